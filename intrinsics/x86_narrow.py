# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""AVX-512: float32 values rounded, clipped and narrowed to 8 bits, up to four vectors at a time.

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
"""

from __future__ import annotations

from typing import Any

from .compat import pure_call, tir

LANES = 16
_RANGE = {"uint8": (0, 255), "int8": (-128, 127)}
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


# The 32-bit word at which `narrowed` leaves each group of four values.
WORDS = tuple(4 * (w % 4) + w // 4 for w in range(16))


def narrowed(
    values: list[Any], dtype: str, zero_point: int, low: int, high: int, bounded: bool = False
) -> Any:
    """Return int32x16 with the values clipped, rounded and narrowed to 8 bits, four in a word.

    Parameters
    ----------
    values : list of PrimExpr
        One, two or four float32x16.
    dtype : str
        "uint8" or "int8".
    zero_point : int
        Added after rounding.
    low, high : int
        Bounds of the result.
    bounded : bool
        Whether no value is -2**23 or less: the sum is then positive, and nothing wraps.

    Raises
    ------
    ValueError
        For another dtype, number of vectors, or bounds that are not the type's.
    """
    if dtype not in _RANGE:
        raise ValueError(f"dtype is {dtype}; allowed: uint8, int8")
    if len(values) not in (1, 2, 4):
        raise ValueError(f"{len(values)} values; allowed: 1, 2 or 4 vectors")
    least, most = _RANGE[dtype]
    if not least <= low <= high <= most:
        raise ValueError(f"low, high are {low}, {high}; allowed: within {least}, {most}")

    def many(value: Any, lanes: int) -> Any:
        return tir.Broadcast(value, lanes)

    bottom = many(tir.const(float(low - zero_point), "float32"), LANES)
    magic = many(tir.const(ROUND, "float32"), LANES)
    shift = many(tir.const(zero_point - ROUND_BITS, "int32"), LANES)
    clipped = values if bounded else [tir.max(value, bottom) for value in values]
    whole = [tir.reinterpret(f"int32x{LANES}", value + magic) + shift for value in clipped]
    # A lone vector, and a lone pair, has itself for a partner.
    halves = [
        pure_call("llvm.x86.avx512.packssdw.512", "int16x32", first, second)
        for first, second in zip(whole[::2], whole[1::2] or whole, strict=True)
    ]
    pack = "packuswb" if dtype == "uint8" else "packsswb"
    packed = pure_call(f"llvm.x86.avx512.{pack}.512", f"{dtype}x64", halves[0], halves[-1])
    if bounded and low > least:
        packed = tir.max(packed, many(tir.const(low, dtype), 64))
    if high < most:
        packed = tir.min(packed, many(tir.const(high, dtype), 64))
    return tir.reinterpret("int32x16", packed)
