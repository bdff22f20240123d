"""ARM kernels, executed: the grid on each instruction set, alone between unreadable pages and in
TVM's RPC server; and the instructions that libraries hold.

`make test` runs a sample of the grid, `make test-arm` all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.grid import DTYPES, EPILOGUE_BASES, EPILOGUES
from tests.kernels import Workload
from tests.test_kernel_properties import convolutions, matmuls
from topi_int8.strategy import STRATEGIES

from . import arm, arm_rpc
from .arm_asm import beyond, disassembled, made_of
from .arm_grid import NARROW_ISAS, SAMPLE, TABLES, Batch, compile_batch, narrow, nhwc, packed
from .bare import build_program

pytestmark = pytest.mark.arm
each_isa = pytest.mark.parametrize("isa", arm.MACHINES)

Record = Callable[[str, object], None]


def _run(batch: Batch, folder: Path, record: Record) -> None:
    """Run a batch in each way that is possible here; fail, or skip if it was none."""
    isa, machine = batch.isa, arm.MACHINES[batch.isa]
    reason = arm.problem(isa)
    if reason:
        pytest.skip(reason)
    program = build_program(batch.executable, batch.symbols, isa, folder)
    wrong = batch.check(program.call)
    record("qemu", (f"{isa} on {machine.cpu}", "kernels between guard pages", len(batch.built)))
    assert not wrong, "\n".join(wrong)
    if isa == "armv7_neon":
        return  # no wheel has a TVM runtime for it
    reason = arm.problem(isa, rpc=True)
    if reason:
        pytest.skip(f"over RPC: {reason}")
    with arm_rpc.session(machine.cpu) as server:
        wrong = batch.check(arm_rpc.runner(server, server.load(batch.executable, isa)))
    record("qemu", (f"{isa} on {machine.cpu}", "kernels over RPC", len(batch.built)))
    assert not wrong, "\n".join(wrong)


@each_isa
def test_sample(isa: str, tmp_path: Path, record_property: Record) -> None:
    batch = compile_batch(SAMPLE, isa)
    every = {row.name for row in STRATEGIES if row.isa == isa}
    assert every <= batch.strategies(), f"untested: {every - batch.strategies()}"
    _run(batch, tmp_path, record_property)


FULL = [
    (isa, table)
    for isa in arm.MACHINES
    for table in TABLES
    if isa in NARROW_ISAS or not table.startswith("narrow")
]


@pytest.mark.arm_full
@pytest.mark.parametrize(("isa", "table"), FULL)
def test_grid(isa: str, table: str, tmp_path: Path, record_property: Record) -> None:
    _run(compile_batch(TABLES[table], isa), tmp_path, record_property)


@pytest.mark.arm_full
@each_isa
@pytest.mark.parametrize("works", [convolutions(), matmuls()], ids=["conv", "matmul"])
def test_random(isa: str, works: SearchStrategy, tmp_path: Path, record_property: Record) -> None:
    """As tests/test_kernel_properties.py, but compiled together. HYPOTHESIS_PROFILE works here."""
    drawn: dict[str, Workload] = {}

    @settings(phases=[Phase.generate])  # a batch cannot be shrunk; it says which case is wrong
    @given(work=works, without_128=st.booleans())
    def collect(work: Workload, without_128: bool) -> None:
        name = f"random{len(drawn)}"
        drawn.update((narrow({name: work}) if without_128 else {}) or {name: work})

    collect()
    print(drawn)
    _run(compile_batch(packed(drawn) | nhwc(drawn), isa), tmp_path, record_property)


# ---- instructions


@each_isa
def test_instructions(isa: str, tmp_path: Path) -> None:
    """What the sample's kernels are made of, and that nothing in the library is beyond the ISA."""
    reason = arm.problem(isa)
    if reason:
        pytest.skip(reason)
    works = narrow({"conv": EPILOGUE_BASES["conv"].with_epilogue(EPILOGUES["u8_residual_s8"])})
    works |= {name: DTYPES[name] for name in ("u8u8", "s8s8", "u8s8_weight_zero_point")}
    batch = compile_batch(packed(works) | nhwc(works), isa)
    lines = disassembled(isa, arm.export(batch.executable, tmp_path / "kernels.so", isa))
    assert made_of(isa, lines)
    assert not beyond(isa, lines)


@pytest.mark.parametrize(
    ("isa", "lesser"), [("neon_dotprod", "cortex-a72"), ("neon_i8mm", "neoverse-n1")]
)
def test_a_lesser_core_refuses_the_kernel(isa: str, lesser: str, tmp_path: Path) -> None:
    """So that a kernel's run on the right model does say that it keeps to the instruction set."""
    reason = arm.problem(isa)
    if reason:
        pytest.skip(reason)
    batch = compile_batch(packed({"conv": EPILOGUE_BASES["conv"]}), isa)
    program = build_program(batch.executable, batch.symbols, isa, tmp_path)
    assert not batch.check(program.call)
    (wrong, _) = batch.check(functools.partial(program.call, cpu=lesser))
    assert "signal 4 (Illegal instruction)" in wrong
