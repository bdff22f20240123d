"""The widening histogram: as if made at once on its final bins, whatever came in which order."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from topi_int8.quantize.histogram import Extent, Histogram

TINY = 2.0**-149
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
# Magnitudes that lie near each other, and the whole of float32, subnormals and zeros of both signs.
VALUES = st.one_of(
    hnp.arrays("float32", st.integers(0, 40), elements=st.floats(-8, 8, width=32)),
    hnp.arrays("float32", st.integers(0, 40), elements=FLOATS),
    hnp.arrays("float32", st.integers(0, 5), elements=st.sampled_from([0.0, -0.0, 1.0, -TINY])),
)  # fmt: skip


def filled(bins: int, *parts: np.ndarray) -> Histogram:
    histogram = Histogram(bins)
    for part in parts:
        histogram.update(part)
    return histogram


def at_once(histogram: Histogram, values: np.ndarray) -> np.ndarray:
    """Count by exact integer arithmetic, value by value."""
    counts = np.zeros_like(histogram.counts)
    for value in values.tolist():
        counts[math.floor(Fraction(value) / Fraction(histogram.width)) - histogram.first] += 1
    return counts


@given(st.lists(VALUES, max_size=6), st.sampled_from([16, 100, 1024]))
def test_counts_are_those_of_the_final_bins(parts: list[np.ndarray], bins: int) -> None:
    histogram = filled(bins, *parts)
    everything = np.concatenate([*parts, np.empty(0, "float32")])
    assert histogram.counts.dtype == "int64" and histogram.counts.shape == (bins,)
    np.testing.assert_array_equal(histogram.counts, at_once(histogram, everything))
    assert histogram.zeros == int(np.sum(everything == 0))
    if everything.size:
        assert histogram.extent.range() == (everything.min(), everything.max())


@given(st.lists(VALUES, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_order_and_parting_do_not_matter(parts: list[np.ndarray], random) -> None:
    shuffled = random.sample(parts, len(parts))
    first, second = filled(64, *parts), filled(64, np.concatenate(shuffled))
    assert (first.first, first.exponent) == (second.first, second.exponent)
    np.testing.assert_array_equal(first.counts, second.counts)


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_bins_are_no_wider_than_they_must(parts: list[np.ndarray]) -> None:
    histogram = filled(64, *parts)
    low, high = min(histogram.extent.low, 0), max(histogram.extent.high, 0)
    if histogram.exponent == -149:
        return
    narrower = [math.floor(math.ldexp(end, 1 - histogram.exponent)) for end in (low, high)]
    assert narrower[1] - narrower[0] >= 64


def test_bins_double_and_zero_stays_a_border() -> None:
    histogram = filled(16, np.array([0.0, 0.5, 15.5], "float32"))
    assert (histogram.width, histogram.first) == (1.0, 0)
    histogram.update(np.array([-1.0, -0.0], "float32"))
    assert (histogram.width, histogram.first) == (2.0, -1)
    assert histogram.counts.tolist() == [1, 3, 0, 0, 0, 0, 0, 0, 1] + [0] * 7
    histogram.update(np.array([1e6], "float32"))
    # Of 2**16 wide bins, 1e6 would need number 15, and -1 a 17th.
    assert (histogram.width, histogram.first) == (2.0**17, -1)


def test_chunks_count_every_value() -> None:
    values = np.random.default_rng(0).normal(size=(3, 50, 1001)).astype("float32")
    histogram = filled(2048, values)
    assert histogram.counts.sum() == values.size
    index = np.floor(values.astype("float64") / histogram.width).astype(int) - histogram.first
    np.testing.assert_array_equal(
        histogram.counts, np.bincount(index.ravel(), minlength=2048)
    )


def test_density_leaves_zeros_out_and_folds_magnitudes() -> None:
    histogram = filled(16, np.array([0.0, 0.0, 0.5, 1.5, -0.5, -2.5, -2.5], "float32"))
    width = histogram.width
    density, magnitudes = histogram.density(), histogram.density(magnitudes=True)
    assert density.total == magnitudes.total == 5
    assert density.counts[int(0.5 / width) - density.first] == 1
    assert magnitudes.first == 0
    folded = {position * width: count for position, count in enumerate(magnitudes.counts) if count}
    # -0.5 and -2.5 are left borders of their bins, and the bins' other sides are nearer to zero.
    assert folded == {0.5 - width: 1, 0.5: 1, 1.5: 1, 2.5 - width: 2}


@given(hnp.arrays("float64", 12, elements=st.floats(0, 9)), st.integers(-12, 0))
def test_integrals_are_those_of_the_function(per_bin: np.ndarray, first: int) -> None:
    density = Histogram(12).density()
    density = type(density)(per_bin, first, 1.0)
    # Bins of 64 parts each, summed up one by one.
    parts = np.repeat(per_bin, 64) / 64
    middles = first + (np.arange(parts.size) + 0.5) / 64
    for position in (first - 3.0, float(first), first + 2.625, first + 11.25, first + 20.0):
        inside = middles < position
        at = np.array([position])
        value, moment = density.integral(per_bin).with_moment(at)
        assert density.integral(per_bin)(at)[0] == value[0]
        assert value[0] == pytest.approx(parts[inside].sum(), abs=1e-9)
        assert moment[0] == pytest.approx((parts * middles)[inside].sum(), abs=1e-9)


def test_extent_clips() -> None:
    extent = Extent()
    with pytest.raises(ValueError, match="no values"):
        extent.clip(0.0, 1.0)
    extent.update(np.array([2.0, 3.0]))
    assert extent.clip(0.0, 2.5) == (2.0, 2.5)
    assert extent.clip(0.0, 1.0) == (2.0, 3.0)
