# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""x86: weights of 4 or 2 bits, two or four in a byte, made int8 again by `vgf2p8affineqb`.

The instruction multiplies each byte, a vector of 8 bits, by an 8x8 matrix of bits. Taking a few
neighbouring bits and repeating the topmost of them, which is their sign, is such a product: one
operation a vector of weights, where shifts and masks take three and leave the weight times 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compat import lanes_of, pure_call, tir

FEATURE = "gfni"  # LLVM's name of what a target must have
# Bits of a weight that can be unpacked.
BITS = (4, 2)


def bounds(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest weight of so many bits."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def packed(weight: np.ndarray, bits: int) -> np.ndarray:
    """Return int8 weights, neighbours of the first dimension together in a byte.

    Parameters
    ----------
    weight : (n, ...) int8 array
        Within `bounds`; n is a multiple of ``8 // bits``.
    bits : int
        One of `BITS`.

    Returns
    -------
    (n * bits / 8, ...) int8 array
        Weight ``i * 8 / bits + p`` in bits ``p * bits`` and up of byte i, in two's complement.

    Raises
    ------
    ValueError
        For other bits, or a weight that does not fit.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; allowed: {', '.join(map(str, BITS))}")
    low, high = bounds(bits)
    if weight.size and not low <= weight.min() <= weight.max() <= high:
        raise ValueError(
            f"weights span [{weight.min()}, {weight.max()}]; allowed in {bits} bits: {low}..{high}"
        )
    each = weight.reshape(-1, 8 // bits, *weight.shape[1:]).view("uint8")
    out = np.zeros((each.shape[0], *each.shape[2:]), "uint8")
    for part in range(8 // bits):
        out |= (each[:, part] & ((1 << bits) - 1)) << (part * bits)
    return out.view("int8")


def matrix(bits: int, part: int) -> int:
    """Return the 8x8 matrix, an int64, that takes the `part`-th weight out of a byte.

    Its byte ``7 - i`` holds the bits whose parity is bit i of the result (Intel 64 Software
    Developer's Manual, volume 2, GF2P8AFFINEQB).
    """
    if bits not in BITS or not 0 <= part < 8 // bits:
        raise ValueError(f"bits, part are {bits}, {part}; allowed: 4, 0..1; 2, 0..3")
    rows = [1 << part * bits + min(bit, bits - 1) for bit in range(8)]
    return int.from_bytes(bytes(rows), "big", signed=True)


def unpacked(vector: Any, bits: int, part: int) -> Any:
    """Return the `part`-th weight of each byte of a vector, as int8.

    Parameters
    ----------
    vector : PrimExpr
        int8x64, int8x32 or int8x16.
    bits, part : int
        As `packed` has them.
    """
    lanes = lanes_of(vector)
    rows = tir.Broadcast(tir.const(matrix(bits, part), "int64"), lanes // 8)
    operands = vector, tir.reinterpret(f"int8x{lanes}", rows), tir.const(0, "int8")
    return pure_call(f"llvm.x86.vgf2p8affineqb.{8 * lanes}", f"int8x{lanes}", *operands)
