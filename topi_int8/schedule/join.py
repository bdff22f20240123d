# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Pieces of a batch laid one behind the other.

Written as copies (`te.extern`): an expression that chooses between eight pieces costs as much as a
small convolution.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import te

from intrinsics import compat
from intrinsics.compat import i32, tir

# Elements of a piece below which one task is as fast as several.
_PARALLEL = 32768


def joined(shape: tuple[int, ...], count: int, dtype: str) -> Any:
    """Return the scheduled PrimFunc of (pieces.., out).

    Parameters
    ----------
    shape : tuple of int
        Of each piece; the batch is outermost.
    count : int
        Number of pieces.
    dtype : str
        Of all of them.

    Raises
    ------
    ValueError
        For no pieces, or pieces without a batch.
    """
    if count < 1 or not shape:
        raise ValueError(f"count, shape are {count}, {shape}; allowed: 1 or more, with an axis")
    pieces = [te.placeholder(shape, dtype, f"piece{at}") for at in range(count)]

    def emit(ins: list[Any], outs: list[Any]) -> Any:
        return compat.sequence([copy(piece, outs[0], at) for at, piece in enumerate(ins)])

    def copy(piece: Any, out: Any, at: int) -> Any:
        places = [tir.Var(f"i{axis}", "int32") for axis in range(len(shape))]
        first = [places[0] + i32(at * shape[0]), *places[1:]]
        body = tir.BufferStore(out, tir.BufferLoad(piece, places), first)
        # The outermost axis that tasks can share out.
        shared = next((axis for axis, extent in enumerate(shape) if extent > 1), 0)
        worth = math.prod(shape) >= _PARALLEL
        for axis in range(len(shape) - 1, -1, -1):
            body = compat.loop(
                places[axis], shape[axis], [body], parallel=worth and axis == shared
            )
        return body

    out = te.extern((count * shape[0], *shape[1:]), pieces, emit, name="joined", dtype=dtype)
    return compat.scheduled(te.create_prim_func([*pieces, out]))
