# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""x86: float32 values rounded, clipped and narrowed to 8 bits, up to four vectors at a time.

The meaning is the end of an epilogue, ``clip(rint(v) + zero_point, low, high)``, in the form that
`compute/epilogue.py` gives it. A vector is clipped below, in float; adding 1.5 * 2**23 leaves its
rounded value in the low bits, to which an integer addition brings the zero point; `vpackssdw` and
`vpackuswb` or `vpacksswb` saturate to the type's range, and one permutation puts the 128-bit lanes
back in order: four operations a vector and four to seven for four of them together, where LLVM
clips and rounds by four or five a vector and takes two for `vpmovdb`. Of these only the clip needs
the multiplier's port; `vcvtps2dq`, which rounds in one, needs it too, and beside AMX there is one.

Why the clip below is not left to saturation: a sum with 1.5 * 2**23 that is negative has bits
which, less the constant's, wrap around int32. Above nothing can: bits of positive floats grow with
their values. Where values are known to be bounded it is left, or to one operation on bytes.

Bounded values can also be rounded by `vcvtps2dq` (`converts`), in three operations a vector, the
zero point added to 16-bit values.

The other end of an epilogue spares that port, too: sums counted from 1.5 * 2**23 are floats
already (`from_bits`), and bytes become floats without a conversion (`shifted`, `spread`).
"""

from __future__ import annotations

from typing import Any

from .compat import i32, lanes_of, pure_call, ramp, tir, unknown_to_llvm

LANES = 16
_RANGE = {"uint8": (0, 255), "int8": (-128, 127)}
# By the number of values in a vector: LLVM's `packssdw`, `packuswb` and `packsswb`.
_PACKS = {16: "avx512.{}.512", 8: "avx2.{}", 4: "sse2.{}.128"}
# Likewise `vcvtps2dq`; the masked form takes the rounding mode that is set.
_CONVERTS = {16: "avx512.mask.cvtps2dq.512", 8: "avx.cvt.ps2dq.256", 4: "sse2.cvtps2dq"}
_ROUNDING_IN_FORCE = 4
_SHUFFLE = "llvm.x86.avx512.pshuf.b.512"
# Adding 1.5 * 2**23 to a float32 rounds it to an integer, which is then in its low bits.
ROUND = 12582912.0
ROUND_BITS = 0x4B400000  # its bit pattern; the low byte is 0


def shifted(values: Any, zero_point: int) -> Any:
    """Return float32x16 of ``values - zero_point``, exactly, for 16 values of 8 bits.

    Where there is a zero point both operations on it are additions, for which beside AMX there are
    two ports: of integers, to the bits of 1.5 * 2**23, and of floats.
    """
    wide = values.astype(f"int32x{LANES}")
    if not zero_point:
        return wide.astype(f"float32x{LANES}")
    bits = wide + tir.Broadcast(tir.const(ROUND_BITS, "int32"), LANES)
    base = tir.Broadcast(tir.const(ROUND + zero_point, "float32"), LANES)
    return tir.reinterpret(f"float32x{LANES}", bits) - base


def spread(row: Any, dtype: str, at: int, zero_point: int) -> Any:
    """Return float32x16 of ``values - zero_point``, exactly, for 16 of 64 bytes: `PACK_ORDER`'s.

    A masked `vpshufb` brings each byte to the low end of the bits of 1.5 * 2**23, which an addition
    takes off again: two operations, none of them the multiplier's.

    Parameters
    ----------
    row : PrimExpr
        64 values in a vector.
    dtype : str
        "uint8" or "int8".
    at : int
        Which of the four vectors.
    zero_point : int
    """
    base = ROUND + zero_point
    row = tir.reinterpret("int8x64", row)
    if dtype == "int8":  # x + 128, unsigned
        row = row ^ tir.Broadcast(tir.const(-128, "int8"), 64)
        base += 128
    # In each lane of 16 bytes, the i-th word's lowest is byte 4 * at + i.
    index = (ramp(i32(0), LANES) & _words(3)) + _words(4 * at)
    moved = pure_call(_SHUFFLE, "int8x64", row, tir.reinterpret("int8x64", index))
    # LLVM, if it knew the mask, would leave it, and take another operation for the bits.
    lowest = tir.reinterpret("int8x64", tir.Broadcast(unknown_to_llvm(255), LANES))
    chosen = lowest < tir.Broadcast(tir.const(0, "int8"), 64)
    bits = tir.Select(chosen, moved, tir.reinterpret("int8x64", _words(ROUND_BITS)))
    floats = tir.reinterpret(f"float32x{LANES}", bits)
    return floats - tir.Broadcast(tir.const(base, "float32"), LANES)


def _words(value: int) -> Any:
    return tir.Broadcast(i32(value), LANES)


def from_bits(sums: Any) -> Any:
    """Return float32x16 of int32 sums that were counted from `ROUND_BITS`: one addition, exact.

    Those bits are the float32 1.5 * 2**23 + sum, as long as the sum's magnitude is below 2**22.
    """
    floats = tir.reinterpret(f"float32x{LANES}", sums)
    return floats - tir.Broadcast(tir.const(ROUND, "float32"), LANES)


# The 32-bit word at which `narrowed` leaves each group of four values.
WORDS = tuple(4 * (w % 4) + w // 4 for w in range(16))
# Which of 64 channels each value of four vectors is, for `narrowed` to leave them in their order.
PACK_ORDER = tuple(4 * WORDS[at // 4] + at % 4 for at in range(64))


def narrowed(
    values: list[Any], dtype: str, zero_point: int, low: int, high: int, bounded: bool = False,
    converts: bool = False,
) -> Any:  # fmt: skip
    """Return an int32 vector with the values clipped, rounded and narrowed to 8 bits, four in a
    word; 128-bit lane by lane, all vectors' values of one before those of the next (`WORDS`).

    Parameters
    ----------
    values : list of PrimExpr
        One, two or four float32x16, or as many of float32x8 or x4.
    dtype : str
        "uint8" or "int8".
    zero_point : int
        Added after rounding.
    low, high : int
        Bounds of the result.
    bounded : bool
        Whether every value is between -2**23 and 2**23: nothing wraps.
    converts : bool
        Whether bounded values are rounded by `vcvtps2dq`.

    Raises
    ------
    ValueError
        For another dtype, number or length of vectors, or bounds that are not the type's.
    """
    if dtype not in _RANGE:
        raise ValueError(f"dtype is {dtype}; allowed: uint8, int8")
    if len(values) not in (1, 2, 4):
        raise ValueError(f"{len(values)} values; allowed: 1, 2 or 4 vectors")
    least, most = _RANGE[dtype]
    if not least <= low <= high <= most:
        raise ValueError(f"low, high are {low}, {high}; allowed: within {least}, {most}")
    lanes = lanes_of(values[0])
    if lanes not in _PACKS:
        raise ValueError(f"vectors are of {lanes} values; allowed: {', '.join(map(str, _PACKS))}")

    def many(value: Any, count: int = lanes) -> Any:
        return tir.Broadcast(value, count)

    def packs(name: str, result: str, first: Any, second: Any) -> Any:
        return pure_call("llvm.x86." + _PACKS[lanes].format(name), result, first, second)

    bottom = many(tir.const(float(low - zero_point), "float32"))
    magic = many(tir.const(ROUND, "float32"))
    shift = many(tir.const(zero_point - ROUND_BITS, "int32"))
    converts = converts and bounded
    if converts:
        whole = [_converted(value, lanes) for value in values]
    else:
        clipped = values if bounded else [tir.max(value, bottom) for value in values]
        whole = [tir.reinterpret(f"int32x{lanes}", value + magic) + shift for value in clipped]
    # A lone vector, and a lone pair, has itself for a partner.
    halves = [
        packs("packssdw", f"int16x{2 * lanes}", first, second)
        for first, second in zip(whole[::2], whole[1::2] or whole, strict=True)
    ]
    if converts and zero_point:
        words = many(tir.const(zero_point, "int16"), 2 * lanes)
        add = f"llvm.sadd.sat.v{2 * lanes}i16"
        halves = [pure_call(add, f"int16x{2 * lanes}", half, words) for half in halves]
    pack = "packuswb" if dtype == "uint8" else "packsswb"
    packed = packs(pack, f"{dtype}x{4 * lanes}", halves[0], halves[-1])
    if bounded and low > least:
        packed = tir.max(packed, many(tir.const(low, dtype), 4 * lanes))
    if high < most:
        packed = tir.min(packed, many(tir.const(high, dtype), 4 * lanes))
    return tir.reinterpret(f"int32x{lanes}", packed)


def in_order(words: Any, dtype: str, first: int, count: int) -> Any:
    """Return `count` of the vectors that were `narrowed` together, from `first` on, as 8 bits."""
    lanes = lanes_of(words)
    inside = [word for word in WORDS if word < lanes]
    order = inside[first * lanes // 4 : (first + count) * lanes // 4]
    row = tir.Shuffle([words], [i32(word) for word in order])
    return tir.reinterpret(f"{dtype}x{count * lanes}", row)


def _converted(value: Any, lanes: int) -> Any:
    """Return a vector rounded to int32 by `vcvtps2dq`."""
    operands = [value]
    if lanes == LANES:
        operands.append(tir.Broadcast(tir.const(0, "int32"), lanes))
        operands += [tir.const(-1, "int16"), tir.const(_ROUNDING_IN_FORCE, "int32")]
    return pure_call("llvm.x86." + _CONVERTS[lanes], f"int32x{lanes}", *operands)
