# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""x86 vector dot products: one activation group broadcast against a vector of output channels.

Each intrinsic computes, for `n` lanes (output channels) and `k` neighbouring input channels::

    C[j] += sum_{i<k} A[i] * B[j, i]            # int32 accumulation, 0 <= j < n

An ISA is the few lines of TVMScript that compute `prod` from the vectors `a` (the k activations as
one 32-bit word broadcast to every lane) and `b` (n*k weights in memory order).
"""

from __future__ import annotations

from dataclasses import dataclass

from . import compat
from .block_text import llvm_call

_HEAD = """
{PF}
def func(
    A: T.Buffer(({k},), "{a}", offset_factor=1),
    B: T.Buffer(({n}, {k}), "{b}", offset_factor=1),
    C: T.Buffer(({n},), "int32", offset_factor=1),
) -> None:
    with {block}("root"):
        T.reads(C[0:{n}], A[0:{k}], B[0:{n}, 0:{k}])
        T.writes(C[0:{n}])
"""

_DESC = """        for i in T.serial(0, {n}):
            for k in T.serial(0, {k}):
                with {block}("update"):
                    vi, vk = T.axis.remap("SR", [i, k])
                    C[vi] = C[vi] + T.Cast("int32", A[vk]) * T.Cast("int32", B[vi, vk])
"""

_IMPL = """        C[T.ramp(T.int32(0), 1, {n})] = {result}
"""


@dataclass(frozen=True)
class DotIntrinsic:
    """A broadcast dot product ``dot_1x{n}x{k}_{a}{b}s32_{isa}``.

    Parameters
    ----------
    name : str
    isa : str
        The row of `topi_int8.target`'s table that it needs.
    n, k : int
        Output lanes, and input channels that one instruction reduces.
    a, b : str
        Dtypes of activation and weight as the instruction reads them.
    result : str
        TVMScript expression of the new C vector, from ``{{acc}}``, ``{{a}}`` and ``{{b}}``.
    mnemonic : str
        The instruction that must appear in the assembly.
    registers : int
        Vector registers of the ISA.
    uops : int
        Vector ALU operations (multiply or add) that it takes.
    exact : bool
        False when products may saturate unless the weights are proven small.
    """

    name: str
    isa: str
    n: int
    k: int
    a: str
    b: str
    result: str
    mnemonic: str
    registers: int
    uops: int
    exact: bool = True

    def __post_init__(self) -> None:
        if self.n * 32 not in (128, 256, 512):
            raise ValueError(f"n is {self.n}; allowed: 4, 8 or 16 lanes of int32")
        if {"uint8": 1, "int8": 1, "int16": 2}[self.a] * self.k != 4:
            raise ValueError(f"k is {self.k}; allowed: what makes 32 bits of {self.a}")

    @property
    def bits(self) -> int:
        """Vector width."""
        return self.n * 32

    def _texts(self) -> tuple[str, str]:
        half = 8 if self.a != "int16" else 16
        count = self.bits // half
        # The activations: 32 bits of memory as one int32, broadcast, seen again as narrow lanes.
        word = f'T.reinterpret("int32", A.vload([0], "{self.a}x{self.k}"))'
        fill = {
            "acc": f'C.vload([0], "int32x{self.n}")',
            "a32": f"T.Broadcast({word}, {self.n})",
            "b": f'B.vload([0, 0], "{self.b}x{count}")',
        }
        fill["a"] = f'T.reinterpret("{self.a}x{count}", {fill["a32"]})'
        fill["b32"] = f'T.reinterpret("int32x{self.n}", {fill["b"]})'
        result = self.result
        for key, value in fill.items():
            result = result.replace("<" + key + ">", value)
        texts = []
        for template in (_DESC, _IMPL):
            text = (_HEAD + template).replace("{result}", result)
            for key in ("n", "k", "a", "b"):
                text = text.replace("{" + key + "}", str(getattr(self, key)))
            texts.append(text)
        return texts[0], texts[1]

    def desc(self) -> object:
        """Return the meaning: a PrimFunc of plain loops."""
        return compat.parse_prim_func(self._texts()[0])

    def impl(self) -> object:
        """Return the implementation: a PrimFunc around the instruction."""
        return compat.parse_prim_func(self._texts()[1])

    def register(self) -> str:
        """Register with TVM's TensorIntrin registry (once) and return the name."""
        return compat.register_intrin(
            f"topi_int8.{self.name}", lambda: (self.desc(), self.impl())
        )


def _vpdpbusd(bits: int) -> str:
    lanes, count = bits // 32, bits // 8
    # LLVM 22 changed the operands from int32 vectors to int8 vectors; same instruction.
    a, b = ("<a>", "<b>") if compat.llvm_major() >= 22 else ("<a32>", "<b32>")
    if compat.llvm_major() >= 22:
        a = f'T.reinterpret("int8x{count}", <a32>)'
    return llvm_call(f"x86.avx512.vpdpbusd.{bits}", f"int32x{lanes}", "<acc>", a, b)


def _vpmaddwd(bits: int) -> str:
    lanes = bits // 32
    name = "avx512.pmaddw.d.512" if bits == 512 else "avx2.pmadd.wd"
    return f"<acc> + {llvm_call(f'x86.{name}', f'int32x{lanes}', '<a>', '<b>')}"


def _vpmaddubsw(bits: int) -> str:
    """u8 x s8 pairs to saturated int16, pairs of those to int32: exact for 7-bit weights only."""
    lanes, halves = bits // 32, bits // 16
    ubsw, wd = (
        ("avx512.pmaddubs.w.512", "avx512.pmaddw.d.512")
        if bits == 512
        else ("avx2.pmadd.ub.sw", "avx2.pmadd.wd")
    )
    pairs = llvm_call(f"x86.{ubsw}", f"int16x{halves}", "<a>", "<b>")
    ones = f'T.Broadcast(T.Cast("int16", 1), {halves})'
    return f"<acc> + {llvm_call(f'x86.{wd}', f'int32x{lanes}', pairs, ones)}"


def _table() -> dict[str, DotIntrinsic]:
    rows = (
        ("avx512_vnni", 16, 4, "uint8", "int8", _vpdpbusd(512), "vpdpbusd", 32, 1, True),
        ("avx512_vnni", 8, 4, "uint8", "int8", _vpdpbusd(256), "vpdpbusd", 32, 1, True),
        ("avx_vnni", 8, 4, "uint8", "int8", _vpdpbusd(256), "vpdpbusd", 16, 1, True),
        ("avx512_bw", 16, 2, "int16", "int16", _vpmaddwd(512), "vpmaddwd", 32, 2, True),
        ("avx2", 8, 2, "int16", "int16", _vpmaddwd(256), "vpmaddwd", 16, 2, True),
        ("avx512_bw", 16, 4, "uint8", "int8", _vpmaddubsw(512), "vpmaddubsw", 32, 3, False),
        ("avx2", 8, 4, "uint8", "int8", _vpmaddubsw(256), "vpmaddubsw", 16, 3, False),
    )
    short = {"uint8": "u8", "int8": "s8", "int16": "s16"}
    table = {}
    for isa, n, k, a, b, result, mnemonic, registers, uops, exact in rows:
        name = f"dot_1x{n}x{k}_{short[a]}{short[b]}s32_{isa}"
        table[name] = DotIntrinsic(name, isa, n, k, a, b, result, mnemonic, registers, uops, exact)
    return table


DOT_INTRINSICS: dict[str, DotIntrinsic] = _table()
