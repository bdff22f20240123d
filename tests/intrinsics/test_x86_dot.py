"""x86_dot.py: each implementation computes its description, and compiles to its instruction."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tvm

from intrinsics import compat
from intrinsics.x86_dot import DOT_INTRINSICS, DotIntrinsic
from tests.kernels import BEYOND, Assembly, call, require
from topi_int8.target import isa_target

# The widest pair that vpmaddubsw adds without saturating: 2 * 255 * 64 = 32640.
SAFE = 64
ROWS = pytest.mark.parametrize("dot", DOT_INTRINSICS.values(), ids=DOT_INTRINSICS.keys())


def library(func: object, isa: str) -> tvm.runtime.Executable:
    """Compile a desc or impl, whose accumulator C becomes the last argument."""
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=isa_target(isa))


def accumulate(lib: tvm.runtime.Executable, a: np.ndarray, b: np.ndarray, c: np.ndarray):
    """Return C + A . B of one step; C is read and written."""
    out = c.copy()
    tensors = [tvm.runtime.tensor(array) for array in (a, b, out)]
    lib["main"](*tensors)
    return tensors[-1].numpy()


def operands(dot: DotIntrinsic, rng: np.random.Generator, bound: int) -> list[np.ndarray]:
    """Return A, B, C of the row's dtypes: extremes and random values, weights up to `bound`."""
    info = np.iinfo(dot.a)
    # int16 rows carry widened 8-bit values minus an 8-bit zero point.
    low, high = (-255, 255) if dot.a == "int16" else (info.min, info.max)
    a = rng.integers(low, high + 1, dot.k)
    b = rng.integers(-bound, bound + 1, (dot.n, dot.k))
    if rng.integers(2):
        a = np.where(rng.integers(0, 2, a.shape), high, low)
    if rng.integers(2):
        b = np.where(rng.integers(0, 2, b.shape), bound, -bound)
    c = rng.integers(-(2**30), 2**30, dot.n)
    return [a.astype(dot.a), b.astype(dot.b), c.astype("int32")]


def numpy_dot(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return c + (b.astype("int32") * a.astype("int32")).sum(axis=1, dtype="int32")


def widest(dot: DotIntrinsic) -> int:
    """Return the largest weight for which the row promises an exact product."""
    if not dot.exact:
        return SAFE
    return 255 if dot.b == "int16" else 127


@ROWS
def test_desc_is_the_dot_product(dot):
    lib = library(dot.desc(), "generic")
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b, c = operands(dot, rng, widest(dot))
        np.testing.assert_array_equal(accumulate(lib, a, b, c), numpy_dot(a, b, c))


@ROWS
def test_impl_computes_desc(dot):
    require(dot.isa)
    meaning, instruction = library(dot.desc(), "generic"), library(dot.impl(), dot.isa)
    rng = np.random.default_rng(1)
    for _ in range(200):
        a, b, c = operands(dot, rng, widest(dot))
        want = accumulate(meaning, a, b, c)
        np.testing.assert_array_equal(accumulate(instruction, a, b, c), want)


@ROWS
def test_impl_is_the_instruction(dot):
    assembly = Assembly.of(library(dot.impl(), dot.isa))
    found = [line for line in assembly.lines if dot.mnemonic in line]
    assert len(found) == 1
    assert ("%zmm" if dot.bits == 512 else "%ymm") in found[0]
    assert not assembly.matching(BEYOND[dot.isa])
    if dot.isa == "avx_vnni":
        assert found[0].startswith("{vex} vpdpbusd")
    elif dot.bits == 512 or dot.isa.startswith("avx512"):
        assert not found[0].startswith("{vex}")


@pytest.mark.parametrize("dot", [d for d in DOT_INTRINSICS.values() if not d.exact],
                         ids=lambda d: d.name)  # fmt: skip
def test_inexact_rows_saturate_beyond_7_bits(dot):
    """Why the strategy asks for a proof: one more than it allows and the pair sum clips."""
    require(dot.isa)
    lib = library(dot.impl(), dot.isa)
    c = np.zeros(dot.n, "int32")
    a = np.full(dot.k, 255, dot.a)
    for weight, saturates in ((SAFE, False), (-SAFE, False), (SAFE + 1, True), (-SAFE - 1, True)):
        b = np.full((dot.n, dot.k), weight, dot.b)
        exact = np.array_equal(accumulate(lib, a, b, c), numpy_dot(a, b, c))
        assert exact != saturates, weight


def test_tensorized_on_memory():
    """Tensorize finds the desc in a loop nest and leaves the impl there."""
    dot = DOT_INTRINSICS["dot_1x8x2_s16s16s32_avx2"]
    require(dot.isa)
    from tvm import te

    a = te.placeholder((10, 2), "int16", "a")
    b = te.placeholder((10, 8, 2), "int16", "b")
    s, k = te.reduce_axis((0, 10), "s"), te.reduce_axis((0, 2), "k")
    out = te.compute(
        (8,),
        lambda j: te.sum(a[s, k].astype("int32") * b[s, j, k].astype("int32"), axis=[s, k]),
        name="out",
    )
    sch = compat.Schedule(te.create_prim_func([a, b, out]))
    block = compat.get_block(sch, "out")
    j, s, k = sch.get_loops(block)
    sch.reorder(s, j, k)
    sch.decompose_reduction(block, s)
    sch.tensorize(j, dot.register())
    lib = tvm.compile(sch.mod, target=isa_target(dot.isa))
    rng = np.random.default_rng(2)
    x = rng.integers(-255, 256, (10, 2)).astype("int16")
    w = rng.integers(-255, 256, (10, 8, 2)).astype("int16")
    want = np.einsum("sk,sjk->j", x.astype("int32"), w.astype("int32"))
    np.testing.assert_array_equal(call(lib, [x, w], np.empty(8, "int32")), want)
    assert any("vpmaddwd" in line for line in Assembly.of(lib).lines)


def test_names_and_registration():
    for name, dot in DOT_INTRINSICS.items():
        assert name == dot.name
        assert name.startswith(f"dot_1x{dot.n}x{dot.k}_") and name.endswith(dot.isa)
        registered = dot.register()
        assert registered == dot.register() == f"topi_int8.{name}"
        found = compat.TensorIntrin.get(registered)
        tvm.ir.assert_structural_equal(found.desc, dot.desc())
        tvm.ir.assert_structural_equal(found.impl, dot.impl())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 5}, r"n is 5; allowed: 4, 8 or 16"),
        ({"k": 2}, r"k is 2; allowed: what makes 32 bits of uint8"),
        ({"a": "int16"}, r"k is 4; allowed: what makes 32 bits of int16"),
    ],
)
def test_rows_validate_themselves(change, message):
    row = DOT_INTRINSICS["dot_1x8x4_u8s8s32_avx_vnni"]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(row, **change)
