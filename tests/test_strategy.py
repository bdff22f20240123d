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
from topi_int8.kernel import Blocks, activation_block, default_blocks
from topi_int8.strategy import PROVEN_7BIT, STRATEGIES
from topi_int8.target import AARCH64_ISAS, ARM_ISAS, X86_ISAS, features, isa_target
from topi_int8.workload import Conv2dWorkload, Epilogue, MatmulWorkload

CONV = Conv2dWorkload(1, 64, 16, 16, 64, 5, 5)  # not for F(2x2, 3x3): see schedule/test_winograd.py
MATMUL = MatmulWorkload(16, 64, 64)
SUFFIXES = (
    "amx_int8", "avx512_vnni", "avx_vnni", "avx512_bw_7bit", "avx512_bw", "avx2_7bit", "avx2",
    "generic",
)  # fmt: skip
ARM_SUFFIXES = (
    "neon_i8mm", "neon_usdot", "neon_dotprod", "neon", "neon_full", "armv7_neon", "armv7_neon_full",
)  # fmt: skip
ISAS = [isa.name for isa in X86_ISAS]
ARM = [isa.name for isa in (*AARCH64_ISAS, *ARM_ISAS)]
# Rows that only conv2d in packed layouts has.
WINOGRAD = ("winograd_avx512_bw", "winograd_avx2")
STEMS = {"conv2d": "conv2d_nchwc", "matmul": "matmul", "conv2d_nhwc": "conv2d_nhwc"}


# Before whose rows stand those on weights of fewer bits, for weights that are proven to fit.
UNPACKING = ("amx_int8", "avx512_vnni", "avx_vnni")


def suffixes(op: str, packed: bool = False) -> list[str]:
    """Return the rows of x86, each F(2x2, 3x3) before the direct sums of its instruction set."""
    names = list(SUFFIXES)
    for name in UNPACKING if packed else ():
        names[names.index(name) : names.index(name)] = [f"{name}_2bit", f"{name}_4bit"]
    for name in WINOGRAD if op == "conv2d" else ():
        names.insert(names.index(name.removeprefix("winograd_") + "_7bit"), name)
    return names


def conv(change: dict) -> Conv2dWorkload:
    return dataclasses.replace(CONV, **change)


# ---- the table


@pytest.mark.parametrize(("op", "stem"), STEMS.items())
def test_order(op, stem):
    *x86, generic = suffixes(op, packed=True)
    names = [f"{stem}_{suffix}" for suffix in (*x86, *ARM_SUFFIXES, generic)]
    assert [row.name for row in STRATEGIES if row.op == op] == names


def test_names_are_unique_and_rows_need_real_isas():
    names = [row.name for row in STRATEGIES]
    assert len(set(names)) == len(names)
    assert {row.isa for row in STRATEGIES} == {*ISAS, *ARM}
    for row in STRATEGIES:
        if row.intrinsic in DOT_INTRINSICS:
            assert DOT_INTRINSICS[row.intrinsic].isa == row.isa


def test_isas_come_fastest_first():
    """A row never stands before one whose instruction set is wider."""
    order = ["amx_int8", "avx512_vnni", "avx_vnni", "avx512_bw", "avx2", *ARM, "generic"]
    for op in STEMS:
        at = [order.index(row.isa) for row in STRATEGIES if row.op == op]
        assert at == sorted(at)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("work", [CONV, MATMUL], ids=["conv2d", "matmul"])
def test_the_fastest_that_the_target_has_wins(work, isa):
    decide = strategy.conv2d if work is CONV else strategy.matmul
    decision = decide(work, isa_target(isa))
    stem = "conv2d_nchwc" if work is CONV else "matmul"
    assert decision.strategy == f"{stem}_{isa}"
    every = suffixes("conv2d" if work is CONV else "matmul")
    before = every[: every.index(isa)]
    assert [name for name, _ in decision.declined] == [f"{stem}_{s}" for s in before]
    here = {f"{stem}_{isa}_7bit": "not known to be 7-bit", f"{stem}_winograd_{isa}": "not 3x3"}
    for name, reason in decision.declined:
        assert here.get(name, "target lacks") in reason


@pytest.mark.parametrize("isa", ARM)
@pytest.mark.parametrize("work", [CONV, MATMUL], ids=["conv2d", "matmul"])
def test_on_arm_the_fastest_wins_and_only_arms_rows_are_asked(work, isa):
    decide = strategy.conv2d if work is CONV else strategy.matmul
    stem = "conv2d_nchwc" if work is CONV else "matmul"
    safe = dataclasses.replace(work, weight_range=(-127, 127))
    decision = decide(safe, isa_target(isa))
    assert decision.strategy == f"{stem}_{isa}"
    table = AARCH64_ISAS if isa.startswith("neon") else ARM_ISAS
    before = [row.name for row in table][: [row.name for row in table].index(isa)]
    lacking = {"neon_usdot": "neon_i8mm"}
    names = [name for s in before for name in (s, *(n for n, of in lacking.items() if of == s))]
    assert decision.declined == tuple(
        (f"{stem}_{name}", f"target lacks {lacking.get(name, name)}") for name in names
    )


@pytest.mark.parametrize("isa", ["neon", "armv7_neon"])
@pytest.mark.parametrize(
    ("weight_range", "reason"),
    [(None, "weights may be -128"), ((-128, 5), "a weight is -128")],
)
def test_pairs_of_products_need_weights_above_128(isa, weight_range, reason):
    work = conv({"weight_range": weight_range})
    decision = strategy.conv2d(work, isa_target(isa))
    assert decision.strategy == f"conv2d_nchwc_{isa}_full"
    assert reason in dict(decision.declined)[f"conv2d_nchwc_{isa}"]


# What a depthwise convolution gets: instruction set x taps x stride.
DEPTHWISE_3X3 = Conv2dWorkload(
    1, 64, 28, 28, 64, 3, 3, groups=64, padding=(1, 1, 1, 1), weight_range=(-127, 127)
)
LONGER = "gathering {} rows takes longer than multiplying by them"


@pytest.mark.parametrize("layout", strategy.LAYOUTS)
@pytest.mark.parametrize(
    ("kernel", "stride", "reason"),
    [
        ((3, 3), 1, None),
        ((3, 3), 2, LONGER.format(3)),
        ((5, 5), 1, None),
        ((5, 5), 2, None),
        ((7, 7), 1, None),
        ((4, 4), 2, None),
        ((1, 1), 1, LONGER.format(1)),
        ((1, 7), 1, LONGER.format(1)),
        ((7, 1), 1, LONGER.format(7)),
        ((2, 2), 1, LONGER.format(2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("isa", ["neon_dotprod", "neon_i8mm"])
def test_depthwise_by_dot_products(isa, kernel, stride, reason, layout):
    """The sums of the cost rule, by hand: 12 a new column and 4 a tap, against 4 a tap."""
    work = dataclasses.replace(
        DEPTHWISE_3X3, kh=kernel[0], kw=kernel[1], strides=(stride, stride)
    )
    decision = strategy.conv2d(work, isa_target(isa), layout)
    stem = f"depthwise_{layout.lower()}"
    if reason is None:
        assert decision.strategy == f"{stem}_neon_dotprod" and not decision.declined
    else:
        assert decision.strategy == f"{stem}_neon"
        assert decision.declined == ((f"{stem}_neon_dotprod", reason),)


@pytest.mark.parametrize(
    ("isa", "change", "strategy_name", "reasons"),
    [
        ("neon", {}, "neon", {"neon_dotprod": "target lacks neon_dotprod"}),
        ("armv7_neon", {}, "armv7_neon", {}),
        # dot products need no proof, pairs do
        ("neon_dotprod", {"weight_range": None}, "neon_dotprod", {}),
        ("neon", {"weight_range": None}, "", {"neon": "weights may be -128"}),
        ("armv7_neon", {"weight_range": None}, "", {"armv7_neon": "weights may be -128"}),
        ("neon", {"weight_range": (-128, 0)}, "", {"neon": "a weight is -128"}),
        (
            "neon", {"weight_dtype": "uint8", "weight_range": (0, 255)}, "",
            {"neon": "span [0, 255], not int8"},
        ),
        ("neon", {"weight_dtype": "uint8", "weight_range": (0, 127)}, "neon", {}),
        ("neon_dotprod", {"weight_dtype": "uint8", "weight_range": None}, "neon_dotprod", {}),
        # with a zero point they must be proven to fit int8
        (
            "neon_dotprod", {"weight_zero_point": 5, "weight_range": None}, "",
            {"neon_dotprod": "may not fit int8", "neon": "may not fit int8"},
        ),
        (
            "neon_dotprod", {"weight_dtype": "uint8", "weight_zero_point": 128,
                             "weight_range": (0, 255)}, "neon_dotprod", {},
        ),
        (
            "neon", {"weight_dtype": "uint8", "weight_zero_point": 128, "weight_range": (0, 255)},
            "", {"neon": "a weight is -128"},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_depthwise_on_arm(isa, change, strategy_name, reasons):
    decision = strategy.conv2d(dataclasses.replace(DEPTHWISE_3X3, **change), isa_target(isa))
    stem = "depthwise_nchwc"
    assert decision.strategy == (f"{stem}_{strategy_name}" if strategy_name else stem)
    declined = dict(decision.declined)
    for suffix, reason in reasons.items():
        assert reason in declined[f"{stem}_{suffix}"]


@pytest.mark.parametrize(("channels", "stays"), [(16, True), (64, True), (20, False), (8, False)])
def test_nhwc_gathers_sixteen_channels(channels, stays):
    work = dataclasses.replace(DEPTHWISE_3X3, ic=channels, oc=channels, groups=channels)
    decision = strategy.conv2d(work, isa_target("neon_dotprod"), "NHWC")
    assert decision.strategy == "depthwise_nhwc_neon" + ("_dotprod" if stays else "")
    reason = f"{channels} channels are no multiple of 16"
    assert (dict(decision.declined).get("depthwise_nhwc_neon_dotprod") == reason) != stays


X86_DEPTHWISE = [
    "avx512_vnni", "avx_vnni", "avx512_bw_7bit", "avx512_bw", "avx2_7bit", "avx2",
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["NCHWc", "NHWC"])
def test_depthwise_on_x86_asks_no_row_of_arm(isa, layout):
    stem = f"depthwise_{layout.lower()}"
    decision = strategy.conv2d(DEPTHWISE_3X3, isa_target(isa), layout)
    best = {"amx_int8": "avx512_vnni", "generic": ""}.get(isa, isa)
    assert decision.strategy == (f"{stem}_{best}" if best else stem)
    upto = X86_DEPTHWISE.index(best) if best else len(X86_DEPTHWISE)
    assert [name for name, _ in decision.declined] == [
        f"{stem}_{suffix}" for suffix in X86_DEPTHWISE[:upto]
    ]


@pytest.mark.parametrize(
    ("change", "plain", "wins"),
    [
        ({"weight_range": (-64, 63)}, False, "depthwise_nchwc_avx2_7bit"),
        ({"weight_range": (-128, 127)}, False, "depthwise_nchwc_avx2"),
        ({"weight_dtype": "uint8", "weight_range": None}, False, "depthwise_nchwc"),
        ({}, True, "depthwise_nchwc"),
    ],
)
def test_depthwise_on_x86(change, plain, wins):
    work = dataclasses.replace(DEPTHWISE_3X3, **change)
    decision = strategy.conv2d(work, isa_target("avx2"), plain=plain)
    assert decision.strategy == wins
    reasons = dict(decision.declined)
    if plain:
        assert "a function of its own" in reasons["depthwise_nchwc_avx2"]
    elif wins == "depthwise_nchwc":
        assert "may not fit int8" in reasons["depthwise_nchwc_avx2"]


def test_depthwise_in_nhwc_takes_lanes_of_16_channels():
    work = dataclasses.replace(DEPTHWISE_3X3, ic=24, oc=24, groups=24)
    decision = strategy.conv2d(work, isa_target("avx512_vnni"), "NHWC")
    assert decision.strategy == "depthwise_nhwc"
    declined = dict(decision.declined)["depthwise_nhwc_avx512_vnni"]
    assert declined == "24 channels are no multiple of 16"


def test_one_output_pixel_is_no_matrix():
    target = isa_target("neon_i8mm")
    decision = strategy.matmul(dataclasses.replace(MATMUL, m=1), target)
    assert decision.strategy == "matmul_neon_usdot"
    assert "one output pixel" in decision.declined[0][1]
    for change in ({"data_dtype": "int8"}, {"weight_dtype": "uint8"}):
        decision = strategy.matmul(dataclasses.replace(MATMUL, m=1, **change), target)
        assert decision.strategy == "matmul_neon_dotprod"
        assert "both signed or both unsigned" in decision.declined[1][1]


@pytest.mark.parametrize("table", [SHAPES, DTYPES, FLOATS, MATMULS, DEPTHWISE])
@pytest.mark.parametrize("isa", ["generic", "amx_int8", *ARM])
def test_something_accepts_everything(table, isa):
    feats = features(isa_target(isa))
    for work in table.values():
        decide = strategy.conv2d if isinstance(work, Conv2dWorkload) else strategy.matmul
        decision = decide(work, feats)
        assert decision.strategy_row.accepts(work, feats) is None
        assert all(reason for _, reason in decision.declined)
        assert ("float32" in decision.strategy) == work.is_float


def test_last_row_of_each_operator_accepts_on_any_target():
    feats = features({"kind": "llvm", "mtriple": "riscv64-unknown-linux-gnu"})
    last = {row.op: row for row in STRATEGIES}
    assert set(last) == set(strategy._OPS)
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
    work = MatmulWorkload(5, 24, k, batch=3, weight_constant=False)
    assert strategy.matmul(work, isa_target(isa)).strategy == f"matmul_{isa}"


@pytest.mark.parametrize(
    ("rows", "more", "wins"),
    [(1, {}, "avx512_vnni"), (4, {}, "avx512_vnni"), (5, {}, "amx_int8"),
     (1, {"weight_dtype": "uint8"}, "amx_int8")],
)  # fmt: skip
def test_few_rows_leave_tiles_alone(rows, more, wins):
    """Unless vpdpbusd does not take the weights."""
    decision = strategy.matmul(MatmulWorkload(rows, 64, 64, **more), isa_target("amx_int8"))
    assert decision.strategy == f"matmul_{wins}"
    if wins != "amx_int8":
        reason = f"{rows} rows: vpdpbusd reads weights faster than tiles do"
        assert dict(decision.declined)["matmul_amx_int8"] == reason


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
    blocks = default_blocks(conv({"ic": ic, "oc": oc}), feats)
    assert blocks.out % 16 == 0
    assert blocks.data % 4 == 0
    assert default_blocks(MatmulWorkload(3, oc, ic), feats) == Blocks(
        ic, -(-oc // 16) * 16, oc
    )


def test_depthwise_keeps_one_block():
    work = DEPTHWISE["c65"]
    for isa in ISAS:
        blocks = default_blocks(work, features(isa_target(isa)))
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
        ({"partial": True}, r"partial with k 4; allowed: multiples of 8, integers"),
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
        packing.pack_weight(np.full((64, 64, 5, 5), -128, "int8"))
    assert CONV.epilogue == Epilogue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"how": "quads"}, r"how is 'quads'; allowed: plain, pairs, row_pairs, dot, rows"),
        ({"how": "rows", "block": 24}, r"block is 24; allowed with rows: multiples of 16"),
        ({"how": "dot", "block": 24}, r"block is 24; allowed with dot: multiples of 16"),
        ({"how": "dot", "strip": 5}, r"strip is 5; allowed: divisors of 28"),
    ],
)
def test_depthwise_packings_validate(change, message):
    PackedDepthwise(DEPTHWISE_3X3, **({"block": 16, "how": "dot", "strip": 14}))
    with pytest.raises(ValueError, match=message):
        PackedDepthwise(DEPTHWISE_3X3, **({"block": 16} | change))


def test_depthwise_packings_refuse_weights_beyond_int8():
    work = dataclasses.replace(DEPTHWISE_3X3, weight_zero_point=100)
    weight = np.full((64, 1, 3, 3), -28, "int8")
    for how in ("pairs", "dot"):
        packing = PackedDepthwise(work, 16, how, "int8")
        assert packing.pack_weight(weight).min() == -128
        with pytest.raises(ValueError, match=r"=100 spans \[-129, -129\]; allowed: .* of int8"):
            packing.pack_weight(weight - 1)
    # Plain products take int16.
    assert PackedDepthwise(work, 16).pack_weight(weight - 1).min() == -129
