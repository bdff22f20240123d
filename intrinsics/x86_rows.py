# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""x86: four rows of bytes interleaved, and multiplied by four rows of weights.

Both work within 128-bit lanes, as the instructions do: of sixteen neighbouring channels of four
rows come four vectors, the first with channels 0..3 of each lane, the second with 4..7 and so on, a
channel's four rows in one 32-bit word. Narrowing the four vectors of sums (`x86_narrow.narrowed`)
puts the channels back in order: `vpackssdw` and `vpackuswb` undo `vpunpck`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import compat
from .compat import lanes_of, pure_call, tir

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
    total, halves = lanes_of(a), []
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
    dtype, lanes = compat.dtype_of(acc), lanes_of(acc)
    # LLVM 22 changed the operands from int32 vectors to int8 vectors; same instruction.
    words = f"int8x{4 * lanes}" if compat.llvm_major() >= 22 else dtype
    a, b = (tir.reinterpret(words, value) for value in (data, weight))
    return pure_call(f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", dtype, acc, a, b)


# LLVM's names by the number of int32 lanes.
_MADDUBSW = {16: "avx512.pmaddubs.w.512", 8: "avx2.pmadd.ub.sw", 4: "ssse3.pmadd.ub.sw.128"}
_MADDWD = {16: "avx512.pmaddw.d.512", 8: "avx2.pmadd.wd", 4: "sse2.pmadd.wd"}


def maddwd(acc: Any, a: Any, b: Any) -> Any:
    """Return ``acc[i] + a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1]`` for int16 vectors."""
    lanes = lanes_of(acc)
    return acc + pure_call(f"llvm.x86.{_MADDWD[lanes]}", f"int32x{lanes}", a, b)


def vpmaddubsw(acc: Any, data: Any, weight: Any) -> Any:
    """Return what `vpdpbusd` does, as long as no sum of two products leaves int16."""
    lanes = lanes_of(acc)
    name = f"llvm.x86.{_MADDUBSW[lanes]}"
    pairs = pure_call(name, f"int16x{2 * lanes}", data, weight)
    return maddwd(acc, pairs, tir.Broadcast(tir.const(1, "int16"), 2 * lanes))


def vpmaddwd(acc: Any, data: Any, even: Any, odd: Any) -> Any:
    """Return what `vpdpbusd` does; `even` and `odd` are every other weight, as int16."""
    lanes = lanes_of(acc)
    words = tir.reinterpret(f"int16x{2 * lanes}", data)
    low = words & tir.Broadcast(tir.const(255, "int16"), 2 * lanes)
    high = tir.reinterpret(f"uint16x{2 * lanes}", data)
    high = high >> tir.Broadcast(tir.const(8, "uint16"), 2 * lanes)
    acc = maddwd(acc, low, even)
    return maddwd(acc, tir.reinterpret(f"int16x{2 * lanes}", high), odd)


def _whole(tile: Any) -> list[Any]:
    return [tile]


def _halves(tile: Any) -> list[Any]:
    """Return the even and the odd elements of an int8 vector as int16."""
    lanes = lanes_of(tile) // 2
    words = tir.reinterpret(f"int16x{lanes}", tile)
    byte = tir.Broadcast(tir.const(8, "int16"), lanes)
    return [(words << byte) >> byte, words >> byte]


@dataclass(frozen=True)
class RowProduct:
    """How the four rows of each channel are multiplied and added up.

    Parameters
    ----------
    mnemonic : str
        The instruction.
    dtype : str
        Of the weights as they are read.
    weights : callable
        An int8 vector of interleaved weights -> the vectors of `dtype` that `add` takes.
    add : callable
        (int32 sums, uint8 data, *weights) -> sums; see `vpdpbusd`.
    parts : int
        Vectors of weights.
    """

    mnemonic: str
    dtype: str
    weights: Callable[[Any], list[Any]]
    add: Callable[..., Any]
    parts: int = 1


ROW_PRODUCTS = {
    "vpdpbusd": RowProduct("vpdpbusd", "int8", _whole, vpdpbusd),
    "vpmaddubsw": RowProduct("vpmaddubsw", "int8", _whole, vpmaddubsw),
    "vpmaddwd": RowProduct("vpmaddwd", "int16", _halves, vpmaddwd, parts=2),
}
