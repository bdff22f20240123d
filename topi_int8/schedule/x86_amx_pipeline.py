# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Convolution on AMX as a software pipeline: a block's products beside the last one's outputs.

A block is up to 2x2, 1x4 or 4x1 tiles of sums: `m_tiles` of `rows` pixels each by `n_tiles` of 16
channels. Its sums start from the bias, are stored to a small buffer during the next block's first
step, each tile just before it starts anew, and become outputs while the rest of that block's
products run, or, where a block has no more than two steps, during the block after: between two
tile instructions stand a few vector ones, so that neither unit waits for the other, although the
window of out-of-order execution is shorter than a block.

Sources. Measured on Granite Rapids (bench/README.md, "What bounds AMX"): a product takes 16 cycles,
but 20 with its share of loads; `tilestored` holds the shuffle port for 16; for some 60 cycles after
any tile instruction the second 512-bit unit takes neither conversions nor multiplies, and still
takes additions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from intrinsics import compat, x86_amx
from intrinsics.compat import i32, loop, prefetch, ramp, sequence, tir
from intrinsics.x86_narrow import LANES, from_bits, in_order, shifted, spread

from ..compute.conv2d import PackedConv2d, declare, pad_stage
from ..compute.epilogue import apply, narrowed_values, real_value
from ..workload import INT8_DTYPES
from .stages import PREFETCHED, divisors
from .stated import bordered, stated, task_loop
from .x86_amx_bands import Bands
from .x86_amx_unpack import AHEAD, Unpacker
from .x86_window import weaves, woven

# Steps that one pass of the loop over the reduction has at most: its code is unrolled.
UNROLLED = 80
# Steps of a reduction that leave no time to make outputs of the sums which the first one stores.
FEW_STEPS = 2


@dataclass(frozen=True)
class Pipeline:
    """A packed convolution in blocks of tiles.

    Parameters
    ----------
    conv : PackedConv2d
        `lanes` is 16 and `k` is 4: that is how a B tile lies in memory.
    m_tiles, n_tiles : int
        Tiles of a block.
    bands : int
        Bands of output rows; a part is a group of `n_tiles` tiles of channels in one band.
    tasks : int
        Tasks that share out the parts of all images; divides their number.
    stream : str
        "a" or "b": the operand that is loaded past the first-level cache, data or weights, to leave
        that to the other; "": neither.
    narrows : bool
        Whether 8-bit outputs are narrowed by AVX-512's instructions.
    rows_first : bool
        Whether tasks share out rows, each with all groups of channels, rather than channels.
    """

    conv: PackedConv2d
    m_tiles: int
    n_tiles: int
    bands: int = 1
    tasks: int = 1
    stream: str = ""
    narrows: bool = False
    rows_first: bool = False

    # ------------------------------------------------------------ shapes

    @cached_property
    def pixels(self) -> Bands:
        """How the pixels of a band become tiles."""
        return Bands(self.conv, self.m_tiles, self.bands)

    @property
    def step(self) -> int:
        """Input channels of a step: whole rows of weights, as many as lie in a byte."""
        least = 4 * self.conv.packed
        return max(d for d in range(least, 65, least) if self.conv.step_block % d == 0)

    @cached_property
    def block(self) -> x86_amx.AmxBlock:
        """The tile registers."""
        conv = self.conv
        return x86_amx.AmxBlock(
            conv.data_dtype, conv.weight_dtype, self.pixels.rows,
            tiles_w=self.m_tiles, oc_tiles=self.n_tiles, k=self.step,
        )  # fmt: skip

    @property
    def steps(self) -> dict[str, int]:
        """The loops of the reduction, outermost first."""
        return self.conv.steps(self.step)

    @property
    def depth(self) -> int:
        """Steps of the reduction."""
        return math.prod(self.steps.values())

    @property
    def unrolled(self) -> int:
        """Steps of one pass of the loop over the reduction."""
        count = 1
        for extent in reversed(self.steps.values()):
            if count * extent > UNROLLED:
                return count * max(divisors(extent, UNROLLED // count))
            count *= extent
        return count

    @property
    def lag(self) -> int:
        """Blocks from the products to the outputs.

        Sums are stored during the first step of the next block; the steps after it make outputs of
        them, or the next block does.
        """
        return 1 if self.depth > FEW_STEPS else 2

    @property
    def prefetches(self) -> int:
        """Lines of the next group's weights that a step fetches into the second-level cache.

        A network's weights are rarely in it. A group's blocks share its lines out in the order of
        memory, for the processor itself fetches ahead only of what is read in that order.
        """
        if self.conv.weight_size <= PREFETCHED:
            return 0
        return -(-self._lines // self.blocks)

    @property
    def blocks(self) -> int:
        """Blocks for which a group's weights are used before the next group is read."""
        bands = 1 if self.rows_first else self.bands
        return self.images * bands * self.pixels.blocks

    @property
    def prefetching(self) -> int:
        """Blocks of a group that fetch; those after them ask for what the last one did."""
        return -(-self._lines // self.prefetches)

    @property
    def _lines(self) -> int:
        """Lines of a group's weights for one step."""
        return self.n_tiles * self.step // (4 * self.conv.packed)

    @property
    def images(self) -> int:
        """Images that one group of channels is used for before the next group is read.

        All, where the weights are more than those images' data.
        """
        if self.rows_first:
            return 1
        all_images = self.conv.work.n
        return all_images if self.conv.weight_size > all_images * self.conv.image_size else 1

    @property
    def parts(self) -> int:
        """Bands of groups of channels, of all images."""
        return self.conv.work.n * self.groups * self.bands

    @property
    def order(self) -> dict[str, int]:
        """The loops over the parts, outermost first; images are outside and inside of groups."""
        outside, group = ("outside", self.conv.work.n // self.images), ("group", self.groups)
        inside, band = ("inside", self.images), ("band", self.bands)
        return dict((outside, band, inside, group) if self.rows_first
                    else (outside, group, inside, band))  # fmt: skip

    @property
    def groups(self) -> int:
        """Groups of output channels that a block takes."""
        return self.conv.out_blocks * self.groups_a_block

    @property
    def groups_a_block(self) -> int:
        """Groups of output channels in a block of the output's layout."""
        return self.conv.out_block // (16 * self.n_tiles)

    # ------------------------------------------------------------ the function

    def schedule(self, ask_permission: bool) -> Any:
        """Return the PrimFunc (data, weight, [bias], [scale], [residual], out)."""
        conv = self.conv
        data, weight, operands = declare(conv)
        source, copies = data, []
        if weaves(conv):
            source = woven(conv, data)
        elif conv.needs_pad:
            source, copies = pad_stage(conv, data), ["pad"]

        shape = (*conv.out_shape[:-1], conv.out_block)
        func = stated(
            data, weight, operands, source, shape, conv.out_shape,
            lambda *buffers: _Emitter(self, *buffers).statement(), copies,
        )  # fmt: skip
        if ask_permission:
            func = func.with_body(
                compat.rewrite_root(func.body, lambda s: [x86_amx.request_permission(), *s])
            )
        return func


class _Emitter:
    """The statements of one kernel."""

    def __init__(
        self, plan: Pipeline, source: Any, weight: Any, bias: Any, scale: Any, residual: Any,
        out: Any,
    ) -> None:  # fmt: skip
        self.plan, self.conv, self.block = plan, plan.conv, plan.block
        self.source, self.weight, self.out = source, weight, out
        self.bias, self.scale, self.residual = bias, scale, residual
        count = plan.m_tiles * plan.pixels.rows
        self.sums = tir.decl_buffer((plan.n_tiles, plan.lag, count, LANES), "int32", "sums")
        # The places of the last blocks, the latest first (the image is -1 where there was none),
        # and the part of `sums` that was stored last.
        self.place_size = 4 + 2 * plan.m_tiles
        size = plan.lag * self.place_size + 1
        self.carried = tir.decl_buffer((size,), "int32", "carried")
        self.unpacker = Unpacker(plan, weight) if self.conv.packed > 1 else None

    def statement(self) -> Any:
        """Return the parallel loop over tasks, each a pipeline over its share of the image."""
        plan = self.plan
        share = plan.parts // plan.tasks
        task, each = tir.Var("task", "int32"), tir.Var("each", "int32")
        b = tir.Var("b", "int32")
        now = _Place.of_block(self, task * share + each, b, each)
        # The first times round this makes outputs of what is not there yet, in the block's own
        # place, where they are made again.
        before = now.copy("before", self._or_before(plan.lag))
        stored, part = self._parts()
        lines = before.lines(stored)
        passed_on = range(self.place_size * (plan.lag - 1) - 1, -1, -1)
        body = [
            *now.binds, *before.binds,
            *self._unpacked_first(now),
            *self._sums(now, part, lines),
            self._carry(self._part, part),
            *(self._carry(self.place_size + at, self._carried(at)) for at in passed_on),
            *(self._carry(at, value) for at, value in enumerate(now.values)),
        ]
        whole = loop(each, share, [loop(b, plan.pixels.blocks, body)])
        steps = [
            x86_amx.configure(self.block),
            *(self._carry(self.place_size * ago, i32(-1)) for ago in range(plan.lag)),
            self._carry(self._part, i32(0)),
            whole,
            tir.IfThenElse(self._carried(0) >= 0, sequence(self._drain(now)), None),
            x86_amx.release(),
        ]
        buffers = [self.sums, self.carried]
        buffers += [] if self.unpacker is None else [self.unpacker.buffer]
        tasks = task_loop(task, plan.tasks, steps, buffers)
        # Tiles that run over the ends of rows have written into the border.
        return sequence([tasks, *bordered(self.conv, self.out)])

    def _drain(self, now: _Place) -> list[Any]:
        """Return what makes outputs of the last blocks."""
        lag, tiles = self.plan.lag, range(self.block.c_tiles)
        final = now.copy("final", lambda at, _: self._carried(at))
        stored, part = self._parts()
        outputs, earlier = final.lines(part), []
        if lag > 1:
            place = final.copy("earlier", self._or_before(lag))
            lines = place.lines(stored)
            earlier = [*place.binds, *lines]
        stores = [self._store(part, tile) for tile in tiles]
        return [*stores, *final.binds, *earlier, *outputs]

    def _or_before(self, ago: int) -> Callable[[int, Any], Any]:
        """Return (at, value) -> that of the block so many ago, `value` where there was none."""
        first = self.place_size * (ago - 1)
        none = self._carried(first) < 0
        return lambda at, value: tir.Select(none, value, self._carried(first + at))

    def _parts(self) -> tuple[Any, Any]:
        """Return which part of `sums` was stored last, and which is the next to be."""
        if self.plan.lag == 1:
            return i32(0), i32(0)
        stored = self._carried(self._part)
        return stored, 1 - stored

    @property
    def _part(self) -> int:
        """Where `carried` has the part of `sums`."""
        return self.plan.lag * self.place_size

    def _carried(self, at: int) -> Any:
        return tir.BufferLoad(self.carried, [i32(at)])

    def _carry(self, at: int, value: Any) -> Any:
        return tir.BufferStore(self.carried, value, [i32(at)])

    def _sums(self, at: _Place, part: Any, lines: list[Any]) -> list[Any]:
        """Return a block's products and the stores of its sums, with `lines` strewn among them."""
        plan, unrolled = self.plan, self.plan.unrolled
        # A tile is stored just before it starts anew, so that the other tiles' products cover it.
        order = [m * plan.n_tiles + n for what, m, n in self.block.step() if what == "dot"]
        head = [
            [self._store(part, tile), sequence([self._start(at, tile), product])]
            for tile, product in zip(order, self._step(at, i32(0)), strict=True)
        ]
        rest = [s for j in range(1, unrolled) for s in self._step(at, i32(j))]
        if plan.lag > 1:
            return _strewn([*(stmt for stmts in head for stmt in stmts), *rest], lines)
        head = [sequence(stmts) for stmts in head]
        passes, k = plan.depth // unrolled, tir.Var("k", "int32")
        body = [s for j in range(unrolled) for s in self._step(at, k * unrolled + j)]
        rolled = [loop(k, passes - 1, body, first=1)] if passes > 1 else []
        return [*head, *_strewn(rest, lines), *rolled]

    # ------------------------------------------------------------ tile instructions

    def _start(self, at: _Place, tile: int) -> Any:
        if self.bias is None:
            return x86_amx.tile_zero(tile)
        n = tile % self.plan.n_tiles
        first = tir.BufferLoad(self.bias, [at.ob, at.channel + n * 16])
        return x86_amx.tile_load(tile, first, 0)

    def _step(self, at: _Place, step: Any) -> list[Any]:
        """Return one step, each product with the loads it waits for."""
        place = _digits(step, self.plan.steps)
        out, pending = [], self._prefetch(at, step)
        unpacked = self._unpacked(at, step + AHEAD)
        for what, *operands in self.block.step():
            if what == "a":
                pending.append(self._load_a(at, place, *operands))
            elif what == "b":
                pending.append(self._load_b(at, place, step, *operands))
            else:
                out.append(sequence([*pending, self.block.product(*operands), *unpacked]))
                pending, unpacked = [], []
        return out

    def _unpacked_first(self, at: _Place) -> list[Any]:
        """Return what unpacks a group's first steps."""
        return [stmt for step in range(AHEAD) for stmt in self._unpacked(at, i32(step))]

    def _unpacked(self, at: _Place, step: Any) -> list[Any]:
        """Return what unpacks a step's weights, if the block is its group's first.

        A step after the last is the last again: what is there does not change.
        """
        last = i32(self.plan.depth - 1)
        if self.unpacker is None or (isinstance(step, tir.IntImm) and step.value > last.value):
            return []
        step = tir.min(step, last)
        place = _digits(step, self.plan.steps)
        origin = [self._weight(at, place, n, 0).indices for n in range(self.plan.n_tiles)]
        filled = self.unpacker.fill(step, [list(index) for index in origin])
        return filled if at.fresh is None else [
            tir.IfThenElse(at.fresh != 0, sequence(filled), None)
        ]  # fmt: skip

    def _load_a(self, at: _Place, place: dict[str, Any], m: int, tile: int) -> Any:
        conv, work = self.conv, self.conv.work
        (sh, sw), (dh, dw) = work.strides, work.dilation
        y, x = at.tiles[m]
        row, column = (at.row + y) * sh + place["kh"] * dh, x * sw + place["kw"] * dw
        channel = place["ik"] * self.plan.step
        block = conv.first_in_block(at.ob) + place["cb"]
        column_bytes = conv.in_block * conv.window_rows
        if conv.window:
            if conv.window_rows > 1:
                grain = conv.window_grain
                row = (at.row + y) * (sh // grain) + place["kh"] * (conv.window_rows // grain)
            index = [at.n, i32(0), row, x * (sw * column_bytes) + channel]
        elif conv.phases:
            pw = conv.phase_shape[1]
            phase = tir.floormod(place["kh"] * dh, i32(sh)) * pw
            phase += tir.floormod(place["kw"] * dw, i32(sw))
            row = at.row + y + tir.floordiv(place["kh"] * dh, i32(sh))
            column = x + tir.floordiv(place["kw"] * dw, i32(sw))
            index = [at.n, block, phase, row, column, channel]
        else:
            index = [at.n, block, row, column, channel]
        pixel = column_bytes if conv.window else conv.step_block
        stride = pixel if conv.phases else pixel * sw
        first = tir.BufferLoad(self.source, index)
        return x86_amx.tile_load(tile, first, stride, self.plan.stream == "a")

    def _load_b(self, at: _Place, place: dict[str, Any], step: Any, n: int, tile: int) -> Any:
        if self.unpacker is not None:
            return x86_amx.tile_load(tile, self.unpacker.first(n, step), 64)
        first = self._weight(at, place, n, 0)
        return x86_amx.tile_load(tile, first, 64, self.plan.stream == "b")

    def _weight(self, at: _Place, place: dict[str, Any], n: Any, row: Any) -> Any:
        """Return the first element of a row of the group's n-th tile of weights."""
        taps = self.conv.ordered(place["kw"], place["cb"])
        tiles = at.ob * (self.conv.out_block // 16) + tir.floordiv(at.channel, i32(16)) + n
        rows = place["ik"] * (self.plan.step // (4 * self.conv.packed)) + row
        return tir.BufferLoad(
            self.weight, [tiles, place["kh"], *taps, rows, i32(0), i32(0)]
        )

    def _prefetch(self, at: _Place, step: Any) -> list[Any]:
        """Return the prefetches of a step, by its number, from the next group's weights."""
        plan = self.plan
        if not plan.prefetches:
            return []
        block = tir.min(at.block, i32(plan.prefetching - 1))
        first = (block * plan.depth + step) * plan.prefetches
        origin = dict.fromkeys(plan.steps, i32(0))
        # Lines past the end of a tile are the next ones'.
        return [
            prefetch(self._weight(at, origin, plan.n_tiles, first + line))
            for line in range(plan.prefetches)
        ]

    def _store(self, half: Any, tile: int) -> Any:
        m, n = divmod(tile, self.plan.n_tiles)
        index = [i32(n), half, i32(m * self.plan.pixels.rows), i32(0)]
        return x86_amx.tile_store(tile, tir.BufferLoad(self.sums, index), 64)


class _Place:
    """Where a block lies: its image, channels, and its tiles' first pixels, bound to variables."""

    def __init__(self, emitter: _Emitter, name: str, values: list[Any]) -> None:
        self.emitter = emitter
        self.block: Any = None  # of its group
        self.fresh: Any = None  # not 0 in a group's first block of a task; None: all blocks are
        self.binds: list[Any] = []
        self.origins: dict[Any, tuple[Any, Any]] = {}
        self.values = [self._bind(f"{name}{at}", value) for at, value in enumerate(values)]
        self.n, self.ob, self.channel, self.row, *tiles = self.values
        self.tiles = list(zip(tiles[::2], tiles[1::2], strict=True))

    @staticmethod
    def of_block(emitter: _Emitter, part: Any, b: Any, each: Any) -> _Place:
        """Return the place of block `b` of a part, the `each`-th of its task."""
        plan = emitter.plan
        at = _digits(part, plan.order)
        a_block = i32(plan.groups_a_block)
        lowest = i32(emitter.conv.work.oh - plan.pixels.height)
        values = [
            at["outside"] * plan.images + at["inside"],
            tir.floordiv(at["group"], a_block),
            tir.floormod(at["group"], a_block) * (16 * plan.n_tiles),
            tir.min(at["band"] * plan.pixels.height, lowest),
        ]
        for m in range(plan.m_tiles):
            values += plan.pixels.first(b * plan.m_tiles + m)
        place = _Place(emitter, "now", values)
        place.block = b
        if not plan.rows_first:
            place.block += (at["inside"] * plan.bands + at["band"]) * plan.pixels.blocks
        if plan.blocks > 1 and plan.conv.packed > 1:
            first = tir.any(each == 0, place.block < plan.pixels.blocks)
            fresh = tir.Select(tir.all(b == 0, first), i32(1), i32(0))
            place.fresh = place._bind("fresh", fresh)
        return place

    def copy(self, name: str, make: Callable[[int, Any], Any]) -> _Place:
        """Return a place of the values ``make(0, value), make(1, value)...`` of this one's."""
        return _Place(self.emitter, name, [make(at, v) for at, v in enumerate(self.values)])

    def _bind(self, name: str, value: Any) -> Any:
        var = tir.Var(name, compat.dtype_of(value))
        self.binds.append(tir.Bind(var, value))
        return var

    # ------------------------------------------------------------ outputs

    def lines(self, half: Any) -> list[Any]:
        """Return statements that make outputs of the sums, a patch of pixels each."""
        plan = self.emitter.plan
        scales = self._scales()
        count = plan.m_tiles * plan.pixels.rows
        patch = max(d for d in (1, 2, 4) if d * plan.n_tiles <= 4 and d <= count)
        starts = [min(q, count - patch) for q in range(0, count, patch)]
        return [self._patch(half, range(q, q + patch), scales) for q in starts]

    def _scales(self) -> list[Any]:
        emitter = self.emitter
        if emitter.scale is None:
            return [None] * emitter.plan.n_tiles
        lanes = [ramp(self.channel + 16 * j, LANES) for j in range(self._n)]
        loads = [tir.BufferLoad(emitter.scale, [self.ob, lane]) for lane in lanes]
        return [self._bind(f"scale{j}", load) for j, load in enumerate(loads)]

    @property
    def _n(self) -> int:
        return self.emitter.plan.n_tiles

    def _patch(self, half: Any, pixels: range, scales: list[Any]) -> Any:
        emitter, epi = self.emitter, self.emitter.conv.work.epilogue
        narrows = emitter.plan.narrows and epi.out_dtype in INT8_DTYPES
        float_sums = emitter.conv.float_sums
        values, places = [], []
        for q in pixels:
            places.append(self._pixel(q, emitter.conv.work.out_border))
            for j in range(self._n):
                index = [i32(j), half, i32(q), ramp(i32(0), LANES)]
                total = tir.BufferLoad(emitter.sums, index)
                residual = self._residual(q, j)
                if float_sums:
                    total = from_bits(total)
                if narrows:
                    values.append(real_value(epi, total, scales[j], residual))
                else:
                    values.append(apply(epi, total, None, scales[j], residual))
        width = 16 * self._n
        if narrows:
            # Where a residual has made the multiplier's port and the other equally busy, the one
            # operation less of vcvtps2dq counts.
            words = narrowed_values(epi, values, converts=emitter.residual is not None)
            packed = tir.Var("words", compat.dtype_of(words))
            stores = [tir.Bind(packed, words)]
            for p, pixel in enumerate(places):
                if float_sums:
                    row = tir.reinterpret(f"{epi.out_dtype}x{width}", packed)
                else:
                    row = in_order(packed, epi.out_dtype, p * self._n, self._n)
                stores.append(self._put(row, pixel, 0, width))
            return sequence(stores)
        stores = []
        for index, value in enumerate(values):
            p, j = divmod(index, self._n)
            stores.append(self._put(value, places[p], 16 * j, LANES))
        return sequence(stores)

    def _pixel(self, q: int, border: tuple[int, int, int, int]) -> Any:
        """Return where the block's q-th pixel lies in a tensor with that border."""
        plan = self.emitter.plan
        width = plan.conv.work.ow + border[1] + border[3]
        m, offset = divmod(q, plan.pixels.rows)
        if (m, border) not in self.origins:
            first, left = plan.pixels.origin(*self.tiles[m], width)
            first += (self.row + border[0]) * width + border[1]
            name = f"{m}_{len(self.origins)}"
            bound = self._bind(f"first{name}", first), self._bind(f"left{name}", left)
            self.origins[m, border] = bound
        return plan.pixels.pixel(*self.origins[m, border], offset, width)

    def _put(self, value: Any, pixel: Any, channel: int, width: int) -> Any:
        index = [self.n, self.ob, i32(0), pixel, ramp(self.channel + channel, width)]
        return tir.BufferStore(self.emitter.out, value, index)

    def _residual(self, q: int, j: int) -> Any:
        """Return a vector of the residual, its zero point subtracted on AVX-512; or None."""
        emitter, conv = self.emitter, self.emitter.conv
        if emitter.residual is None:
            return None
        epi = conv.work.epilogue
        pixel = [self.n, self.ob, i32(0), self._pixel(q, conv.work.residual_border)]
        if conv.float_sums:
            row = tir.BufferLoad(emitter.residual, [*pixel, ramp(self.channel, 64)])
            return spread(row, epi.residual_dtype, j, epi.residual_zero_point)
        channel = ramp(self.channel + 16 * j, LANES)
        if conv.crops:  # the surplus of the last block is not stored
            channel = tir.min(channel, i32(conv.out_store - 1))
        residual = tir.BufferLoad(emitter.residual, [*pixel, channel])
        if emitter.plan.narrows and epi.residual_dtype in INT8_DTYPES:
            return shifted(residual, epi.residual_zero_point)
        return residual


def _digits(number: Any, extents: dict[str, int]) -> dict[str, Any]:
    """Return a number's place in each of nested loops, outermost first."""
    place = {}
    for name, extent in reversed(extents.items()):
        place[name] = tir.floormod(number, i32(extent))
        number = tir.floordiv(number, i32(extent))
    return place


def _strewn(stmts: list[Any], lines: list[Any]) -> list[Any]:
    """Return the statements with the lines spread evenly behind them."""
    if not stmts:
        return lines
    out, done = [], 0
    for i, stmt in enumerate(stmts, 1):
        upto = len(lines) * i // len(stmts)
        out += [stmt, *lines[done:upto]]
        done = upto
    return out
