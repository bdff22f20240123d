"""Weights of 4 and 2 bits in x86's kernels: bit-exact over ugly shapes; what rows say of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.grid import DTYPES, EPILOGUE_BASES, EPILOGUES, MATMULS, SAME, SHAPES, conv
from tests.kernels import Assembly
from tests.packed import build_packed, check_packed, packing_target
from topi_int8 import strategy
from topi_int8.compute.conv2d import PackedConv2d, conv2d
from topi_int8.kernel import Blocks
from topi_int8.target import isa_target, named
from topi_int8.workload import Conv2dWorkload, MatmulWorkload

ISAS = ("amx_int8", "avx512_vnni", "avx_vnni")
each_isa = pytest.mark.parametrize("isa", ISAS)
# Of the whole grid, what differs to unpacking: steps, blocks, bands, groups.
UGLY = (
    "one_of_everything", "ic3_oc65", "ic65_oc129_1x1", "large_k_1x1", "prime_37", "batch_3",
    "stem_7x7", "stride_2_1", "dilation_3_strided", "groups_misaligned",
)


@each_isa
@pytest.mark.parametrize("name", UGLY)
def test_shapes(name, isa):
    built = check_packed(SHAPES[name], isa, 4 if UGLY.index(name) % 3 else 2)
    assert built.kernel.packing.weight_bits < 8


@each_isa
@pytest.mark.parametrize(("name", "bits"), [("s8s8_zero_point", 4), ("u8s8_zero_point_255", 2)])
def test_dtypes_at_their_ends(name, bits, isa):
    check_packed(DTYPES[name], isa, bits, extreme=True)


@each_isa
def test_weights_with_a_zero_point(isa):
    work = replace(DTYPES["u8s8"], weight_dtype="uint8", weight_zero_point=100)
    check_packed(work, isa, 4)


@each_isa
@pytest.mark.parametrize("name", ["int32_clip", "u8_residual_s8"])
def test_epilogues(name, isa):
    check_packed(EPILOGUE_BASES["flat"].with_epilogue(EPILOGUES[name]), isa, 4)


@pytest.mark.parametrize("name", ["u8", "s8_residual_s8"])
def test_sums_in_the_bits_of_floats(name):
    work = conv(192, (7, 7), 64, epilogue=EPILOGUES[name])
    built = check_packed(work, "amx_int8", 4, proven=True)
    assert built.kernel.packing.float_sums


@each_isa
@pytest.mark.parametrize(
    "name", ["one_of_everything", "vector_odd", "rows_17_odd_n", "k_7", "transposed", "batch_odd_n"]
)
def test_matmuls(name, isa):
    check_packed(MATMULS[name], isa, 2 if "odd" in name else 4)


@each_isa
@pytest.mark.parametrize(("data", "out"), [(32, 16), (4, 128), (20, 80)])
def test_blocks_that_a_neighbour_chose(data, out, isa):
    work = replace(EPILOGUE_BASES["conv"], ic=3 if data == 4 else 2 * data - 3, oc=2 * out - 5)
    check_packed(work.with_epilogue(EPILOGUES["u8"]), isa, 4, Blocks(data, out))


@each_isa
def test_nhwc(isa):
    check_packed(conv(132, (5, 6), 33, (3, 3), padding=SAME), isa, 4, layout="NHWC")


# Groups of one block (a ring of steps) and of several, few steps and more than are unrolled; images
# and bands that share a group's weights; tasks that begin inside a group.
GROUPS = {
    "one_block": conv(128, (7, 7), 64, (3, 3), padding=SAME),
    "one_block_rolled": conv(640, (7, 7), 32, (3, 3), padding=SAME),
    "few_steps": conv(64, (7, 7), 64),
    "blocks": conv(128, (9, 14), 128, (3, 3), padding=SAME),
    "blocks_rolled": conv(704, (9, 14), 32, (3, 3), padding=SAME),
    "images": conv(256, (7, 7), 256, n=3),
    "bands": conv(64, (56, 56), 64, (3, 3), padding=SAME),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_blocks_on_tiles(name):
    bits = 2 if name == "blocks" else 4
    built = check_packed(GROUPS[name], "amx_int8", bits)
    plan = built.kernel.plan.pipeline
    assert (plan.blocks == 1) == name.startswith("one_")
    assert (plan.depth > plan.unrolled) == name.endswith("rolled")


@each_isa
@pytest.mark.parametrize("bits", [4, 2])
def test_one_instruction_a_vector_of_weights(bits, isa):
    work = conv(64, (7, 7), 64, (1, 1))
    assembly = Assembly.of(build_packed(work, isa, bits).library)
    register = "ymm" if isa == "avx_vnni" else "zmm"
    found = assembly.matching(rf"vgf2p8affineqb .*%{register}")
    assert found and not assembly.matching(r"vps[lr]l[wd]")


def test_packed_weights_are_a_half_and_a_quarter():
    work = conv(64, (7, 7), 64, (3, 3), padding=SAME)
    sizes = [
        np.prod(build_packed(work, "avx512_vnni", bits).kernel.weight_shape) for bits in (4, 2)
    ]
    assert sizes == [64 * 64 * 9 / 2, 64 * 64 * 9 / 4]


# ---- the table


FEW = MatmulWorkload(1, 1000, 2048, weight_range=(-7, 7))


def reasons(work: strategy.Workload, where: object) -> dict[str, str]:
    decide = strategy.conv2d if isinstance(work, Conv2dWorkload) else strategy.matmul
    return dict(decide(work, where).declined)


def test_bytes_are_read_where_nothing_is_proven():
    for unproven in (None, (-8, 8), (-127, 127)):
        found = reasons(replace(FEW, weight_range=unproven), packing_target("amx_int8"))
        assert not any("bit" in name for name in found)


def test_who_lacks_what_is_said():
    found = reasons(FEW, isa_target("avx512_vnni"))
    assert found["matmul_avx512_vnni_4bit"] == "target lacks gfni, which unpacks weights"
    assert reasons(FEW, isa_target("avx2"))["matmul_avx_vnni_4bit"] == "target lacks avx_vnni"
    on_arm = reasons(FEW, named("cortex-a72"))["matmul_avx512_vnni_4bit"]
    assert on_arm == "target lacks avx512_vnni: on aarch64 weights of few bits are bytes"


def test_few_rows_read_packed_weights():
    for isa in ISAS[1:]:
        assert strategy.matmul(FEW, packing_target(isa)).strategy == f"matmul_{isa}_4bit"
        ternary = replace(FEW, weight_range=(-1, 1))
        assert strategy.matmul(ternary, packing_target(isa)).strategy == f"matmul_{isa}_2bit"
    many = strategy.matmul(replace(FEW, m=64), packing_target("avx512_vnni"))
    assert many.strategy == "matmul_avx512_vnni"
    assert "64 rows use each weight" in dict(many.declined)["matmul_avx512_vnni_4bit"]


def test_late_layers_of_a_network_read_packed_weights_on_tiles():
    late = conv(512, (7, 7), 512, (3, 3), padding=SAME, weight_range=(-7, 7))
    target = packing_target("amx_int8")
    assert strategy.conv2d(late, target).strategy == "conv2d_nchwc_amx_int8_4bit"
    early = strategy.conv2d(replace(late, ih=14, iw=14), target)
    assert early.strategy == "conv2d_nchwc_amx_int8"
    assert "196 pixels use each weight" in dict(early.declined)["conv2d_nchwc_amx_int8_4bit"]


def test_packings_validate():
    work = conv(16, (7, 7), 16)
    packed = {"lanes": 16, "k": 4, "data_dtype": "uint8", "weight_dtype": "int8", "weight_bits": 4}
    PackedConv2d(work, 16, 16, **packed)
    for change, message in (
        ({"weight_bits": 3}, "weight_bits is 3; allowed: 8, 4, 2"),
        ({"weight_dtype": "uint8"}, "weight_dtype is uint8; allowed in fewer bits: int8"),
        ({"k": 16}, "k is 16, 2 weights in a byte; allowed: a divisor of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedConv2d(work, 16, 16, **{**packed, **change})
    with pytest.raises(ValueError, match=r"weights span .*; allowed in 4 bits"):
        PackedConv2d(work, 16, 16, **packed).pack_weight(np.full((16, 16, 1, 1), 9, "int8"))
    with pytest.raises(ValueError, match="weight_bits is 4; allowed in TE: 8"):
        conv2d(PackedConv2d(work, 16, 16, **packed))
