"""x86_depthwise.py: bit-exact by each product and layout, in lanes, strips and blocks of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intrinsics.x86_rows import LANE, ROW_PRODUCTS, interleaved
from tests.grid import DEPTHWISE, EPILOGUES, depthwise
from tests.kernels import Assembly, build, check, check_instructions, decide
from topi_int8.compute.depthwise import PackedDepthwise
from topi_int8.kernel import Blocks
from topi_int8.schedule.x86_depthwise import LONG_ROW
from topi_int8.schedule.x86_depthwise_lanes import (
    STRIP_BYTES,
    Columns,
    Rows,
    choose_columns,
    choose_last,
    choose_rows,
)

# instruction set -> what multiplies weights of 7 bits, and of 8
PRODUCTS = {
    "avx2": ("vpmaddubsw", "vpmaddwd"),
    "avx_vnni": ("vpdpbusd", "vpdpbusd"),
    "avx512_bw": ("vpmaddubsw", "vpmaddwd"),
    "avx512_vnni": ("vpdpbusd", "vpdpbusd"),
    "amx_int8": ("vpdpbusd", "vpdpbusd"),
}
each_isa = pytest.mark.parametrize("isa", PRODUCTS)
PAD = dict(padding=(1, 1, 1, 1))
U8 = EPILOGUES["u8_bounded"]
# Shapes for one path each, beyond the grid's.
PATHS = {
    "kernel_13": depthwise(40, (15, 17), (13, 13), padding=(6, 6, 6, 6)),
    "kernel_13_stride_2": depthwise(40, (15, 17), (13, 13), strides=(2, 2), padding=(6, 6, 6, 6)),
    "kernel_9_stride_3_dilation_2": depthwise(
        96, (20, 25), (9, 9), strides=(3, 3), dilation=(2, 2), padding=(8, 8, 8, 8)
    ),
    "strips": depthwise(96, (5, 300), (5, 5), padding=(2, 2, 2, 2)),
    "strips_stride_2": depthwise(144, (5, 301), (5, 5), strides=(2, 2), padding=(2, 2, 2, 2)),
    "beside_stride_2": depthwise(144, (7, 60), (3, 3), strides=(2, 2), epilogue=U8, **PAD),
    "beside_5x5": depthwise(96, (9, 30), (5, 5), padding=(2, 2, 2, 2), epilogue=U8),
    "stride_3": depthwise(16, (11, 50), (3, 3), strides=(3, 3), **PAD),
    "stride_4": depthwise(80, (14, 14), (3, 3), strides=(4, 4)),
    "two_columns": depthwise(64, (50, 2), (3, 3), **PAD),
    "mostly_border": depthwise(80, (2, 2), (5, 5), padding=(9, 8, 7, 6)),
    "mostly_border_strided": depthwise(80, (2, 2), (5, 5), strides=(3, 2), padding=(9, 8, 7, 6)),
    "one_row": depthwise(96, (6, 40), (1, 9), strides=(1, 2), padding=(0, 4, 0, 4)),
    "last_16": depthwise(80, (6, 7), (3, 3), epilogue=EPILOGUES["s8_bounded"], **PAD),
    "last_20": depthwise(84, (6, 7), (3, 3), epilogue=U8, **PAD),
    "last_36": depthwise(100, (6, 7), (3, 3), epilogue=U8, **PAD),
    "batch_4_s8": depthwise(144, (6, 6), (3, 3), n=4, data_dtype="int8", **PAD),
    # 3 lanes a pixel in NHWC
    "c48": depthwise(48, (6, 9), (3, 3), **PAD),
    "c48_stride_2": depthwise(48, (6, 9), (3, 3), strides=(2, 2), **PAD),
    "one_pixel_wide": depthwise(16, (9, 1), (3, 1), padding=(1, 0, 1, 0)),
}  # fmt: skip


@each_isa
@pytest.mark.parametrize("layout", ["NCHWc", "NHWC"])
@pytest.mark.parametrize("name", PATHS)
def test_paths(name, layout, isa):
    work = PATHS[name]
    built = check(work, isa, layout=layout, extreme="border" in name)
    lanes = layout == "NCHWc" or work.ic % 16 == 0
    assert (PRODUCTS[isa][1] in built.decision.intrinsic) == lanes


# The others of the grid have weights beyond int8.
SIGNED = [n for n, w in DEPTHWISE.items() if w.weight_dtype == "int8" and not w.weight_zero_point]


@each_isa
@pytest.mark.parametrize("name", SIGNED)
def test_weights_of_7_bits(name, isa):
    built = check(replace(DEPTHWISE[name], weight_range=(-64, 63)), isa)
    assert PRODUCTS[isa][0] in built.decision.intrinsic


@each_isa
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name, isa):
    base = (DEPTHWISE["c65"], DEPTHWISE["stride_2"], PATHS["c48"])
    check(base[list(EPILOGUES).index(name) % 3].with_epilogue(EPILOGUES[name]), isa)


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_of_the_neighbours(block, stride):
    """Blocks of 16 and 32 channels put several pixels into a vector, 64 a pixel's four lanes."""
    work = depthwise(65, (9, 30), (3, 3), strides=(stride, stride), epilogue=U8, **PAD)
    for isa in ("avx_vnni", "avx512_vnni"):
        built = check(work, isa, blocks=Blocks(block, block))
        assert built.kernel.data_layout.block == built.kernel.out_layout.block == block


@pytest.mark.parametrize(
    ("isa", "register"),
    [("avx2", "ymm"), ("avx_vnni", "ymm"), ("avx512_bw", "zmm"), ("avx512_vnni", "zmm")],
)
@pytest.mark.parametrize("weight_range", [(-64, 63), (-128, 127)])
def test_instructions(isa, register, weight_range):
    work = depthwise(64, (12, 28), (3, 3), epilogue=U8, weight_range=weight_range, **PAD)
    built = build(work, isa)
    check_instructions(built, isa, PRODUCTS[isa][weight_range[1] == 127], register)
    assembly = Assembly.of(built.library)
    # Bytes are interleaved by unpacking, and narrowed by what undoes it.
    for mnemonic in ("vpunpcklbw", "vpunpckhwd", "vpackssdw", "vpackuswb", "vcvtps2dq"):
        assert assembly.mnemonics()[mnemonic] > 0, mnemonic
    for mnemonic in ("vpmovusdb", "vpmovdb", "vpshufb", "vpermb"):
        assert assembly.mnemonics()[mnemonic] == 0, mnemonic


def test_sums_of_a_block_stay_in_registers():
    """Of two output rows: the loop of the products stores a vector of each, and nothing else."""
    work = depthwise(64, (12, 28), (3, 3), epilogue=U8, weight_range=(-127, 127), **PAD)
    assembly = Assembly.of(build(work, "avx512_vnni").library)
    assert len(assembly.spills("vpdpbusd")) == 2


# ---- choices


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_each_tap_of_each_row_is_multiplied_once(kh, stride, dilation, count):
    count = count if dilation == 1 else 1
    high = (count - 1) * stride + (kh - 1) * dilation + 1
    work = depthwise(16, (high, 5), (kh, 1), strides=(stride, 1), dilation=(dilation, 1))
    rows = Rows(work, count)
    for row in range(count):
        taps = {
            (4 * group + t) * rows.unit: tap
            for group in range(rows.groups)
            for t, tap in enumerate(rows.taps(row, group))
            if tap is not None
        }
        assert taps == {row * stride + tap * dilation: tap for tap in range(kh)}


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "count"),
    [(3, 1, 1, 2), (3, 2, 1, 1), (5, 1, 1, 2), (5, 2, 1, 2), (3, 1, 2, 1), (1, 1, 1, 2)],
)
def test_rows_of_a_block(kernel, stride, dilation, count):
    work = depthwise(
        16, (40, 40), (kernel, kernel), strides=(stride, stride), dilation=(dilation, dilation)
    )
    assert choose_rows(work).count == count


@given(
    st.sampled_from([16, 32, 48, 64, 96]), st.integers(1, 400), st.integers(1, 9),
    st.integers(1, 3), st.integers(1, 2), st.integers(0, 4), st.sampled_from([2, 4]),
)  # fmt: skip
def test_columns_cover_the_row(channels, ow, kw, stride, dilation, pad, vector):
    width = max(1, (ow - 1) * stride + (kw - 1) * dilation + 1 - 2 * pad)
    if width + 2 * pad < (kw - 1) * dilation + 1:
        return
    work = depthwise(
        channels, (3, width), (3, kw), strides=(1, stride), dilation=(1, dilation),
        padding=(0, pad, 0, pad),
    )  # fmt: skip
    packing = PackedDepthwise(work, channels, "rows", "uint8")
    rows = choose_rows(work)
    columns = choose_columns(packing, rows, vector)
    covered = {start + x for start in columns.starts for x in range(columns.width)}
    assert covered == set(range(work.ow))
    lines = columns.count * len(columns.phases) * rows.groups * 4 * channels
    assert lines <= STRIP_BYTES or columns.width == 1
    # Every column that a tap reads is in its phase, inside the image or filled.
    for start, kw_tap in ((s, k) for s in columns.starts for k in range(kw)):
        phase, offset = columns.tap(kw_tap)
        assert offset + columns.width <= columns.count
        first, last = columns.inside(start, columns.phases[phase])
        for x in range(columns.width):
            at = (start + x) * stride + kw_tap * dilation - pad
            assert (int(first) <= x + offset < int(last)) == (0 <= at < width)
    assert columns.computed in (1, 2, 4) and columns.gathered in (1, 2, 4)
    assert columns.operand_lanes >= columns.computed


def test_the_last_block_leaves_out_its_padding():
    for channels, lanes in ((80, 1), (96, 2), (112, 4), (128, 4)):
        work = depthwise(channels, (6, 7), (3, 3), epilogue=U8, **PAD)
        for epilogue, expected in ((U8, lanes), (EPILOGUES["int32_bias"], 4)):
            packing = PackedDepthwise(work.with_epilogue(epilogue), 64, "rows", "uint8")
            assert choose_last(Columns(packing, 7, 4, 4)).lanes == expected


def test_rows_are_interleaved_beside_the_sums_where_there_is_much_of_it():
    def source(width: int, stride: int) -> str:
        size = (9, width * stride)
        work = depthwise(64, size, (3, 3), strides=(stride, stride), epilogue=U8, **PAD)
        return str(decide(work, "amx_int8").kernel().func)

    def loops(text: str) -> int:
        return text.count("for q in")

    # Each of two ways, and inside and at the border: the loops over phases, and that over sums.
    assert loops(source(LONG_ROW, 1)) == 2 * (1 + 1)
    assert loops(source(LONG_ROW - 1, 2)) == 2 * (2 + 1)
    assert loops(source(LONG_ROW, 2)) == 2 + (2 + 1)


def test_interleaving_refuses_what_is_not_four_rows():
    with pytest.raises(ValueError, match=r"3 rows; allowed: 4"):
        interleaved([None] * 3)


def test_products_say_what_their_weights_are():
    assert {name: (p.dtype, p.parts) for name, p in ROW_PRODUCTS.items()} == {
        "vpdpbusd": ("int8", 1), "vpmaddubsw": ("int8", 1), "vpmaddwd": ("int16", 2),
    }  # fmt: skip
    assert LANE == 16
