"""winograd.py: F(2x2, 3x3) bit-exact on each ISA over awkward shapes; reasons for no; assembly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from tests.grid import DTYPES, EPILOGUES, SAME, SHAPES, conv
from tests.kernels import (
    Assembly,
    Built,
    build,
    check,
    check_instructions,
    compare,
    decide,
    run,
)
from topi_int8.compute.winograd import PackedWinograd, applies, overflows
from topi_int8.kernel import Blocks
from topi_int8.schedule.winograd import BAND_BYTES, choose_columns, choose_rows
from topi_int8.workload import Conv2dWorkload

ISAS = ("avx2", "avx512_bw")
each_isa = pytest.mark.parametrize("isa", ISAS)
FULL = {"uint8": (0, 255), "int8": (-128, 127)}  # weights that are constants of any value


def tiled(work: Conv2dWorkload) -> Conv2dWorkload:
    """Return a workload of the grid with its weight known to be a constant."""
    return replace(work, weight_range=work.weight_range or FULL[work.weight_dtype])


def check_tiled(work: Conv2dWorkload, isa: str, **more: Any) -> Built:
    built = check(tiled(work), isa, **more)
    assert built.decision.strategy == f"conv2d_nchwc_winograd_{isa}"
    return built


MORE = {
    # Bands of tiles, each with its own input; and one for all, tiles of which are cropped.
    "bands": conv(32, (32, 28), 48, (3, 3), padding=SAME),
    "one_band": conv(64, (7, 7), 64, (3, 3), padding=SAME),
    "columns_17_tiles": conv(20, (6, 34), 20, (3, 3), padding=SAME),
    "columns_37_tiles": conv(16, (3, 73), 16, (3, 3), padding=SAME),
    "columns_in_bands": conv(64, (4, 448), 16, (3, 3), padding=SAME),
    "rows_odd": conv(20, (9, 12), 20, (3, 3), padding=SAME, n=3),
    "padding_2": conv(20, (8, 9), 20, (3, 3), padding=(2, 2, 2, 2)),
    "unpadded": conv(33, (12, 11), 17, (3, 3)),
    "network_input": conv(3, (24, 24), 16, (3, 3), padding=SAME),
}
SERVED = {
    name: work for name, work in {**SHAPES, **MORE}.items()
    if applies(work) and decide(tiled(work), "avx2").strategy_row.transforms
}  # fmt: skip


def test_the_grid_has_enough_of_them() -> None:
    assert len(SERVED) >= 12 and {"batch_3", "ic17_oc33", "padding_asymmetric"} <= SERVED.keys()


@each_isa
@pytest.mark.parametrize("name", SERVED)
def test_shapes(name: str, isa: str) -> None:
    check_tiled(SERVED[name], isa)


@each_isa
@pytest.mark.parametrize("name", [name for name, work in DTYPES.items() if applies(work)])
def test_dtypes(name: str, isa: str) -> None:
    """Full ranges at their extremes."""
    check_tiled(DTYPES[name], isa, extreme=True)


@each_isa
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name: str, isa: str) -> None:
    work = SERVED["rows_odd" if list(EPILOGUES).index(name) % 2 else "bands"]
    check_tiled(work.with_epilogue(EPILOGUES[name]), isa)


@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_that_fit_by_a_hair(sign: int) -> None:
    """4 times the largest sum is within 2**31: 1841 channels, all products at their extreme."""
    work = conv(1841, (6, 6), 16, (3, 3), padding=SAME, data_zero_point=0, weight_range=(-127, 127))
    assert not overflows(work) and overflows(replace(work, ic=1842))
    built = check_tiled(work, "avx2")
    ops = reference.random_operands(work)
    ops = replace(
        ops, data=np.full_like(ops.data, 255), weight=np.full_like(ops.weight, sign * 127)
    )
    want = reference.conv2d(work, **ops.named())
    assert np.abs(want).max() == 9 * 1841 * 255 * 127
    compare(work, run(built, ops), want)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 20),
    st.tuples(*[st.integers(0, 3)] * 4), st.integers(1, 2), st.integers(0, 255),
)  # fmt: skip
def test_any_shape(ic, oc, ih, iw, padding, n, zero_point) -> None:
    """The kernel itself, also where the table prefers another."""
    top, left, bottom, right = padding
    if ih + top + bottom < 3 or iw + left + right < 3:
        return
    work = tiled(conv(ic, (ih, iw), oc, (3, 3), padding=padding, n=n, data_zero_point=zero_point))
    check(work, "avx2")


# ---------------------------------------------------------------- what declines


def reason(work: Conv2dWorkload, isa: str = "avx2") -> str:
    declined = dict(decide(work, isa).declined)
    return declined.get(f"conv2d_nchwc_winograd_{isa}", "")


ALIGNED = tiled(SHAPES["aligned"])


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (replace(ALIGNED, strides=(2, 1)), "not 3x3 with strides"),
        (replace(ALIGNED, dilation=(1, 2)), "not 3x3 with strides"),
        (replace(ALIGNED, groups=2), "not 3x3 with strides"),
        (replace(ALIGNED, kh=1), "not 3x3 with strides"),
        (replace(ALIGNED, weight_range=None), "weights are no constant"),
        (replace(ALIGNED, ic=4096), "may not fit int32"),
        (replace(ALIGNED, ih=2, iw=3), "too few for each transformed weight"),
        (replace(ALIGNED, ih=1, iw=60), "the direct sum takes"),
    ],
)
@each_isa
def test_reasons_for_no(work: Conv2dWorkload, why: str, isa: str) -> None:
    assert why in reason(work, isa)
    assert not reason(ALIGNED, isa)


@pytest.mark.parametrize("isa", ["avx_vnni", "avx512_vnni", "generic"])
def test_others_do_not_need_it(isa: str) -> None:
    assert decide(ALIGNED, isa).strategy == f"conv2d_nchwc_{isa}"


def test_what_the_packing_refuses() -> None:
    with pytest.raises(ValueError, match="allowed: 3x3"):
        PackedWinograd(replace(ALIGNED, strides=(2, 2)), 16, 16, 8)
    with pytest.raises(ValueError, match="tiles_w is 6; allowed: 7 or more"):
        PackedWinograd(ALIGNED, 16, 16, 8, tiles_w=6)


def test_rows_of_a_band() -> None:
    assert choose_rows(28, 28) == 1 and choose_rows(28, 14) == 1
    assert choose_rows(14, 7) == 2 and choose_rows(7, 7) == 7 and choose_rows(4, 4) == 4


@pytest.mark.parametrize(
    ("tiles_w", "width", "rows", "ic", "columns"),
    [(28, 14, 1, 64, 28), (112, 14, 1, 64, 56), (960, 12, 1, 64, 96), (112, 14, 1, 512, 14)],
)
def test_columns_of_a_band(tiles_w: int, width: int, rows: int, ic: int, columns: int) -> None:
    assert choose_columns(tiles_w, width, rows, ic) == columns
    assert 16 * rows * columns * ic * 2 <= BAND_BYTES or columns == width


def test_packed_weight_is_the_transform() -> None:
    """Point (0, 0) is four times the first tap, the middle ones sums of all."""
    weight = np.random.default_rng(0).integers(-127, 128, (128, 64, 3, 3)).astype("int8")
    packed = PackedWinograd(ALIGNED, 16, 16, 8).pack_weight(weight)
    wide = weight.astype("int32")
    first = packed[:, 0, 0].transpose(0, 3, 1, 2, 4).reshape(128, 64)
    np.testing.assert_array_equal(first, 4 * wide[:, :, 0, 0])
    middle = packed[:, 1, 1].transpose(0, 3, 1, 2, 4).reshape(128, 64)
    np.testing.assert_array_equal(middle, wide.sum((2, 3)))


# ---------------------------------------------------------------- assembly


@each_isa
def test_instructions(isa: str) -> None:
    work = tiled(conv(64, (56, 56), 64, (3, 3), padding=SAME)).with_epilogue(EPILOGUES["u8_relu"])
    built = build(work, isa, Blocks(16, 16))
    check_instructions(built, isa, "vpmaddwd", "zmm" if isa == "avx512_bw" else "ymm")
    assert not Assembly.of(built.library).spills("vpmaddwd")
