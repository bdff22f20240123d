# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""AVX-512: float32 values rounded, clipped and narrowed to 8 bits, up to four vectors at a time.

The meaning is the end of an epilogue, ``clip(rint(v) + zero_point, low, high)``, in the form that
`compute/epilogue.py` gives it. Vectors are clipped above in float, so that `vcvtps2dq` cannot
overflow (below, it saturates to the least integer of all); then `vpackssdw`, `vpaddsw` of the zero
point, and `vpackuswb` or `vpacksswb`, whose saturation is the type's own range, and one permutation
that puts the 128-bit lanes back in order: two operations a vector and four to seven for four of
them together, where LLVM clips and rounds by three or four a vector and takes two for `vpmovdb`.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import block_text, compat

LANES = 16
_RANGE = {"uint8": (0, 255), "int8": (-128, 127)}
# Adding 1.5 * 2**23 to a float32 rounds it to an integer, which is then in its low bits: the form
# in which compute/epilogue.py rounds, and in which the desc must say it.
ROUND = 12582912.0
ROUND_BITS = 0x4B400000  # its bit pattern; the low byte is 0
_NEAREST_MXCSR = 4  # vcvtps2dq in the current rounding mode: half to even


@dataclass(frozen=True)
class Narrow:
    """The narrowing of a patch of values, `pixels` x `channels`.

    Parameters
    ----------
    pixels, channels : int
        Together 16, 32 or 64 values; channels are whole vectors of 16.
    dtype : str
        "uint8" or "int8".
    zero_point : int
        Added after rounding.
    low, high : int
        Bounds of the result.
    """

    pixels: int
    channels: int
    dtype: str
    zero_point: int
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.channels % LANES or self.pixels * self.channels not in (16, 32, 64):
            raise ValueError(
                f"pixels, channels are {self.pixels}, {self.channels}; allowed: 16, 32 or 64 "
                "values, in vectors of 16 channels"
            )
        if self.dtype not in _RANGE:
            raise ValueError(f"dtype is {self.dtype}; allowed: uint8, int8")
        least, most = _RANGE[self.dtype]
        if not least <= self.low <= self.high <= most:
            raise ValueError(
                f"low, high are {self.low}, {self.high}; allowed: within {least}, {most}"
            )

    @property
    def name(self) -> str:
        """Name of the intrinsic."""
        bounds = f"{self.low}_{self.high}_{self.zero_point}".replace("-", "m")
        return f"topi_int8.narrow_{self.pixels}x{self.channels}_{self.dtype}_{bounds}_avx512_bw"

    def register(self) -> str:
        """Register the tensor intrinsic (once) and return its name."""
        return compat.register_intrin(self.name, lambda: (self.desc(), self.impl()))

    def desc(self) -> object:
        """Return the meaning: a PrimFunc of plain loops."""
        low, high = (f"T.float32({float(b - self.zero_point)})" for b in (self.low, self.high))
        bits = (
            f'T.reinterpret("int32", T.min(T.max(V[vx, vo], {low}), {high}) + T.float32({ROUND}))'
        )
        if self.zero_point:
            bits += f" + T.int32({self.zero_point - ROUND_BITS})"
        statement = f'O[vx, vo] = T.Cast("{self.dtype}", {bits})'
        return self._function(
            block_text.nest("narrow", {"x": self.pixels, "o": self.channels}, "", statement)
        )

    def impl(self) -> object:
        """Return the implementation: a PrimFunc around the instructions."""
        vectors = [
            self._integers(f"V[{x}, T.ramp({c}, 1, {LANES})]")
            for x in range(self.pixels)
            for c in range(0, self.channels, LANES)
        ]
        # A lone vector, and a lone pair, has itself for a partner.
        halves = [
            self._zero_pointed(
                block_text.llvm_call("x86.avx512.packssdw.512", "int16x32", first, second)
            )
            for first, second in zip(vectors[::2], vectors[1::2] or vectors, strict=True)
        ]
        pack = "packuswb" if self.dtype == "uint8" else "packsswb"
        packed = block_text.llvm_call(
            f"x86.avx512.{pack}.512", f"{self.dtype}x64", halves[0], halves[-1]
        )
        if self.low > _RANGE[self.dtype][0]:
            packed = f"T.max({packed}, T.Broadcast(T.{self.dtype}({self.low}), 64))"
        lines = [f'packed: T.let = T.reinterpret("int32x16", {packed})']
        width = self.channels // 4  # 32-bit words of a pixel
        for x in range(self.pixels):
            # Word i of vector t is in lane i, at t.
            words = [4 * (w % 4) + w // 4 for w in range(x * width, (x + 1) * width)]
            row = f"T.Shuffle([packed], [{', '.join(f'T.int32({word})' for word in words)}])"
            lines.append(
                f"O[{x}, T.ramp(0, 1, {self.channels})] = "
                f'T.reinterpret("{self.dtype}x{self.channels}", {row})'
            )
        return self._function(lines)

    def _integers(self, value: str) -> str:
        """Return sixteen values rounded to int32, clipped above."""
        high = f"T.Broadcast(T.float32({float(self.high - self.zero_point)}), {LANES})"
        clipped = f"T.min({value}, {high})"
        return block_text.llvm_call(
            "x86.avx512.mask.cvtps2dq.512", f"int32x{LANES}", clipped,
            f"T.Broadcast(T.int32(0), {LANES})", "T.int16(-1)", f"T.int32({_NEAREST_MXCSR})",
        )  # fmt: skip

    def _zero_pointed(self, pairs: str) -> str:
        if not self.zero_point:
            return pairs
        fill = f"T.Broadcast(T.int16({self.zero_point}), 32)"
        return block_text.llvm_call("sadd.sat.v32i16", "int16x32", pairs, fill)

    def _function(self, body: list[str]) -> object:
        shape = (self.pixels, self.channels)
        buffers = "\n".join(
            [
                "sv, so = T.int32(), T.int32()",
                f'V = T.match_buffer(v, {shape}, "float32", offset_factor=1, strides=[sv, 1], '
                'scope="local")',
                f'O = T.match_buffer(o, {shape}, "{self.dtype}", offset_factor=1, strides=[so, 1])',
            ]
        )
        whole = [block_text.region(name, shape) for name in "VO"]
        return block_text.function(buffers, *whole, body)
