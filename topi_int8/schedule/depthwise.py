# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Depthwise convolution: channels in vectors, a strip of pixels in registers over all taps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intrinsics.arm_depthwise import ArmDepthwise

from ..compute.depthwise import PackedDepthwise, depthwise
from ..workload import Conv2dWorkload
from .stages import (
    Stages,
    divisors,
    keep_rolled,
    parallel_tasks,
    schedule_alone,
    zero_in_vectors,
)


@dataclass(frozen=True)
class DepthwisePlan:
    """A depthwise convolution and the registers it may use.

    Parameters
    ----------
    conv : PackedDepthwise
    lanes : int
        Lanes of 32 bits in a vector.
    registers : int
        Vector registers; half of them hold the strip, the rest what widening takes.
    """

    conv: PackedDepthwise
    lanes: int
    registers: int

    def tile(self) -> tuple[int, int]:
        """Return (lanes of a vector of channels, columns of a strip)."""
        conv = self.conv
        if conv.how == "plain":
            strip = max(divisors(conv.work.ow, self.registers // 2))
            return max(divisors(conv.block, self.lanes)), strip
        return (4, conv.strip) if conv.how == "dot" else choose_pairs(conv.block, conv.work.ow)

    @property
    def short_loop(self) -> str:
        """The loop of the reduction that LLVM must not unroll, by its axis' name; or empty."""
        return "row" if self.conv.how == "row_pairs" and self.conv.work.kh > 1 else ""

    def schedule(self) -> Any:
        """Return the scheduled PrimFunc."""
        return schedule_alone(self, depthwise(self.conv))

    def apply(self, sch: Any, stages: Stages) -> None:
        """Schedule the sums and the output."""
        conv, acc = self.conv, stages.acc
        owo = _tiled(sch, stages, *self.tile(), channels_inside=conv.how == "dot")
        if conv.how == "plain":
            _plain(sch, acc)
        elif conv.how == "dot":
            _dot(sch, acc, owo, conv)
        else:
            _pairs(sch, acc)


def choose_pairs(block: int, ow: int) -> tuple[int, int]:
    """Return (lanes, strip): 16 sums, in wide vectors where the block has them.

    No more, although that hides little latency: LLVM starts all of a strip's multiplies before it
    adds the first, and spills. Cores that run out of order overlap pixels by themselves.
    """
    lanes = max(divisors(block, 16))
    return lanes, max(divisors(ow, 16 // lanes))


def choose_strip(work: Conv2dWorkload) -> int:
    """Return the output columns of a strip whose gathered rows stay on the stack, and its sums in
    registers ("dot").

    Buffers of more than 1 KB would be asked of the runtime, strip by strip.
    """
    columns = 1024 // (64 * -(-work.kh // 4))
    strip = (columns - (work.kw - 1) * work.dilation[1] - 1) // work.strides[1] + 1
    return max(divisors(work.ow, max(1, min(strip, 16))))


def _tiled(
    sch: Any, stages: Stages, lanes: int, strip: int, channels_inside: bool = False
) -> Any:
    """Tile the output: strips of columns, channels in vectors; its rows in parallel.

    A strip takes one vector of channels, or (`channels_inside`) 16 channels, vector by vector.
    Returns the outer of the two loops, over strips and over channels, outside the sums.
    """
    n, cb, oh, ow, c = stages.loops
    owo, owi = sch.split(ow, [None, strip])
    if channels_inside:
        coo, co, ci = sch.split(c, [None, 16 // lanes, lanes])
        outer = [owo, co]
        sch.reorder(n, cb, oh, coo, *outer, owi, ci)
    else:
        co, ci = sch.split(c, [None, lanes])
        outer = [co, owo]
        sch.reorder(n, cb, oh, *outer, owi, ci)
    parallel_tasks(sch, [n, cb], oh)
    # The sums live over all taps.
    sch.compute_at(stages.acc, outer[1], preserve_unit_loops=True)
    sch.unroll(owi)
    sch.vectorize(ci)
    return outer[0]


def _plain(sch: Any, acc: Any) -> None:
    *_, ax, ac, kh, kw = sch.get_loops(acc)
    sch.reorder(kh, kw, ax, ac)
    for loop in (kw, ax):
        sch.unroll(loop)
    sch.vectorize(ac)
    zero_in_vectors(sch, sch.decompose_reduction(acc, kh), 1)


def _pairs(sch: Any, acc: Any) -> None:
    """All pairs of a row unrolled: which taps a pair holds is then known."""
    *_, ax, ac, row, pair = sch.get_loops(acc)
    sch.reorder(row, pair, ax, ac)
    sch.unroll(ax)
    sch.vectorize(ac)
    keep_rolled(sch, row)
    init = sch.decompose_reduction(acc, row)
    zero_in_vectors(sch, init, 1)
    sch.unroll(pair)


def _dot(sch: Any, acc: Any, owo: Any, conv: PackedDepthwise) -> None:
    """Rows are gathered once a strip, and four channels at a time pass over it."""
    intrinsics = ArmDepthwise(conv.data_dtype, conv.weight_dtype, conv.work.dilation[0])
    gather, dot = intrinsics.register()
    gathered = next(
        block for block in sch.get_producers(acc) if sch.get(block).name_hint.startswith("gather")
    )
    sch.compute_at(gathered, owo, preserve_unit_loops=True)
    sch.set_scope(gathered, 0, "local")
    *_, g, _, x, c, _ = sch.get_loops(gathered)
    for loop in (g, x):
        sch.unroll(loop)
    sch.tensorize(c, gather)

    *_, ax, ac, g, kw, t = sch.get_loops(acc)
    sch.reorder(g, kw, ax, ac, t)
    init = sch.decompose_reduction(acc, g)
    zero_in_vectors(sch, init, 1)
    for loop in (g, kw, ax):
        sch.unroll(loop)
    sch.tensorize(ac, dot)
