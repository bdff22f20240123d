# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""ARM SIMD dot products over a block of vector registers: zero, dot and store.

A block of C is ``h x w`` output pixels by ``n`` output channels, all of it held in vector registers
over the reduction. A step multiplies it by ``step`` input channels::

    C[y, x, o] += sum_{i, j} A[y * stride_h, x * stride_w, i * k + j] * B[i, o, j]

so that weights lie as (step / k, n, k), in the order in which they are read. How a product is made
is a row of `PRODUCTS`:

==========  =====================================================================================
``smlal``   ARMv8.0 and ARMv7: the 16 products of a pixel and a channel become 8 int16 by smull and
            smlal2, and are added in pairs into 4 partial sums by sadalp. The partial sums of each
            output are its own vector, added up once, at the end: no operand is ever broadcast.
            This is the 4x4 interleaved GEMM of gemmlowp and of TVM's "quantized_interleaved". Sums
            of two products fit int16 while |a| <= 128 and |w| <= 127: 2 * 128 * 127 < 2**15.
``mull``    the same without that condition: each product is widened before it is added.
``dot``     ARMv8.2: four channels of 4 output channels, the pixel's by lane.
``mmla``    ARMv8.6: a 2x2 block of outputs over 8 channels. Two pixels share a register.
``fma``     float32, the pixel's channels by lane.
==========  =====================================================================================

The accumulators (scope "local") are read by `store` alone, which is why `mmla` may keep its 2x2
blocks in them as they are. Their indices are constants: LLVM keeps them in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import block_text, compat
from .block_text import llvm_call

REGISTERS = {"aarch64": 32, "arm": 16}


@dataclass(frozen=True)
class ArmProduct:
    """How operands are multiplied: one row of `PRODUCTS`.

    Parameters
    ----------
    name : str
        "{how}_{a}{b}{c}_{isa}".
    isa : str
        The instruction set of `topi_int8.target`'s table that it needs.
    how : str
        A key of the module's table.
    a, b : str
        Dtypes of data and weight as the instructions read them.
    k : tuple of int
        Neighbouring channels that one row of packed weights may hold.
    mnemonics : tuple of str
        Instructions that must appear in the assembly.
    arch : str
    """

    name: str
    isa: str
    how: str
    a: str
    b: str
    k: tuple[int, ...]
    mnemonics: tuple[str, ...]
    arch: str = "aarch64"

    def __post_init__(self) -> None:
        if self.how not in _DOTS:
            raise ValueError(f"how is {self.how!r}; allowed: {', '.join(_DOTS)}")
        if self.arch not in REGISTERS:
            raise ValueError(f"arch is {self.arch!r}; allowed: {', '.join(REGISTERS)}")

    @property
    def registers(self) -> int:
        """Vector registers of 128 bits."""
        return REGISTERS[self.arch]

    @property
    def acc(self) -> str:
        """Dtype of the sums."""
        return "float32" if self.a == "float32" else "int32"

    @property
    def partial(self) -> bool:
        """Whether each output is kept as four partial sums."""
        return self.how in ("smlal", "mull")

@dataclass(frozen=True)
class ArmBlock:
    """A block of accumulators and the shape of one step. See the module's docstring.

    Parameters
    ----------
    product : ArmProduct
    h, w : int
        Output rows and columns.
    n : int
        Output channels, a multiple of 4.
    step : int
        Input channels of a step, a multiple of `k`.
    k : int
        Neighbouring channels in a row of packed weights.
    stride_h, stride_w : int
        Steps between output rows and pixels in the data.
    window : bool
        The data is two-dimensional: A[y * stride_h, x * stride_w + i * k + j], overlapping windows.
    """

    product: ArmProduct
    h: int
    w: int
    n: int
    step: int
    k: int
    stride_h: int = 1
    stride_w: int = 1
    window: bool = False

    def __post_init__(self) -> None:
        if self.n % 4 or self.n < 4:
            raise ValueError(f"n is {self.n}; allowed: multiples of 4")
        if self.step % self.k or self.k not in self.product.k:
            raise ValueError(f"step is {self.step}, k is {self.k}; allowed: k of {self.product.k}")
        if self.product.how == "mmla" and self.pixels % 2:
            raise ValueError(f"pixels are {self.pixels}; allowed: an even number")

    @property
    def pixels(self) -> int:
        """Output pixels."""
        return self.h * self.w

    @property
    def rows_h(self) -> int:
        """Output rows (the name that `schedule.blocks` knows)."""
        return self.h

    @property
    def columns(self) -> int:
        """Output columns."""
        return self.w

    @property
    def channels(self) -> int:
        """Output channels."""
        return self.n

    oc_blocks = 1

    @property
    def rows_k(self) -> int:
        """Rows of packed weights in a step."""
        return self.step // self.k

    @property
    def name(self) -> str:
        """Suffix that tells this block from every other: its shape, strides and product."""
        kind = "w" if self.window else "s"
        return (
            f"{self.h}x{self.w}x{self.n}x{self.step}_{kind}{self.stride_h}x{self.stride_w}"
            f"x{self.k}_{self.product.name}"
        )

    # ------------------------------------------------------------ texts

    @property
    def _parts(self) -> tuple[int, ...]:
        return (4,) if self.product.partial else ()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        h, x = (self.h - 1) * self.stride_h + 1, (self.w - 1) * self.stride_w + 1
        out = (1, self.h, self.w, self.n)
        return {
            "A": (h, x - 1 + self.step) if self.window else (h, x, self.step),
            "B": (1, 1, 1, 1, self.rows_k, self.n, self.k),
            "C": (*out, *self._parts),
            "O": out,
        }

    def _buffer(self, name: str, dtype: str, strides: str | None, scope: str = "global") -> str:
        layout = f", strides=[{strides}]" if strides else ""
        return (
            f'{name} = T.match_buffer({name.lower()}, {self._shapes()[name]}, "{dtype}", '
            f'offset_factor=1{layout}, scope="{scope}")'
        )

    def _nest(self, block: str, reduced: dict[str, int], statement: str) -> list[str]:
        extents = {"h": self.h, "x": self.w, "o": self.n}
        if self.product.partial and block != "store":
            extents["l"] = 4
        return block_text.nest(block, extents | reduced, "".join(reduced), statement)

    def _c(self, pixel: int, o: int) -> str:
        """Return the index of four accumulators: of one output, or of four neighbouring channels.

        (With mmla, accumulators are numbered by blocks; so far the number is all that counts.)
        """
        y, x = divmod(pixel, self.w)
        if self.product.partial:
            return f"0, {y}, {x}, {o}, T.ramp(0, 1, 4)"
        return f"0, {y}, {x}, T.ramp({o}, 1, 4)"

    def _accumulators(self) -> list[str]:
        step = 1 if self.product.partial else 4
        return [self._c(m, o) for m in range(self.pixels) for o in range(0, self.n, step)]

    def zero(self) -> tuple[object, object]:
        """Return (desc, impl) of ``C = 0``."""
        acc, whole = self.product.acc, block_text.region("C", self._shapes()["C"])
        c = self._buffer("C", acc, None, "local")
        index = "0, vh, vx, vo" + (", vl" if self.product.partial else "")
        zero = f"T.{acc}(0)"
        desc = self._nest("init", {}, f"C[{index}] = {zero}")
        impl = [f"C[{at}] = T.Broadcast({zero}, 4)" for at in self._accumulators()]
        return block_text.function(c, "", whole, desc), block_text.function(c, "", whole, impl)

    def dot(self) -> tuple[object, object]:
        """Return (desc, impl) of one multiply-accumulate step."""
        product, shapes = self.product, self._shapes()
        buffers = "\n".join(
            [
                "sh, sx = T.int32(), T.int32()",
                "sb, sc, sy, sk = T.int32(), T.int32(), T.int32(), T.int32()",
                self._buffer("A", product.a, "sh, 1" if self.window else "sh, sx, 1"),
                self._buffer("B", product.b, f"sb, sc, sy, sk, {self.n * self.k}, {self.k}, 1"),
                self._buffer("C", product.acc, None, "local"),
            ]
        )
        whole = {name: block_text.region(name, shapes[name]) for name in "ABC"}
        reduced = {"i": self.rows_k, "j": self.k}
        within = "vj"
        if product.partial:
            # As compute/conv2d.py splits a row of weights into four partial sums.
            reduced["j"] = self.k // 4
            within = "T.floordiv(vj, 2) * 8 + vl * 2 + T.floormod(vj, 2)"
        channel = f"vi * {self.k} + {within}" if self.k > 1 else "vi"
        pixel = f"vh * {self.stride_h}, vx * {self.stride_w}"
        a = f"A[{pixel} + {channel}]" if self.window else f"A[{pixel}, {channel}]"
        b = f"B[0, 0, 0, 0, vi, vo, {within if self.k > 1 else 0}]"
        c = "C[0, vh, vx, vo, vl]" if product.partial else "C[0, vh, vx, vo]"
        if product.acc == "int32":
            a, b = f'T.Cast("int32", {a})', f'T.Cast("int32", {b})'
        desc = self._nest("update", reduced, f"{c} = {c} + {a} * {b}")
        reads = f"{whole['C']}, {whole['A']}, {whole['B']}"
        return (
            block_text.function(buffers, reads, whole["C"], desc),
            block_text.function(buffers, reads, whole["C"], _DOTS[product.how](self)),
        )

    def store(self) -> tuple[object, object]:
        """Return (desc, impl) of ``O = C``, partial sums added up."""
        product, shapes = self.product, self._shapes()
        buffers = "\n".join(
            [
                "sb, sh, sx = T.int32(), T.int32(), T.int32()",
                self._buffer("C", product.acc, None, "local"),
                self._buffer("O", product.acc, "sb, sh, sx, 1"),
            ]
        )
        c = "C[0, vh, vx, vo]"
        if product.partial:
            c = " + ".join(f"C[0, vh, vx, vo, {part}]" for part in range(4))
        desc = self._nest("store", {}, f"O[0, vh, vx, vo] = {c}")
        impl = [
            f"O[0, {m // self.w}, {m % self.w}, T.ramp({o}, 1, 4)] = {self._stored(m, o)}"
            for m in range(self.pixels) for o in range(0, self.n, 4)
        ]  # fmt: skip
        reads, writes = (block_text.region(name, shapes[name]) for name in "CO")
        return (
            block_text.function(buffers, reads, writes, desc),
            block_text.function(buffers, reads, writes, impl),
        )

    def _stored(self, pixel: int, o: int) -> str:
        """Return the values of four channels of a pixel."""
        if self.product.how == "mmla":
            # A 2x2 block lies as (p0 o0, p0 o1, p1 o0, p1 o1).
            first, second = (f"C[{self.block_2x2(pixel // 2, o // 2 + i)}]" for i in (0, 1))
            lanes = [0, 1, 4, 5] if pixel % 2 == 0 else [2, 3, 6, 7]
            return f"tir.Shuffle([{first}, {second}], {lanes})"
        if not self.product.partial:
            return f"C[{self._c(pixel, o)}]"
        sums = [f"C[{self._c(pixel, o + i)}]" for i in range(4)]
        if self.product.arch == "aarch64":
            halves = [_pairs(sums[i], sums[i + 1]) for i in (0, 2)]
            return _pairs(*halves)
        # vpadd takes half registers.
        halves = [f'{_vpadd(f"T.vectorlow({s}, dtype={_X2})", f"T.vectorhigh({s}, dtype={_X2})")}'
                  for s in sums]  # fmt: skip
        return (
            f'T.vectorcombine({_vpadd(*halves[:2])}, {_vpadd(*halves[2:])}, dtype="int32x4")'
        )

    def block_2x2(self, pair: int, o_pair: int) -> str:
        """Return the index of a 2x2 block of accumulators (mmla)."""
        pixel, vector = divmod(pair * (self.n // 2) + o_pair, self.n // 4)
        return self._c(pixel, 4 * vector)

    def register(self) -> tuple[str, str, str]:
        """Register zero, dot and store (once) and return their names."""
        return block_text.register(self)

    # ------------------------------------------------------------ operands

    def load_a(self, pixel: int, channel: int, count: int) -> str:
        """Return `count` neighbouring channels of a pixel as a vector."""
        y, x = divmod(pixel, self.w)
        y, x = y * self.stride_h, x * self.stride_w
        at = f"[{y}, {x + channel}]" if self.window else f"[{y}, {x}, {channel}]"
        return f'A.vload({at}, "{self.product.a}x{count}")'

    def load_b(self, row: int, o: int, j: int, count: int) -> str:
        """Return `count` packed weights from row `row`, channel `o`, element `j` on."""
        return f'B.vload([0, 0, 0, 0, {row}, {o}, {j}], "{self.product.b}x{count}")'


# ---------------------------------------------------------------- how products are made

_X2 = '"int32x2"'
# An LLVM that finds smlal2 in a product of widened upper halves. LLVM 10 finds it behind the
# intrinsic alone; else it moves each upper half down first, or widens weights outside of a loop.
_SEES_SMLAL2 = 22
_LONG_PRODUCT = {
    ("aarch64", "int8"): "aarch64.neon.smull",
    ("aarch64", "uint8"): "aarch64.neon.umull",
    ("arm", "int8"): "arm.neon.vmulls",
    ("arm", "uint8"): "arm.neon.vmullu",
}


def _pairs(first: str, second: str) -> str:
    return llvm_call("aarch64.neon.addp.v4i32", "int32x4", first, second)


def _vpadd(first: str, second: str) -> str:
    return llvm_call("arm.neon.vpadd.v2i32", "int32x2", first, second)


def _accumulate_pairs(block: ArmBlock, c: str, products: str) -> str:
    """Return the statement that adds int16x8 in pairs into four sums: sadalp, uadalp, vpadal."""
    signed = block.product.a == "int8"
    if block.product.arch == "aarch64":
        name = "aarch64.neon.saddlp" if signed else "aarch64.neon.uaddlp"
        pairs = llvm_call(f"{name}.v4i32.v8i16", "int32x4", products)
        return f"C[{c}] = C[{c}] + {pairs}"
    name = "arm.neon.vpadals" if signed else "arm.neon.vpadalu"
    return f"C[{c}] = {llvm_call(f'{name}.v4i32.v8i16', 'int32x4', f'C[{c}]', products)}"


def _long_product(block: ArmBlock, row: int, half: int, pixel: int, o: int) -> str:
    """Return the 8 products of half a row of weights as int16x8: smull, umull, vmull."""
    wide = block.product.a.replace("8", "16") + "x8"
    a = block.load_a(pixel, row * block.k, block.k)
    b = block.load_b(row, o, 0, block.k)
    if block.k == 16:
        part = "T.vectorhigh" if half else "T.vectorlow"
        a = f'{part}({a}, dtype="{block.product.a}x8")'
        b = f'{part}({b}, dtype="{block.product.b}x8")'
    if compat.llvm_major() < _SEES_SMLAL2:
        name = _LONG_PRODUCT[block.product.arch, block.product.a]
        return llvm_call(f"{name}.v8i16", wide, a, b)
    return f'T.Cast("{wide}", {a}) * T.Cast("{wide}", {b})'


def _long(block: ArmBlock) -> list[str]:
    """smlal adds the halves' products in int16, mull each by itself."""
    body = []
    for row in range(block.rows_k):
        for o in range(block.n):
            for m in range(block.pixels):
                halves = [_long_product(block, row, half, m, o) for half in range(block.k // 8)]
                if block.product.how == "smlal":
                    halves = [" + ".join(halves)]
                body += [_accumulate_pairs(block, block._c(m, o), half) for half in halves]
    return body


def _chunks(step: int) -> list[tuple[int, int]]:
    """Return (first channel, channels) of the vector loads that read `step` channels of a pixel."""
    chunks, at = [], 0
    for count in (16, 8, 4):
        while step - at >= count:
            chunks.append((at, count))
            at += count
    return chunks


def _dot(block: ArmBlock) -> list[str]:
    product = block.product
    mixed = product.a != product.b
    name = "usdot" if mixed else "udot" if product.a == "uint8" else "sdot"
    body = []
    for at, count in _chunks(block.step):
        for lane in range(count // 4):
            for o in range(0, block.n, 4):
                weights = block.load_b(at // 4 + lane, o, 0, 16)
                for m in range(block.pixels):
                    words = f'T.reinterpret("int32x{count // 4}", {block.load_a(m, at, count)})'
                    if count == 4:
                        words = words.replace("int32x1", "int32")
                        same = f"T.Broadcast({words}, 4)"
                    else:
                        # A shuffle has no more lanes than its operands.
                        whole = ", ".join([words] * (16 // count))
                        same = f"tir.Shuffle([{whole}], {[lane] * 4})"
                    c = block._c(m, o)
                    a = f'T.reinterpret("{product.a}x16", {same})'
                    operands = (a, weights) if mixed else (weights, a)
                    call = llvm_call(
                        f"aarch64.neon.{name}.v4i32.v16i8", "int32x4", f"C[{c}]", *operands
                    )
                    body.append(f"C[{c}] = {call}")
    return body


def _mmla(block: ArmBlock) -> list[str]:
    product = block.product
    name = {"uint8int8": "usmmla", "int8int8": "smmla", "uint8uint8": "ummla"}
    name = name[product.a + product.b]
    body = []
    for row in range(block.rows_k):
        for o_pair in range(block.n // 2):
            weights = block.load_b(row, 2 * o_pair, 0, 16)
            for pair in range(block.pixels // 2):
                # Two pixels' eight channels side by side: zip1 or zip2 of their vectors.
                if block.step % 16 == 0:
                    at, lanes = row // 2 * 16, [row % 2, 2 + row % 2]
                    halves = [f'T.reinterpret("int64x2", {block.load_a(2 * pair + i, at, 16)})'
                              for i in (0, 1)]  # fmt: skip
                    joined = f"tir.Shuffle([{', '.join(halves)}], {lanes})"
                else:
                    halves = [f'T.reinterpret("int64", {block.load_a(2 * pair + i, row * 8, 8)})'
                              for i in (0, 1)]  # fmt: skip
                    joined = f"tir.Shuffle([{', '.join(halves)}], [0, 1])"
                a = f'T.reinterpret("{product.a}x16", {joined})'
                c = block.block_2x2(pair, o_pair)
                call = llvm_call(
                    f"aarch64.neon.{name}.v4i32.v16i8", "int32x4", f"C[{c}]", a, weights
                )
                body.append(f"C[{c}] = {call}")
    return body


def _fma(block: ArmBlock) -> list[str]:
    body = []
    for row in range(block.rows_k):
        at, lane = row // 4 * 4, row % 4
        count = min(4, block.step - at)
        for o in range(0, block.n, 4):
            weights = block.load_b(row, o, 0, 4)
            for m in range(block.pixels):
                if count == 4:
                    same = f"tir.Shuffle([{block.load_a(m, at, 4)}], {[lane] * 4})"
                else:
                    scalar = block.load_a(m, row, 1).removesuffix('x1")') + '")'
                    same = f"T.Broadcast({scalar}, 4)"
                c = block._c(m, o)
                body.append(f"C[{c}] = C[{c}] + {weights} * {same}")
    return body


_DOTS: dict[str, Callable[[ArmBlock], list[str]]] = {
    "smlal": _long, "mull": _long, "dot": _dot, "mmla": _mmla, "fma": _fma,
}  # fmt: skip


def _table() -> dict[str, ArmProduct]:
    short = {"uint8": "u8", "int8": "s8"}
    rows = (
        ("mmla", "neon_i8mm", "int8", "int8", (8,), ("smmla",), "aarch64"),
        ("mmla", "neon_i8mm", "uint8", "int8", (8,), ("usmmla",), "aarch64"),
        ("mmla", "neon_i8mm", "uint8", "uint8", (8,), ("ummla",), "aarch64"),
        # By lane the signed operand is the vector and the instruction is called sudot.
        ("dot", "neon_i8mm", "uint8", "int8", (4,), ("sudot", "usdot"), "aarch64"),
        ("dot", "neon_dotprod", "int8", "int8", (4,), ("sdot",), "aarch64"),
        ("dot", "neon_dotprod", "uint8", "uint8", (4,), ("udot",), "aarch64"),
        ("smlal", "neon", "int8", "int8", (16, 8), ("smull", "smlal2", "sadalp"), "aarch64"),
        ("mull", "neon", "int8", "int8", (16, 8), ("smull", "sadalp"), "aarch64"),
        ("mull", "neon", "uint8", "uint8", (16, 8), ("umull", "uadalp"), "aarch64"),
        ("smlal", "armv7_neon", "int8", "int8", (16, 8), ("vmull.s8", "vmlal.s8"), "arm"),
        ("mull", "armv7_neon", "int8", "int8", (16, 8), ("vmull.s8", "vpadal.s16"), "arm"),
        ("mull", "armv7_neon", "uint8", "uint8", (16, 8), ("vmull.u8", "vpadal.u16"), "arm"),
    )
    table = {}
    for how, isa, a, b, k, mnemonics, arch in rows:
        name = f"{how}_{short[a]}{short[b]}s32_{isa}"
        table[name] = ArmProduct(name, isa, how, a, b, k, mnemonics, arch)
    for isa, arch in (("neon", "aarch64"), ("armv7_neon", "arm")):
        name = f"fma_f32f32f32_{isa}"
        # ARMv7 has vmla.f32, which rounds twice; LLVM prefers vmul and vadd, and vfma with VFPv4.
        mnemonic = "fmla" if arch == "aarch64" else "vmul.f32"
        table[name] = ArmProduct(name, isa, "fma", "float32", "float32", (1,), (mnemonic,), arch)
    return table


PRODUCTS: dict[str, ArmProduct] = _table()
