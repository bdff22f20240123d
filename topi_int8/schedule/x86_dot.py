# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Convolution by vpdpbusd or vpmaddubsw: `spatial_pack`'s register tile, written as statements.

What statements can do and the scheduled computation cannot: sums start from the bias; four vectors
of them are requantized and narrowed together and stored as one line (`intrinsics.x86_narrow`); the
last tile of a row begins earlier instead of ending later, so that nothing is cropped; a 1x1
convolution's image is one row; and weights of the next channels are fetched ahead where few pixels
use them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from intrinsics import compat
from intrinsics.compat import i32, loop, prefetch, ramp, sequence, tir
from intrinsics.x86_dot import DotIntrinsic
from intrinsics.x86_narrow import in_order
from intrinsics.x86_rows import maddwd, vpdpbusd, vpmaddubsw
from intrinsics.x86_unpack import unpacked

from ..compute.conv2d import PackedConv2d, declare, pad_stage
from ..compute.epilogue import apply, narrowed_values, real_value
from ..workload import INT8_DTYPES, Conv2dWorkload
from .spatial_pack import Tile
from .stages import PREFETCHED, TASKS
from .stated import bordered, stated, task_loop

PRODUCTS = {"vpdpbusd": vpdpbusd, "vpmaddubsw": vpmaddubsw, "vpmaddwd": maddwd}


def pixels_of(work: Conv2dWorkload) -> tuple[int, int]:
    """Return (rows, columns) of the output as tiles see it: one row where pixels are neighbours in
    the data, too.
    """
    borders = (*work.padding, *work.out_border, *work.residual_border)
    pointwise = (work.kh, work.kw, *work.strides) == (1, 1, 1, 1) and not any(borders)
    return (1, work.oh * work.ow) if pointwise else (work.oh, work.ow)


@dataclass(frozen=True)
class DotPlan:
    """A packed convolution and its register tile.

    Parameters
    ----------
    conv : PackedConv2d
        With ``ow_padded`` the output's own width.
    tile : Tile
        No wider than `pixels_of` says; its height divides the height.
    intrinsic : DotIntrinsic
        On 8 or 16 lanes.
    """

    conv: PackedConv2d
    tile: Tile
    intrinsic: DotIntrinsic

    @property
    def columns(self) -> int:
        """Pixels of a row that tiles share out."""
        return pixels_of(self.conv.work)[1]

    @property
    def tiles_w(self) -> int:
        """Tiles of a row; the last may overlap the one before."""
        return -(-self.columns // self.tile.width)

    @property
    def tiles(self) -> int:
        """Tiles of an image."""
        return pixels_of(self.conv.work)[0] // self.tile.height * self.tiles_w

    @property
    def share(self) -> int:
        """Tiles of a task."""
        tasks = self.conv.work.n * math.prod(self.groups)
        shares = min(self.tiles, -(-TASKS // tasks))
        return -(-self.tiles // shares)

    @property
    def groups(self) -> tuple[int, int]:
        """(groups of channel blocks, groups of vectors in one) that tiles take."""
        vectors = self.conv.out_block // self.conv.lanes
        return self.conv.out_blocks // self.tile.blocks, vectors // self.tile.vectors

    @property
    def steps(self) -> dict[str, int]:
        """The loops of the reduction, outermost first; a step takes what one byte packs."""
        return self.conv.steps(self.conv.k * self.conv.packed)

    @property
    def lines(self) -> int:
        """Cache lines of a tile's weights; fewer for narrow vectors."""
        return math.prod(self.steps.values()) * self.tile.blocks * self.tile.vectors

    @property
    def prefetches(self) -> tuple[int, int]:
        """(loops, lines): in so many loops of the reduction, the innermost's body fetches so many
        lines of the next group's weights into the second-level cache; lines are 0 for none.

        A network's weights are rarely there. An image's tiles share a group's lines out in the
        order of memory, for the processor itself fetches ahead only of what is read in that order.
        """
        # A lone tile reads weights as fast as they come.
        if self.tiles == 1 or self.conv.weight_size <= PREFETCHED:
            return 0, 0
        extents = tuple(self.steps.values())
        turns = [self.tiles * math.prod(extents[:loops]) for loops in range(len(extents) + 1)]
        # A line in twice as many turns is better than many in a few.
        loops = max((at for at, count in enumerate(turns) if count <= 2 * self.lines), default=0)
        return loops, -(-self.lines // turns[loops])

    @property
    def prefetching(self) -> int:
        """Tiles of an image that fetch; those after them ask for what the last one did."""
        loops, count = self.prefetches
        return -(-self.lines // (math.prod(list(self.steps.values())[:loops]) * count))

    def schedule(self) -> Any:
        """Return the PrimFunc (data, weight, [bias], [scale], [residual], out)."""
        conv = self.conv
        data, weight, operands = declare(conv)
        source, copies = (pad_stage(conv, data), ["pad"]) if conv.needs_pad else (data, [])
        shape = (*conv.out_shape[:-1], conv.out_block)
        return stated(
            data, weight, operands, source, shape, conv.out_shape,
            lambda *buffers: _Emitter(self, *buffers).statement(), copies,
        )  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where a tile lies: its image, first channel block, channel in it, row and column."""

    n: Any
    ob: Any
    channel: Any
    y: Any
    x: Any
    number: Any  # of the tile in its image


class _Emitter:
    """The statements of one kernel."""

    def __init__(
        self, plan: DotPlan, source: Any, weight: Any, bias: Any, scale: Any, residual: Any,
        out: Any,
    ) -> None:  # fmt: skip
        self.plan, self.conv, self.tile = plan, plan.conv, plan.tile
        self.source, self.weight, self.out = source, weight, out
        self.bias, self.scale, self.residual = bias, scale, residual
        self.lanes = plan.intrinsic.n
        self.product = PRODUCTS[plan.intrinsic.mnemonic]
        count = self.lanes * plan.intrinsic.k
        self.data_type, self.weight_type = (
            f"{dtype}x{count}" for dtype in (plan.intrinsic.a, plan.intrinsic.b)
        )
        self.vectors = [(b, v) for b in range(self.tile.blocks) for v in range(self.tile.vectors)]
        self.pixels = [(y, x) for y in range(self.tile.height) for x in range(self.tile.width)]
        # One buffer a pixel: together they would be too large for TVM to leave them on the stack.
        self.sums = [
            tir.decl_buffer((len(self.vectors), self.lanes), "int32", f"sums{number}")
            for number in range(len(self.pixels))
        ]

    def statement(self) -> Any:
        """Return the parallel loop over images, channels and shares of the rows."""
        plan, conv, tile = self.plan, self.conv, self.tile
        blocks, parts = plan.groups
        shares = -(-plan.tiles // plan.share)
        task, each, number = (tir.Var(name, "int32") for name in ("task", "each", "tile"))
        rest, share = tir.floordiv(task, i32(shares)), tir.floormod(task, i32(shares))
        across = i32(plan.tiles_w)
        row, column = tir.floordiv(number, across), tir.floormod(number, across)
        rest, part = tir.floordiv(rest, i32(parts)), tir.floormod(rest, i32(parts))
        at = _Place(
            tir.floordiv(rest, i32(blocks)),
            tir.floormod(rest, i32(blocks)) * tile.blocks,
            part * (tile.vectors * self.lanes),
            row * tile.height,
            tir.min(column * tile.width, i32(plan.columns - tile.width)),
            number,
        )
        body = [tir.Bind(number, share * plan.share + each), *self._tile(at)]
        tiles = loop(each, tir.min(i32(plan.share), plan.tiles - share * plan.share), body)
        tasks = task_loop(task, conv.work.n * blocks * parts * shares, [tiles], self.sums)
        return sequence([tasks, *bordered(conv, self.out)])

    def _tile(self, at: _Place) -> list[Any]:
        steps = self.plan.steps
        place = {name: tir.Var(name, "int32") for name in steps}
        fetched, _ = self.plan.prefetches
        body = self._step(at, place)
        for around in range(len(steps), -1, -1):
            if around == fetched:
                body = [*self._prefetch(at, place), *body]
            if around:
                name, extent = list(steps.items())[around - 1]
                body = [loop(place[name], extent, body)]
        return [*self._start(at), *body, *self._outputs(at)]

    # ------------------------------------------------------------ sums

    def _sum(self, vector: int) -> list[Any]:
        """Return where a pixel's buffer of sums has a vector."""
        return [i32(vector), ramp(i32(0), self.lanes)]

    def _operand(self, operand: Any, at: _Place, vector: int) -> Any:
        """Return a vector of the bias or the scale."""
        b, v = self.vectors[vector]
        channel = ramp(at.channel + v * self.lanes, self.lanes)
        return tir.BufferLoad(operand, [at.ob + b, channel])

    def _start(self, at: _Place) -> list[Any]:
        stmts = []
        for vector in range(len(self.vectors)):
            value = tir.Broadcast(i32(0), self.lanes)
            if self.bias is not None:
                value = self._operand(self.bias, at, vector)
            stmts += [
                tir.BufferStore(self.sums[pixel], value, self._sum(vector))
                for pixel in range(len(self.pixels))
            ]
        return stmts

    def _step(self, at: _Place, place: dict[str, Any]) -> list[Any]:
        """Return the products of `k` channels of a tap, or of as many more as a byte packs."""
        conv, stmts, loads = self.conv, [], []
        for vector, (b, v) in enumerate(self.vectors):
            own = i32(b * (conv.out_block // self.lanes) + v)
            lanes = ramp(i32(0), self.lanes * conv.k)
            loads.append(tir.Var(f"weight{vector}", self.weight_type))
            stmts.append(tir.Bind(loads[-1], self._weight(at, place, own, lanes)))
        for part in range(conv.packed):
            weights = loads
            if conv.packed > 1:
                weights = []
                for vector, load in enumerate(loads):
                    weights.append(tir.Var(f"weight{vector}_{part}", self.weight_type))
                    stmts.append(tir.Bind(weights[-1], unpacked(load, conv.weight_bits, part)))
            stmts += self._products(at, place, part, weights)
        return stmts

    def _products(
        self, at: _Place, place: dict[str, Any], part: int, weights: list[Any]
    ) -> list[Any]:
        """Return the products of all pixels with vectors of weights."""
        stmts = []
        for pixel, offset in enumerate(self.pixels):
            word = tir.reinterpret("int32", self._data(at, place, part, *offset))
            data = tir.Var("data", self.data_type)
            spread = tir.Broadcast(word, self.lanes)
            stmts.append(tir.Bind(data, tir.reinterpret(self.data_type, spread)))
            for vector, weight in enumerate(weights):
                where = self._sum(vector)
                total = self.product(tir.BufferLoad(self.sums[pixel], where), data, weight)
                stmts.append(tir.BufferStore(self.sums[pixel], total, where))
        return stmts

    def _prefetch(self, at: _Place, place: dict[str, Any]) -> list[Any]:
        """Return the prefetches of one turn of the loop that has them."""
        plan = self.plan
        loops, count = plan.prefetches
        if not count:
            return []
        turn = tir.min(at.number, i32(plan.prefetching - 1))
        for name, extent in list(plan.steps.items())[:loops]:
            turn = turn * extent + place[name]
        origin = {name: i32(0) for name in plan.steps}
        # Lines past the end of a vector's are the next ones'.
        lines = [{**origin, "ik": turn * count + line} for line in range(count)]
        vectors = i32(len(self.vectors))
        return [prefetch(self._weight(at, line, vectors, i32(0))) for line in lines]

    def _weight(self, at: _Place, place: dict[str, Any], vector: Any, lanes: Any) -> Any:
        """Return weights of the vector that is so many behind the tile's first."""
        taps = self.conv.ordered(place["kw"], place["cb"])
        first = at.ob * (self.conv.out_block // self.lanes)
        first += tir.floordiv(at.channel, i32(self.lanes))
        index = [first + vector, place["kh"], *taps, place["ik"], i32(0), lanes]
        return tir.BufferLoad(self.weight, index)

    def _data(self, at: _Place, place: dict[str, Any], part: int, y: int, x: int) -> Any:
        """Return the `k` channels of a pixel that a part of a step multiplies."""
        conv, work = self.conv, self.conv.work
        (sh, sw), (dh, dw) = work.strides, work.dilation
        row = (at.y + y) * sh + place["kh"] * dh
        first = (place["ik"] * conv.packed + part) * conv.k
        channel = ramp(first, conv.k)
        if conv.window:
            start = (at.x + x) * (sw * conv.in_block) + first
            return tir.BufferLoad(
                self.source, [at.n, i32(0), row, ramp(start, conv.k)]
            )
        column = (at.x + x) * sw + place["kw"] * dw
        block = conv.first_in_block(at.ob) + place["cb"]
        return tir.BufferLoad(self.source, [at.n, block, row, column, channel])

    # ------------------------------------------------------------ outputs

    def _outputs(self, at: _Place) -> list[Any]:
        """Return what makes outputs of the sums, up to four vectors at a time."""
        stmts, scales = [], []
        for vector in range(len(self.vectors) if self.scale is not None else 0):
            scales.append(tir.Var(f"scale{vector}", f"float32x{self.lanes}"))
            stmts.append(tir.Bind(scales[-1], self._operand(self.scale, at, vector)))
        own, width = self.tile.vectors, self.tile.width
        for b in range(self.tile.blocks):
            for y in range(self.tile.height):
                x = 0
                while x < width:
                    count = max(c for c in (1, 2, 4) if c * own <= max(4, own) and c <= width - x)
                    pixels = [y * width + x + i for i in range(count)]
                    stmts += self._patch(at, b, pixels, scales)
                    x += count
        return stmts

    def _patch(self, at: _Place, b: int, pixels: list[int], scales: list[Any]) -> list[Any]:
        """Return the outputs of neighbouring pixels in the tile's channels of a block."""
        epi, own = self.conv.work.epilogue, self.tile.vectors
        narrows = epi.out_dtype in INT8_DTYPES
        pieces = [(pixel, v) for pixel in pixels for v in range(own)]
        values = []
        for pixel, v in pieces:
            vector = b * own + v
            total = tir.BufferLoad(self.sums[pixel], self._sum(vector))
            scale = scales[vector] if scales else None
            residual = self._residual(at, b, pixel, v)
            if narrows:
                values.append(real_value(epi, total, scale, residual))
            else:
                values.append(apply(epi, total, None, scale, residual))
        if not narrows:
            return [
                tir.BufferStore(self.out, value, self._stored(at, b, pixel, v, self.lanes))
                for (pixel, v), value in zip(pieces, values, strict=True)
            ]
        stmts = []
        for start in range(0, len(pieces), 4):
            stmts += self._narrow(at, b, pieces[start : start + 4], values[start : start + 4])
        return stmts

    def _narrow(
        self, at: _Place, b: int, pieces: list[tuple[int, int]], values: list[Any]
    ) -> list[Any]:
        """Return the stores of one, two or four vectors, neighbours in memory as far as they are.
        """
        if len(values) == 3:
            return self._narrow(at, b, pieces[:2], values[:2]) + self._narrow(
                at, b, pieces[2:], values[2:]
            )
        epi = self.conv.work.epilogue
        words = narrowed_values(epi, values, converts=True)
        packed = tir.Var("words", compat.dtype_of(words))
        stmts = [tir.Bind(packed, words)]
        # Whole blocks of neighbouring pixels are one run of bytes, else each pixel's vectors.
        dense = self.tile.vectors * self.lanes == self.conv.out_block
        runs = [pieces] if dense else _runs(pieces)
        first = 0
        for run in runs:
            row = in_order(packed, epi.out_dtype, first, len(run))
            where = self._stored(at, b, *run[0], len(run) * self.lanes)
            stmts.append(tir.BufferStore(self.out, row, where))
            first += len(run)
        return stmts

    def _where(self, at: _Place, b: int, pixel: int, v: int, count: int) -> list[Any]:
        y, x = self.pixels[pixel]
        channel = ramp(at.channel + v * self.lanes, count)
        return [at.n, at.ob + b, at.y + y, at.x + x, channel]

    def _stored(self, at: _Place, b: int, pixel: int, v: int, count: int) -> list[Any]:
        """Return `_where` in the output, which may have a border."""
        return _inside(self.conv.work.out_border, self._where(at, b, pixel, v, count))

    def _residual(self, at: _Place, b: int, pixel: int, v: int) -> Any:
        if self.residual is None:
            return None
        where = self._where(at, b, pixel, v, self.lanes)
        *index, channel = _inside(self.conv.work.residual_border, where)
        if self.conv.crops:  # the surplus of the last block is not stored
            channel = tir.min(channel, i32(self.conv.out_store - 1))
        return tir.BufferLoad(self.residual, [*index, channel])


def _inside(border: tuple[int, int, int, int], where: list[Any]) -> list[Any]:
    """Return where an output lies in a tensor with that border."""
    n, ob, y, x, channel = where
    return [n, ob, y + border[0], x + border[1], channel]


def _runs(pieces: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Return (pixel, vector) split by pixel."""
    runs: dict[int, list[tuple[int, int]]] = {}
    for pixel, v in pieces:
        runs.setdefault(pixel, []).append((pixel, v))
    return list(runs.values())
