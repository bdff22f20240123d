# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Depthwise convolution on x86: a dot product of four rows of a column, in each channel.

Four rows of the image are interleaved once (`intrinsics.x86_rows`) into a small buffer, with the
borders, and serve all horizontal taps of several output rows: an output row whose first tap is the
second of the four multiplies by weights that are moved by one, zero elsewhere. Nothing is padded in
memory beforehand.

The buffer lies as rows of 16-byte lanes, a lane being four channels of one of the four vectors that
interleaving gives. A vector of sums is of any few neighbouring lanes, so that narrow channel blocks
fill wide vectors with several pixels. With strides, columns of the same phase are neighbours.

Counted in operations of the two ports that multiply or shuffle 512 bits, for 64 channels of a pixel
of a 3x3 with stride 1: 4 of interleaving, 12 dot products, 16 to 23 to requantize.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intrinsics import compat
from intrinsics.compat import i32, loop, ramp, sequence, tir
from intrinsics.x86_rows import LANE, ROW_PRODUCTS, RowProduct, interleaved

from ..compute.depthwise import PackedDepthwise, declare
from ..compute.epilogue import apply, narrowed_values, real_value, stored_value
from .stages import rows_per_task
from .stated import stated, task_loop
from .x86_depthwise_lanes import Columns, Rows, narrows

# Dot products that are unrolled; of more the horizontal taps are a loop.
UNROLLED = 160
# Vectors of a row from which on interleaving goes beside the sums.
LONG_ROW = 24
# Parts into which an image is cut at least, if its rows allow it, to be shared by threads: each
# interleaves its weights anew.
PARTS = 16


@dataclass(frozen=True)
class LanesPlan:
    """A depthwise convolution by dot products of interleaved rows.

    Parameters
    ----------
    conv : PackedDepthwise
        Summed by "rows".
    rows : Rows
    columns : Columns
    last : Columns
        Of the last channel block.
    how : str
        The product, of `intrinsics.x86_rows`.
    """

    conv: PackedDepthwise
    rows: Rows
    columns: Columns
    last: Columns
    how: str

    @property
    def steps(self) -> int:
        """Blocks of output rows; the last may overlap the one before."""
        return -(-self.conv.work.oh // self.rows.count)

    @property
    def steps_a_task(self) -> int:
        """Blocks of output rows of a task."""
        return rows_per_task(self.conv.work.n * self.conv.blocks, self.steps, PARTS)

    def schedule(self) -> Any:
        """Return the PrimFunc (data, weight, [bias], [scale], [residual], out)."""
        shape = self.conv.out_shape
        data, weight, operands = declare(self.conv)
        product = ROW_PRODUCTS[self.how]

        def statement(*buffers: Any) -> Any:
            kinds = dict.fromkeys((self.columns, self.last))
            return self._statement(
                [_Emitter(product, self.rows, columns, *buffers) for columns in kinds]
            )

        return stated(data, weight, operands, data, shape, shape, statement, [])

    def _statement(self, emitters: list[_Emitter]) -> Any:
        """Return the parallel loop over images, channel blocks and shares of the rows.

        A second emitter is the last channel block's.
        """
        conv = self.conv
        shares = self.steps // self.steps_a_task
        tasks = conv.work.n * conv.blocks * shares
        task, step = (tir.Var(name, "int32") for name in ("task", "step"))
        image = tir.floordiv(task, i32(shares))
        n, cb = tir.floordiv(image, i32(conv.blocks)), tir.floormod(image, i32(conv.blocks))
        at = tir.floormod(task, i32(shares)) * self.steps_a_task + step
        y = tir.min(at * self.rows.count, i32(conv.work.oh - self.rows.count))

        def share(emitter: _Emitter) -> Any:
            each = loop(step, self.steps_a_task, emitter.rows_at(n, cb, y))
            return sequence([*emitter.before(cb), each])

        body = share(emitters[0])
        if emitters[1:]:
            body = tir.IfThenElse(cb < conv.blocks - 1, body, share(emitters[1]))
        buffers = [buffer for emitter in emitters for buffer in emitter.buffers]
        return task_loop(task, tasks, [body], buffers)


@dataclass(frozen=True)
class _Place:
    """Image, channel block, output row and column at which a strip of a block of rows begins; and
    which columns [first, last) of each phase are inside the image.
    """

    n: Any
    cb: Any
    y: Any
    start: Any
    ends: list[tuple[Any, Any]]


class _Emitter:
    """The statements of one kernel, for channel blocks of one kind."""

    def __init__(
        self, product: RowProduct, rows: Rows, columns: Columns, data: Any, weight: Any, bias: Any,
        scale: Any, residual: Any, out: Any,
    ) -> None:  # fmt: skip
        self.product = product
        self.conv, self.rows, self.columns = columns.conv, rows, columns
        self.data, self.weight, self.out = data, weight, out
        self.bias, self.scale, self.residual = bias, scale, residual
        work = self.conv.work
        phases, lanes = len(columns.phases), columns.count * columns.lanes
        self.lines = tir.decl_buffer((phases, rows.groups, 4, lanes * LANE), "uint8", "lines")
        spare = columns.operand_lanes
        shape = (len(rows.pairs), work.kw, 4, product.parts, spare * self.elements)
        self.taps = tir.decl_buffer(shape, product.dtype, "taps")
        self.biases = tir.decl_buffer((4, spare * 4), "int32", "biases")
        self.scales = tir.decl_buffer((4, spare * 4), "float32", "scales")
        self.count = 4 * columns.computed  # sums of a vector
        # One buffer each: together they would be too large for TVM to leave them on the stack.
        self.sums = [
            tir.decl_buffer((4, self.count), "int32", f"sums{row}") for row in range(rows.count)
        ]
        self.ordered = tir.decl_buffer((4 * self.count,), "float32", "ordered")

    @property
    def elements(self) -> int:
        """Weights of a lane in one vector of them."""
        return LANE // self.product.parts

    @property
    def buffers(self) -> list[Any]:
        """The buffers that a task needs."""
        optional = ((self.bias, self.biases), (self.scale, self.scales))
        optional += ((self.residual, self.ordered),)
        used = [buffer for operand, buffer in optional if operand is not None]
        return [self.lines, self.taps, *self.sums, *used]

    def before(self, cb: Any) -> list[Any]:
        """Return what a task does once: operands in order, and borders that nothing writes to."""
        borders = self.columns.bordered and not self.columns.starts[1:]
        return [*self._operands(cb), *(self._borders(self.columns.ends) if borders else [])]

    def rows_at(self, n: Any, cb: Any, y: Any) -> list[Any]:
        """Return what computes the block of output rows from y on, strip by strip."""
        columns, starts = self.columns, self.columns.starts
        if not starts[1:]:
            return self._strip(_Place(n, cb, y, i32(0), columns.ends))
        strip, start = tir.Var("strip", "int32"), tir.Var("start", "int32")
        binds = [tir.Bind(start, tir.min(strip * columns.width, i32(starts[-1])))]
        ends = []
        for p, phase in enumerate(columns.phases):
            first, last = tir.Var(f"first{p}", "int32"), tir.Var(f"last{p}", "int32")
            bounds = columns.inside(start, phase)
            binds += [tir.Bind(first, bounds[0]), tir.Bind(last, bounds[1])]
            ends.append((first, last))
        each = self._strip(_Place(n, cb, y, start, ends))
        if columns.bordered:
            each = [*self._borders(ends), *each]
        return [loop(strip, len(starts), [*binds, *each])]

    def _strip(self, at: _Place) -> list[Any]:
        """Return what computes a strip of a block of rows; rows outside of the image are checked
        for only where there are some.
        """
        work = self.conv.work
        stmts = self._beside(at) if self.beside else self._apart(at, checked=False)
        if not work.padding[0] and not work.padding[2]:
            return stmts
        top = self._top(at)
        inside = tir.all(top >= 0, top + (self.rows.span - 1) * self.rows.unit < work.ih)
        checked = sequence(self._apart(at, checked=True))
        return [tir.IfThenElse(inside, sequence(stmts), checked)]

    @property
    def beside(self) -> bool:
        """Whether vectors are interleaved beside sums, since that takes one port and these two.

        Only much of it, and in long rows, pays for what is interleaved twice.
        """
        columns = self.columns
        much = self.rows.groups > 1 or self.conv.work.strides[1] > 1
        return much and columns.alike and columns.vectors >= LONG_ROW

    def _apart(self, at: _Place, checked: bool) -> list[Any]:
        """Return the loops that interleave, and behind them the one that computes."""
        columns, stmts = self.columns, []
        for p, (first, last) in enumerate(at.ends):
            q = tir.Var("q", "int32")
            lanes = (last - first) * columns.lanes
            count = tir.floordiv(lanes + i32(columns.gathered - 1), i32(columns.gathered))
            stmts.append(loop(q, count, self._interleave(at, p, q, checked)))
        q = tir.Var("q", "int32")
        return [*stmts, loop(q, columns.vectors, self._outputs(at, q))]

    def _beside(self, at: _Place) -> list[Any]:
        """Return the loop that interleaves some vectors ahead of those that it computes."""
        columns = self.columns
        ahead = columns.ahead
        first, q = tir.Var("q", "int32"), tir.Var("q", "int32")

        def all_phases(number: Any) -> list[Any]:
            phases = range(len(columns.phases))
            return [s for p in phases for s in self._interleave(at, p, number, checked=False)]

        return [
            loop(first, ahead, all_phases(first)),
            loop(q, columns.vectors, [*all_phases(q + ahead), *self._outputs(at, q)]),
        ]

    # ------------------------------------------------------------ operands of the channels

    def _operands(self, cb: Any) -> list[Any]:
        """Return what brings weights, bias and scale into the order of the sums."""
        columns, stmts = self.columns, []
        vector = columns.computed
        for lane in range(0, columns.operand_lanes, vector):
            lane = min(lane, columns.operand_lanes - vector)
            for pair, (row, group) in enumerate(self.rows.pairs):
                kw, taps = tir.Var("kw", "int32"), self.rows.taps(row, group)
                tiles = interleaved([self._tap(cb, tap, kw, lane) for tap in taps])
                where = ramp(i32(lane * self.elements), vector * self.elements)
                stores = [
                    tir.BufferStore(self.taps, part, [i32(pair), kw, i32(v), i32(p), where])
                    for v, tile in enumerate(tiles)
                    for p, part in enumerate(self.product.weights(tile))
                ]
                stmts.append(loop(kw, self.conv.work.kw, stores))
        moved = ((self.bias, self.biases), (self.scale, self.scales))
        for source, target in moved:
            if source is None:
                continue
            for lane in range(columns.operand_lanes):
                for v in range(4):
                    channel = lane % columns.lanes * LANE + 4 * v
                    value = tir.BufferLoad(source, [cb, ramp(i32(channel), 4)])
                    index = [i32(v), ramp(i32(4 * lane), 4)]
                    stmts.append(tir.BufferStore(target, value, index))
        return stmts

    def _tap(self, cb: Any, tap: int | None, kw: Any, lane: int) -> Any:
        """Return the weights of a tap for a vector of lanes; zero if there is none."""
        vector = self.columns.computed
        if tap is None:
            return tir.Broadcast(tir.const(0, "int8"), vector * LANE)

        def load(at: Any, count: int) -> Any:
            index = [cb, i32(tap), kw, ramp(at, count)]
            return tir.BufferLoad(self.weight, index)

        return self._pieces(lane, vector, load)

    def _pieces(self, lane: int, count: int, load: Any) -> Any:
        """Return `count` lanes from one on, of a pixel repeated as often as needed."""
        lanes, parts = self.columns.lanes, []
        while count:
            first = lane % lanes
            run = min(count, lanes - first)
            run = max(v for v in (1, 2, 4) if v <= run)
            parts.append((load(i32(first * LANE), run * LANE), run * LANE))
            lane, count = lane + run, count - run
        return _joined(parts)

    # ------------------------------------------------------------ rows of the image

    def _borders(self, ends: list[tuple[Any, Any]]) -> list[Any]:
        """Return what fills the columns outside of the image."""
        columns, stmts = self.columns, []
        for p, (first, last) in enumerate(ends):
            for begin, end in ((0, first), (last, columns.count)):
                if isinstance(begin, int) and isinstance(end, int) and begin == end:
                    continue
                lane = tir.Var("lane", "int32")
                where = ramp((begin * columns.lanes + lane) * LANE, LANE)
                fills = [
                    tir.BufferStore(
                        self.lines, self._border(LANE), [i32(p), i32(group), i32(v), where]
                    )
                    for group in range(self.rows.groups) for v in range(4)
                ]  # fmt: skip
                stmts.append(loop(lane, (end - begin) * columns.lanes, fills))
        return stmts

    def _border(self, count: int) -> Any:
        return tir.Broadcast(tir.const(self.conv.padded.data_zero_point, "uint8"), count)

    def _top(self, at: _Place) -> Any:
        """Return the first row of the image that a block of output rows reads."""
        return at.y * self.conv.work.strides[0] - self.conv.work.padding[0]

    def _interleave(self, at: _Place, p: int, number: Any, checked: bool) -> list[Any]:
        """Return what interleaves a vector of a phase, the last one where there is no such number.

        checked : whether rows may be outside of the image.
        """
        columns, work, rows = self.columns, self.conv.work, self.rows
        vector = columns.gathered
        width = vector * LANE
        first, last = at.ends[p]
        end = (last - first) * columns.lanes - vector
        lane = tir.Var("lane", "int32")
        stmts = [tir.Bind(lane, first * columns.lanes + tir.min(number * vector, end))]
        for group in range(rows.groups):
            loaded = []
            for t in range(4):
                row, value = self._top(at) + (4 * group + t) * rows.unit, self._border(width)
                if 4 * group + t < rows.span:
                    value = self._row(at, row, columns.phases[p], lane)
                    if checked:
                        inside = tir.all(row >= 0, row < work.ih)
                        value = tir.if_then_else(inside, value, self._border(width))
                loaded.append(tir.Var(f"row{t}", compat.dtype_of(value)))
                stmts.append(tir.Bind(loaded[-1], value))
            for v, tile in enumerate(interleaved(loaded)):
                index = [i32(p), i32(group), i32(v), ramp(lane * LANE, width)]
                stmts.append(tir.BufferStore(self.lines, tile, index))
        return stmts

    def _row(self, place: _Place, row: Any, phase: int, lane: Any) -> Any:
        """Return a vector of a phase's lanes of a row, as uint8."""
        columns, work = self.columns, self.conv.work
        stride, block = work.strides[1], self.conv.block
        column = place.start * stride + (phase - work.padding[1])
        vector = columns.gathered

        def load(at: Any, count: int) -> Any:
            return tir.BufferLoad(self.data, [place.n, place.cb, row, column, ramp(at, count)])

        lanes = i32(columns.lanes)
        x, within = tir.floordiv(lane, lanes), tir.floormod(lane, lanes)
        if stride == 1 and columns.dense:
            value = load(lane * LANE, vector * LANE)
        elif columns.lanes % vector == 0:
            value = load(x * (stride * block) + within * LANE, vector * LANE)
        else:
            pixels, size = range(vector // columns.lanes), columns.lanes * LANE
            value = _joined([(load((x + i) * (stride * block), size), size) for i in pixels])
        if work.data_dtype == "int8":
            value = tir.reinterpret(f"uint8x{vector * LANE}", value)
            value = value ^ tir.Broadcast(tir.const(128, "uint8"), vector * LANE)
        return value

    # ------------------------------------------------------------ sums and outputs

    def _outputs(self, at: _Place, q: Any) -> list[Any]:
        """Return what computes the q-th vector of a strip's outputs."""
        columns = self.columns
        lane = tir.Var("lane", "int32")
        first = tir.min(q * columns.computed, i32(columns.width * columns.lanes - columns.computed))
        stmts = [tir.Bind(lane, first), *self._sums(lane)]
        for row in range(self.rows.count):
            stmts += self._stores(at, lane, row)
        return stmts

    def _sums(self, lane: Any) -> list[Any]:
        work, at, stmts = self.conv.work, self.columns.operand(lane), []
        for sums in self.sums:
            for v in range(4):
                value = tir.Broadcast(i32(0), self.count)
                if self.bias is not None:
                    value = tir.BufferLoad(self.biases, [i32(v), ramp(at * 4, self.count)])
                stmts.append(tir.BufferStore(sums, value, [i32(v), ramp(i32(0), self.count)]))
        # A pass of the loop over horizontal taps takes one of each phase.
        a_pass = work.strides[1]
        passes = work.kw // a_pass if 4 * work.kw * len(self.rows.pairs) > UNROLLED else 0
        if passes:
            k = tir.Var("k", "int32")
            taps = [s for j in range(a_pass) for s in self._products(lane, at, j, k * a_pass)]
            stmts.append(loop(k, passes, taps))
        for kw in range(passes * a_pass, work.kw):
            stmts += self._products(lane, at, kw, i32(0))
        return stmts

    def _products(self, lane: Any, at: Any, kw: int, more: Any) -> list[Any]:
        """Return the dot products of horizontal tap `kw` + `more`, a multiple of the stride: each
        vector of data serves all rows.
        """
        columns, stmts, width = self.columns, [], self.columns.computed * LANE
        phase, offset = columns.tap(kw)
        work = self.conv.work
        offset += tir.floordiv(more, i32(work.strides[1])) * work.dilation[1]
        for group in range(self.rows.groups):
            pairs = [(i, row) for i, (row, g) in enumerate(self.rows.pairs) if g == group]
            for v in range(4):
                first = (lane + offset * columns.lanes) * LANE
                index = [i32(phase), i32(group), i32(v), ramp(first, width)]
                data = tir.Var("data", f"uint8x{width}")
                stmts.append(tir.Bind(data, tir.BufferLoad(self.lines, index)))
                for pair, row in pairs:
                    own = ramp(at * self.elements, columns.computed * self.elements)
                    weights = [
                        tir.BufferLoad(self.taps, [i32(pair), more + kw, i32(v), i32(part), own])
                        for part in range(self.product.parts)
                    ]
                    where = [i32(v), ramp(i32(0), self.count)]
                    total = tir.BufferLoad(self.sums[row], where)
                    total = self.product.add(total, data, *weights)
                    stmts.append(tir.BufferStore(self.sums[row], total, where))
        return stmts

    def _stores(self, place: _Place, lane: Any, row: int) -> list[Any]:
        """Return what makes outputs of the sums of one of a block's rows, and stores them."""
        epi, at = self.conv.work.epilogue, self.columns.operand(lane) * 4
        to = place.start * self.columns.lanes + lane
        sums, values = self.sums[row], []
        for v in range(4):
            total = tir.BufferLoad(sums, [i32(v), ramp(i32(0), self.count)])
            scale = None
            if self.scale is not None:
                scale = tir.BufferLoad(self.scales, [i32(v), ramp(at, self.count)])
            if narrows(epi) or self.residual is not None:
                values.append(real_value(epi, total, scale, None))
            else:
                values.append(apply(epi, total, None, scale, None))

        if not narrows(epi):
            return self._in_pieces(place, to, row, values)
        width = self.columns.computed * LANE
        words = narrowed_values(epi, values, converts=True)
        packed = tir.reinterpret(f"{epi.out_dtype}x{width}", words)
        if self.columns.dense:
            index = self._where(place, row, to * LANE, width)
            return [tir.BufferStore(self.out, packed, index)]
        return self._padded(packed, place, row, tir.floordiv(to, i32(self.columns.lanes)))

    @staticmethod
    def _where(place: _Place, row: int, first: Any, count: int) -> list[Any]:
        """Return the index of bytes of one of a block's output rows."""
        return [place.n, place.cb, place.y + row, i32(0), ramp(first, count)]

    def _in_pieces(self, place: _Place, to: Any, row: int, values: list[Any]) -> list[Any]:
        """Return the stores of wider outputs, and of those with a residual: each vector has four
        neighbours of a lane, which meet a residual in order.
        """
        epi, lanes, stmts = self.conv.work.epilogue, range(self.columns.computed), []
        for v, value in enumerate(values):
            named = tir.Var("value", compat.dtype_of(value))
            stmts.append(tir.Bind(named, value))
            for i in lanes:
                part = tir.Shuffle([named], [i32(4 * i + j) for j in range(4)])
                first = i * LANE + 4 * v
                target, index = self.ordered, [ramp(i32(first), 4)]
                if self.residual is None:
                    target, index = self.out, self._where(place, row, to * LANE + first, 4)
                stmts.append(tir.BufferStore(target, part, index))
        if self.residual is None:
            return stmts
        for i in lanes:
            index = self._where(place, row, (to + i) * LANE, LANE)
            value = tir.BufferLoad(self.ordered, [ramp(i32(i * LANE), LANE)])
            value = real_value(epi, value, None, tir.BufferLoad(self.residual, index))
            stmts.append(tir.BufferStore(self.out, stored_value(epi, value), index))
        return stmts

    def _padded(self, packed: Any, place: _Place, row: int, x: Any) -> list[Any]:
        """Return the stores of whole pixels, from the x-th on: padding is the zero point."""
        size, block, epi = self.columns.lanes * LANE, self.conv.block, self.conv.work.epilogue
        named = tir.Var("packed", compat.dtype_of(packed))
        rest = tir.Broadcast(tir.const(epi.out_zero_point, epi.out_dtype), block - size)
        stmts = [tir.Bind(named, packed)]
        for i in range(self.columns.computed // self.columns.lanes):
            own = tir.Shuffle([named], [i32(i * size + j) for j in range(size)])
            pixel = _joined([(own, size), (rest, block - size)])
            index = self._where(place, row, (x + i) * block, block)
            stmts.append(tir.BufferStore(self.out, pixel, index))
        return stmts


def _joined(parts: list[tuple[Any, int]]) -> Any:
    """Return one vector of several, each given with its length."""
    if len(parts) == 1:
        return parts[0][0]
    total = sum(count for _, count in parts)
    return tir.Shuffle([vector for vector, _ in parts], [i32(i) for i in range(total)])
