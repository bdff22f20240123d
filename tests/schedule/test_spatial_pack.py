"""spatial_pack.py: the broadcast-dot kernels, bit-exact on each ISA over the grid; their assembly;
and what the choice of a register tile promises.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intrinsics import compat
from intrinsics.x86_dot import DOT_INTRINSICS
from tests.grid import DTYPES, EPILOGUE_BASES, EPILOGUES, FLOATS, MATMULS, SHAPES
from tests.kernels import Assembly, build, check, check_instructions, decide
from topi_int8.schedule.spatial_pack import Tile, choose_tile
from topi_int8.schedule.stages import divisors
from topi_int8.workload import Conv2dWorkload

ISAS = ("generic", "avx2", "avx_vnni", "avx512_bw", "avx512_vnni")
each_isa = pytest.mark.parametrize("isa", ISAS)
# Weights that the 7-bit rows accept, and what F(2x2, 3x3) declines: they come after it.
SEVEN_BITS = {"weight_range": (-64, 64)}
DILATED = {"dilation": (2, 2), "padding": (2, 2, 2, 2)}


# ---- bit-exact on each ISA


@each_isa
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, isa):
    built = check(SHAPES[name], isa)
    assert built.decision.strategy == f"conv2d_nchwc_{isa}"


@each_isa
@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name, isa):
    """Full ranges at their extremes: 255 * -128 in every lane."""
    check(DTYPES[name], isa, extreme=True)


@each_isa
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name, isa):
    base = list(EPILOGUE_BASES.values())[list(EPILOGUES).index(name) % len(EPILOGUE_BASES)]
    check(base.with_epilogue(EPILOGUES[name]), isa)


@each_isa
@pytest.mark.parametrize("name", MATMULS)
def test_matmuls(name, isa):
    check(MATMULS[name], isa)


@each_isa
@pytest.mark.parametrize("name", FLOATS)
def test_floats(name, isa):
    built = check(FLOATS[name], isa)
    assert built.decision.strategy.endswith("_float32")


@pytest.mark.parametrize("isa", ["avx2", "avx512_bw"])
@pytest.mark.parametrize(
    "name",
    ["ic65_oc129_1x1", "dilation_2_1", "stem_7x7", "prime_17_s2", "groups_16", "everything"],
)
def test_seven_bit_rows(name, isa):
    """The largest weights that are proven safe, against data at both ends of its range."""
    built = check(replace(SHAPES[name], **SEVEN_BITS), isa, extreme=True)
    assert built.decision.strategy == f"conv2d_nchwc_{isa}_7bit"


@pytest.mark.parametrize("isa", ["avx2", "avx512_bw"])
def test_seven_bit_signed_data(isa):
    built = check(replace(DTYPES["s8s8"], **DILATED, **SEVEN_BITS), isa, extreme=True)
    assert built.decision.strategy == f"conv2d_nchwc_{isa}_7bit"


@pytest.mark.parametrize("isa", ["avx2", "avx512_bw"])
def test_full_range_weights_do_not_saturate(isa):
    """What TVM's own pre-VNNI kernels get wrong: vpmaddubsw at 255 * 127 * 2."""
    work = replace(DTYPES["u8s8"], **DILATED, weight_range=(-128, 127))
    built = check(work, isa, extreme=True)
    assert built.decision.strategy == f"conv2d_nchwc_{isa}"


# ---- assembly, on every machine

CONV = Conv2dWorkload(1, 64, 14, 14, 64, 3, 3, padding=(1, 1, 1, 1))


# The rows that the strategy table uses: on avx512_vnni it has no use for 256 bits.
USED = [dot for dot in DOT_INTRINSICS.values() if (dot.isa, dot.n) != ("avx512_vnni", 8)]


@pytest.mark.parametrize("dot", USED, ids=lambda dot: dot.name)
@pytest.mark.parametrize("name", ["conv", "epilogue"])
def test_instructions(name, dot):
    work = {
        "conv": CONV,
        "epilogue": EPILOGUE_BASES["conv"].with_epilogue(EPILOGUES["u8_residual_s8"]),
    }[name]
    work = work if dot.exact else replace(work, **DILATED, **SEVEN_BITS)
    built = build(work, dot.isa)
    assert built.decision.intrinsic == dot.name
    check_instructions(built, dot.isa, dot.mnemonic, "zmm" if dot.bits == 512 else "ymm")
    if name == "conv":  # short reductions are unrolled whole, their stores with them
        spills = Assembly.of(built.library).spills(dot.mnemonic)
        if spills and not dot.exact:
            pytest.xfail(f"vpmaddwd by ones takes one register too many: {len(spills)} spills")
        assert not spills


@each_isa
@pytest.mark.parametrize("name", ["conv", "matmul"])
def test_float_instructions(name, isa):
    product, register = {
        "generic": ("mulps", "xmm"),
        "avx2": ("vfmadd", "ymm"),
        "avx_vnni": ("vfmadd", "ymm"),
    }.get(isa, ("vfmadd", "zmm"))
    floats = {"data_dtype": "float32", "weight_dtype": "float32"}
    conv = replace(CONV, **floats, epilogue=EPILOGUES["float32_bare"])
    built = build(conv if name == "conv" else FLOATS[name], isa)
    check_instructions(built, isa, product, register)
    if name == "conv":
        assert not Assembly.of(built.library).spills(product)


def test_generic_instructions():
    check_instructions(build(CONV, "generic"), "generic", "pmaddwd", "xmm")


# ---- choosing a register tile

tiles = st.tuples(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 16),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([16, 32]),
    st.integers(1, 4),
)


@given(tiles)
def test_tile_fits_and_covers(arguments):
    oh, ow, out_blocks, vectors, registers, uops = arguments
    tile, padded = choose_tile(oh, ow, out_blocks, vectors, registers, uops)
    assert oh % tile.height == 0
    assert padded % tile.width == 0 and ow <= padded < ow + tile.width
    assert out_blocks % tile.blocks == 0 and vectors % tile.vectors == 0
    assert tile.blocks == 1 or tile.vectors == vectors
    # The weights and a broadcast need registers beside the accumulators.
    weights = tile.blocks * tile.vectors
    assert tile.accumulators == tile.pixels * weights
    assert tile.accumulators + weights + 1 <= registers


@given(tiles)
def test_large_images_fill_the_registers(arguments):
    """Latency 5 at two a cycle wants 10 accumulators: any image of 16 pixels offers them."""
    _, _, out_blocks, vectors, registers, uops = arguments
    tile, padded = choose_tile(16, 112, out_blocks, vectors, registers, uops)
    assert tile.accumulators >= 10
    assert padded <= 112 * 1.1


def test_divisors():
    assert divisors(12, 4) == [1, 2, 3, 4]
    assert divisors(12, 100) == [1, 2, 3, 4, 6, 12]
    assert divisors(7, 6) == [1]


def test_tile_counts():
    tile = Tile(2, 7, 1, 2)
    assert (tile.pixels, tile.accumulators) == (14, 28)


def test_kernels_are_marked_as_scheduled():
    """So that no later pass schedules them again."""
    func = decide(CONV, "avx2").kernel().func
    assert func.attrs[compat.SCHEDULED_ATTR]
    assert func.attrs[compat.NOALIAS_ATTR]
