"""depthwise.py: bit-exact on each ISA over the grid, in vectors, on the ISA's own registers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.grid import DEPTHWISE, EPILOGUES
from tests.kernels import Assembly, build, check, check_instructions
from topi_int8.strategy import Blocks

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
    ("isa", "register"),
    [
        ("generic", "xmm"),
        ("avx2", "ymm"),
        ("avx_vnni", "ymm"),
        ("avx512_bw", "zmm"),
        ("avx512_vnni", "zmm"),
    ],
)
def test_instructions(isa, register):
    built = build(replace(DEPTHWISE["c128"], iw=28, epilogue=EPILOGUES["u8"]), isa)
    # LLVM sees that the products of widened bytes fit pmaddwd.
    check_instructions(built, isa, "pmaddwd", register)
    # Neither are floats multiplied one by one.
    assert not Assembly.of(built.library).matching("^v?mulss")
