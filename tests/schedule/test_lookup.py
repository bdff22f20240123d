"""schedule/lookup.py: whole rows against numpy, on every ISA; ARM's under qemu."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st

from intrinsics import byte_lookup
from tests import reference
from tests.emulator import arm
from tests.emulator.bare import build_program
from tests.kernels import Assembly, call, check_no_more, require
from topi_int8.schedule.lookup import Lookup
from topi_int8.target import features, host_target, isa_target

ISAS = ("generic", "avx2", "avx_vnni", "avx512_bw", "avx512_vnni", "amx_int8")
# A byte, around each length of vector, tails, two tasks with and without a tail.
SIZES = (1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000, 65536, 70001, 200003)
TYPES = [(data, out) for data in ("uint8", "int8") for out in ("uint8", "int8")]


def row(size: int, data: str, out: str, target: tvm.target.Target) -> Lookup:
    has = features(target)
    return Lookup(size, data, out, byte_lookup.best(has.arch, has.llvm))


def draw(size: int, data: str, out: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, size).astype("uint8")
    return values.view(data), rng.integers(0, 256, 256).astype("uint8").view(out)


def check(kernel: Lookup, target: tvm.target.Target, seed: int = 0) -> None:
    library = tvm.compile(tvm.IRModule({"main": kernel.schedule()}), target=target)
    data, table = draw(kernel.size, kernel.data_dtype, kernel.out_dtype, seed)
    packed = kernel.pack_table(table)
    assert packed.shape == kernel.table_shape
    got = call(library, [data, packed], np.empty(kernel.size, kernel.out_dtype))
    np.testing.assert_array_equal(got, reference.lookup(data, table))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("isa", ISAS)
def test_sizes(isa: str, size: int) -> None:
    require(isa)
    check(row(size, "uint8", "int8", isa_target(isa)), isa_target(isa))


@pytest.mark.parametrize("data, out", TYPES)
@pytest.mark.parametrize("isa", ("generic", "avx2", "avx512_bw"))
def test_types(isa: str, data: str, out: str) -> None:
    require(isa)
    check(row(300, data, out, isa_target(isa)), isa_target(isa))


@pytest.mark.parametrize("data, out", TYPES)
def test_on_this_cpu(data: str, out: str) -> None:
    """With the byte permutes that no canonical target names."""
    for size in SIZES:
        check(row(size, data, out, host_target()), host_target())


@given(st.integers(1, 3000), st.sampled_from(TYPES), st.integers(0, 2**32 - 1))
def test_random_tables(size: int, types: tuple[str, str], seed: int) -> None:
    check(row(size, *types, host_target()), host_target(), seed)


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_beyond_the_isa(isa: str) -> None:
    target = isa_target(isa)
    kernel = row(1000, "uint8", "uint8", target)
    library = tvm.compile(tvm.IRModule({"main": kernel.schedule()}), target=target)
    check_no_more(Assembly.of(library), isa)


@pytest.mark.arm
@pytest.mark.parametrize("isa", arm.MACHINES)
def test_arm(isa: str, tmp_path: Path) -> None:
    reason = arm.problem(isa)
    if reason:
        pytest.skip(reason)
    target = isa_target(isa)
    kernels = {
        f"lookup_{size}_{data}_{out}": row(size, data, out, target)
        for size in (1, 15, 16, 40, 1000, 70001)
        for data, out in TYPES
    }
    module = tvm.IRModule(
        {name: k.schedule().with_attr("global_symbol", name) for name, k in kernels.items()}
    )
    program = build_program(tvm.compile(module, target=target), list(kernels), isa, tmp_path)
    for name, kernel in kernels.items():
        data, table = draw(kernel.size, kernel.data_dtype, kernel.out_dtype)
        out = np.zeros(kernel.size, kernel.out_dtype)
        got = program.call(name, [data, kernel.pack_table(table), out])[-1]
        np.testing.assert_array_equal(got, reference.lookup(data, table), err_msg=name)


@pytest.mark.parametrize("field, value", [("size", 0), ("data_dtype", "int32"),
                                          ("out_dtype", "float32")])  # fmt: skip
def test_nonsense_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Lookup(**{"size": 4, "data_dtype": "int8", "out_dtype": "int8", field: value})
