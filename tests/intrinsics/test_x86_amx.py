"""x86_amx.py: zero, dot and store over blocks of tiles, run against the plain loops they replace.

`tensorize` proves that a loop nest is the desc before it puts the impl there; running both nests
proves that the impl is what the desc says. On a CPU without AMX the tiles are emulated.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te

from intrinsics import compat, x86_amx
from intrinsics.compat import tir
from intrinsics.x86_amx import AmxBlock
from tests.emulator import counts, native_features, reset
from tests.kernels import Assembly, call, require
from topi_int8.target import isa_target, runs_here

ISA = "amx_int8" if runs_here("amx_int8") else "amx_int8_avx2"
STEPS = 3
SIGNS = list(itertools.product(("uint8", "int8"), repeat=2))
ROWS = (1, 7, 13, 14, 16)
DEPTHS = (4, 16, 40, 64)
TILES: tuple[dict[str, int], ...] = (
    {},
    {"tiles_w": 2, "oc_tiles": 2},
    {"rows_h": 2, "oc_blocks": 2},
    {"tiles_w": 2, "oc_blocks": 2},
    {"rows_h": 2, "oc_tiles": 2},
    {"oc_tiles": 4},
    {"oc_blocks": 4},
    {"oc_tiles": 2, "oc_blocks": 2},
    {"tiles_w": 4},
    {"rows_h": 4},
    {"rows_h": 2, "tiles_w": 2},
    {"tiles_w": 3},
    {"oc_blocks": 3},
    {"tiles_w": 6},
    {"oc_tiles": 6},
    {"rows_h": 5},
)
STRIDES = ({}, {"stride_h": 2, "stride_w": 2}, {"stride_h": 2}, {"stride_w": 3})


def grid() -> list[AmxBlock]:
    """Every shape of tiles with two sign pairs, every row count and depth with all four."""
    blocks = []
    for i, tiles in enumerate(TILES):
        for j in (0, 1):
            a, b = SIGNS[(i + 2 * j + i // 4) % 4]
            rows, k = ROWS[(i + 2 * j) % 5], DEPTHS[(i + i // 4 + j) % 4]
            blocks.append(AmxBlock(a, b, rows, k=k, **tiles, **STRIDES[(i + j) % 4]))
    for (i, (a, b)), (j, rows) in itertools.product(enumerate(SIGNS), enumerate(ROWS)):
        tiles = TILES[(0, 1, 6, 8)[(i + j) % 4]]
        strides = STRIDES[(i + 2 * j) % 2]
        blocks.append(AmxBlock(a, b, rows, k=DEPTHS[(i + j) % 4], **tiles, **strides))
    # Windows that overlap: the taps of a stem's row.
    blocks += [
        AmxBlock(
            "uint8", "int8", 16, tiles_w=2, oc_tiles=2, k=28, stride_h=2, stride_w=8, window=True
        ),
        AmxBlock("int8", "int8", 7, k=12, stride_w=4, window=True),
        AmxBlock("uint8", "uint8", 1, rows_h=2, k=64, stride_h=3, stride_w=16, window=True),
        AmxBlock("int8", "uint8", 13, oc_blocks=2, k=20, stride_w=4, window=True),
    ]
    return sorted(set(blocks), key=lambda block: block.name)


def extents(block: AmxBlock) -> tuple[int, int, int, int]:
    """Return C's shape: (channel blocks, rows, pixels, channels)."""
    pixels = block.tiles_w * block.rows
    return block.oc_blocks, block.rows_h, pixels, block.oc_tiles * 16


def data_shape(block: AmxBlock) -> tuple[int, ...]:
    """Return A's shape for all steps."""
    _, nh, nx, _ = extents(block)
    height, width = (nh - 1) * block.stride_h + 1, (nx - 1) * block.stride_w + 1
    if block.window:
        return STEPS, height, width - 1 + block.k
    return STEPS, height, width, block.k


def nest(block: AmxBlock) -> Any:
    """Return plain loops over STEPS steps: C[b, h, x, o] += A . B."""
    nb, nh, nx, no = extents(block)
    a = te.placeholder(data_shape(block), block.a, "a")
    b = te.placeholder((block.n_tiles, STEPS, 1, 1, block.k // 4, 16, 4), block.b, "b")
    s = te.reduce_axis((0, STEPS), "s")
    i, j = te.reduce_axis((0, block.k // 4), "i"), te.reduce_axis((0, 4), "j")

    def product(vb: Any, vh: Any, vx: Any, vo: Any) -> Any:
        row, column = vh * block.stride_h, vx * block.stride_w
        x = a[s, row, column + i * 4 + j] if block.window else a[s, row, column, i * 4 + j]
        tile, lane = tir.floordiv(vo, 16), tir.floormod(vo, 16)
        w = b[vb * block.oc_tiles + tile, s, 0, 0, i, lane, j]
        return te.sum(x.astype("int32") * w.astype("int32"), axis=[s, i, j])

    return te.create_prim_func([a, b, te.compute((nb, nh, nx, no), product, name="c")])


def iterating(sch: Any, loops: list[Any]) -> Any:
    """Move loops of extent 1 outside and return the outermost other one."""
    single = [loop for loop in loops if int(sch.get(loop).extent) == 1]
    wide = [loop for loop in loops if int(sch.get(loop).extent) > 1]
    sch.reorder(*single, *wide)
    return wide[0]


def tensorized(block: AmxBlock) -> Any:
    """Return the nest on tiles, configured by itself."""
    zero, dot, store = block.register()
    sch = compat.Schedule(nest(block))
    acc = compat.get_block(sch, "c")
    stored = sch.cache_write(acc, 0, "local")
    b, h, x, o, s, i, j = sch.get_loops(acc)
    sch.reorder(s, b, h, x, o, i, j)
    init = sch.decompose_reduction(acc, s)
    sch.tensorize(iterating(sch, sch.get_loops(init)), zero)
    sch.tensorize(iterating(sch, sch.get_loops(acc)[1:]), dot)
    sch.tensorize(iterating(sch, sch.get_loops(stored)), store)

    def configured(stmts: list[Any]) -> list[Any]:
        first = [x86_amx.request_permission(), x86_amx.configure(block)]
        return [*first, *stmts, x86_amx.release()]

    func = sch.mod["main"]
    return func.with_body(compat.rewrite_root(func.body, configured))


def build(func: Any, isa: str) -> tvm.runtime.Executable:
    return tvm.compile(tvm.IRModule({"main": func}), target=isa_target(isa))


def draw(block: AmxBlock, seed: int) -> list[np.ndarray]:
    """Return full-range A and B."""
    rng = np.random.default_rng(seed)
    a_range, b_range = (np.iinfo(dtype) for dtype in (block.a, block.b))
    a_shape = data_shape(block)
    b_shape = (block.n_tiles, STEPS, 1, 1, block.k // 4, 16, 4)
    return [
        rng.integers(a_range.min, a_range.max + 1, a_shape).astype(block.a),
        rng.integers(b_range.min, b_range.max + 1, b_shape).astype(block.b),
    ]


def numpy_nest(block: AmxBlock, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the nest's result, computed another way."""
    nb, _, _, no = extents(block)
    pixels = a[:, :: block.stride_h].astype("int64")
    if block.window:
        pixels = np.lib.stride_tricks.sliding_window_view(pixels, block.k, axis=2)
    pixels = pixels[:, :, :: block.stride_w]  # (steps, h, x, k)
    weights = b.reshape(block.n_tiles, STEPS, block.k // 4, 16, 4).astype("int64")
    dense = weights.transpose(0, 3, 1, 2, 4).reshape(nb, no, STEPS, block.k)
    return np.einsum("shxk,bosk->bhxo", pixels, dense, optimize=True).astype("int32")


@pytest.mark.parametrize("block", grid(), ids=lambda block: block.name)
def test_tiles_compute_desc(block):
    require(ISA)
    a, b = draw(block, seed=3)
    out = np.empty(extents(block), "int32")
    reset()
    got = call(build(tensorized(block), ISA), [a, b], out)
    np.testing.assert_array_equal(got, numpy_nest(block, a, b))
    if "amx" not in native_features():
        name = f"tdpb{block.a[0]}{block.b[0]}d".replace("i", "s")
        assert counts() == {
            "ldtilecfg": 1,
            "tilezero": block.c_tiles,
            "tileloadd": STEPS * (block.m_tiles + block.n_tiles),
            name: STEPS * block.c_tiles,
            "tilestored": block.c_tiles,
            "tilerelease": 1,
        }


@pytest.mark.parametrize("block", grid()[::6], ids=lambda block: block.name)
def test_numpy_is_the_plain_loops(block):
    """The desc's own loops, run by TVM without any tile."""
    a, b = draw(block, seed=4)
    got = call(build(nest(block), "generic"), [a, b], np.empty(extents(block), "int32"))
    np.testing.assert_array_equal(got, numpy_nest(block, a, b))


@pytest.mark.parametrize(("a", "b"), SIGNS)
def test_instructions_of_the_sign_pairs(a, b):
    block = AmxBlock(a, b, 16, tiles_w=2, oc_tiles=2)
    assembly = Assembly.of(build(tensorized(block), "amx_int8"))
    found = assembly.mnemonics()
    product = {"uint8": "u", "int8": "s"}
    # LLVM may unroll the steps.
    products = found[f"tdpb{product[a]}{product[b]}d"]
    assert products in (4, 4 * STEPS) and found["tileloadd"] == products
    assert products == sum(count for name, count in found.items() if name.startswith("tdp"))
    assert (found["tilestored"], found["tilezero"]) == (4, 4)
    assert (found["ldtilecfg"], found["tilerelease"]) == (1, 1)
    assert len(assembly.matching(r"^(call|jmp)q? .*syscall")) == 1  # permission is asked for


@pytest.mark.parametrize("block", grid()[::3], ids=lambda block: block.name)
def test_configuration_is_a_legal_palette_1(block):
    """Intel SDM, LDTILECFG: 8 tiles of at most 16 rows and 64 bytes; shapes that TDP accepts."""
    raw = np.array(block.config(), "int32").tobytes()
    assert len(raw) == 64 and raw[0] == 1 and not any(raw[1:16])
    colsb, rows = np.frombuffer(raw[16:48], "<u2"), np.frombuffer(raw[48:], "u1")
    assert not colsb[8:].any() and not rows[8:].any()
    assert ((colsb == 0) == (rows == 0)).all()
    assert colsb.max() <= 64 and rows.max() <= 16 and not (colsb % 4).any()
    assert np.count_nonzero(rows[: block.c_tiles] == block.rows) == block.c_tiles
    assert (colsb[: block.c_tiles] == 64).all()
    operands = set(zip(rows[block.c_tiles : 8].tolist(), colsb[block.c_tiles : 8].tolist()))
    assert operands - {(0, 0)} == {(block.rows, block.k), (block.k // 4, 64)}


def test_names_tell_blocks_apart():
    blocks = grid()
    assert len({block.name for block in blocks}) == len(blocks)
    names = blocks[0].register()
    assert names == blocks[0].register()
    assert [name.split(".")[1].split("_")[0] for name in names] == ["zero", "dot", "store"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": "int32"}, r"dtypes are int32, int8; allowed: uint8, int8"),
        ({"b": "float32"}, r"dtypes are uint8, float32"),
        ({"rows": 0}, r"rows is 0; allowed: 1\.\.16"),
        ({"rows": 17}, r"rows is 17"),
        ({"k": 6}, r"k is 6; allowed: 4\.\.64 in steps of 4"),
        ({"k": 68}, r"k is 68"),
        ({"k": 0}, r"k is 0"),
        ({"tiles_w": 7}, r"C tiles are 7x1; allowed: with the shorter side and one more at most 8"),
        ({"tiles_w": 3, "oc_tiles": 2}, r"C tiles are 3x2"),
        ({"tiles_w": 2, "oc_tiles": 3}, r"C tiles are 2x3"),
        ({"tiles_w": 2, "oc_tiles": 2, "oc_blocks": 2}, r"C tiles are 2x4"),
    ],
)
def test_blocks_validate_themselves(arguments, message):
    given = {"a": "uint8", "b": "int8", "rows": 16} | arguments
    with pytest.raises(ValueError, match=message):
        AmxBlock(**given)
