# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Packed tensors joined along their channels, of whatever blocks, on the way through an affine.

DenseNet's concats grow by 32 channels a layer, and each result is read by one BatchNorm: here it is
one pass, written as statements (`te.extern`), for an expression that chooses between the inputs
cannot be vectorised. Runs of channels that lie together on both sides are moved as one vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tvm import te

from intrinsics import compat
from intrinsics.compat import ramp, tir

from ..compute.epilogue import dequantize_value, stored_value
from ..layout import Layout, round_up
from ..workload import INT8_DTYPES, Epilogue

# The shortest run: what every block is a multiple of.
_RUN = 16
# Bytes of the result below which one task is as fast as several.
_PARALLEL_BYTES = 32768


@dataclass(frozen=True)
class Concat:
    """``out = concat(parts)``, or ``clip(rint((concat(parts) - zero_point) * scale + bias) + z)``.

    Parameters
    ----------
    n, h, w : int
        Of every part.
    channels, blocks : tuple of int
        Logical channels and channel block of each part. Blocks are multiples of 16, and so are the
        channels of all parts but the last.
    out_block : int
        A multiple of 16.
    dtype : str
        Of every part: "uint8" or "int8".
    epilogue : Epilogue or None
        How an affine's result is stored; None: there is none.
    zero_point : int
        Of the parts; matters to an affine only.
    """

    n: int
    h: int
    w: int
    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    out_block: int
    dtype: str
    epilogue: Epilogue | None = None
    zero_point: int = 0

    def __post_init__(self) -> None:
        if not self.channels or len(self.channels) != len(self.blocks):
            raise ValueError(
                f"channels, blocks are {self.channels}, {self.blocks}; allowed: one of each a part"
            )
        if self.dtype not in INT8_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(INT8_DTYPES)}")
        whole = (*self.channels[:-1], *self.blocks, self.out_block)
        if any(size < 1 or size % _RUN for size in whole):
            raise ValueError(
                f"channels, blocks, out_block are {self.channels}, {self.blocks}, "
                f"{self.out_block}; allowed: multiples of {_RUN}, but for the last channels"
            )

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return Layout.packed(self.out_block).shape(self.n, sum(self.channels), self.h, self.w)

    def schedule(self) -> Any:
        """Return the scheduled PrimFunc of (parts.., [scale, bias], out).

        Scale and bias are float32 (output blocks, out_block).
        """
        inputs = [
            te.placeholder(
                Layout.packed(block).shape(self.n, count, self.h, self.w), self.dtype, f"part{at}"
            )
            for at, (count, block) in enumerate(zip(self.channels, self.blocks, strict=True))
        ]  # fmt: skip
        if self.epilogue is not None:
            shape = (self.out_shape[1], self.out_block)
            inputs += [te.placeholder(shape, "float32", name) for name in ("scale", "bias")]
        dtype = self.epilogue.out_dtype if self.epilogue else self.dtype
        out = te.extern(
            self.out_shape, inputs, lambda ins, outs: self._emit(ins, outs[0]),
            name="concat", dtype=dtype,
        )  # fmt: skip
        func = te.create_prim_func([*inputs, out])
        return compat.scheduled(func)

    def _emit(self, ins: list[Any], out: Any) -> Any:
        """Return a loop over image rows, in parallel where they are worth it."""
        row = tir.Var("row", "int32")
        at = (tir.floordiv(row, self.h), tir.floormod(row, self.h))
        parts, vectors = ins[: len(self.channels)], ins[len(self.channels) :]
        body = []
        ends = list(accumulate(self.channels))
        for part, block, first, count in zip(
            parts, self.blocks, [0, *ends], self.channels, strict=False
        ):
            body.append(self._part(part, block, first, round_up(count, _RUN), at, vectors, out))
        filled, last = round_up(ends[-1], _RUN), self.out_shape[1] * self.out_block
        if filled < last:
            body.append(self._zeros(filled, last - filled, at, out))
        parallel = math.prod(self.out_shape) >= _PARALLEL_BYTES
        return compat.loop(row, self.n * self.h, body, parallel=parallel)

    def _runs(self, count: int, run: int, store: Any) -> Any:
        """Return ``store(column, channel)`` for every run of channels and column."""
        k, x = tir.Var("k", "int32"), tir.Var("x", "int32")
        return compat.loop(k, count // run, [compat.loop(x, self.w, [store(x, k * run)])])

    def _place(self, at: tuple, channel: Any, x: Any, block: int, run: int) -> list[Any]:
        lanes = ramp(tir.floormod(channel, block), run)
        return [at[0], tir.floordiv(channel, block), at[1], x, lanes]

    def _part(
        self, part: Any, block: int, first: int, count: int, at: tuple, vectors: list[Any], out: Any
    ) -> Any:
        run = math.gcd(block, self.out_block, first, count)

        def store(x: Any, channel: Any) -> Any:
            value = tir.BufferLoad(part, self._place(at, channel, x, block, run))
            place = self._place(at, channel + first, x, self.out_block, run)
            if self.epilogue is not None:
                scale, bias = (tir.BufferLoad(v, [place[1], place[4]]) for v in vectors)
                real = dequantize_value(value, self.zero_point, 1.0) * scale + bias
                value = stored_value(self.epilogue, real)
            return tir.BufferStore(out, value, place)

        return self._runs(count, run, store)

    def _zeros(self, first: int, count: int, at: tuple, out: Any) -> Any:
        """Return what fills the last block up: what is there must be finite."""

        def store(x: Any, channel: Any) -> Any:
            zeros = tir.Broadcast(tir.const(0, compat.shape_and_dtype(out)[1]), _RUN)
            return tir.BufferStore(
                out, zeros, self._place(at, channel + first, x, self.out_block, _RUN)
            )

        return self._runs(count, _RUN, store)
