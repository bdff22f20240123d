"""Thin TE schedules for what `te_compute` lowers: the tiles that the plans chose, tensorized.

A plan (what `schedule/` follows in S-TIR) says how the sums are tiled; here the same is said to TE.
With an exact output the tile is computed where the output needs it, so that all that Relay fused
behind the convolution works on sums that are still in registers or in the first cache. TOPI's own
schedule lets a fused epilogue take the register tile apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import te

from ..schedule.depthwise import DepthwisePlan
from ..schedule.spatial_pack import SpatialPack, divisors, rows_per_task
from . import te_intrin
from .te_compute import TAG, Lowered

_VECTOR = 16  # channels of a copy's or an epilogue's vector


@dataclass
class _Tiling:
    """An output stage, and its axes by the sums' names for them; None: of one element."""

    stage: Any
    n: Any
    ob: Any
    oh: Any
    ow: Any
    o: Any

    def split(self, name: str, factor: int) -> tuple[Any, Any]:
        """Split an axis; (None, None) if it is not there."""
        axis = getattr(self, name)
        return (None, None) if axis is None else self.stage.split(axis, factor)

    def order(self, *axes: Any) -> None:
        """Order the axes that are there."""
        self.stage.reorder(*(axis for axis in axes if axis is not None))

    def unroll(self, *axes: Any) -> None:
        """Unroll the axes that are there."""
        for axis in axes:
            if axis is not None:
                self.stage.unroll(axis)

    def parallel(self, outer: list[Any], rows: Any) -> None:
        """Run a nest in parallel, as `schedule.spatial_pack.parallel_tasks` does."""
        _parallel(self.stage, [axis for axis in outer if axis is not None], rows)


def _parallel(stage: Any, outer: list[Any], rows: Any) -> None:
    if rows is not None:
        count = 1
        for axis in outer:
            count *= _extent(stage, axis)
        task, _ = stage.split(rows, rows_per_task(count, _extent(stage, rows)))
        outer = [*outer, task]
    if outer:
        stage.parallel(stage.fuse(*outer) if len(outer) > 1 else outer[0])


def _extent(stage: Any, axis: Any) -> int:
    """Return an axis's extent; TE knows it of root axes, and of splits by their relation."""
    if axis.dom is not None:
        return int(axis.dom.extent)
    for relation in stage.relations:
        if isinstance(relation, te.schedule.Split):
            if axis.same_as(relation.inner):
                return int(relation.factor)
            if axis.same_as(relation.outer):
                return -(-_extent(stage, relation.parent) // int(relation.factor))
    raise ValueError(f"the extent of {axis} is not known")


def schedule(plan: Any, lowered: Lowered, outs: list[Any]) -> Any:
    """Return the TE schedule of a fused function around a lowered call.

    Parameters
    ----------
    plan : SpatialPack or DepthwisePlan
    lowered : Lowered
    outs : list of te.Tensor
        The function's outputs; the first is computed from the call's.
    """
    s = te.create_schedule([out.op for out in outs])
    out = outs[0]
    ours, others = _stages(out)
    sums = lowered.sums
    fused = lowered.exact and _same_shape(out, lowered.out)
    for op in others:
        if not op.same_as(out.op):
            s[op].compute_inline()
    root = out if fused else sums
    axes = lowered.axes if fused else (0, 1, 2, 3, 4)
    acc = s.cache_write(sums, "global")
    if not root.op.same_as(sums.op):
        s[sums].compute_inline()
    stage = s[root]
    named = [None if at is None else s[root].op.axis[at] for at in axes]
    _FAMILIES[type(plan)](s, plan, acc, _Tiling(stage, *named))
    for op in ours:
        if not op.same_as(sums.op):
            _copy(s[op])
    if not fused and not out.op.same_as(sums.op):
        _copy(s[out])
    return s


def supports(plan: Any) -> bool:
    """Whether there is a TE schedule for a plan."""
    return type(plan) in _FAMILIES


def _stages(out: Any) -> tuple[list[Any], list[Any]]:
    """Return the computations that `out` needs, itself among them: ours, and Relay's."""
    ours: list[Any] = []
    others: list[Any] = []
    seen: set[Any] = set()

    def visit(op: Any) -> None:
        if op in seen or not isinstance(op, te.ComputeOp):
            return
        seen.add(op)
        for tensor in op.input_tensors:
            visit(tensor.op)
        (ours if op.tag == TAG else others).append(op)

    visit(out.op)
    return ours, others


def _same_shape(first: Any, second: Any) -> bool:
    return [int(d) for d in first.shape] == [int(d) for d in second.shape]


def _copy(stage: Any) -> None:
    """Schedule a stage of its own: rows in parallel, the innermost dimension in vectors."""
    *outer, inner = stage.op.axis
    width = max(divisors(int(inner.dom.extent), _VECTOR))
    if not stage.op.reduce_axis:
        _, vector = stage.split(inner, width)
        stage.vectorize(vector)
    if not outer:
        return
    # As many of the outer dimensions as make enough tasks.
    fused, count = [], 1
    for axis in outer:
        fused.append(axis)
        count *= int(axis.dom.extent)
        if count >= 32:
            break
    stage.parallel(stage.fuse(*fused) if len(fused) > 1 else fused[0])


# ---------------------------------------------------------------- families


def _spatial_pack(s: Any, plan: SpatialPack, acc: Any, out: _Tiling) -> None:
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
        s[acc].tensorize(lane, te_intrin.dot(plan.intrinsic))
    for axis in (oh, ow, ob, vector):
        s[acc].unroll(axis)


def _depthwise(s: Any, plan: DepthwisePlan, acc: Any, out: _Tiling) -> None:
    lanes, strip = plan.tile()
    owo, owi = out.split("ow", strip)
    co, ci = out.split("o", lanes)
    out.order(out.n, out.ob, out.oh, co, owo, owi, ci)
    out.unroll(owi)
    out.stage.vectorize(ci)
    out.parallel([out.n, out.ob], out.oh)
    s[acc].compute_at(out.stage, owo)
    *outer, ow, o = s[acc].op.axis
    first, second = s[acc].op.reduce_axis
    s[acc].reorder(*outer, first, second, ow, o)
    s[acc].unroll(second)
    s[acc].unroll(ow)
    s[acc].vectorize(o)


_FAMILIES: dict[type, Callable[[Any, Any, Any, _Tiling], None]] = {
    SpatialPack: _spatial_pack,
    DepthwisePlan: _depthwise,
}
