"""One TE schedule a family of plans: what `schedule/` says in S-TIR, said to TE.

Each is handed the output stage (`Tiling`), the stage of the sums, and that of the accumulators
(which are the sums before they are stored, or parts of them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from intrinsics.arm_depthwise import ArmDepthwise

from ..schedule.blocks import BlockPlan
from ..schedule.depthwise import DepthwisePlan
from ..schedule.spatial_pack import SpatialPack
from ..schedule.stages import divisors
from ..schedule.winograd import WinogradPlan
from . import te_intrin
from .te_tiling import Tiling


@dataclass(frozen=True)
class Family:
    """How the plans of one type are scheduled in TE.

    Parameters
    ----------
    scope : str
        Where the accumulators live: "local" where intrinsics alone read and write them.
    stores : bool
        Whether storing the sums is a step of its own; else the output reads the accumulators.
    schedule : callable
        (schedule, plan, accumulators, sums, output) -> the operations scheduled besides those.
    """

    scope: str
    stores: bool
    schedule: Callable[[Any, Any, Any, Any, Tiling], list[Any]]


def _spatial_pack(s: Any, plan: SpatialPack, acc: Any, _sums: Any, out: Tiling) -> list[Any]:
    conv, tile = plan.conv, plan.tile
    # 1. Tile the output; the register tile innermost.
    obo, obi = out.split("ob", tile.blocks)
    oho, ohi = out.split("oh", tile.height)
    owo, owi = out.split("ow", tile.width)
    vectors, lanes = out.split("o", conv.lanes)
    voo, voi = out.stage.split(vectors, tile.vectors)
    out.order(out.n, obo, voo, oho, owo, obi, ohi, owi, voi, lanes)
    out.unroll(obi, ohi, owi, voi)
    out.stage.vectorize(lanes)
    # 2. Threads share out batch, channels and rows.
    out.parallel([out.n, obo, voo], oho)
    # 3. The sums of one tile live in registers over the reduction.
    s[acc].compute_at(out.stage, owo)
    n, ob, oh, ow, o = s[acc].op.axis
    *outer, ik, kk = s[acc].op.reduce_axis
    vector, lane = s[acc].split(o, conv.lanes)
    if plan.intrinsic is None:
        s[acc].reorder(n, *outer, ik, oh, ow, ob, vector, kk, lane)
        s[acc].vectorize(lane)
    else:
        s[acc].reorder(n, *outer, ik, oh, ow, ob, vector, lane, kk)
        name = plan.intrinsic.register()
        s[acc].tensorize(lane, te_intrin.reducing(name, None, [("vk", conv.k)]))
    for axis in (oh, ow, ob, vector):
        s[acc].unroll(axis)
    return []


def _winograd(s: Any, plan: WinogradPlan, acc: Any, _sums: Any, out: Tiling) -> list[Any]:
    conv, tile = plan.conv, plan.tile
    # 1. Tile the output: bands, blocks of channels, tiles of 2x2, vectors.
    obo, obi = out.split("ob", tile.blocks)
    band_y, rows = out.split("oh", 2 * plan.rows)
    ty, yy = out.stage.split(rows, 2)
    band_x, columns = out.split("ow", 2 * plan.columns)
    tx, xx = out.stage.split(columns, 2)
    vec, lane = out.split("o", conv.lanes)
    bands = (out.n, band_y, band_x)
    out.order(*bands, obo, obi, ty, tx, vec, yy, xx, lane)
    out.unroll(yy, xx)
    out.stage.vectorize(lane)
    # 2. Threads share out bands, each of which transforms its own input, or bands and channels.
    task = out.stage.fuse(*bands) if plan.banded else out.stage.fuse(*bands, obo)
    out.stage.parallel(task)
    s[acc].compute_at(out.stage, obo if plan.banded else task)
    # 3. The input's transform.
    (points,) = (tensor for tensor in acc.op.input_tensors if tensor.op.name == "transform")
    n, a, b, cb, py, px, i = s[points].op.axis
    s[points].reorder(n, cb, py, px, a, b, i)
    if plan.banded:
        s[points].compute_at(out.stage, task)
    else:
        s[points].parallel(s[points].fuse(n, cb, py))
    for axis in (a, b):
        s[points].unroll(axis)
    s[points].vectorize(i)
    # 4. The products of a block of channels; the register tile innermost.
    n, ob, a, b, my, mx, o = s[acc].op.axis
    cb, ik, kk = s[acc].op.reduce_axis
    myo, myi = s[acc].split(my, tile.height)
    mxo, mxi = s[acc].split(mx, tile.width)
    vectors, lane = s[acc].split(o, conv.lanes)
    avo, avi = s[acc].split(vectors, tile.vectors)
    s[acc].reorder(n, a, b, avo, myo, mxo, cb, ik, myi, mxi, ob, avi, lane, kk)
    s[acc].tensorize(lane, te_intrin.reducing(plan.intrinsic.register(), None, [("vk", 2)]))
    for axis in (myi, mxi, ob, avi):
        s[acc].unroll(axis)
    return [points.op]


def _blocks(s: Any, plan: BlockPlan, acc: Any, sums: Any, out: Tiling) -> list[Any]:
    block = plan.block
    zero, dot, store = block.register()
    # 1. Tile the output: one block of accumulators innermost.
    obo, obi = out.split("ob", block.oc_blocks)
    oho, ohi = out.split("oh", block.rows_h)
    owo, owi = out.split("ow", block.columns)
    oo, oi = out.split("o", block.channels)
    out.order(out.n, obo, oo, oho, owo, obi, ohi, owi, oi)
    # 2. Threads share out batch, channels and rows.
    out.parallel([out.n, obo, oo], oho)
    # 3. Accumulators live in registers over the reduction.
    s[acc].compute_at(out.stage, owo)
    n, *inner = s[acc].op.axis
    *outer, ik, kk = s[acc].op.reduce_axis
    step, ik = s[acc].split(ik, block.rows_k)
    s[acc].reorder(n, *outer, step, *inner, ik, kk)
    reduced = [("vi", block.rows_k), ("vj", int(kk.dom.extent))]
    s[acc].tensorize(inner[0], te_intrin.reducing(dot, zero, reduced))
    # 4. They are stored once: where the sums are the output there, else to a small buffer that the
    # epilogue reads in vectors.
    if out.stage.op.same_as(s[sums].op):
        first = next(axis for axis in (obi, ohi, owi, oi) if axis is not None)
        out.stage.tensorize(first, te_intrin.copying(store))
        return []
    s[sums].compute_at(out.stage, owo)
    s[sums].tensorize(s[sums].op.axis[1], te_intrin.copying(store))
    oiv, oil = out.stage.split(oi, max(divisors(block.channels, plan.vector)))
    out.stage.unroll(oiv)
    out.stage.vectorize(oil)
    return []


def _depthwise(s: Any, plan: DepthwisePlan, acc: Any, _sums: Any, out: Tiling) -> list[Any]:
    lanes, strip = plan.tile()
    owo, owi = out.split("ow", strip)
    if plan.conv.how == "dot":
        return _depthwise_dot(s, plan, acc, out, lanes, (owo, owi))
    co, ci = out.split("o", lanes)
    # LLVM 10 converts wider vectors of floats to bytes one by one.
    civ, cil = out.stage.split(ci, max(divisors(lanes, plan.lanes)))
    out.order(out.n, out.ob, out.oh, co, owo, owi, civ, cil)
    out.unroll(owi, civ)
    out.stage.vectorize(cil)
    out.parallel([out.n, out.ob], out.oh)
    s[acc].compute_at(out.stage, owo)
    *outer, ow, o = s[acc].op.axis
    first, second = s[acc].op.reduce_axis
    s[acc].reorder(*outer, first, second, ow, o)
    s[acc].unroll(second)
    s[acc].unroll(ow)
    s[acc].vectorize(o)
    return []


def _depthwise_dot(
    s: Any, plan: DepthwisePlan, acc: Any, out: Tiling, lanes: int, columns: tuple[Any, Any]
) -> list[Any]:
    """Rows are gathered once a strip, and a vector of channels at a time passes over it."""
    conv, (owo, owi) = plan.conv, columns
    dtypes = conv.data_dtype, conv.weight_dtype
    gather, dot = ArmDepthwise(*dtypes, conv.work.dilation[0]).register()
    coo, rest = out.split("o", 16)
    co, ci = out.stage.split(rest, lanes)
    out.order(out.n, out.ob, out.oh, coo, owo, co, owi, ci)
    out.unroll(owi)
    out.stage.vectorize(ci)
    out.parallel([out.n, out.ob], out.oh)

    gathered = acc.op.input_tensors[0]
    s[gathered].compute_at(out.stage, owo)
    s[gathered].set_scope("local")
    *_, g, _, x, c, _ = s[gathered].op.axis
    for axis in (g, x):
        s[gathered].unroll(axis)
    s[gathered].tensorize(c, te_intrin.copying(gather))

    s[acc].compute_at(out.stage, co)
    *outer, ow, o = s[acc].op.axis
    g, kw, t = s[acc].op.reduce_axis
    s[acc].reorder(*outer, g, kw, ow, o, t)
    for axis in (g, kw, ow):
        s[acc].unroll(axis)
    s[acc].tensorize(o, te_intrin.reducing(dot, None, [("vt", 4)]))
    return [gathered.op]


FAMILIES: dict[type, Family] = {
    SpatialPack: Family("global", False, _spatial_pack),
    BlockPlan: Family("local", True, _blocks),
    DepthwisePlan: Family("global", False, _depthwise),
    WinogradPlan: Family("global", False, _winograd),
}
