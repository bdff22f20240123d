"""arm_dot.py: each block computes its description, under qemu; and what its assembly is made of.

The descriptions are plain loops: this machine runs them against numpy. The implementations are put
in place of those loops by `tensorize`, which proves that they are the desc, and run by qemu: with
mmla the accumulators between zero and store lie in an order of their own, so that only all three
together compute anything.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te

from bench import arm_asm
from intrinsics import compat
from intrinsics.arm_dot import PRODUCTS, ArmBlock, ArmProduct
from intrinsics.compat import tir
from tests.emulator import arm
from tests.emulator.arm_asm import beyond
from tests.emulator.bare import build_program
from topi_int8.schedule.blocks import iterating
from topi_int8.target import isa_target

STEPS = 3

PIXELS = ((1, 2), (2, 2), (1, 1), (1, 3), (2, 1), (3, 1), (1, 5))
CHANNELS = (4, 8, 16)
# Vectors of every length that loads are cut into, alone and after each other.
STEP_CHANNELS = {1: (4, 1, 3, 6), 4: (16, 4, 8, 20, 24, 28), 8: (8, 16, 24), 16: (16, 32)}
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"stride_w": 2},
    {"stride_h": 2, "stride_w": 3},
    {"window": True, "stride_w": 4},
    {"window": True, "stride_h": 2, "stride_w": 6},
)


@functools.cache
def blocks(product: ArmProduct) -> tuple[ArmBlock, ...]:
    """With each k every layout; pixels, channels and steps in turn.

    Not larger than they have to be: parsing them takes most of these tests' time.
    """
    limit = product.registers // (4 if product.partial else 2)
    even = [size for size in PIXELS if product.how != "mmla" or size[0] * size[1] % 2 == 0]
    found, i = [], list(PRODUCTS).index(product.name)
    for k in product.k:
        # Two rows differ in their types alone, or in how wide their sums are.
        for layout in LAYOUTS[i % 2 :: 2] if product.how == "mull" else LAYOUTS:
            h, w = even[i % len(even)]
            size = h * w if product.partial else h * w // 4
            channels = [n for n in CHANNELS if size * n <= limit] or [4]
            n, step = channels[i % len(channels)], STEP_CHANNELS[k][i % len(STEP_CHANNELS[k])]
            found.append(ArmBlock(product, h, w, n, step, k, **layout))
            i += 1
    return tuple(found)


# ---- operands


def data_shape(block: ArmBlock) -> tuple[int, ...]:
    height, width = (block.h - 1) * block.stride_h + 1, (block.w - 1) * block.stride_w + 1
    if block.window:
        return height, width - 1 + block.step
    return height, width, block.step


def draw(block: ArmBlock, steps: int, seed: int, low: int | None = None) -> list[np.ndarray]:
    """Return data and weights: random (seed 0), or at the ends of their ranges.

    `low` is the smallest weight, by default the smallest that the row promises to be exact for.
    Floats are small integers, so that sums are exact in any order.
    """
    rng, product = np.random.default_rng(seed), block.product
    shapes = (steps, *data_shape(block)), (1, steps, 1, 1, block.rows_k, block.n, block.k)
    arrays = []
    for dtype, shape in zip((product.a, product.b), shapes, strict=True):
        ends = (-50, 50) if dtype == "float32" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if dtype == product.b and len(arrays) == 1:
            least = -127 if product.how == "smlal" else ends[0]
            ends = (least if low is None else low, ends[1])
        values = rng.integers(ends[0], ends[1] + 1, shape)
        if seed:
            # All at the lower end: the largest products of signed types. Then either end.
            values = np.full(shape, ends[0]) if seed == 1 else rng.choice(ends, shape)
        arrays.append(values.astype(dtype))
    return arrays


def numpy_product(block: ArmBlock, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return (1, h, w, n): the products summed over all steps."""
    steps = len(a)
    pixels = a[:, :: block.stride_h].astype("int64")
    if block.window:
        pixels = np.lib.stride_tricks.sliding_window_view(pixels, block.step, axis=2)
    pixels = pixels[:, :, :: block.stride_w]  # (steps, h, w, step)
    weights = b.reshape(steps, block.rows_k, block.n, block.k).astype("int64")
    weights = weights.transpose(0, 2, 1, 3).reshape(steps, block.n, block.step)
    sums = np.einsum("shxk,sok->hxo", pixels, weights, optimize=True)
    return sums[None].astype(block.product.acc)


# ---- desc


def compile_for(functions: dict[str, Any], isa: str) -> tvm.runtime.Executable:
    named = {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    return tvm.compile(tvm.IRModule(named), target=isa_target(isa))


# Rows of the same types mean the same.
MEANINGS = {(row.a, row.b, row.partial, row.k): row for row in PRODUCTS.values()}


@pytest.mark.parametrize("product", MEANINGS.values(), ids=lambda row: row.name)
def test_desc_is_the_product(product):
    """Run by this machine: zero, one step after another, store."""
    functions = {}
    for i, block in enumerate(blocks(product)):
        for what in ("zero", "dot", "store"):
            functions[f"{what}{i}"] = getattr(block, what)()[0]
    library = compile_for(functions, "generic")
    for i, block in enumerate(blocks(product)):
        a, b = draw(block, STEPS, seed=i % 3)
        parts = (4,) if product.partial else ()
        c = tvm.runtime.tensor(np.full((1, block.h, block.w, block.n, *parts), 77, product.acc))
        out = tvm.runtime.tensor(np.empty((1, block.h, block.w, block.n), product.acc))
        library[f"zero{i}"](c)
        for step in range(STEPS):
            operands = a[step], np.ascontiguousarray(b[:, step : step + 1])
            library[f"dot{i}"](*map(tvm.runtime.tensor, operands), c)
        library[f"store{i}"](c, out)
        np.testing.assert_array_equal(out.numpy(), numpy_product(block, a, b), block.name)


@pytest.mark.parametrize("k", [8, 16])
def test_partial_sums_are_of_neighbours(k):
    """As a long multiply and a pairwise add make them: lanes 2l and 2l + 1 of eight are part l."""
    block = ArmBlock(PRODUCTS["smlal_s8s8s32_neon"], 1, 1, 4, k, k)
    library = compile_for({"dot": block.dot()[0]}, "generic")
    b = np.ones((1, 1, 1, 1, 1, 4, k), "int8")
    for channel in range(k):
        a = np.zeros((1, 1, k), "int8")
        a[..., channel] = 1
        c = tvm.runtime.tensor(np.zeros((1, 1, 1, 4, 4), "int32"))
        library["dot"](tvm.runtime.tensor(a), tvm.runtime.tensor(b), c)
        assert c.numpy()[0, 0, 0].tolist() == [np.eye(4)[channel % 8 // 2].tolist()] * 4


# ---- impl


def nest(block: ArmBlock) -> Any:
    """Return plain loops over STEPS steps."""
    product, k = block.product, block.k
    parts = 4 if product.partial else 1
    a = te.placeholder((STEPS, *data_shape(block)), product.a, "a")
    b = te.placeholder((1, STEPS, 1, 1, block.rows_k, block.n, k), product.b, "b")
    s = te.reduce_axis((0, STEPS), "s")
    i, j = te.reduce_axis((0, block.rows_k), "i"), te.reduce_axis((0, k // parts), "j")

    def step(v0: Any, vh: Any, vx: Any, vo: Any, *part: Any) -> Any:
        within = j
        if part:
            within = tir.floordiv(j, 2) * 8 + part[0] * 2 + tir.floormod(j, 2)
        row, column, channel = vh * block.stride_h, vx * block.stride_w, i * k + within
        x = a[s, row, column + channel] if block.window else a[s, row, column, channel]
        w = b[v0, s, 0, 0, i, vo, within]
        return te.sum(x.astype(product.acc) * w.astype(product.acc), axis=[s, i, j])

    shape = (1, block.h, block.w, block.n)
    if not product.partial:
        return te.create_prim_func([a, b, te.compute(shape, step, name="c")])
    c = te.compute((*shape, 4), step, name="c")
    out = te.compute(
        shape, lambda *at: c[(*at, 0)] + c[(*at, 1)] + c[(*at, 2)] + c[(*at, 3)], name="sum"
    )
    return te.create_prim_func([a, b, out])


def tensorized(block: ArmBlock) -> Any:
    """Return the nest on vector registers."""
    zero, dot, store = block.register()
    sch = compat.Schedule(nest(block))
    acc = compat.get_block(sch, "c")
    if block.product.partial:
        sch.set_scope(acc, 0, "local")
        stored = compat.get_block(sch, "sum")
    else:
        stored = sch.cache_write(acc, 0, "local")
    *spatial, s, i, j = sch.get_loops(acc)
    sch.reorder(s, *spatial, i, j)
    init = sch.decompose_reduction(acc, s)
    sch.tensorize(iterating(sch, sch.get_loops(init)), zero)
    sch.tensorize(iterating(sch, sch.get_loops(acc)[1:]), dot)
    sch.tensorize(iterating(sch, sch.get_loops(stored)), store)
    return sch.mod["main"]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A product's blocks in one module."""

    product: ArmProduct
    executable: tvm.runtime.Executable


@pytest.fixture(scope="module", params=PRODUCTS.values(), ids=PRODUCTS.keys())
def compiled(request: pytest.FixtureRequest) -> Compiled:
    product = request.param
    functions = {block.name: tensorized(block) for block in blocks(product)}
    return Compiled(product, compile_for(functions, product.isa))


@pytest.mark.arm
def test_impl_computes_desc(compiled: Compiled, tmp_path: Path, record_property):
    isa, found = compiled.product.isa, blocks(compiled.product)
    reason = arm.problem(isa)
    if reason:
        pytest.skip(reason)
    program = build_program(compiled.executable, [block.name for block in found], isa, tmp_path)
    wrong = []
    for block in found:
        for seed in (0, 1, 2):
            a, b = draw(block, STEPS, seed)
            out = np.zeros((1, block.h, block.w, block.n), block.product.acc)
            got = program.call(block.name, [a, b, out])[-1]
            if not np.array_equal(got, numpy_product(block, a, b)):
                wrong.append(f"{block.name} (seed {seed})")
    where = f"{isa} on {arm.MACHINES[isa].cpu}"
    record_property("qemu", (where, "blocks of intrinsics", len(found)))
    assert not wrong


@pytest.mark.arm
@pytest.mark.parametrize("isa", ["neon", "armv7_neon"])
def test_pairs_of_products_overflow_at_128(isa: str, tmp_path: Path):
    """Why the strategy asks for a proof: two products of -128 and -128 do not fit int16."""
    reason = arm.problem(isa)
    if reason:
        pytest.skip(reason)
    exact = {}
    for how in ("smlal", "mull"):
        block = ArmBlock(PRODUCTS[f"{how}_s8s8s32_{isa}"], 1, 2, 4, 16, 16)
        folder = tmp_path / how
        program = build_program(compile_for({"f": tensorized(block)}, isa), ["f"], isa, folder)
        for low in (-127, -128):
            a, b = draw(block, STEPS, seed=1, low=low)
            assert a.max() == -128 and b.max() == low
            out = np.zeros((1, block.h, block.w, block.n), "int32")
            got = program.call("f", [a, b, out])[-1]
            exact[how, low] = np.array_equal(got, numpy_product(block, a, b))
    assert exact == {
        ("smlal", -127): True, ("smlal", -128): False, ("mull", -127): True, ("mull", -128): True,
    }  # fmt: skip


# ---- instructions


def wanted(block: ArmBlock) -> tuple[str, ...]:
    """The row's mnemonics; with rows of 8 weights there is no second half to add."""
    other = ("smlal2", "vmlal.s8") if block.k == 8 else ()
    if "sudot" in block.product.mnemonics:
        # A pixel's single word is broadcast where it is loaded: no lane, and so no sudot.
        other = ("sudot",) if block.step == 4 else ("usdot",) if block.step % 8 == 0 else ()
    return tuple(name for name in block.product.mnemonics if name not in other)


def test_impl_is_made_of_the_instructions(compiled: Compiled, request: pytest.FixtureRequest):
    """No product is made twice, or by another instruction. LLVM may unroll the steps."""
    found: dict[str, list[arm_asm.Instruction]] = {}
    for function in arm_asm.parse(compiled.executable.mod.inspect_source("asm")):
        name = function.name.removeprefix("__tvm_ffi_").removesuffix("_compute_")
        found.setdefault(name, []).extend(i for b in function.blocks for i in b.instructions)
    for block in blocks(compiled.product):
        code = found[block.name]
        macs = block.pixels * block.n * block.step
        made = sum(map(arm_asm.macs, code))
        assert made in (macs, STEPS * macs), (block.name, made / macs)
        assert not beyond(block.product.isa, [i.text for i in code]), block.name
    for block in blocks(compiled.product):
        names = Counter(i.mnemonic for i in found[block.name])
        assert all(names[name] for name in wanted(block)), (block.name, names)


# ---- the table


def test_names_are_unique_and_say_what_a_row_is():
    short = {"uint8": "u8", "int8": "s8", "float32": "f32", "int32": "s32"}
    for name, row in PRODUCTS.items():
        types = "".join(short[dtype] for dtype in (row.a, row.b, row.acc))
        assert name == row.name == f"{row.how}_{types}_{row.isa}"
        assert row.registers == (16 if row.isa == "armv7_neon" else 32)
        assert row.isa in arm.MACHINES
    every = [block for row in PRODUCTS.values() for block in blocks(row)]
    assert len({block.name for block in every}) == len(every)


@pytest.mark.parametrize(
    ("field", "value"),
    [("h", 2), ("w", 4), ("n", 8), ("step", 32), ("k", 8), ("stride_h", 2), ("stride_w", 2),
     ("window", True), ("product", PRODUCTS["mull_s8s8s32_neon"])],
)  # fmt: skip
def test_each_field_is_in_the_name(field, value):
    """Two blocks of one name would share an intrinsic."""
    block = ArmBlock(PRODUCTS["smlal_s8s8s32_neon"], 1, 2, 4, 16, 16)
    assert dataclasses.replace(block, **{field: value}).name != block.name


@pytest.mark.parametrize("how", ["smlal", "mull", "dot", "mmla", "fma"])
def test_registration(how):
    product = next(row for row in PRODUCTS.values() if row.how == how)
    block = ArmBlock(product, 1, 2, 4, product.k[-1], product.k[-1])
    names = block.register()
    assert names == block.register()
    assert names == tuple(f"topi_int8.{what}_{block.name}" for what in ("zero", "dot", "store"))
    for name, what in zip(names, ("zero", "dot", "store"), strict=True):
        found, (desc, impl) = compat.TensorIntrin.get(name), getattr(block, what)()
        tvm.ir.assert_structural_equal(found.desc, desc)
        tvm.ir.assert_structural_equal(found.impl, impl)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("smlal_s8s8s32_neon", {"n": 6}, r"n is 6; allowed: multiples of 4"),
        ("smlal_s8s8s32_neon", {"n": 0}, r"n is 0; allowed: multiples of 4"),
        ("smlal_s8s8s32_neon", {"step": 24}, r"step is 24, k is 16; allowed: k of \(16, 8\)"),
        ("smlal_s8s8s32_neon", {"k": 4}, r"step is 16, k is 4; allowed: k of \(16, 8\)"),
        ("dot_s8s8s32_neon_dotprod", {"k": 8}, r"step is 16, k is 8; allowed: k of \(4,\)"),
        ("mmla_s8s8s32_neon_i8mm", {"k": 8, "w": 3}, r"pixels are 3; allowed: an even number"),
    ],
)
def test_blocks_validate_themselves(name, change, message):
    row = PRODUCTS[name]
    good = {"h": 1, "w": 2, "n": 4, "step": 16, "k": row.k[0]}
    ArmBlock(row, **good)
    with pytest.raises(ValueError, match=message):
        ArmBlock(row, **(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"how": "vmla"}, r"how is 'vmla'; allowed: smlal, mull, dot, mmla, fma"),
        ({"arch": "riscv"}, r"arch is 'riscv'; allowed: aarch64, arm"),
    ],
)
def test_rows_validate_themselves(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRODUCTS["smlal_s8s8s32_neon"], **change)
