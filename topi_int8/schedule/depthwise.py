# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Depthwise convolution: channels in vectors, a strip of pixels in registers over all taps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te

from intrinsics import compat
from intrinsics.arm_depthwise import ArmDepthwise
from intrinsics.compat import Schedule

from ..compute.depthwise import PackedDepthwise, depthwise
from ..workload import Conv2dWorkload
from .blocks import keep_rolled, roll
from .spatial_pack import copy_stage, divisors, finish, parallel_tasks, zero_in_vectors


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

    def schedule(self) -> Any:
        """Return the scheduled PrimFunc."""
        return _schedule(self.conv, *self.tile())


def _schedule(conv: PackedDepthwise, lanes: int, strip: int) -> Any:
    sch = Schedule(te.create_prim_func(depthwise(conv)))
    acc, owo = _tiled(sch, strip, lanes, channels_inside=conv.how == "dot")
    if conv.how == "plain":
        _plain(sch, acc)
    elif conv.how == "dot":
        _dot(sch, acc, owo, conv)
    else:
        _pairs(sch, acc)
    if "pad" in compat.block_names(sch):
        copy_stage(sch, compat.get_block(sch, "pad"))
    return roll(finish(sch))


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
    sch: Any, strip: int, lanes: int, channels_inside: bool = False
) -> tuple[Any, Any]:
    """Tile the output: strips of columns, channels in vectors; its rows in parallel.

    A strip takes one vector of channels, or (`channels_inside`) 16 channels, vector by vector.
    Returns the block of the sums, and the loop over strips or over channels outside the sums.
    """
    acc, out = compat.get_block(sch, "conv"), compat.get_block(sch, "out")
    n, cb, oh, ow, c = sch.get_loops(out)
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
    sch.compute_at(acc, outer[1], preserve_unit_loops=True)
    sch.unroll(owi)
    sch.vectorize(ci)
    return acc, outer[0]


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
    gathered = compat.get_block(sch, "gather")
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
