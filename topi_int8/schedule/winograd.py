# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Winograd's F(2x2, 3x3) by a broadcast dot product: AVX2 and AVX-512BW without VNNI.

A band of tiles is transformed into the second cache, multiplied with the weights block by block of
output channels, and each block is put together and stored before the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intrinsics.x86_dot import DotIntrinsic

from ..compute.winograd import POINTS, PackedWinograd, winograd
from ..workload import Conv2dWorkload
from .spatial_pack import Tile
from .stages import Stages, divisors, parallel_tasks, schedule_alone, zero_in_vectors

# Bands shared out to threads: with fewer, the input is transformed first, and blocks of output
# channels are shared out as well.
ENOUGH_BANDS = 8
# Tiles of a band: as many as use a weight often enough for it to stream from the third cache.
ENOUGH_TILES = 14
# Of a band's transformed input: a part of the second cache, of which no CPU served has less.
BAND_BYTES = 192 * 1024


def worthwhile(work: Conv2dWorkload, lanes: int, k: int, uops: int) -> str | None:
    """Return why the direct sum is no slower, or None where F(2x2, 3x3) wins.

    Counted in vector operations for one block of 16 input by one of 16 output channels and a tile,
    with the transforms' own (on 8 lanes 64 for a block of input, 130 for one of output, as LLVM
    compiles them) shared by the blocks that they serve.

    Parameters
    ----------
    work : Conv2dWorkload
        One to which it applies.
    lanes : int
        Output channels of a vector.
    k, uops : int
        Input channels and vector operations of one step of the direct sum.
    """
    tiles = -(-work.oh // 2) * -(-work.ow // 2)
    if work.n * tiles < ENOUGH_TILES // 2:
        return f"{work.n * tiles} tiles of output: too few for each transformed weight"
    steps = 16 * 16 // lanes
    direct = 36 * steps // k * uops
    transforms = 8 / lanes * (64 / -(-work.oc // 16) + 130 / -(-work.ic // 16))
    ours = (16 * steps // 2 * 2 + transforms) * 4 * tiles / (work.oh * work.ow)
    if ours < 0.9 * direct:
        return None
    return f"the direct sum takes {direct} operations, tiles {ours:.0f}"


def choose_rows(tiles_h: int, tiles_w: int) -> int:
    """Return the rows of tiles in a band."""
    enough = [rows for rows in divisors(tiles_h, tiles_h) if rows * tiles_w >= ENOUGH_TILES]
    return enough[0] if enough else tiles_h


def choose_columns(tiles_w: int, width: int, rows: int, ic: int) -> int:
    """Return the columns of tiles in a band: as many register tiles as fit the second cache.

    Parameters
    ----------
    tiles_w, width : int
        Tiles in a row, whole register tiles of this width.
    rows : int
        Of the band.
    ic : int
        Input channels, whole blocks.
    """
    fits = BAND_BYTES // (POINTS**2 * rows * ic * 2)
    return max(d for d in divisors(tiles_w, tiles_w) if d % width == 0 and d <= max(fits, width))


@dataclass(frozen=True)
class WinogradPlan:
    """A packed convolution, its band and its register tile.

    Parameters
    ----------
    conv : PackedWinograd
        `tiles_w` must be whole register tiles.
    rows, columns : int
        Tiles in a band: divisors of `conv.tiles_h` and `conv.tiles_w`, whole register tiles.
    tile : Tile
        Its pixels are tiles of output here.
    intrinsic : DotIntrinsic
        The inner (lanes, 2) product of int16.
    """

    conv: PackedWinograd
    rows: int
    columns: int
    tile: Tile
    intrinsic: DotIntrinsic

    @property
    def banded(self) -> bool:
        """Whether each band transforms its own input."""
        conv = self.conv
        bands = (conv.tiles_h // self.rows) * (conv.tiles_w // self.columns)
        return conv.work.n * bands >= ENOUGH_BANDS

    def schedule(self) -> Any:
        """Return the scheduled PrimFunc."""
        return schedule_alone(self, winograd(self.conv))

    def apply(self, sch: Any, stages: Stages) -> None:
        """Schedule the input's transform, the sums and the output."""
        _apply(sch, stages, self)


def _apply(sch: Any, stages: Stages, plan: WinogradPlan) -> None:
    conv, tile, acc = plan.conv, plan.tile, stages.acc
    (points,) = (
        block for block in sch.get_producers(acc) if sch.get(block).name_hint == "transform"
    )
    sch.compute_inline(stages.stored)

    # 1. Tile the output: bands, blocks of channels, tiles of 2x2, vectors.
    n, ob, y, x, o = stages.loops
    band_y, ty, yy = sch.split(y, [None, plan.rows, 2])
    band_x, tx, xx = sch.split(x, [None, plan.columns, 2])
    obo, obi = sch.split(ob, [None, tile.blocks])
    vec, lane = sch.split(o, [None, conv.lanes])
    bands = [n, band_y, band_x]
    sch.reorder(*bands, obo, obi, ty, tx, vec, yy, xx, lane)

    # 2. Threads share out bands, each of which transforms its own input; or, where there are few,
    # bands and channels, behind a pass that transforms all of it.
    task = sch.fuse(*bands) if plan.banded else sch.fuse(*bands, obo)
    sch.parallel(task)
    sch.compute_at(acc, obo if plan.banded else task, preserve_unit_loops=True)
    if plan.banded:
        sch.compute_at(points, task, preserve_unit_loops=True)

    # 3. The input's transform: a tile's 16 points from 16 loads.
    pn, a, b, cb, py, px, i = sch.get_loops(points)[-7:]
    sch.reorder(pn, cb, py, px, a, b, i)
    if not plan.banded:
        parallel_tasks(sch, [pn, cb], py)
    for loop in (a, b):
        sch.unroll(loop)
    sch.vectorize(i)

    # 4. The products of a block of channels; the register tile innermost.
    *_, aob, a, b, my, mx, ao, cb, ik, kk = sch.get_loops(acc)
    myo, myi = sch.split(my, [None, tile.height])
    mxo, mxi = sch.split(mx, [None, tile.width])
    avo, avi, alane = sch.split(ao, [None, tile.vectors, conv.lanes])
    sch.reorder(a, b, avo, myo, mxo, cb, ik, myi, mxi, aob, avi, alane, kk)
    for loop in (myi, mxi, aob, avi):
        sch.unroll(loop)
    zero_in_vectors(sch, sch.decompose_reduction(acc, cb), 4)
    sch.tensorize(alane, plan.intrinsic.register())

    # 5. A tile's four outputs share their sums.
    for loop in (yy, xx):
        sch.unroll(loop)
    sch.vectorize(lane)
