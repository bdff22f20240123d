# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Direct convolution on AMX tiles: up to 2x2 tiles of int32, the requantize epilogue from L1.

A C tile is `rows` pixels of one output row by 16 output channels. `tileloadd` steps over pixels
with the convolution's own stride, so nothing is gathered; a tap of the kernel is a constant offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intrinsics import compat, x86_amx
from intrinsics.compat import tir

from ..compute.conv2d import PackedConv2d
from ..workload import Conv2dWorkload
from .blocks import BlockPlan
from .stages import divisors


def choose_rows(ow: int) -> tuple[int, int]:
    """Return (rows, ow_padded): the pixels of a tile, and whole tiles of them over an output row.

    A tdp takes `rows` cycles whatever else, so short tiles waste no multiplies; what a tile costs
    besides is its loads (about 8 cycles a 16-row tile) and its share of the loop. Padding columns
    are wasted work and cost a crop.
    """
    best = (float("inf"), 1, ow)
    for rows in range(1, 17):
        padded = -(-ow // rows) * rows
        cost = (padded / rows) * (rows + 8) * (1.0 if padded == ow else 1.05)
        best = min(best, (cost, rows, padded))
    return best[1], best[2]


def wants_flat(work: Conv2dWorkload) -> bool:
    """Whether to compute the image as one row of virtual pixels.

    Where an output row is a short tile (7 pixels: each weight tile loaded for 7 rows of products
    instead of 16, and read seven times), the columns wasted between rows are the smaller loss.
    """
    return work.strides == (1, 1) and work.oh > 1 and work.ow <= 10


def wants_window(work: Conv2dWorkload, block: int) -> bool:
    """Whether one step should read all horizontal taps: where they fit 64 bytes side by side."""
    one_block = work.ic <= block and work.groups == 1
    fits = block % 4 == 0 and work.kw * block <= 64
    return one_block and work.kw > 1 and work.dilation[1] == 1 and fits


def choose_step(channels: int) -> int:
    """Return the input channels of one tile step: the largest divisor in 4..64 that is a multiple
    of 4.
    """
    return max(d for d in range(4, 65, 4) if channels % d == 0)


def choose_block(conv: PackedConv2d, rows: int) -> x86_amx.AmxBlock:
    """Choose how many tiles to keep: 2x2 where the shape divides, else the nearest to it.

    With m x n C tiles a step loads m + n tiles for m * n products, so the squarer the better.
    """
    per_group = conv.out_blocks // conv.super_groups
    step = choose_step(conv.step_block)
    best: tuple[tuple[float, int], dict[str, int]] | None = None
    for tiles_w in divisors(conv.ow_padded // rows, 4):
        for rows_h in divisors(conv.rows, 4):
            for oc_tiles in divisors(conv.out_block // 16, 4):
                for oc_blocks in divisors(per_group, 4):
                    m, n = tiles_w * rows_h, oc_tiles * oc_blocks
                    if m * n > 4 or (oc_blocks > 1 and oc_tiles * 16 != conv.out_block):
                        continue
                    # Loads (A by its rows, B in full) against products, per product.
                    load = (m * rows / 2 + n * step / 8) / (m * n)
                    cost = (max(load, rows) + 0.2 * load, rows_h)
                    if best is None or cost < best[0]:
                        best = (
                            cost,
                            dict(
                                tiles_w=tiles_w,
                                rows_h=rows_h,
                                oc_tiles=oc_tiles,
                                oc_blocks=oc_blocks,
                            ),
                        )
    assert best is not None, "one tile always fits"
    sh, sw = conv.work.strides
    return x86_amx.AmxBlock(
        conv.data_dtype, conv.weight_dtype, rows,
        k=step, stride_h=sh, stride_w=sw * conv.in_block if conv.window else sw,
        window=conv.window, **best[1],
    )  # fmt: skip


@dataclass(frozen=True)
class AmxPlan:
    """A packed convolution and its block of tiles.

    Parameters
    ----------
    conv : PackedConv2d
        `lanes` is 16 and `k` is 4: that is how a B tile lies in memory.
    block : AmxBlock
    ask_permission : bool
        Whether the function asks the operating system for tile state before it starts.
    narrows : bool
        Whether 8-bit outputs are narrowed by AVX-512's intrinsic.
    """

    conv: PackedConv2d
    block: x86_amx.AmxBlock
    ask_permission: bool
    narrows: bool = False

    def schedule(self) -> Any:
        """Return the scheduled PrimFunc."""
        blocks = BlockPlan(
            self.conv, self.block, vector=16, from_bias=True, narrows=self.narrows
        )
        func = blocks.schedule()
        if self.conv.folds_bias:
            func = _start_from_bias(func, self.block)
        return with_tile_state(func, self.block, int(self.conv.needs_pad), self.ask_permission)


_BIAS = 2  # the parameter's place


def _start_from_bias(func: Any, block: x86_amx.AmxBlock) -> Any:
    """Return the function with the bias loaded into the accumulators where they were zeroed."""
    bias = compat.parameter(func, _BIAS)

    def start(init: Any) -> Any:
        _, ob, _, _, o = (axis.min for axis in init.writes[0].region)
        loads = x86_amx.start_from(block, bias, (ob, o))
        return tir.SeqStmt(loads) if len(loads) > 1 else loads[0]

    return compat.replace_block(func, "conv_init_o", start)


def with_tile_state(
    func: Any, block: x86_amx.AmxBlock, position: int, ask_permission: bool
) -> Any:
    """Return the function with tiles configured at the start of each task of one parallel loop.

    `position` says which of the function's loops uses tiles. Tile configuration is per thread, so
    it stands inside the loop.
    """

    def rewrite(stmts: list[Any]) -> list[Any]:
        loop = stmts[position]
        steps = [x86_amx.configure(block), loop.body, x86_amx.release()]
        configured = compat.with_body(loop, tir.SeqStmt(steps))
        first = [x86_amx.request_permission()] if ask_permission else []
        return [*first, *stmts[:position], configured, *stmts[position + 1 :]]

    return func.with_body(compat.rewrite_root(func.body, rewrite))
