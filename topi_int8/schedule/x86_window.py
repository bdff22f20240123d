# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Rows of a narrow image woven together, with borders: what a window over several rows reads.

Four channels of a pixel are one 32-bit word; sixteen words of each of a window's rows are loaded,
shuffled so that a column's words lie side by side, and stored. LLVM would copy word by word.
"""

from __future__ import annotations

from typing import Any

from tvm import te

from intrinsics.compat import i32, loop, tir

from ..compute.conv2d import PackedConv2d, pad_stage

COLUMNS = 16  # of one pass: a vector of words
CHANNELS = 4


def weaves(conv: PackedConv2d) -> bool:
    """Whether `woven` can make what the convolution reads."""
    return conv.window and conv.in_block == CHANNELS and conv.work.iw >= COLUMNS


def woven(conv: PackedConv2d, data: Any) -> Any:
    """Return stage "pad" of a convolution with windows; its loops are scheduled.

    Parameters
    ----------
    conv : PackedConv2d
        For which `weaves`.
    data : te.Tensor
        (n, 1, ih, iw, 4).
    """
    shape = pad_stage(conv, data).shape

    def emit(ins: list[Any], outs: list[Any]) -> Any:
        return _Weaver(conv, ins[0], outs[0], [int(extent) for extent in shape]).statement()

    return te.extern(shape, [data], emit, name="pad", dtype=conv.data_dtype)


class _Weaver:
    """The statements of one copy."""

    def __init__(self, conv: PackedConv2d, source: Any, out: Any, shape: list[int]) -> None:
        self.conv, self.source, self.out = conv, source, out
        self.images, _, self.rows, self.bytes = shape
        self.word = CHANNELS * conv.window_rows  # bytes of a column

    def statement(self) -> Any:
        """Return the loop over rows of the copy."""
        row = tir.Var("row", "int32")
        n, y = tir.floordiv(row, self.rows), tir.floormod(row, self.rows)
        total = self.images * self.rows
        return loop(row, total, self._row(n, y), parallel=total > 1)

    def _row(self, n: Any, y: Any) -> list[Any]:
        work = self.conv.work
        top, left, _, _ = work.padding
        columns = self.bytes // self.word
        stmts = [self._fill(n, y, 0, left), self._fill(n, y, left + work.iw, columns)]
        sources = []
        for p in range(self.conv.window_rows):
            at = y * self.conv.window_grain + (p - top)
            inside = tir.all(at >= 0, at < work.ih)
            sources.append((inside, tir.max(tir.min(at, work.ih - 1), 0)))
        chunk = tir.Var("chunk", "int32")
        x = tir.min(chunk * COLUMNS, i32(work.iw - COLUMNS))
        count = -(-work.iw // COLUMNS)
        stmts.append(loop(chunk, count, self._columns(n, y, x, sources)))
        return [stmt for stmt in stmts if stmt is not None]

    def _columns(self, n: Any, y: Any, x: Any, sources: list[Any]) -> list[Any]:
        conv, f = self.conv, self.conv.window_rows
        lanes = COLUMNS * CHANNELS
        border = tir.Broadcast(tir.const(conv.data_zero_point, conv.data_dtype), lanes)
        stmts, rows = [], []
        for p, (inside, at) in enumerate(sources):
            index = [n, i32(0), at, x, tir.Ramp(0, 1, lanes)]
            loaded = tir.BufferLoad(self.source, index)
            words = tir.reinterpret(f"int32x{COLUMNS}", tir.Select(inside, loaded, border))
            rows.append(tir.Var(f"row{p}", f"int32x{COLUMNS}"))
            stmts.append(tir.Bind(rows[p], words))
        for part in range(f):
            # Word w of the copy is column w // f of row w % f.
            at = range(part * COLUMNS, (part + 1) * COLUMNS)
            order = [i32(w % f * COLUMNS + w // f) for w in at]
            value = tir.reinterpret(f"{conv.data_dtype}x{lanes}", tir.Shuffle(rows, order))
            first = (x + conv.work.padding[1]) * self.word + part * lanes
            stmts.append(self._store(n, y, first, value, lanes))
        return stmts

    def _fill(self, n: Any, y: Any, first: int, end: int) -> Any:
        """Return the loop that fills columns with the zero point, or None."""
        if end <= first:
            return None
        column = tir.Var("column", "int32")
        zero = tir.const(self.conv.data_zero_point, self.conv.data_dtype)
        value = tir.Broadcast(zero, CHANNELS)
        body = self._store(n, y, first * self.word + column * CHANNELS, value, CHANNELS)
        count = (end - first) * self.conv.window_rows
        return loop(column, count, [body])

    def _store(self, n: Any, y: Any, first: Any, value: Any, lanes: int) -> Any:
        index = [n, i32(0), y, tir.Ramp(first, 1, lanes)]
        return tir.BufferStore(self.out, value, index)
