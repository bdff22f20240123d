"""byte_lookup.py: every entry of a table, by the instructions of each row, and by no other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te
from tvm.target import Target

from intrinsics.byte_lookup import BYTE_LOOKUPS, TABLE, ByteLookup, best
from intrinsics.compat import tir
from tests.kernels import Assembly, call
from topi_int8 import _host
from topi_int8.target import KERNEL_FLAG, features, isa_target

X86 = [row for row in BYTE_LOOKUPS if row.arch == "x86_64"]
# What each must be made of: LLVM may know better than a pattern, a table lookup it does not.
INSTRUCTION = {"vpermi2b": "vperm[it]2b .*%zmm", "vpshufb_512": "vpshufb .*%zmm",
               "vpshufb_256": "vpshufb .*%ymm", "tbl": r"tb[lx]"}  # fmt: skip


def target_of(row: ByteLookup) -> Target:
    """Return a Target that has what a row needs, and not much more."""
    isa = {"vpermi2b": "avx512_bw", "vpshufb_512": "avx512_bw", "vpshufb_256": "avx2"}
    base = isa_target(isa.get(row.name, "neon"))
    more = sorted(row.needs - features(base).llvm)
    config = {"kind": "llvm", **{key: base.attrs[key] for key in ("mtriple", "mcpu", "mattr")
                                 if key in base.attrs}}  # fmt: skip
    config["mattr"] = [*map(str, config.get("mattr", ())), *(f"+{name}" for name in more)]
    return Target(config)


def runs_here(row: ByteLookup) -> bool:
    return {KERNEL_FLAG.get(name, name) for name in row.needs} <= _host.cpu_flags()


def vectors(row: ByteLookup, count: int) -> Any:
    """Return a function that looks `count` vectors up."""
    rows = TABLE // 16 if row.lanes < 64 or "vpshufb" in row.name else TABLE // 64
    table = te.placeholder((rows, row.lanes), "int8", "table")
    data = te.placeholder((count, row.lanes), "int8", "data")

    def emit(ins: list[Any], outs: list[Any]) -> Any:
        i, ramp = tir.Var("i", "int32"), tir.Ramp(0, 1, row.lanes)
        entries = [tir.BufferLoad(ins[1], [at, ramp]) for at in range(rows)]
        found = row.look(entries, tir.BufferLoad(ins[0], [i, ramp]))
        store = tir.BufferStore(outs[0], found, [i, ramp])
        return tir.For(i, 0, count, tir.ForKind.SERIAL, store)

    out = te.extern((count, row.lanes), [data, table], emit, name="out", dtype="int8")
    return te.create_prim_func([data, table, out])


def build(row: ByteLookup) -> Any:
    module = tvm.IRModule({"main": vectors(row, TABLE // row.lanes)})
    return tvm.compile(module, target=target_of(row))


@pytest.mark.parametrize("row", X86, ids=lambda row: row.name)
def test_every_entry(row: ByteLookup) -> None:
    if not runs_here(row):
        pytest.skip(f"this CPU lacks {sorted(row.needs)}")
    rng = np.random.default_rng(1)
    index = rng.permutation(TABLE).astype("uint8")
    table = rng.permutation(TABLE).astype("uint8")
    packed = row.pack(table)
    assert packed.dtype == "uint8" and packed.shape[1] == row.lanes
    data = index.reshape(-1, row.lanes)
    got = call(build(row), [data.view("int8"), packed.view("int8")], data.view("int8"))
    np.testing.assert_array_equal(got.view("uint8"), table[data])


@pytest.mark.parametrize("row", X86, ids=lambda row: row.name)
def test_instructions(row: ByteLookup) -> None:
    assembly = Assembly.of(build(row))
    assert assembly.matching(INSTRUCTION[row.name])
    if row.name == "vpermi2b":  # two shuffles, and the sign bits choose
        assert not assembly.matching("vpshufb")


@pytest.mark.parametrize("isa, name", [
    ("amx_int8", "vpshufb_512"), ("avx512_bw", "vpshufb_512"), ("avx_vnni", "vpshufb_256"),
    ("avx2", "vpshufb_256"), ("generic", None), ("neon", "tbl"), ("neon_i8mm", "tbl"),
    ("armv7_neon", None),
])  # fmt: skip
def test_best(isa: str, name: str | None) -> None:
    has = features(isa_target(isa))
    found = best(has.arch, has.llvm)
    assert (found.name if found else None) == name


def test_best_of_a_cpu_with_vbmi() -> None:
    has = features(target_of(BYTE_LOOKUPS[0]))
    assert best(has.arch, has.llvm) is BYTE_LOOKUPS[0]
    assert best("aarch64", has.llvm) is None  # not by features alone


@pytest.mark.parametrize("field, value", [("lanes", 8), ("needs", frozenset())])
def test_nonsense_is_refused(field: str, value: object) -> None:
    row = BYTE_LOOKUPS[0]
    with pytest.raises(ValueError, match=field):
        ByteLookup(**{**row.__dict__, field: value})
