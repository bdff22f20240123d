"""x86_narrow.py: values rounded, clipped and narrowed as numpy does it, and by packing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te

from intrinsics.compat import i32, ramp, sequence, tir
from intrinsics.x86_narrow import (
    LANES,
    PACK_ORDER,
    ROUND_BITS,
    WORDS,
    from_bits,
    narrowed,
    spread,
)
from tests.kernels import Assembly, call, require
from topi_int8.target import isa_target

# The instruction set whose vectors have so many values.
ISA = {16: "avx512_bw", 8: "avx2", 4: "generic"}
STORED = (
    ("uint8", 0, 0, 255),
    ("uint8", 128, 128, 255),
    ("uint8", 255, 3, 200),
    ("int8", 0, -128, 127),
    ("int8", -128, -128, 100),
    ("int8", 7, 7, 127),
)
ROWS = 32


@dataclass(frozen=True)
class Case:
    """Arguments of `narrowed`: vectors and what is stored."""

    vectors: int
    dtype: str
    zero_point: int
    low: int
    high: int
    lanes: int = 16
    bounded: bool = False
    converts: bool = False

    @property
    def name(self) -> str:
        fields = (self.vectors, self.dtype, self.zero_point, self.low, self.high, self.lanes)
        kind = "_converts" * self.converts or "_bounded" * self.bounded
        return "narrow_" + "_".join(map(str, fields)).replace("-", "m") + kind

    @property
    def stored(self) -> tuple[str, int, int, int]:
        """Type, zero point and bounds."""
        return self.dtype, self.zero_point, self.low, self.high


GRID = [
    Case(vectors, *stored, lanes, bounded, converts)
    for vectors in (1, 2, 4)
    for stored in STORED
    for lanes in ISA
    for bounded, converts in ((False, False), (True, False), (True, True))
]


def narrowing(case: Case) -> Any:
    """Return a function that narrows ROWS groups of vectors."""
    width = case.vectors * case.lanes
    values = te.placeholder((ROWS, width), "float32", "v")

    def emit(ins: list[Any], outs: list[Any]) -> Any:
        row = tir.Var("row", "int32")
        vectors = [
            tir.BufferLoad(ins[0], [row, tir.Ramp(j * case.lanes, 1, case.lanes)])
            for j in range(case.vectors)
        ]
        words = narrowed(vectors, *case.stored, case.bounded, case.converts)
        inside = [word for word in WORDS if word < case.lanes]
        order = [tir.const(word, "int32") for word in inside[: width // 4]]
        packed = tir.reinterpret(f"{case.dtype}x{width}", tir.Shuffle([words], order))
        store = tir.BufferStore(outs[0], packed, [row, tir.Ramp(0, 1, width)])
        return tir.For(row, 0, ROWS, tir.ForKind.SERIAL, store)

    out = te.extern((ROWS, width), [values], emit, name="out", dtype=case.dtype)
    return te.create_prim_func([values, out])


def draw(case: Case) -> np.ndarray:
    """Return values around the bounds, ties, and beyond int32 on both sides."""
    rng = np.random.default_rng(5)
    shape = (ROWS, case.vectors * case.lanes)
    values = (rng.integers(-700, 700, shape) * 0.5).astype("float32")
    far = np.float32(
        [2.0**31, -(2.0**31), 3e9, -3e9, 1e30, -1e30, 40000, -40000, 254.5, 255.5, np.inf, -np.inf,
         -(2.0**23), -1.5 * 2**23, -1.5 * 2**23 - 1, -2e7, 2.0**23, 1.5 * 2**23, -4194304.5]
    )  # fmt: skip
    if case.bounded:
        far = far[np.abs(far) < 2**23]
    return np.where(rng.random(shape) < 1 / 3, rng.choice(far, shape), values)


def wanted(case: Case, values: np.ndarray) -> np.ndarray:
    """Return what is stored of the values, computed another way."""
    rounded = np.rint(values.astype("float64")) + case.zero_point
    return np.clip(rounded, case.low, case.high).astype(case.dtype)


def build(case: Case) -> Any:
    return tvm.compile(tvm.IRModule({"main": narrowing(case)}), target=isa_target(ISA[case.lanes]))


@pytest.mark.parametrize("case", GRID, ids=lambda case: case.name)
def test_narrows_as_numpy_does(case):
    require(ISA[case.lanes])
    values = draw(case)
    got = call(build(case), [values], np.empty(values.shape, case.dtype))
    np.testing.assert_array_equal(got, wanted(case, values))


def test_packs_four_vectors_together():
    found = Assembly.of(build(Case(4, "uint8", 3, 3, 255))).mnemonics()
    assert found["vaddps"] == found["vpaddd"] == 2 * found["vpackssdw"]
    assert found["vpackssdw"] == 2 * found["vpackuswb"] > 0
    assert found["vpmovdb"] == found["vcvtps2dq"] == 0


@pytest.mark.parametrize("lanes", ISA)
def test_converts_where_values_are_bounded(lanes):
    case = Case(4, "uint8", 3, 0, 255, lanes, True, True)
    found = Assembly.of(build(case)).mnemonics()
    prefix = "v" if lanes > 4 else ""
    assert found[f"{prefix}cvtps2dq"] == 2 * found[f"{prefix}packssdw"] > 0
    assert found[f"{prefix}paddsw"] == found[f"{prefix}packssdw"]
    assert found[f"{prefix}addps"] == 0
    unbounded = replace(case, bounded=False)
    assert Assembly.of(build(unbounded)).mnemonics()[f"{prefix}cvtps2dq"] == 0


def test_sums_counted_in_the_bits_of_floats():
    require("avx512_bw")
    sums = te.placeholder((32,), "int32", "sums")
    func = te.create_prim_func([sums, _in_vectors(sums, "float32", from_bits)])
    values = np.int32([0, 1, -1, 2**22 - 1, 1 - 2**22, 12345, -54321, 77] * 4)
    got = call(_compiled(func), [values + np.int32(ROUND_BITS)], np.empty(32, "float32"))
    np.testing.assert_array_equal(got, values.astype("float32"))


def _in_vectors(source: Any, dtype: str, value: Any) -> Any:
    """Return the tensor of ``value(vector)`` for each vector of 16."""

    def emit(ins: list[Any], outs: list[Any]) -> Any:
        at = [ramp(i32(first), LANES) for first in range(0, int(source.shape[0]), LANES)]
        return sequence([
            tir.BufferStore(outs[0], value(tir.BufferLoad(ins[0], [index])), [index])
            for index in at
        ])

    return te.extern(source.shape, [source], emit, dtype=dtype)


def _compiled(func: Any) -> Any:
    return tvm.compile(tvm.IRModule({"main": func}), target=isa_target("avx512_bw"))


@pytest.mark.parametrize(("dtype", "zero_point"), [("uint8", 0), ("uint8", 200), ("int8", -7)])
def test_spreads_a_row_in_the_order_that_packs_undo(dtype, zero_point):
    """All bytes there are; narrowed together again they are the row."""
    require("avx512_bw")
    rows = te.placeholder((256,), dtype, "rows")

    def emit(outs: list[Any], first: int, vectors: list[Any]) -> list[Any]:
        stores = [(vector, first + 16 * at, LANES) for at, vector in enumerate(vectors)]
        if str(outs[0].dtype) == dtype:
            low, high = (0, 255) if dtype == "uint8" else (-128, 127)
            words = narrowed(vectors, dtype, zero_point, low, high)
            stores = [(tir.reinterpret(f"{dtype}x64", words), first, 64)]
        return [tir.BufferStore(outs[0], value, [ramp(i32(at), n)]) for value, at, n in stores]

    def spreading(ins: list[Any], outs: list[Any]) -> Any:
        stmts = []
        for first in range(0, 256, 64):
            row = tir.BufferLoad(ins[0], [ramp(i32(first), 64)])
            vectors = [spread(row, dtype, at, zero_point) for at in range(4)]
            stmts += emit(outs, first, vectors)
        return sequence(stmts)

    given = np.arange(256, dtype="uint8").view(dtype)
    spread_floats = given.reshape(-1, 64)[:, PACK_ORDER].astype("float32") - zero_point
    for wanted in (spread_floats.reshape(-1), given):
        out = te.extern(rows.shape, [rows], spreading, dtype=str(wanted.dtype))
        func = te.create_prim_func([rows, out])
        got = call(_compiled(func), [given], np.empty_like(wanted))
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [None] * 3}, r"3 values; allowed: 1, 2 or 4 vectors"),
        ({"values": [tir.Var("v", "float32x2")]}, r"vectors are of 2 values; allowed: 16, 8, 4"),
        ({"dtype": "int16"}, r"dtype is int16; allowed: uint8, int8"),
        ({"high": 256}, r"low, high are 0, 256; allowed: within 0, 255"),
    ],
)
def test_refuses_what_it_cannot_do(change, message):
    given = dict(values=[None], dtype="uint8", zero_point=0, low=0, high=255)
    with pytest.raises(ValueError, match=message):
        narrowed(**(given | change))
