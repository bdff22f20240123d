# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""NCHW[c]c spatial pack with a broadcast dot product: VNNI, AVX-512BW, AVX2, and plain FMA.

The register tile is `tile_h x tile_w` output pixels by `vectors` vectors of output channels, all of
it held in registers over the whole reduction: each step broadcasts the activations of every pixel
once and multiplies them with every weight vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intrinsics.x86_dot import DotIntrinsic

from ..compute.conv2d import PackedConv2d, conv2d
from .stages import Stages, divisors, parallel_tasks, schedule_alone, zero_in_vectors


@dataclass(frozen=True)
class Tile:
    """A register tile: rows x columns of output, blocks of channels, and vectors in each block."""

    height: int
    width: int
    blocks: int
    vectors: int

    @property
    def pixels(self) -> int:
        """Output pixels in the tile."""
        return self.height * self.width

    @property
    def accumulators(self) -> int:
        """Vector registers that hold the tile."""
        return self.pixels * self.blocks * self.vectors


def choose_tile(
    oh: int, ow: int, out_blocks: int, vectors: int, registers: int, uops: int, crops: bool = True
) -> tuple[Tile, int]:
    """Choose the register tile and the padded output width by a cost rule.

    Cost per output and reduction step, in issued operations: `uops` for the product, half a
    broadcast (a load, from L1) shared by the tile's vectors, and two for a weight load (from L2)
    shared by its pixels. Columns that pad the last tile are waste, and cropping them costs another
    pass; under ten accumulators the multiplier's latency (5 cycles, two a cycle) shows. Ranked
    against measured times of ResNet's layers on AVX2: tiles of many pixels by one or two vectors
    win.

    Parameters
    ----------
    oh, ow : int
        Output height and width.
    out_blocks : int
        Blocks of output channels that share their input (per group).
    vectors : int
        Weight vectors in one block.
    registers : int
        Vector registers of the ISA.
    uops : int
        Vector operations of one dot product.
    crops : bool
        Whether surplus columns are cropped, or else computed twice.

    Returns
    -------
    tile : Tile
    ow_padded : int
    """
    best: tuple[float, Tile, int] | None = None
    for block_vectors in divisors(vectors, vectors):
        # All of a block's vectors before several blocks.
        for blocks in divisors(out_blocks, 4) if block_vectors == vectors else [1]:
            total = blocks * block_vectors
            if total > max(registers // 4, 1):
                continue
            for height in divisors(oh, registers):
                for width in range(1, min(ow, registers) + 1):
                    tile = Tile(height, width, blocks, block_vectors)
                    # Registers not holding the tile: the weights, a broadcast, and the product that
                    # is to be added, which takes the broadcast's place when nobody else needs it.
                    spare = 1 + (uops > 1 and total > 1)
                    if tile.accumulators + total + spare > registers:
                        break
                    padded = -(-ow // width) * width
                    cost = uops + 0.5 / total + 2 / tile.pixels
                    cost *= padded / ow * (1.05 if crops and padded != ow else 1.0)
                    cost *= max(1.0, 10 / tile.accumulators) ** 0.5
                    # Wide tiles over tall ones: their loads are closer together.
                    cost *= 1 + 0.002 * height
                    if best is None or cost < best[0]:
                        best = (cost, tile, padded)
    assert best is not None, "a tile of one accumulator always fits"
    return best[1], best[2]


@dataclass(frozen=True)
class SpatialPack:
    """A packed convolution and its register tile.

    Parameters
    ----------
    conv : PackedConv2d
        ``ow_padded`` must be whole tiles.
    tile : Tile
    intrinsic : DotIntrinsic or None
        The inner (lanes, k) product; None vectorises it instead.
    """

    conv: PackedConv2d
    tile: Tile
    intrinsic: DotIntrinsic | None

    def schedule(self) -> Any:
        """Return the scheduled PrimFunc."""
        return schedule_alone(self, conv2d(self.conv))

    def apply(self, sch: Any, stages: Stages) -> None:
        """Schedule the sums and the output."""
        name = None if self.intrinsic is None else self.intrinsic.register()
        _apply(sch, stages, self.conv, self.tile, name)


def _apply(
    sch: Any, stages: Stages, conv: PackedConv2d, tile: Tile, intrinsic: str | None
) -> None:
    acc = stages.acc

    # 1. Tile the output: blocks of channels, rows, columns, vectors; the tile innermost.
    n, ob, oh, ow, o = stages.loops
    obo, obi = sch.split(ob, [None, tile.blocks])
    oho, ohi = sch.split(oh, [None, tile.height])
    owo, owi = sch.split(ow, [None, tile.width])
    voo, voi, lanes = sch.split(o, [None, tile.vectors, conv.lanes])
    sch.reorder(n, obo, voo, oho, owo, obi, ohi, owi, voi, lanes)

    # 2. Threads share out batch, channels and rows.
    parallel_tasks(sch, [n, obo, voo], oho)

    # 3. The accumulators live at one tile.
    sch.compute_at(acc, owo, preserve_unit_loops=True)
    an, aob, ay, ax, ao, *outer, ik, kk = sch.get_loops(acc)[-10:]
    avec, alane = sch.split(ao, [tile.vectors, conv.lanes])
    sch.reorder(an, *outer, ik, ay, ax, aob, avec, alane, kk)
    for loop in (ay, ax, aob, avec):
        sch.unroll(loop)

    # 4. Zero, accumulate, store; all in vectors of `lanes`. (A reduction can only be vectorised
    # whole.)
    if intrinsic is None:
        sch.reorder(kk, alane)
        sch.vectorize(alane)
    init = sch.decompose_reduction(acc, outer[0])
    zero_in_vectors(sch, init, 4)
    if intrinsic is not None:
        sch.tensorize(alane, intrinsic)
    for loop in (obi, ohi, owi, voi):
        sch.unroll(loop)
    sch.vectorize(lanes)
