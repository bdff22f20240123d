# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""x86: four rows of bytes interleaved, and multiplied by four rows of weights.

Both work within 128-bit lanes, as the instructions do: of sixteen neighbouring channels of four
rows come four vectors, the first with channels 0..3 of each lane, the second with 4..7 and so on, a
channel's four rows in one 32-bit word. Narrowing the four vectors of sums (`x86_narrow.narrowed`)
puts the channels back in order: `vpackssdw` and `vpackuswb` undo `vpunpck`.
"""

from __future__ import annotations

from typing import Any

from . import compat
from .compat import pure_call, tir

LANE = 16  # bytes


def interleaved(rows: list[Any]) -> list[Any]:
    """Return four vectors in which each channel's four rows lie side by side: eight `vpunpck`.

    Parameters
    ----------
    rows : list of PrimExpr
        Four uint8 or int8 vectors of 16, 32 or 64 channels.

    Raises
    ------
    ValueError
        For another number of rows.
    """
    if len(rows) != 4:
        raise ValueError(f"{len(rows)} rows; allowed: 4")
    first, second = _unpacked(rows[0], rows[1], 1), _unpacked(rows[2], rows[3], 1)
    return [
        half for low, high in zip(first, second, strict=True) for half in _unpacked(low, high, 2)
    ]


def _unpacked(a: Any, b: Any, size: int) -> list[Any]:
    """Return `vpunpckl` and `vpunpckh` of units of `size` bytes."""
    dtype, _, count = compat.dtype_of(a).partition("x")
    total = int(count)
    halves = []
    for start in (0, LANE // 2):
        order = [
            side * total + lane + start + at + byte
            for lane in range(0, total, LANE)
            for at in range(0, LANE // 2, size)
            for side in (0, 1)
            for byte in range(size)
        ]
        halves.append(tir.Shuffle([a, b], [compat.i32(i) for i in order]))
    return halves


def vpdpbusd(acc: Any, data: Any, weight: Any) -> Any:
    """Return ``acc[i] + sum over t < 4 of data[4 * i + t] * weight[4 * i + t]``.

    Parameters
    ----------
    acc : PrimExpr
        int32x4, int32x8 or int32x16.
    data, weight : PrimExpr
        uint8 and int8 vectors of four times as many elements.
    """
    dtype = compat.dtype_of(acc)
    bits = 32 * int(dtype.partition("x")[2])
    # LLVM 22 changed the operands from int32 vectors to int8 vectors; same instruction.
    words = f"int8x{bits // 8}" if compat.llvm_major() >= 22 else dtype
    a, b = (tir.reinterpret(words, value) for value in (data, weight))
    return pure_call(f"llvm.x86.avx512.vpdpbusd.{bits}", dtype, acc, a, b)
