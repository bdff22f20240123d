"""depthwise.py: bit-exact on each ISA over the grid, in vectors, on the ISA's own registers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.grid import DEPTHWISE, EPILOGUES
from tests.kernels import Assembly, build, check, check_instructions
from topi_int8.strategy import Blocks
from topi_int8.target import isa_target, runs_here

# Depthwise needs plain vectors only: AVX-VNNI adds nothing to AVX2 but LLVM's vpdpwssd.
ISAS = ("generic", "avx2", "avx_vnni", "avx512_bw", "avx512_vnni", "amx_int8")
each_isa = pytest.mark.parametrize("isa", ISAS)


@each_isa
@pytest.mark.parametrize("name", DEPTHWISE)
def test_shapes_and_dtypes(name, isa):
    built = check(DEPTHWISE[name], isa, extreme="zero_point" in name or name == "s8s8")
    assert built.decision.strategy == "depthwise_nchwc"


@pytest.mark.parametrize("isa", ["avx2", "avx512_bw"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name, isa):
    base = DEPTHWISE[("c17", "stride_2", "batch_3")[list(EPILOGUES).index(name) % 3]]
    check(base.with_epilogue(EPILOGUES[name]), isa)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_blocks_of_the_neighbours(block):
    """On AMX the neighbours' blocks have 64 channels."""
    work = replace(DEPTHWISE["c65"], epilogue=EPILOGUES["u8_residual_u8"])
    built = check(work, "avx2", blocks=Blocks(block, block))
    assert built.kernel.data_layout.block == built.kernel.out_layout.block == block


@pytest.mark.parametrize(
    ("isa", "multiply", "register"),
    [
        ("generic", "pmaddwd", "xmm"),
        ("avx2", "vpmaddwd", "ymm"),
        ("avx_vnni", "vpdpwssd", "ymm"),
        ("avx512_bw", "vpmaddwd", "zmm"),
        ("avx512_vnni", "vpdpwssd", "zmm"),
    ],
)
def test_instructions(isa, multiply, register):
    built = build(replace(DEPTHWISE["c128"], iw=28, epilogue=EPILOGUES["u8"]), isa)
    check_instructions(built, isa, multiply, register)
    # Nothing is multiplied one by one.
    assert not [line for line in Assembly.of(built.library).matching("^v?mulss|^imull? .*\\(")]


def test_isa_names_are_targets():
    assert all(isa_target(isa) is not None for isa in ISAS) and isinstance(runs_here(ISAS[0]), bool)
