"""x86_narrow.py: values rounded, clipped and narrowed as numpy does it, and by packing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te

from intrinsics.compat import tir
from intrinsics.x86_narrow import WORDS, narrowed
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
