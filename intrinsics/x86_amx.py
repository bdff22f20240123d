# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""AMX int8: zero, dot and store over a block of tile registers, for all four sign pairs.

A block of C is `oc_blocks x rows_h x (tiles_w * rows) x (oc_tiles * 16)` accumulators held in
`oc_blocks * oc_tiles * rows_h * tiles_w` tile registers, each `rows` output pixels of one image row
by 16 output channels. A step multiplies it by `k` input channels (64, or fewer for narrow inputs)::

    C[b, h, x, o] += sum_{i, j} A[h * stride_h, x * stride_w, 4*i + j]
                                * B[b * oc_tiles + o / 16, 0, 0, 0, i, o % 16, j]

The strides of a convolution become the row stride of `tileloadd`. The accumulator buffer (scope
"local") is never touched: its elements live in tile registers between zero and store. Source of the
tiling: Intel 64 Optimization Reference Manual, chapter 20 (2x2 C tiles need half a load per
product).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import block_text, compat
from .compat import tir

_NAME = {"uint8": "u", "int8": "s"}
TILES = 8


def _llvm(name: str, *args: str) -> str:
    found = f'T.llvm_lookup_intrinsic_id("llvm.x86.{name}")'
    call = f'T.call_llvm_intrin("void", {found}, {{NSIG:{len(args)}}} {", ".join(args)})'
    return f"T.evaluate({call})"


@dataclass(frozen=True)
class AmxBlock:
    """A block of tile registers and the shape of one step. See the module's docstring.

    Parameters
    ----------
    a, b : str
        "uint8" or "int8": dtypes of data and weight.
    rows : int
        Pixels in a tile, 1..16.
    tiles_w, rows_h : int
        Tiles along a row, and output rows.
    oc_tiles, oc_blocks : int
        Tiles of 16 output channels inside a channel block, and channel blocks.
    k : int
        Input channels of a step: a multiple of 4, at most 64.
    stride_h, stride_w : int
        Steps between output rows and pixels in the data.
    window : bool
        The data is two-dimensional, and a pixel's `k` elements start `stride_w` elements behind the
        last pixel's: overlapping windows of a row, A[h * stride_h, x * stride_w + 4*i + j].
    """

    a: str
    b: str
    rows: int
    tiles_w: int = 1
    rows_h: int = 1
    oc_tiles: int = 1
    oc_blocks: int = 1
    k: int = 64
    stride_h: int = 1
    stride_w: int = 1
    window: bool = False

    def __post_init__(self) -> None:
        if self.a not in _NAME or self.b not in _NAME:
            raise ValueError(f"dtypes are {self.a}, {self.b}; allowed: uint8, int8")
        if not 1 <= self.rows <= 16:
            raise ValueError(f"rows is {self.rows}; allowed: 1..16")
        if self.k % 4 or not 4 <= self.k <= 64:
            raise ValueError(f"k is {self.k}; allowed: 4..64 in steps of 4")
        # One operand stays loaded over a step, the other passes through one tile at least.
        if self.c_tiles + min(self.m_tiles, self.n_tiles) + 1 > TILES:
            raise ValueError(
                f"C tiles are {self.m_tiles}x{self.n_tiles}; allowed: with the shorter side and "
                f"one more at most {TILES} tiles"
            )

    @property
    def m_tiles(self) -> int:
        """Tiles of pixels."""
        return self.tiles_w * self.rows_h

    @property
    def n_tiles(self) -> int:
        """Tiles of output channels."""
        return self.oc_tiles * self.oc_blocks

    @property
    def c_tiles(self) -> int:
        """Tile registers that accumulate."""
        return self.m_tiles * self.n_tiles

    @property
    def columns(self) -> int:
        """Output columns of the block."""
        return self.tiles_w * self.rows

    @property
    def channels(self) -> int:
        """Output channels of the block inside one channel block."""
        return self.oc_tiles * 16

    @property
    def rows_k(self) -> int:
        """Rows of packed weights in a step."""
        return self.k // 4

    @property
    def name(self) -> str:
        """Suffix that tells this block from every other."""
        return (
            f"{self.rows_h}x{self.tiles_w}x{self.rows}_{self.oc_blocks}x{self.oc_tiles}x16x{self.k}"
            f"_{'w' if self.window else 's'}{self.stride_h}x{self.stride_w}"
            f"_{_NAME[self.a]}8{_NAME[self.b]}8s32_amx_int8"
        )

    # ------------------------------------------------------------ tile numbers

    def _c(self, m: int, n: int) -> int:
        return m * self.n_tiles + n

    def _operand_tiles(self) -> tuple[list[int], list[int], bool]:
        """Return (A tiles, B tiles, weights_stay): which operand is loaded once, which rotates."""
        free = list(range(self.c_tiles, TILES))
        if self.n_tiles < len(free):
            return free[self.n_tiles :][: self.m_tiles], free[: self.n_tiles], True
        return free[: self.m_tiles], free[self.m_tiles :], False

    def config(self) -> list[int]:
        """Return the 64 bytes of the tile configuration (palette 1) as 16 little-endian int32."""
        rows, colsb = [0] * 16, [0] * 16
        a_tiles, b_tiles, _ = self._operand_tiles()
        for tile in range(self.c_tiles):
            rows[tile], colsb[tile] = self.rows, 64
        for tile in a_tiles:
            rows[tile], colsb[tile] = self.rows, self.k
        for tile in b_tiles:
            rows[tile], colsb[tile] = self.k // 4, 64
        data = bytes([1, 0]) + bytes(14)
        data += b"".join(c.to_bytes(2, "little") for c in colsb) + bytes(rows)
        return [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, 64, 4)]

    # ------------------------------------------------------------ texts

    def _shapes(self) -> dict[str, str]:
        """Return the shapes of A, B and C and their whole regions (RA, RB, RC) as text."""
        h = (self.rows_h - 1) * self.stride_h + 1
        x = (self.tiles_w * self.rows - 1) * self.stride_w + 1
        shapes = {
            "A": (h, x - 1 + self.k) if self.window else (h, x, self.k),
            "B": (self.n_tiles, 1, 1, 1, self.k // 4, 16, 4),
            "C": (self.oc_blocks, self.rows_h, self.tiles_w * self.rows, self.oc_tiles * 16),
        }
        texts = {name: str(shape) for name, shape in shapes.items()}
        for name, shape in shapes.items():
            texts["R" + name] = block_text.region(name, shape)
        return texts

    def _nest(self, block: str, reduce: bool, statement: str) -> list[str]:
        """Return the loops of a desc around one statement, its iterators named v?."""
        extents = {"b": self.oc_blocks, "h": self.rows_h, "x": self.tiles_w * self.rows}
        extents["o"] = self.oc_tiles * 16
        if reduce:
            extents |= {"i": self.k // 4, "j": 4}
        return block_text.nest(block, extents, "ij", statement)

    def _buffer(self, name: str, dtype: str, strides: str | None, scope: str = "global") -> str:
        shape = self._shapes()["C" if name == "O" else name]
        layout = f", strides=[{strides}]" if strides else ""
        return (
            f'{name} = T.match_buffer({name.lower()}, {shape}, "{dtype}", offset_factor=1'
            f'{layout}, scope="{scope}")'
        )

    def zero(self) -> tuple[object, object]:
        """Return (desc, impl) of ``C = 0``."""
        s = self._shapes()
        c = self._buffer("C", "int32", None, "local")
        desc = self._nest("init", False, "C[vb, vh, vx, vo] = T.int32(0)")
        impl = [_llvm("tilezero", f"T.uint8({tile})") for tile in range(self.c_tiles)]
        return block_text.function(c, "", s["RC"], desc), block_text.function(c, "", s["RC"], impl)

    def dot(self) -> tuple[object, object]:
        """Return (desc, impl) of one multiply-accumulate step."""
        s = self._shapes()
        buffers = "\n".join(
            [
                "sh, sx, sb = T.int32(), T.int32(), T.int32()",
                "sc, sy, sk = T.int32(), T.int32(), T.int32()",
                self._buffer("A", self.a, "sh, 1" if self.window else "sh, sx, 1"),
                self._buffer("B", self.b, "sb, sc, sy, sk, 64, 4, 1"),
                self._buffer("C", "int32", None, "local"),
            ]
        )
        reads = f"{s['RC']}, {s['RA']}, {s['RB']}"
        strided = f"A[vh * {self.stride_h}, vx * {self.stride_w}, vi * 4 + vj]"
        if self.window:
            strided = f"A[vh * {self.stride_h}, vx * {self.stride_w} + vi * 4 + vj]"
        weight = (
            f"B[vb * {self.oc_tiles} + T.floordiv(vo, 16), 0, 0, 0, vi, T.floormod(vo, 16), vj]"
        )
        c = "C[vb, vh, vx, vo]"
        step = f'{c} = {c} + T.Cast("int32", {strided}) * T.Cast("int32", {weight})'
        desc = self._nest("update", True, step)
        return (
            block_text.function(buffers, reads, s["RC"], desc),
            block_text.function(buffers, reads, s["RC"], self._dot_body()),
        )

    def step(self) -> list[tuple[Any, ...]]:
        """Return a step's instructions in order.

        ("a", m, tile) and ("b", n, tile) load a tile of data or of weights, ("dot", m, n) adds the
        product of two loaded ones.
        """
        a_tiles, b_tiles, weights_stay = self._operand_tiles()
        outer, inner = (
            (self.m_tiles, self.n_tiles) if weights_stay else (self.n_tiles, self.m_tiles)
        )
        rotates, stays = ("a", "b") if weights_stay else ("b", "a")
        tiles = {"a": a_tiles, "b": b_tiles}
        found: list[tuple[Any, ...]] = []
        for i in range(outer):
            found.append((rotates, i, tiles[rotates][i % len(tiles[rotates])]))
            for j in range(inner):
                if i == 0:
                    found.append((stays, j, tiles[stays][j]))
                found.append(("dot", i, j) if weights_stay else ("dot", j, i))
        return found

    def _product_tiles(self, m: int, n: int) -> tuple[int, int, int]:
        """Return the tiles of a product: sums, data, weights."""
        a_tiles, b_tiles, _ = self._operand_tiles()
        return self._c(m, n), a_tiles[m % len(a_tiles)], b_tiles[n % len(b_tiles)]

    def product(self, m: int, n: int) -> Any:
        """Return the statement that adds the product of data tile m and weight tile n."""
        name = f"llvm.x86.tdpb{_NAME[self.a]}{_NAME[self.b]}d"
        return compat.call_statement(
            name, *(tir.const(tile, "uint8") for tile in self._product_tiles(m, n))
        )

    def _dot_body(self) -> list[str]:
        product = f"tdpb{_NAME[self.a]}{_NAME[self.b]}d"

        def load_a(m: int, tile: int) -> str:
            h, w = divmod(m, self.tiles_w)
            # Elements from pixel to pixel.
            pixel = f"{self.stride_w}" if self.window else f"{self.stride_w} * sx"
            first = f"{h * self.stride_h}, {w * self.rows * self.stride_w}"
            address = f"T.address_of(A[{first}{'' if self.window else ', 0'}])"
            return _llvm("tileloadd64", f"T.uint8({tile})", address, f'T.Cast("int64", {pixel})')

        def load_b(n: int, tile: int) -> str:
            address = f"T.address_of(B[{n}, 0, 0, 0, 0, 0, 0])"
            return _llvm("tileloadd64", f"T.uint8({tile})", address, "T.int64(64)")

        def multiply(m: int, n: int) -> str:
            return _llvm(product, *(f"T.uint8({tile})" for tile in self._product_tiles(m, n)))

        emit = {"a": load_a, "b": load_b, "dot": multiply}
        return [emit[what](*operands) for what, *operands in self.step()]

    def store(self) -> tuple[object, object]:
        """Return (desc, impl) of ``O = C``: tiles written to an int32 buffer."""
        s = self._shapes()
        buffers = "\n".join(
            [
                "sb, sh, sx = T.int32(), T.int32(), T.int32()",
                self._buffer("C", "int32", None, "local"),
                self._buffer("O", "int32", "sb, sh, sx, 1"),
            ]
        )
        writes = "O" + s["RC"][1:]
        desc = self._nest("store", False, "O[vb, vh, vx, vo] = C[vb, vh, vx, vo]")
        impl = []
        for m in range(self.m_tiles):
            h, w = divmod(m, self.tiles_w)
            for n in range(self.n_tiles):
                b, t = divmod(n, self.oc_tiles)
                address = f"T.address_of(O[{b}, {h}, {w * self.rows}, {t * 16}])"
                stride = 'T.Cast("int64", sx * 4)'
                impl.append(_llvm("tilestored64", f"T.uint8({self._c(m, n)})", address, stride))
        return (
            block_text.function(buffers, s["RC"], writes, desc),
            block_text.function(buffers, s["RC"], writes, impl),
        )

    def register(self) -> tuple[str, str, str]:
        """Register zero, dot and store (once) and return their names."""
        return block_text.register(self)


def configure(block: AmxBlock) -> object:
    """Return the block statement that loads this tile configuration on the running thread.

    The addresses in this file are `T.address_of`: TVM's StorageRewrite may give two buffers one
    allocation, and `access_ptr` wants both to have one element type then.
    """
    stores = "\n".join(f"        cfg[{i}] = T.int32({w})" for i, w in enumerate(block.config()))
    alloc = "T.sblock_alloc_buffer" if compat.IS_RELAX else "T.alloc_buffer"
    text = f"""
{{PF}}
def func() -> None:
    with {{block}}("amx_config"):
        T.reads()
        T.writes()
        cfg = {alloc}((16,), "int32")
{stores}
        {_llvm("ldtilecfg", "T.address_of(cfg[0])")}
"""
    return compat.first_block(compat.parse_prim_func(text))


def tile_zero(tile: int) -> Any:
    """Return the statement that clears a tile."""
    return compat.call_statement("llvm.x86.tilezero", tir.const(tile, "uint8"))


def tile_load(tile: int, first: Any, stride: int, stream: bool = False) -> Any:
    """Return the statement that loads a tile.

    Parameters
    ----------
    first : BufferLoad
        Its first element.
    stride : int
        Bytes from row to row; 0 repeats one row.
    stream : bool
        Whether the lines are to leave the first-level cache soon.
    """
    name = "llvm.x86.tileloaddt164" if stream else "llvm.x86.tileloadd64"
    operands = tir.const(tile, "uint8"), tir.address_of(first), tir.const(stride, "int64")
    return compat.call_statement(name, *operands)


def tile_store(tile: int, first: Any, stride: int) -> Any:
    """Return the statement that stores a tile, `stride` bytes from row to row."""
    operands = tir.const(tile, "uint8"), tir.address_of(first), tir.const(stride, "int64")
    return compat.call_statement("llvm.x86.tilestored64", *operands)


def release() -> object:
    """Return the statement that gives the tile registers back (smaller context switches)."""
    return compat.call_statement("llvm.x86.tilerelease")


def request_permission() -> object:
    """Return the statement that asks Linux for AMX tile state for this process.

    arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA); granted once, asking again is harmless. Kernel
    documentation: Documentation/arch/x86/xstate.rst.
    """
    return compat.extern_statement("syscall", 158, 0x1023, 18)
