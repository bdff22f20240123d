"""strategy.py: the order of the table, who declines and why, and the blocks it hands out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intrinsics.x86_dot import DOT_INTRINSICS
from tests.grid import DEPTHWISE, DTYPES, FLOATS, MATMULS, SHAPES
from topi_int8 import strategy
from topi_int8.compute.conv2d import PackedConv2d
from topi_int8.compute.depthwise import PackedDepthwise
from topi_int8.strategy import PROVEN_7BIT, STRATEGIES, Blocks, activation_block
from topi_int8.target import X86_ISAS, features, isa_target
from topi_int8.workload import Conv2dWorkload, Epilogue, MatmulWorkload

CONV = Conv2dWorkload(1, 64, 14, 14, 64, 3, 3)
MATMUL = MatmulWorkload(16, 64, 64)
SUFFIXES = (
    "amx_int8", "avx512_vnni", "avx_vnni", "avx512_bw_7bit", "avx512_bw", "avx2_7bit", "avx2",
    "generic",
)  # fmt: skip
ISAS = [isa.name for isa in X86_ISAS]


def conv(change: dict) -> Conv2dWorkload:
    return dataclasses.replace(CONV, **change)


# ---- the table


@pytest.mark.parametrize(("op", "stem"), [("conv2d", "conv2d_nchwc"), ("matmul", "matmul")])
def test_order(op, stem):
    assert [row.name for row in STRATEGIES if row.op == op] == [f"{stem}_{s}" for s in SUFFIXES]


def test_names_are_unique_and_rows_need_real_isas():
    names = [row.name for row in STRATEGIES]
    assert len(set(names)) == len(names)
    assert {row.isa for row in STRATEGIES} == set(ISAS)
    for row in STRATEGIES:
        if row.intrinsic in DOT_INTRINSICS:
            assert DOT_INTRINSICS[row.intrinsic].isa == row.isa


def test_isas_come_fastest_first():
    """A row never stands before one whose instruction set is wider."""
    order = ["amx_int8", "avx512_vnni", "avx_vnni", "avx512_bw", "avx2", "generic"]
    for op in ("conv2d", "matmul"):
        at = [order.index(row.isa) for row in STRATEGIES if row.op == op]
        assert at == sorted(at)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("work", [CONV, MATMUL], ids=["conv2d", "matmul"])
def test_the_fastest_that_the_target_has_wins(work, isa):
    decide = strategy.conv2d if work is CONV else strategy.matmul
    decision = decide(work, isa_target(isa))
    stem = "conv2d_nchwc" if work is CONV else "matmul"
    assert decision.strategy == f"{stem}_{isa}"
    before = SUFFIXES[: SUFFIXES.index(isa)]
    assert [name for name, _ in decision.declined] == [f"{stem}_{s}" for s in before]
    for name, reason in decision.declined:
        unproven = name.endswith("_7bit") and name.removesuffix("_7bit").endswith(isa)
        assert ("not known to be 7-bit" if unproven else "target lacks") in reason


@pytest.mark.parametrize("table", [SHAPES, DTYPES, FLOATS, MATMULS, DEPTHWISE])
@pytest.mark.parametrize("isa", ["generic", "amx_int8"])
def test_something_accepts_everything(table, isa):
    feats = features(isa_target(isa))
    for work in table.values():
        decide = strategy.conv2d if isinstance(work, Conv2dWorkload) else strategy.matmul
        decision = decide(work, feats)
        assert decision.strategy_row.accepts(work, feats) is None
        assert all(reason for _, reason in decision.declined)
        assert decision.strategy.endswith("float32") == work.is_float


def test_last_row_of_each_operator_accepts_on_any_target():
    feats = features({"kind": "llvm", "mtriple": "riscv64-unknown-linux-gnu"})
    last = {row.op: row for row in STRATEGIES}
    assert set(last) == {
        "conv2d", "depthwise", "matmul", "conv2d_float32", "depthwise_float32", "matmul_float32",
    }  # fmt: skip
    awkward = dataclasses.replace(MATMUL, k=7, batch=3, weight_dtype="uint8", weight_zero_point=9)
    for row in last.values():
        assert row.isa == "generic"
        assert row.accepts(awkward, feats) is None


def test_a_target_and_its_features_decide_the_same():
    target = isa_target("avx512_vnni")
    assert (
        strategy.conv2d(CONV, target).declined == strategy.conv2d(CONV, features(target)).declined
    )


def test_an_operator_without_rows_is_a_bug():
    with pytest.raises(AssertionError, match="no strategy for pool"):
        strategy._decide("pool", CONV, features(isa_target("generic")))


# ---- reasons for no


@pytest.mark.parametrize(
    ("change", "isa", "suffix", "reason"),
    [
        (
            {"weight_dtype": "uint8"}, "avx512_vnni", "avx512_vnni",
            "uint8 weights with zero point 0 may not fit int8",
        ),
        (
            {"weight_zero_point": 5}, "amx_int8", "amx_int8",
            "int8 weights with zero point 5 may not fit int8",
        ),
        (
            {"weight_zero_point": 5, "weight_range": (-128, 20)}, "amx_int8", "amx_int8",
            "weights minus their zero point span [-133, 15], not int8",
        ),
        (
            {}, "avx2", "avx2_7bit",
            "weights are not known to be 7-bit: vpmaddubsw could saturate",
        ),
        (
            {"weight_range": (-65, 10)}, "avx2", "avx2_7bit",
            "weights span [-65, 10], beyond +-64: vpmaddubsw could saturate",
        ),
        ({}, "avx2", "avx_vnni", "target lacks avx_vnni"),
    ],
    ids=str,
)  # fmt: skip
def test_reasons(change, isa, suffix, reason):
    declined = dict(strategy.conv2d(conv(change), isa_target(isa)).declined)
    assert declined[f"conv2d_nchwc_{suffix}"] == reason


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({"weight_range": (-64, 64)}, True),
        ({"weight_range": (0, 0)}, True),
        ({"weight_range": (-65, 0)}, False),
        ({"weight_range": (0, 65)}, False),
        ({"weight_range": None}, False),
        # 7 bits are counted from the zero point.
        ({"weight_dtype": "uint8", "weight_zero_point": 128, "weight_range": (64, 192)}, True),
        ({"weight_dtype": "uint8", "weight_zero_point": 128, "weight_range": (63, 192)}, False),
        ({"weight_dtype": "uint8", "weight_range": (0, 64)}, True),
        ({"weight_zero_point": 1, "weight_range": (-64, 64)}, False),
    ],
    ids=str,
)
def test_seven_bits_are_proven(change, accepted):
    for isa in ("avx2", "avx512_bw"):
        chosen = strategy.conv2d(conv(change), isa_target(isa)).strategy
        assert chosen == f"conv2d_nchwc_{isa}" + ("_7bit" if accepted else "")


def test_the_proof_is_tight():
    """A pair of products of u8 data and weights of +-PROVEN_7BIT fits int16, one more does not."""
    assert 2 * 255 * PROVEN_7BIT <= 2**15 - 1 < 2 * 255 * (PROVEN_7BIT + 1)


@pytest.mark.parametrize("k", [1, 2, 5, 6, 7, 64])
@pytest.mark.parametrize("isa", ISAS)
def test_batched_matmul_takes_any_k(isa, k):
    """An odd k of a batch, whose rows no channel block can fill up outside, is widened inside."""
    work = MatmulWorkload(4, 24, k, batch=3, weight_constant=False)
    assert strategy.matmul(work, isa_target(isa)).strategy == f"matmul_{isa}"


def test_kernels_do_not_depend_on_the_weights_range():
    target = isa_target("amx_int8")
    one, other = (
        strategy.conv2d(conv({"weight_range": r}), target).kernel() for r in (None, (-9, 9))
    )
    assert one is other


# ---- blocks


@pytest.mark.parametrize(
    ("isa", "channels", "more", "block"),
    [
        ("amx_int8", 3, {"entry": True}, 4),
        ("amx_int8", 3, {}, 16),
        ("amx_int8", 16, {}, 16),
        ("amx_int8", 17, {}, 32),
        ("amx_int8", 33, {}, 64),
        ("amx_int8", 512, {}, 64),
        ("amx_int8", 512, {"is_float": True}, 16),
        ("avx512_vnni", 3, {"entry": True}, 4),
        ("avx512_vnni", 5, {"entry": True}, 16),
        ("avx512_vnni", 512, {}, 16),
        ("generic", 1, {"entry": True}, 4),
        ("generic", 1, {}, 16),
    ],
    ids=str,
)
def test_activation_block(isa, channels, more, block):
    assert activation_block(features(isa_target(isa)), channels, **more) == block


@given(st.sampled_from(ISAS), st.integers(1, 700), st.integers(1, 700))
def test_default_blocks_are_what_the_kernels_take(isa, ic, oc):
    feats = features(isa_target(isa))
    blocks = strategy.default_blocks(conv({"ic": ic, "oc": oc}), feats)
    assert blocks.out % 16 == 0
    assert blocks.data % 4 == 0
    assert strategy.default_blocks(MatmulWorkload(3, oc, ic), feats) == Blocks(
        ic, -(-oc // 16) * 16
    )


def test_depthwise_keeps_one_block():
    work = DEPTHWISE["c65"]
    for isa in ISAS:
        blocks = strategy.default_blocks(work, features(isa_target(isa)))
        assert blocks.data == blocks.out


# ---- frozen dataclasses


def test_rows_validate_and_are_frozen():
    row = STRATEGIES[0]
    with pytest.raises(ValueError, match=r"op is 'pool'; allowed: conv2d, depthwise, matmul"):
        dataclasses.replace(row, op="pool")
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.name = "other"
    decision = strategy.conv2d(CONV, isa_target("avx2"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.declined = ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": 3}, r"lanes is 3; allowed: a divisor of 16"),
        ({"k": 3}, r"k is 3; allowed: a divisor of 16"),
        ({"out_store": 17}, r"out_store is 17; allowed: <= 16"),
        ({"ow_padded": 11}, r"ow_padded is 11; allowed: >= 12"),
        ({"widened": 8}, r"widened is 8; allowed: >= 16"),
        ({"window": True}, r"window with several data blocks"),
        ({"flat": True, "window": True, "in_block": 64}, r"flat with strides \(1, 1\)"),
    ],
)
def test_packings_validate(change, message):
    good = {"in_block": 16, "out_block": 16, "lanes": 16, "k": 4,
            "data_dtype": "uint8", "weight_dtype": "int8"}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        PackedConv2d(CONV, **(good | change))


def test_packings_refuse_the_wrong_operator_and_weight():
    with pytest.raises(ValueError, match=r"groups is 1; allowed: ic == oc == 64"):
        PackedDepthwise(CONV, 16)
    packing = PackedConv2d(conv({"weight_zero_point": 100}), 16, 16, 16, 4, "uint8", "int8")
    with pytest.raises(
        ValueError, match=r"weight_zero_point=100 spans \[-228, -228\]; allowed: the"
    ):
        packing.pack_weight(np.full((64, 64, 3, 3), -128, "int8"))
    assert CONV.epilogue == Epilogue()
