"""Percentile, KL and MSE against slow, obvious references; and tensors that are hard to observe."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topi_int8.quantize import (
    OBSERVERS,
    Grid,
    KLDivergence,
    MeanSquaredError,
    Observer,
    Percentile,
)
from topi_int8.quantize.clipping import _divergences, _squared_errors
from topi_int8.quantize.histogram import Density
from topi_int8.quantize.qparams import activation_qparams

EIGHT, SYMMETRIC = Grid(), Grid(symmetric=True)
GRIDS = pytest.mark.parametrize("grid", [EIGHT, SYMMETRIC], ids=["asymmetric", "symmetric"])


def _normal(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=40000)


def _relu(rng: np.random.Generator) -> np.ndarray:
    return np.maximum(rng.normal(size=40000), 0)


def _heavy(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_t(2.5, size=40000)


def _skewed(rng: np.random.Generator) -> np.ndarray:
    x = rng.gamma(0.5, size=40000) * 3
    return x - 0.2 * rng.random(x.size)


def _negative(rng: np.random.Generator) -> np.ndarray:
    return -rng.exponential(size=40000)


def _far(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(2, 3, size=40000)


SHAPES = [_normal, _relu, _heavy, _skewed, _negative, _far]
TENSORS = pytest.mark.parametrize("draw", SHAPES, ids=lambda f: f.__name__.strip("_"))


def tensor(draw) -> np.ndarray:
    return draw(np.random.default_rng(7)).astype("float32")


def seen(observer: Observer, values: np.ndarray, parts: int = 5) -> Observer:
    for part in np.array_split(values, parts):
        observer.update(part)
    return observer


def error(values: np.ndarray, low: float, high: float, grid: Grid = EIGHT) -> float:
    """Return the mean squared error of quantizing the very values."""
    params = activation_qparams(low, high, "int8" if grid.symmetric else "uint8", grid.symmetric)
    real = params.dequantize(params.quantize(values)).astype("float64")
    return float(np.mean((real - values) ** 2))


# ------------------------------------------------------------ properties of all


@pytest.mark.parametrize("method", OBSERVERS)
@TENSORS
@GRIDS
def test_the_range_lies_between_the_ends(draw, method: str, grid: Grid) -> None:
    values = tensor(draw)
    low, high = seen(OBSERVERS[method](), values).range(grid)
    assert values.min() <= low <= high <= values.max()


@pytest.mark.parametrize("method", OBSERVERS)
def test_what_relu_made_starts_at_zero(method: str) -> None:
    low, high = seen(OBSERVERS[method](), tensor(_relu)).range()
    assert low == 0 and high > 2.5


@pytest.mark.parametrize("method", OBSERVERS)
@GRIDS
def test_the_range_grows_with_the_values(method: str, grid: Grid) -> None:
    values = tensor(_skewed)
    low, high = seen(OBSERVERS[method](), values).range(grid)
    for factor in (2.0**-30, 64.0):
        scaled = seen(OBSERVERS[method](), values * np.float32(factor)).range(grid)
        assert scaled == pytest.approx((low * factor, high * factor), rel=1e-6)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=200))
def test_any_values_give_a_range_between_their_ends(numbers: list[float]) -> None:
    values = np.array(numbers, "float32")
    for make in OBSERVERS.values():
        for grid in (EIGHT, SYMMETRIC):
            low, high = seen(make(), values, parts=1).range(grid)
            assert values.min() <= low <= high <= values.max()


# ------------------------------------------------------------ tensors that are hard to observe


@pytest.mark.parametrize("method", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-30, 3e38])
@GRIDS
def test_a_constant_is_represented(method: str, value: float, grid: Grid) -> None:
    values = np.full(1000, value, "float32")
    low, high = seen(OBSERVERS[method](), values).range(grid)
    assert (low, high) == (values[0], values[0])
    assert error(values, low, high, grid) <= (float(values[0]) / 1000) ** 2


@pytest.mark.parametrize("method", OBSERVERS)
@pytest.mark.parametrize("numbers", [(0, 1), (0, 1, 100), (-1, 0, 3), (-7, -2, 1, 4, 100)])
@GRIDS
def test_few_distinct_values_are_all_represented(method: str, numbers: tuple, grid: Grid) -> None:
    values = np.tile(np.array(numbers, "float32"), 500)
    low, high = seen(OBSERVERS[method](), values).range(grid)
    step = (max(numbers) - min(min(numbers), 0)) / grid.steps
    assert error(values, low, high, grid) <= step**2 / 2


@pytest.mark.parametrize("method", ["percentile", "kl"])
@GRIDS
def test_one_outlier_is_clipped(method: str, grid: Grid) -> None:
    # Not by MSE: its error alone would be 0.3 of the variance of the half million other values.
    values = np.append(np.random.default_rng(0).normal(size=500_000), 400.0).astype("float32")
    low, high = seen(OBSERVERS[method](), values).range(grid)
    assert high < 40
    assert error(values[:-1], low, high, grid) < error(values[:-1], -5, 400, grid) / 50


@pytest.mark.parametrize("method", ["percentile", "kl", "mse"])
def test_a_relu_that_hardly_fires_keeps_its_values(method: str) -> None:
    values = np.zeros(100_000, "float32")
    values[:3] = 1, 2, 3
    assert seen(OBSERVERS[method](), values).range()[1] > 2.9


# ------------------------------------------------------------ percentile


@TENSORS
@pytest.mark.parametrize("percentile", [70, 90, 99.9, 99.99])
def test_percentile_is_the_quantile_to_a_bin(draw, percentile: float) -> None:
    values = tensor(draw)
    observer = seen(Percentile(percentile), values)
    ends = np.array([100 - percentile, 100 + percentile]) / 200
    want = np.quantile(values, ends, method="inverted_cdf")
    width = observer.histogram.width
    assert observer.range() == pytest.approx(tuple(want), abs=width)
    high = np.quantile(np.abs(values), percentile / 100, method="inverted_cdf")
    low = max(-high, values.min())
    got = observer.range(SYMMETRIC)
    assert got == pytest.approx((low, min(high, values.max())), abs=width)


@TENSORS
@GRIDS
def test_percentile_100_is_minmax(draw, grid: Grid) -> None:
    values = tensor(draw)
    assert seen(Percentile(100), values).range(grid) == (values.min(), values.max())


def test_percentile_widens_with_the_percentage() -> None:
    values = tensor(_heavy)
    ranges = [seen(Percentile(p), values).range() for p in (20, 80, 99, 99.9, 99.99, 100)]
    assert all(b[0] <= a[0] and a[1] <= b[1] for a, b in itertools.pairwise(ranges))


# ------------------------------------------------------------ mean squared error


@TENSORS
@GRIDS
def test_no_clipped_range_has_a_smaller_error(draw, grid: Grid) -> None:
    """Brute force over clipped ranges and the very values, no histogram."""
    values = tensor(draw)
    got = error(values, *seen(MeanSquaredError(), values).range(grid), grid)
    low, high = min(values.min(), 0), max(values.max(), 0)
    fractions = np.linspace(0.04, 1, 25)
    lows = low * fractions if low < 0 and not grid.symmetric else [low]
    highs = high * fractions if high > 0 else [high]
    if grid.symmetric:
        top = max(-low, high) * fractions
        best = min(error(values, -t, t, grid) for t in top)
    else:
        best = min(error(values, a, b) for a in lows for b in highs)
    assert got <= 1.02 * best


@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 7, 255]))
def test_the_expected_error_is_that_of_values_in_the_middle_of_tiny_bins(seed: int, steps) -> None:
    """The sum over borders against every bin's own error, one after the other."""
    rng = np.random.default_rng(seed)
    first = -int(rng.integers(1, 60))
    counts = rng.integers(0, 50, size=100) * (rng.random(100) < 0.7) * 1.0
    low, high = rng.uniform(first, 0, size=6), rng.uniform(1, 100 + first, size=6)
    parts = 200
    position = first + (np.arange(100 * parts) + 0.5) / parts
    weight = np.repeat(counts, parts) / parts
    want = []
    for a, b in zip(low, high, strict=True):
        scale = (b - a) / steps
        lowest = -round(-a / scale)
        k = np.clip(np.rint(position / scale), lowest, lowest + steps)
        want.append(np.sum(weight * (position - k * scale) ** 2) / counts.sum())
    got = _squared_errors(Density(counts, first, 1.0), steps)(low, high)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------ Kullback-Leibler divergence


def divergence(counts: np.ndarray, first: int, low: int, high: int, cells: int) -> float:
    """Return the divergence by loops such as MXNet's.

    Every bin is first cut into `cells` parts, so that cells are whole numbers of parts.
    """
    inside = counts[low - first : high - first]
    p = inside.copy()
    filled = np.flatnonzero(inside)
    p[filled[0]] += counts[: low - first].sum()
    p[filled[-1]] += counts[high - first :].sum()
    p, sliced = np.repeat(p, cells) / cells, np.repeat(inside, cells) / cells
    q = np.zeros_like(p)
    merged = p.size // cells
    for cell in range(cells):
        part = slice(cell * merged, (cell + 1) * merged)
        some = sliced[part] > 0
        if some.any():
            q[part] = np.where(some, sliced[part].sum() / some.sum(), 0)
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))


def _counts(seed: int, bins: int, holes: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(300 * np.exp(-np.abs(np.linspace(-4, 4, bins)))) * 1.0
    return counts * (rng.random(bins) >= holes)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5]), st.sampled_from([4, 5, 16]))
def test_divergence_is_that_of_the_two_distributions(seed: int, holes: float, cells: int) -> None:
    counts, first = _counts(seed, 60, holes), -30
    some = np.flatnonzero(counts) + first
    ranges = [(a, b) for a in range(-30, 1) for b in range(31) if b - a >= cells][::7]
    ranges = [(a, b) for a, b in ranges if np.sum((a <= some) & (some < b)) > 1]
    low, high = np.array(ranges, "float64").T
    want = [divergence(counts, first, a, b, cells) for a, b in ranges]
    got = _divergences(Density(counts, first, 1.0), cells)(low, high)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("draw", [_relu, _heavy, _normal], ids=lambda f: f.__name__.strip("_"))
@GRIDS
def test_no_range_diverges_less(draw, grid: Grid) -> None:
    """Brute force, by the loops above, over ranges whose ends are quarters of octaves apart."""
    observer = seen(KLDivergence(bins=1024), tensor(draw))
    density = observer.histogram.density(magnitudes=grid.symmetric)
    counts, first, cells = density.counts, density.first, grid.steps + 1
    filled = np.flatnonzero(counts) + first
    ends = np.array([max(-filled[0], 0), filled[-1] + 1])
    tried = np.ceil(ends[:, None] * 2.0 ** (-np.arange(9) / 4)).astype(int)
    best = min(
        divergence(counts, first, -low, high, cells)
        for low, high in itertools.product(*map(np.unique, tried))
        if low + high >= cells
    )
    low, high = observer.range(grid)
    if grid.symmetric:
        low, high = 0.0, max(-low, high)
    got = [int(np.floor(low / density.width)), int(np.ceil(high / density.width))]
    assert divergence(counts, first, *got, cells) <= best + 1e-9


def test_a_range_of_one_bin_is_no_choice() -> None:
    counts = np.zeros(1000)
    counts[[1, 900, 950]] = 700, 20, 20
    low, high = np.zeros(4), np.array([300.0, 901, 951, 1000])
    got = _divergences(Density(counts, 0, 1.0), 256)(low, high)
    assert got[0] == np.inf and got[1] > 1e-3
    assert got[2:] == pytest.approx([0, 0], abs=1e-12)


def test_kl_refuses_more_levels_than_bins_can_tell_apart() -> None:
    observer = seen(KLDivergence(bins=1024), tensor(_normal))
    with pytest.raises(ValueError, match="bins is 1024; allowed: four for each of 512 levels"):
        observer.range(Grid(512))


def test_kl_clips_long_tails_and_keeps_short_ones() -> None:
    rng = np.random.default_rng(1)
    flat = rng.uniform(-1, 1, size=200_000).astype("float32")
    assert seen(KLDivergence(), flat).range() == (flat.min(), flat.max())
    heavy = rng.standard_t(2, size=200_000).astype("float32")
    low, high = seen(KLDivergence(), heavy).range()
    assert low > heavy.min() / 4 and high < heavy.max() / 4


def test_more_levels_clip_less() -> None:
    values = tensor(_heavy)
    for make in (KLDivergence, MeanSquaredError):
        observer = seen(make(), values)
        spans = [np.ptp(observer.range(Grid(levels))) for levels in (16, 64, 256)]
        assert spans[0] <= spans[1] <= spans[2] and spans[0] < spans[2]
