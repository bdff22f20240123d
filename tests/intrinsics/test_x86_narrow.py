"""x86_narrow.py: values rounded, clipped and narrowed as the plain loops say, and by packing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te

from intrinsics import compat
from intrinsics.compat import tir
from intrinsics.x86_narrow import Narrow
from tests.kernels import Assembly, call, require
from topi_int8.compute.epilogue import quantize_value
from topi_int8.schedule.blocks import iterating
from topi_int8.target import isa_target

ISA = "avx512_bw"
PATCHES = ((1, 64), (2, 32), (4, 16), (1, 32), (2, 16), (1, 16))
STORED = (
    ("uint8", 0, 0, 255),
    ("uint8", 128, 128, 255),
    ("uint8", 255, 3, 200),
    ("int8", 0, -128, 127),
    ("int8", -128, -128, 100),
    ("int8", 7, 7, 127),
)
GRID = [
    Narrow(*patch, *STORED[(i + j) % len(STORED)])
    for i, patch in enumerate(PATCHES)
    for j in range(0, len(STORED), 1 if i < 3 else 3)
]
ROWS = 32


def narrowed(narrow: Narrow, tensorize: bool) -> Any:
    """Return a function that narrows ROWS patches."""
    shape = (ROWS, narrow.pixels, narrow.channels)
    bounds = float(narrow.low), float(narrow.high)
    values = te.placeholder(shape, "float32", "v")
    near = te.compute(shape, lambda *at: values[at] * tir.const(1.0, "float32"), "near")
    out = te.compute(
        shape,
        lambda *at: quantize_value(near[at], narrow.zero_point, *bounds, narrow.dtype), "out",
    )  # fmt: skip
    sch = compat.Schedule(te.create_prim_func([values, out]))
    block = compat.get_block(sch, "out")
    row, pixel, channel = sch.get_loops(block)
    source = compat.get_block(sch, "near")
    sch.compute_at(source, row, preserve_unit_loops=True)
    sch.set_scope(source, 0, "local")
    if tensorize:
        sch.tensorize(iterating(sch, [pixel, channel]), narrow.register())
    return sch.mod["main"]


def draw(narrow: Narrow) -> np.ndarray:
    """Return values around the bounds, ties, and beyond int32 on both sides."""
    rng = np.random.default_rng(5)
    shape = (ROWS, narrow.pixels, narrow.channels)
    values = (rng.integers(-700, 700, shape) * 0.5).astype("float32")
    far = np.float32([2.0**31, -(2.0**31), 3e9, -3e9, 1e30, -1e30, 40000, -40000, 254.5, 255.5])
    return np.where(rng.random(shape) < 1 / 7, rng.choice(far, shape), values)


def wanted(narrow: Narrow, values: np.ndarray) -> np.ndarray:
    """Return what is stored of the values, computed another way."""
    rounded = np.rint(values.astype("float64")) + narrow.zero_point
    return np.clip(rounded, narrow.low, narrow.high).astype(narrow.dtype)


def build(narrow: Narrow, tensorize: bool = True) -> Any:
    module = tvm.IRModule({"main": narrowed(narrow, tensorize)})
    return tvm.compile(module, target=isa_target(ISA))


@pytest.mark.parametrize("narrow", GRID, ids=lambda narrow: narrow.name.split("narrow_")[1])
def test_narrows_as_the_desc_says(narrow):
    require(ISA)
    values = draw(narrow)
    for tensorize in (False, True):
        got = call(build(narrow, tensorize), [values], np.empty(values.shape, narrow.dtype))
        np.testing.assert_array_equal(got, wanted(narrow, values))


def test_packs_four_vectors_together():
    narrow = Narrow(1, 64, "uint8", 3, 3, 255)
    found = Assembly.of(build(narrow)).mnemonics()
    assert found["vcvtps2dq"] == 2 * found["vpackssdw"] == 4 * found["vpackuswb"] > 0
    assert found["vpmovdb"] == 0 and found["vpaddsw"] == found["vpackssdw"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 48}, r"pixels, channels are 1, 48; allowed: 16, 32 or 64"),
        ({"pixels": 3}, r"pixels, channels are 3, 64"),
        ({"dtype": "int16"}, r"dtype is int16; allowed: uint8, int8"),
        ({"high": 256}, r"low, high are 0, 256; allowed: within 0, 255"),
    ],
)
def test_validates_itself(change, message):
    given = dict(pixels=1, channels=64, dtype="uint8", zero_point=0, low=0, high=255)
    with pytest.raises(ValueError, match=message):
        Narrow(**(given | change))
