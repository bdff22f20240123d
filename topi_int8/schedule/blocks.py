# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""A convolution by blocks of accumulators in registers, with zero, dot and store intrinsics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from ..compute.conv2d import PackedConv2d, conv2d
from .stages import Stages, divisors, keep_rolled, parallel_tasks, schedule_alone


class Block(Protocol):
    """What the schedule asks of a block of accumulators."""

    oc_blocks: int  # blocks of output channels
    rows_h: int  # output rows
    columns: int  # output columns
    channels: int  # output channels in one block of them
    rows_k: int  # rows of packed weights in one step

    def register(self) -> tuple[str, str, str]:
        """Register the tensor intrinsics zero, dot and store; return their names."""
        ...


# A reduction of so few steps is unrolled by LLVM whole (its limit is about 300 instructions).
# Weights then do not change from block to block: it loads them once for all, far more than there
# are registers, and spills them.
SHORT_REDUCTION = 8


@dataclass(frozen=True)
class BlockPlan:
    """A packed convolution and its block of accumulators.

    Parameters
    ----------
    conv : PackedConv2d
        `ow_padded` must be whole blocks.
    block : Block
        Its intrinsics do the inner work. Weights lie in the order in which dot reads them.
    vector : int
        Channels of an epilogue's vector, at most.
    rolled : str
        Which short loops of the reduction stay loops: "" none, "whole" a reduction that is short as
        a whole, "all" the innermost in any case.
    """

    conv: PackedConv2d
    block: Block
    vector: int
    rolled: str = ""

    @property
    def loops(self) -> dict[str, int]:
        """The loops of the reduction around a step, outermost first: axis -> passes."""
        conv = self.conv
        taps = conv.ordered(("kw", conv.taps_w), ("cb", conv.in_blocks_per_group))
        steps = conv.step_block // (conv.k * self.block.rows_k)
        return dict((("kh", conv.work.kh), *taps, ("ik", steps)))

    @property
    def short_loop(self) -> str:
        """The loop of the reduction that LLVM must not unroll, by its axis' name; or empty."""
        loops = {name: passes for name, passes in self.loops.items() if passes > 1}
        names = list(loops)
        short = {"": [], "whole": names, "all": names[-1:]}[self.rolled]
        few = math.prod(loops[name] for name in short) <= SHORT_REDUCTION
        return short[-1] if short and few else ""

    def schedule(self) -> Any:
        """Return the scheduled PrimFunc."""
        return schedule_alone(self, conv2d(self.conv))

    def apply(self, sch: Any, stages: Stages) -> None:
        """Schedule the sums and the output."""
        _apply(sch, stages, self)


def _apply(sch: Any, stages: Stages, plan: BlockPlan) -> None:
    conv, block = plan.conv, plan.block
    zero, dot, store = block.register()
    acc, stored = stages.acc, stages.stored

    # 1. Tile the output: one block of accumulators innermost.
    n, ob, oh, ow, o = stages.loops
    obo, obi = sch.split(ob, [None, block.oc_blocks])
    oho, ohi = sch.split(oh, [None, block.rows_h])
    owo, owi = sch.split(ow, [None, block.columns])
    oo, oi = sch.split(o, [None, block.channels])
    sch.reorder(n, obo, oo, oho, owo, obi, ohi, owi, oi)

    # 2. Threads share out batch, channels and rows.
    parallel_tasks(sch, [n, obo, oo], oho)

    # 3. The epilogue reads the sums in vectors.
    oiv, oil = sch.split(oi, [None, max(divisors(block.channels, plan.vector))])
    sch.vectorize(oil)
    sch.unroll(oiv)

    # 4. Accumulators live in registers over the reduction and are stored to a small buffer once.
    if conv.partial:
        sch.compute_at(stored, owo, preserve_unit_loops=True)
        sch.compute_at(acc, owo, preserve_unit_loops=True)
        sch.set_scope(acc, 0, "local")
    else:
        sch.compute_at(acc, owo, preserve_unit_loops=True)
        stored = sch.cache_write(acc, 0, "local")
    spatial = 6 if conv.partial else 5
    loops = sch.get_loops(acc)[-spatial - 5 :]
    (an, *inner), (*outer, ik, kk) = loops[:spatial], loops[spatial:]
    step, ik = sch.split(ik, [None, block.rows_k])
    sch.reorder(an, *outer, step, *inner, ik, kk)
    for name, loop in zip(plan.loops, (*outer, step), strict=True):
        if name == plan.short_loop:
            keep_rolled(sch, loop)

    # 5. Zero, multiply-accumulate, store.
    init = sch.decompose_reduction(acc, outer[0])
    sch.tensorize(iterating(sch, sch.get_loops(init)[1 - spatial :]), zero)
    sch.tensorize(iterating(sch, [*inner, ik, kk]), dot)
    sch.tensorize(iterating(sch, sch.get_loops(stored)[-4:]), store)


def iterating(sch: Any, loops: list[Any]) -> Any:
    """Move loops of extent 1 outside the others and return the outermost that iterates.

    tensorize compares loop by loop, and the intrinsics' descs have no loops of extent 1.
    """
    extents = [int(sch.get(loop).extent) for loop in loops]
    single = [loop for loop, extent in zip(loops, extents, strict=True) if extent == 1]
    wide = [loop for loop, extent in zip(loops, extents, strict=True) if extent > 1]
    sch.reorder(*single, *wide)
    return wide[0]
