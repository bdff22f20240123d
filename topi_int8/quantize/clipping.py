"""Observers that clip: what saturates is weighed against what is rounded.

All three remember one `Histogram` and look for the range in it when calibration is over.
`KLDivergence` and `MeanSquaredError` score a grid of ranges that shrink from either end by equal
ratios, then a finer grid around the best. Of equals the widest is chosen.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .histogram import Density, Extent, Histogram
from .observer import EIGHT_BITS, Grid, Observer

# By what factors each end of a range is tried: first of the whole range, down to 1/1024, then of
# the best so far. That is off by 1% at most, where errors are flat.
_COARSE = 2.0 ** (-np.arange(41) / 4)
_FINE = 2.0 ** (np.arange(8, -9, -1) / 32)
# Ranges scored at once: of 256 numbers each, which the second-level cache holds.
_BLOCK = 128
# Scores that differ by less than this share of the largest are equal: they are differences of sums
# of up to 1e10 counts in float64.
_SAME = 1e-9

# The score of ranges, the smaller the better: of their low and their high ends, in bins from zero,
# (n,) float64 arrays, low <= 0 <= high.
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Clipping(Observer):
    """An observer that remembers a histogram.

    Parameters
    ----------
    bins : int
        Bins of the histogram, 1024 or more: four for each of 256 levels. Half of them or more cover
        the extent of the values and zero: of 8192, a bin is at most 1/4096 of it.
    """

    bins: int = field(default=8192, kw_only=True)
    histogram: Histogram = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.bins, int) or self.bins < 1024:
            raise ValueError(f"bins is {self.bins!r}; allowed: an integer, 1024 or more")
        object.__setattr__(self, "histogram", Histogram(self.bins))

    def update(self, values: np.ndarray) -> None:
        """Count the values; an empty tensor changes nothing."""
        self.histogram.update(values)

    def range(self, grid: Grid = EIGHT_BITS) -> tuple[float, float]:
        """Return the chosen range, inside (min, max) seen; ValueError if nothing was seen."""
        extent = self.histogram.extent
        extent.range()
        density = self.histogram.density(magnitudes=grid.symmetric)
        if density.total == 0:
            return 0.0, 0.0
        low, high = self._choose(density, _reach(extent, grid), grid)
        return extent.clip(-high if grid.symmetric else low, high)

    @abstractmethod
    def _choose(
        self, density: Density, reach: tuple[float, float], grid: Grid
    ) -> tuple[float, float]:
        """Return a range within ``reach``; for a symmetric grid, (0, largest magnitude)."""


def _reach(extent: Extent, grid: Grid) -> tuple[float, float]:
    """Return the range that holds all values and zero; of their magnitudes for a symmetric grid."""
    low, high = min(extent.low, 0.0), max(extent.high, 0.0)
    return (0.0, max(-low, high)) if grid.symmetric else (low, high)


@dataclass(frozen=True)
class Percentile(Clipping):
    """The range that holds a percentage of the values; as many lie below it as above.

    On a symmetric grid it holds that percentage of the magnitudes. Both as in ONNX Runtime's
    percentile calibrator. Zeros count like other values: of a relu's output, where they are half,
    the highest 1% are 2% of what is not zero. Where all but so few are zero that nothing else is
    left, the range holds all.

    Parameters
    ----------
    percentile : float
        In (0, 100]; 100 is `MinMax`.
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile!r}; allowed: above 0, at most 100")

    def _choose(
        self, density: Density, reach: tuple[float, float], grid: Grid
    ) -> tuple[float, float]:
        count = density.total + self.histogram.zeros
        cut = (1 - self.percentile / 100) * count
        if cut == 0:
            return reach
        if grid.symmetric:
            low, high = 0.0, self._value(density, count - cut)
        else:
            low, high = (self._value(density, rank) for rank in (cut / 2, count - cut / 2))
        return (low, high) if (low, high) != (0, 0) else reach

    def _value(self, density: Density, rank: float) -> float:
        """Return the value below which so many values lie."""
        below = np.concatenate([[0.0], np.cumsum(density.counts)])
        negative = below[-density.first]
        if negative <= rank <= negative + self.histogram.zeros:
            return 0.0
        if rank > negative:
            rank = min(rank - self.histogram.zeros, density.total)
        # The bin in which the count passes the rank; it is not empty.
        index = int(np.searchsorted(below, rank, "left")) - 1
        inside = (rank - below[index]) / density.counts[index]
        return float(density.first + index + inside) * density.width


@dataclass(frozen=True)
class MeanSquaredError(Clipping):
    """The range with the smallest expected squared error of quantization.

    The error is that of the very scale and zero point which the range gets, saturation included,
    for values spread evenly inside each bin, as in torch's ``HistogramObserver``; tried are all
    pairs of ends in a grid, where torch walks inwards until it gets worse. ("MSE" range setting of
    Nagel et al., A White Paper on Neural Network Quantization, 2021, section 3.1.)

    Tensors that share one scale are chosen for apart and get the union of their ranges: the error
    is then no longer the smallest for each, but what the widest member keeps, all keep.
    """

    def _choose(
        self, density: Density, reach: tuple[float, float], grid: Grid
    ) -> tuple[float, float]:
        return _search(_squared_errors(density, grid.steps), reach, density.width)


def _squared_errors(density: Density, steps: int) -> Score:
    """Return the score that is the expected squared error, in bins squared.

    The values that become level k, k * s in real numbers, lie between the borders (k - 1/2) * s and
    (k + 1/2) * s; the first level has all below it, the last one all above. With M0, M1 and M2 the
    number, the sum and the sum of squares of those values, the error is the sum over k of
    ``M2 - 2 * k*s * M1 + (k*s)**2 * M0``. As M0 and M1 are differences of integrals at the borders,
    the sums over k are rewritten as sums over borders (summation by parts).
    """
    left = density.borders()[:-1].astype("float64")
    counts, total = density.counts, density.total
    squares = float(np.sum(counts * (left * left + left + 1 / 3)))
    values = float(np.sum(counts * (left + 0.5)))
    integral = density.integral(counts)

    def errors(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        scale = (high - low) / steps
        lowest = -np.rint(-low / scale)
        upper = lowest[:, None] + np.arange(1, steps + 1)  # the level above each border
        m0, m1 = integral.with_moment((upper - 0.5) * scale[:, None])
        last = lowest + steps
        k_m1 = last * values - m1.sum(axis=1)
        k2_m0 = last**2 * total - np.sum((2 * upper - 1) * m0, axis=1)
        return np.maximum(squares - 2 * scale * k_m1 + scale**2 * k2_m0, 0) / total

    return errors


@dataclass(frozen=True)
class KLDivergence(Clipping):
    """The range whose quantized distribution diverges least from the real one.

    TensorRT's entropy calibration (Migacz, 8-bit Inference with TensorRT, GTC 2017; MXNet's and
    pytorch-quantization's implementations), for two ends instead of one threshold. P is the
    histogram inside a range, with all that lies outside added to the bins at its ends. Q is made
    from the histogram inside the range alone: cut into as many equal cells as there are levels, and
    each cell's values spread evenly over the bins of P in it that are not empty. The range with the
    smallest Kullback-Leibler divergence of Q from P is chosen.

    What differs: both ends move, each by itself; zeros are left out (pytorch-quantization puts the
    next bin's count in their place); a bin that lies in two cells is shared between them, where
    MXNet rounds cells to whole bins; and what lies outside is added to the outermost bins that are
    not empty, where MXNet adds it to the very last ones and then a little to every empty bin. As
    there, no cell is narrower than a bin: with one outlier thousands of times the usual value,
    `Percentile` cuts deeper.

    Tensors that share one scale are chosen for apart and get the union of their ranges: what the
    widest member keeps, all keep, and the divergences are no longer the smallest for each.
    """

    def _choose(
        self, density: Density, reach: tuple[float, float], grid: Grid
    ) -> tuple[float, float]:
        if self.bins < 4 * grid.levels:
            raise ValueError(f"bins is {self.bins}; allowed: four for each of {grid.levels} levels")
        filled = np.flatnonzero(density.counts) + density.first
        whole = (min(filled[0], 0) * density.width, max(filled[-1] + 1, 0) * density.width)
        score = _divergences(density, grid.steps + 1)
        return _search(score, whole, density.width, whole_bins=True)


def _divergences(density: Density, cells: int) -> Score:
    """Return the score that is the divergence, of ranges whose ends are borders of bins.

    With p the counts of P in bins, M the values and B the filled bins of a cell, q = M / B, and the
    divergence is the sum of ``p log p - p log q`` over bins, both normalised. The first term is a
    sum over bins, the second one over cells, each of them a difference of integrals: no bin is
    looked at again for another range.

    It is infinite for ranges of fewer bins than cells, and for those that hold all but one bin's
    values outside: there P and Q are one value each, and equal.
    """
    counts, first, total = density.counts, density.first, density.total
    filled = counts > 0
    values = density.integral(counts)
    bins = density.integral(filled.astype("float64"))
    entropy = density.integral(_x_log_x(counts))
    # The nearest filled bin at or after each bin, and at or before it; where there is none, the
    # last bin, and the first.
    place = np.arange(counts.size)
    after = np.minimum.accumulate(np.where(filled, place, place[-1])[::-1])[::-1]
    before = np.maximum.accumulate(np.where(filled, place, 0))

    def divergences(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        width = (high - low) / cells
        borders = low[:, None] + np.arange(cells + 1) * width[:, None]
        in_cells = np.diff(values(borders), axis=1)
        bins_in_cells = np.diff(bins(borders), axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            # A border next to a bin's may leave a rounding error of either in an empty cell.
            some = (in_cells > 0) & (bins_in_cells > 0)
            log_q = np.where(some, np.log(in_cells / bins_in_cells), 0.0)
        p_log_p = entropy(high) - entropy(low)
        p_log_q = np.sum(in_cells * log_q, axis=1)
        inside = values(high) - values(low)
        ends = after[(low - first).astype(np.intp)], before[(high - first).astype(np.intp) - 1]
        for end, outside in zip(ends, (values(low), total - values(high)), strict=True):
            p_log_p += _x_log_x(counts[end] + outside) - _x_log_x(counts[end])
            p_log_q += outside * _mean_over_bin(log_q, (end + first - low) / width, 1 / width)
        says_something = (ends[0] < ends[1]) | (inside == total)
        allowed = says_something & (width >= 1)
        normalised = np.log(np.where(allowed, inside, total) / total)
        return np.where(allowed, (p_log_p - p_log_q) / total + normalised, np.inf)

    return divergences


def _mean_over_bin(per_cell: np.ndarray, start: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Return, for each row, the mean of one bin that starts in cell ``start`` and may end in the
    next; ``start`` and ``width`` are in cells, the width at most 1.
    """
    rows, last = np.arange(start.size), per_cell.shape[1] - 1
    cell = np.clip(np.floor(start).astype(np.intp), 0, last)
    share = np.clip((cell + 1 - start) / width, 0, 1)
    following = np.minimum(cell + 1, last)
    return per_cell[rows, cell] * share + per_cell[rows, following] * (1 - share)


def _x_log_x(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, x, 1.0))


def _search(
    score: Score, reach: tuple[float, float], width: float, whole_bins: bool = False
) -> tuple[float, float]:
    """Return the best of the ranges within ``reach``, both in real numbers.

    Parameters
    ----------
    width : float
        Of a bin.
    whole_bins : bool
        Only ranges whose ends are borders of bins, such as those of ``reach`` are.
    """
    limits = [abs(end) / width for end in reach]
    best = limits
    for factors in (_COARSE, _FINE):
        ends = [np.minimum(end * factors, limit) for end, limit in zip(best, limits, strict=True)]
        if whole_bins:
            ends = [np.ceil(side) for side in ends]
        low, high = (side.ravel() for side in np.meshgrid(*map(np.unique, ends), indexing="ij"))
        widest_first = np.argsort(-(low + high), kind="stable")
        low, high = low[widest_first], high[widest_first]
        scores = np.concatenate(
            [score(-low[i : i + _BLOCK], high[i : i + _BLOCK]) for i in range(0, low.size, _BLOCK)]
        )
        noise = _SAME * scores[np.isfinite(scores)].max()
        chosen = np.flatnonzero(scores <= scores.min() + noise)[0]
        best = [float(low[chosen]), float(high[chosen])]
    return 0.0 - best[0] * width, best[1] * width
