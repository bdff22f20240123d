"""Thin TE schedules for what `te_compute` lowers: the tiles that the plans chose, tensorized.

A plan (what `schedule/` follows in S-TIR) says how the sums are tiled; here the same is said to TE.
With an exact output the tile is computed where the output needs it, so that all that Relay fused
behind the convolution works on sums that are still in registers or in the first cache. TOPI's own
schedule lets a fused epilogue take the register tile apart.
"""

from __future__ import annotations

from typing import Any

from tvm import te

from ..schedule.stages import divisors
from . import wide_indices
from .te_compute import TAG, Lowered
from .te_families import FAMILIES
from .te_tiling import Tiling

_VECTOR = 16  # channels of a copy's or an epilogue's vector


def schedule(plan: Any, lowered: Lowered, outs: list[Any]) -> Any:
    """Return the TE schedule of a fused function around a lowered call.

    Parameters
    ----------
    plan : SpatialPack, BlockPlan or DepthwisePlan
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
    family = FAMILIES[type(plan)]
    acc = _accumulators(s, plan, sums, family.scope)
    if not (root.op.same_as(sums.op) or family.stores):
        s[sums].compute_inline()
    named = [None if at is None else s[root].op.axis[at] for at in axes]
    done = family.schedule(s, plan, acc, sums, Tiling(s[root], *named))
    wide_indices.mark(s[acc])
    done += [sums.op, acc.op]
    for op in ours:
        if not any(op.same_as(other) for other in done):
            _copy(s[op])
    if not fused and not out.op.same_as(sums.op):
        _copy(s[out])
    return s


def supports(plan: Any) -> bool:
    """Whether there is a TE schedule for a plan."""
    return type(plan) in FAMILIES


def _accumulators(s: Any, plan: Any, sums: Any, scope: str) -> Any:
    """Return the tensor that the reduction adds to: parts of the sums, or a copy of them."""
    if not getattr(plan.conv, "partial", False):
        return s.cache_write(sums, scope)
    (parts,) = sums.op.input_tensors
    s[parts].set_scope(scope)
    return parts


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
