"""The TIR schedule of a fused Relay function: the very one that Relax uses, by the same plan.

With an exact output the sums are computed tile by tile where the function's output needs them, and
all that Relay fused behind is computed there. Elsewhere they are stored as they are, and what reads
them is a plain pass of its own; see `te_compute`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from intrinsics import compat

from ..schedule import rest
from ..schedule.rest_analysis import REDUCE
from ..schedule.stages import Stages, copy_stage, vector_stage
from . import tir_plans
from .tir_plans import Placed

_ROOT = "root"


def schedule(sch: Any) -> bool:
    """Schedule a function if it is ours; return whether it is.

    Parameters
    ----------
    sch : Schedule
        Of a function that `te.create_prim_func` made of a fused Relay function.
    """
    found = {name: tir_plans.placed(_node(sch, name).annotations) for name in _names(sch)}
    ours = [(name, placed) for name, placed in found.items() if placed is not None]
    outputs = sch.get_output_blocks(_ROOT)
    if not ours:
        return _schedule_rest(sch)
    if len(ours) != 1 or len(outputs) != 1:
        return False
    (acc, placed), out = ours[0], sch.get(outputs[0]).name_hint
    before = _reached(sch, acc, sch.get_producers)
    stored = acc
    if getattr(placed.plan.conv, "partial", False):
        (adds_up,) = sch.get_consumers(compat.get_block(sch, acc))
        stored = sch.get(adds_up).name_hint
    _inline(sch, {*before, acc, stored, out}, acc)
    fused = placed.exact and _shape(sch, out) == placed.shape and out != stored
    copies = [name for name in _names(sch) if name not in (acc, stored, *([out] * fused))]
    placed.plan.apply(sch, _stages(sch, placed, acc, stored, out if fused else None))
    for name in copies:
        if not name.startswith(("gather", "transform")):  # the plan's own
            _schedule_copy(sch, name)
    return True


def _schedule_rest(sch: Any) -> bool:
    """Schedule a function that is no convolution or matmul; return whether that succeeded.

    Those of others are left to TVM: their strategies bring a TE schedule of their own.
    """
    if any(_multiplies(sch, name) for name in _names(sch)):
        return False
    rest.inline(sch)
    reasons: list[str] = []
    for block in compat.child_blocks(sch):
        rest.schedule_block(sch, block, reasons)
    return not reasons


def _multiplies(sch: Any, name: str) -> bool:
    """Whether a block sums up products of two tensors."""
    loads: list[Any] = []
    compat.walk(_node(sch, name).body, (compat.BufferLoad, loads.append))
    written = compat.buffer_of(_node(sch, name).writes[0])
    read = [load for load in loads if not compat.buffer_of(load).same_as(written)]
    return _reduces(sch, name) and len(read) > 1


def _schedule_copy(sch: Any, name: str) -> None:
    block = compat.get_block(sch, name)
    if _reduces(sch, name):
        rest.schedule_block(sch, block, [])
    elif name.startswith("pad"):
        copy_stage(sch, block)
    elif sch.get_loops(block):
        vector_stage(sch, block)


def _node(sch: Any, name: str) -> Any:
    return sch.get(compat.get_block(sch, name))


def _names(sch: Any) -> list[str]:
    return compat.block_names(sch)


def _shape(sch: Any, name: str) -> tuple[int, ...]:
    return tuple(int(extent) for extent in _node(sch, name).writes[0].buffer.shape)


def _reached(sch: Any, start: str, step: Callable[[Any], list[Any]]) -> list[str]:
    """Return the blocks that lead to a block, or that it leads to."""
    found, waiting = [], [start]
    while waiting:
        for block in step(compat.get_block(sch, waiting.pop())):
            name = sch.get(block).name_hint
            if name not in found:
                found.append(name)
                waiting.append(name)
    return found


def _reduces(sch: Any, name: str) -> bool:
    return any(int(it.iter_type) == REDUCE for it in _node(sch, name).iter_vars)


def _inline(sch: Any, kept: set[str], acc: str) -> None:
    """Inline every block but those that are kept, and what comes of other reductions."""
    for name in _names(sch):
        origins = [name, *_reached(sch, name, sch.get_producers)]
        apart = acc not in origins and any(_reduces(sch, origin) for origin in origins)
        if name not in kept and not apart:
            sch.compute_inline(compat.get_block(sch, name))


def _stages(sch: Any, placed: Placed, acc: str, stored: str, out: str | None) -> Stages:
    """Return the stages of a plan; without an output to compute tile by tile, a copy of the sums.
    """
    sums = compat.get_block(sch, stored)
    axes: tuple[int | None, ...] = placed.axes
    if out is None:
        block, axes = sch.cache_write(sums, 0, "global"), (0, 1, 2, 3, 4)
    else:
        block = compat.get_block(sch, out)
    found = sch.get_loops(block)
    outermost = found[0]
    loops = []
    for at in axes:
        if at is None:
            outermost = sch.add_unit_loop(outermost)
            loops.append(outermost)
        else:
            loops.append(found[at])
    return Stages(compat.get_block(sch, acc), sums, block, loops)
