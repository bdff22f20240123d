# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Direct convolution on AMX tiles: which block of tiles a shape wants, and which tasks.

What is chosen here is carried out by `x86_amx_pipeline`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..compute.conv2d import PackedConv2d
from ..workload import INT8_DTYPES, Conv2dWorkload
from .stages import divisors
from .x86_amx_bands import Bands
from .x86_amx_pipeline import Pipeline


def wants_window(work: Conv2dWorkload, block: int) -> bool:
    """Whether one step should read all horizontal taps: where they fit 64 bytes side by side."""
    one_block = work.ic <= block and work.groups == 1
    fits = block % 4 == 0 and work.kw * block <= 64
    return one_block and work.kw > 1 and work.dilation[1] == 1 and fits


def wants_phases(conv: PackedConv2d) -> bool:
    """Whether a strided convolution's data should be copied so that tiles may cross rows.

    It should where that saves more tiles than a copy costs; borders are a copy in any case.
    """
    if conv.work.strides == (1, 1) or conv.window:
        return False
    split = Bands(replace(conv, phases=True), 1, 1)
    return split.virtual and 1.1 * split.tiles < Bands(conv, 1, 1).tiles


def choose_window_rows(work: Conv2dWorkload, block: int) -> int:
    """Return how many rows of taps a window reads: for the fewest steps, the fewest rows.

    As many as fit 64 bytes; rows woven together are bytes that are copied.
    """
    if work.dilation[0] != 1:
        return 1
    most = min(work.kh, 64 // (work.kw * block))
    return min(range(1, most + 1), key=lambda rows: (-(-work.kh // rows), rows))


# Bytes of the first-level cache that an operand which stays there may take, of 48 KB.
RESIDENT = 40 << 10
# Steps from which data streamed through that cache would push the weights out.
LONG = 8
# Steps up to which making outputs takes longer than the products.
SHORT = 4
# Tasks of a kernel at the most, and multiply-accumulates that one should have: some 8 us. To start
# a task, and to empty its pipeline, takes 0.2 us.
TASKS, MACS_A_TASK = 32, 12 << 20
# Bands of rows that threads share out at the most: each reads all weights. Of more threads some
# take a part of a band's channels.
BANDS = 4
# Blocks that a band of rows should have at least.
BLOCKS_A_PART = 4


def choose_tiles(conv: PackedConv2d) -> tuple[int, int, str]:
    """Return (m_tiles, n_tiles, stream): the block, and the operand loaded past the first cache.

    1x4 tiles store whole lines; they suit short reductions, and convolutions of one tap, as long as
    the weights of their 64 channels stay in the first-level cache while data passes by. Else 2x2,
    with the fewest loads for a product. Where all pixels are one block of 4x1, each weight is read
    once.
    """
    work = conv.work
    taps = work.kh * work.kw
    depth = conv.in_blocks_per_group * conv.step_block * conv.taps_h * conv.taps_w
    image = conv.in_blocks_per_group * conv.step_block * work.oh * work.ow
    tiles = conv.out_block // 16
    few = work.n == 1 and Bands(conv, 4, 1).blocks == 1 and Bands(conv, 2, 1).blocks > 1
    if few and image <= RESIDENT and depth >= 64 * LONG:
        return 4, 1, "b"
    if (taps == 1 or depth <= 64 * SHORT) and 64 * depth <= RESIDENT and tiles % 4 == 0:
        return 1, 4, "a" if depth >= 64 * LONG else ""
    n = 2 if tiles % 2 == 0 else 1
    m = min(2 if n == 2 else 4, Bands(conv, 1, 1).tiles)
    if n * 16 * depth > RESIDENT:
        return m, n, "b"
    return m, n, "a" if taps == 1 and depth >= 64 * LONG else ""


def choose_bands(plan: Pipeline, limit: int) -> int:
    """Return into how many bands of equal height the output's rows are cut, `limit` at the most.

    At least half of that, and among those the number for which all tiles have the fewest pixels,
    for bands overlap and tiles repeat some; then an even one, then the most.
    """
    rows = plan.conv.work.oh
    counts = {-(-rows // -(-rows // count)) for count in range(max(1, limit // 2), limit + 1)}

    def cost(count: int) -> tuple[int, int, int]:
        pixels = Bands(plan.conv, plan.m_tiles, count)
        return count * pixels.blocks * plan.m_tiles * pixels.rows, count % 2, -count

    return min(counts, key=cost)


def wants_rows(conv: PackedConv2d) -> bool:
    """Whether threads should share out rows, and not channels.

    Where data and outputs are more than the weights: a thread then finds in its own second-level
    cache what it wrote itself, if the layer before was shared out so, too. ResNet-50 on two cores:
    2.12 -> 1.83 ms.
    """
    return conv.image_size + math.prod(conv.out_shape[1:]) > conv.weight_size


def wants_float_sums(plan: Pipeline) -> bool:
    """Whether sums should be counted in the bits of floats.

    Where whole lines of 64 channels are stored. Conversions to float, of sums and of a residual,
    are the multiplier's, which is one beside tiles and has more to do than the other port.
    """
    epi = plan.conv.work.epilogue
    lines = plan.narrows and plan.n_tiles == 4 and not plan.conv.crops
    narrow = epi.out_dtype in INT8_DTYPES and epi.residual_dtype in (None, *INT8_DTYPES)
    return lines and narrow and epi.small_sums


def choose_pipeline(conv: PackedConv2d, narrows: bool) -> Pipeline:
    """Return the pipeline: its block, and the tasks that threads share out.

    Rows are (`wants_rows`), or channels before rows: each thread then reads its weights alone.
    """
    m, n, stream = choose_tiles(conv)
    plan = Pipeline(conv, m, n, stream=stream, narrows=narrows)
    most = max(1, min(TASKS, conv.work.macs // MACS_A_TASK))
    rows_first = wants_rows(conv)
    wanted = -(-most // plan.parts)
    if rows_first:
        wanted = min(-(-most // conv.work.n), BANDS)
    limit = min(wanted, conv.work.oh, max(1, plan.pixels.blocks // BLOCKS_A_PART))
    bands = choose_bands(plan, limit)
    plan = replace(plan, bands=bands, rows_first=rows_first and bands > 1)
    plan = replace(plan, tasks=max(divisors(plan.parts, most)))
    if wants_float_sums(plan):
        plan = replace(plan, conv=replace(conv, float_sums=True))
    return plan


@dataclass(frozen=True)
class AmxPlan:
    """A pipeline, and whether its function asks the operating system for tile state first.

    Parameters
    ----------
    pipeline : Pipeline
    ask_permission : bool
    """

    pipeline: Pipeline
    ask_permission: bool

    @property
    def conv(self) -> PackedConv2d:
        """The packed convolution."""
        return self.pipeline.conv

    def schedule(self) -> Any:
        """Return the scheduled PrimFunc."""
        return self.pipeline.schedule(self.ask_permission)
