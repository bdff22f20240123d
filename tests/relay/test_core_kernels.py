"""The core on TVM 0.17 and LLVM 10: S-TIR kernels and numpy packers against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import grid, kernels
from topi_int8.workload import Conv2dWorkload, MatmulWorkload

Workload = Conv2dWorkload | MatmulWorkload

ISAS = ("generic", "avx2", "avx512_bw", "avx512_vnni")  # LLVM 10 knows no others

WORKLOADS: dict[str, Workload] = {
    f"{table}-{name}": work
    for table, works in (
        ("shape", grid.SHAPES), ("dtype", grid.DTYPES), ("depthwise", grid.DEPTHWISE),
        ("matmul", grid.MATMULS), ("float", grid.FLOATS),
    )
    for name, work in works.items()
} | {
    f"epilogue-{base}-{name}": replace(work, epilogue=epilogue)
    for base, work in grid.EPILOGUE_BASES.items()
    for name, epilogue in grid.EPILOGUES.items()
}  # fmt: skip

# Every second workload on one instruction set, in turn; `relay_full` has the others.
_TURNS = [
    pytest.param(
        name, isa, id=f"{name}-{isa}",
        marks=() if at % 2 == 0 and isa == ISAS[at // 2 % 4] else pytest.mark.relay_full,
    )
    for at, name in enumerate(WORKLOADS)
    for isa in ISAS
]


@pytest.mark.parametrize(("name", "isa"), _TURNS)
def test_kernel(name: str, isa: str) -> None:
    kernels.check(WORKLOADS[name], isa, extreme=sum(name.encode()) % 2 == 1)


@pytest.mark.parametrize("name", ["ic17_oc33", "stem_3x3", "image_10x10_unpadded", "batch_3_1x1"])
def test_nhwc(name: str) -> None:
    kernels.check(grid.SHAPES[name], "avx2", layout="NHWC")


@pytest.mark.parametrize(
    ("isa", "mnemonic", "register"),
    [("avx2", "vpmaddwd", "ymm"), ("avx512_bw", "vpmaddwd", "zmm"),
     ("avx512_vnni", "vpdpbusd", "zmm")],
)  # fmt: skip
def test_llvm_10_emits_the_instruction_in_registers(isa: str, mnemonic: str, register: str) -> None:
    built = kernels.build(grid.SHAPES["aligned"], isa)
    kernels.check_instructions(built, isa, mnemonic, register)
    assert not kernels.Assembly.of(built.library).spills(mnemonic)
