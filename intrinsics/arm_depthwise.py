# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""ARM depthwise by the dot product: four rows of a column brought together, and their products.

A dot product adds four neighbouring bytes, depthwise convolution four rows of one channel. `gather`
brings a column's rows together, 16 channels by two rounds of zip::

    O[c, t] = A[t * dilation, 0, c]          0 <= c < 16, 0 <= t < 4

and `dot` multiplies four channels of it::

    C[c] += sum_t A[c, t] * B[c, t]          0 <= c < 4

A gathered column serves all horizontal taps. Source of the transposition: the usual 4 x 16 byte
transpose, as in Arm's Compute Library.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import block_text, compat
from .block_text import llvm_call

_DOTS = {
    ("int8", "int8"): "sdot.v4i32.v16i8",
    ("uint8", "uint8"): "udot.v4i32.v16i8",
    ("uint8", "int8"): "usdot.v4i32.v16i8",
}


@dataclass(frozen=True)
class ArmDepthwise:
    """The two intrinsics for one pair of types.

    Parameters
    ----------
    a, b : str
        Dtypes of data and weight: both signed, both unsigned, or (with i8mm) u8 and s8.
    dilation : int
        Rows between the taps.
    """

    a: str
    b: str
    dilation: int = 1

    def __post_init__(self) -> None:
        if (self.a, self.b) not in _DOTS:
            allowed = ", ".join(map(str, _DOTS))
            raise ValueError(f"dtypes are {self.a}, {self.b}; allowed: {allowed}")

    def gather(self) -> tuple[object, object]:
        """Return (desc, impl) of bringing together four rows of 16 channels."""
        rows = 3 * self.dilation + 1
        buffers = "\n".join(
            [
                "sr, sc = T.int32(), T.int32()",
                f'A = T.match_buffer(a, ({rows}, 1, 16), "{self.a}", offset_factor=1, '
                "strides=[sr, sc, 1])",
                f'O = T.match_buffer(o, (16, 4), "{self.a}", offset_factor=1, scope="local")',
            ]
        )
        desc = block_text.nest(
            "gather", {"c": 16, "t": 4}, "", f"O[vc, vt] = A[vt * {self.dilation}, 0, vc]"
        )
        row = [f'A.vload([{t * self.dilation}, 0, 0], "{self.a}x16")' for t in range(4)]

        def zipped(first: str, second: str, high: int, size: int) -> str:
            """Return zip1 or zip2 of two vectors, in elements of `size` bytes."""
            count = 16 // size
            lanes = []
            for i in range(high * count // 2, (high + 1) * count // 2):
                for operand in (0, 1):
                    at = (operand * count + i) * size
                    lanes += range(at, at + size)
            return f"tir.Shuffle([{first}, {second}], {lanes})"

        impl = []
        for half in (0, 1):
            pairs = [zipped(row[i], row[i + 1], half, 1) for i in (0, 2)]
            for quarter in (0, 1):
                at = half * 8 + quarter * 4
                impl.append(f"O[{at}, T.ramp(0, 1, 16)] = {zipped(*pairs, quarter, 2)}")
        reads, writes = block_text.region("A", (rows, 1, 16)), block_text.region("O", (16, 4))
        return (
            block_text.function(buffers, reads, writes, desc),
            block_text.function(buffers, reads, writes, impl),
        )

    def dot(self) -> tuple[object, object]:
        """Return (desc, impl) of the products of four channels."""
        buffers = "\n".join(
            [
                f'A = T.match_buffer(a, (4, 4), "{self.a}", offset_factor=1, scope="local")',
                f'B = T.match_buffer(b, (4, 4), "{self.b}", offset_factor=1)',
                'C = T.match_buffer(c, (4,), "int32", offset_factor=1)',
            ]
        )
        step = 'C[vc] = C[vc] + T.Cast("int32", A[vc, vt]) * T.Cast("int32", B[vc, vt])'
        desc = block_text.nest("update", {"c": 4, "t": 4}, "t", step)
        a, b = f'A.vload([0, 0], "{self.a}x16")', f'B.vload([0, 0], "{self.b}x16")'
        name = f"aarch64.neon.{_DOTS[self.a, self.b]}"
        c = "C[T.ramp(0, 1, 4)]"
        impl = [f"{c} = {llvm_call(name, 'int32x4', c, a, b)}"]
        reads = "C[0:4], A[0:4, 0:4], B[0:4, 0:4]"
        writes = block_text.region("C", (4,))
        return (
            block_text.function(buffers, reads, writes, desc),
            block_text.function(buffers, reads, writes, impl),
        )

    def register(self) -> tuple[str, str]:
        """Register gather and dot (once) and return their names."""
        names = (
            f"topi_int8.gather_16x4_{self.a}_{self.dilation}_neon",
            f"topi_int8.depthwise_dot_4x4_{self.a}_{self.b}_neon_dotprod",
        )
        for name, make in zip(names, (self.gather, self.dot), strict=True):
            compat.register_intrin(name, make)
        return names
