"""A streaming histogram that stays exact: bins that double in width, whole bins merged.

Bins are ``[i * width, (i + 1) * width)`` with integer i and ``width`` a power of two, so zero is
always a border and two neighbours are exactly one bin of the double width. Values outside the
window of `bins` bins widen it until they fit; the counts are then those of a histogram made at once
on the final bins. One pass, no second look at the values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Every float32 is a multiple of it: bins of this width hold one value each.
_SMALLEST_EXPONENT = -149
# Values counted at a time: their index buffers stay in the second-level cache.
_CHUNK = 1 << 15


class Extent:
    """The smallest and the largest value seen."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def update(self, values: np.ndarray) -> None:
        """Widen to the values; an empty array changes nothing."""
        if values.size:
            self.low = min(self.low, float(values.min()))
            self.high = max(self.high, float(values.max()))

    def range(self) -> tuple[float, float]:
        """Return (min, max) seen; ValueError if nothing was."""
        if self.low > self.high:
            raise ValueError("observer has seen no values; allowed: at least one update")
        return self.low, self.high

    def clip(self, low: float, high: float) -> tuple[float, float]:
        """Return what a range and this one have in common; `range`, where that is nothing."""
        least, most = self.range()
        inside = max(low, least), min(high, most)
        return inside if inside[0] <= inside[1] else (least, most)


class Histogram:
    """Counts of float32 values by bins of equal width around zero.

    Parameters
    ----------
    bins : int
        Number of bins, fixed. From half of them on cover the values and zero, whatever their signs.

    Attributes
    ----------
    counts : (bins,) int64 array
    first : int
        Bin ``n`` of `counts` is ``[(first + n) * width, (first + n + 1) * width)``; the bin that
        starts at zero is ``counts[-first]``.
    exponent : int
        ``width == 2.0**exponent``.
    zeros : int
        How many of the values were zero exactly; they are in ``counts[-first]``, too.
    extent : Extent
        Smallest and largest value, exactly.
    """

    def __init__(self, bins: int) -> None:
        self.counts = np.zeros(bins, "int64")
        self.first, self.exponent = 0, _SMALLEST_EXPONENT
        self.zeros = 0
        self.extent = Extent()

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    def update(self, values: np.ndarray) -> None:
        """Count finite float32 values, of any shape."""
        values = np.asarray(values, "float32").reshape(-1)
        if not values.size:
            return
        self.extent.update(values)
        self._fit()
        for start in range(0, values.size, _CHUNK):
            chunk = values[start : start + _CHUNK]
            # In float64 the quotient by a power of two is exact, down to the smallest float32.
            position = np.multiply(chunk, 1 / self.width, dtype="float64")
            np.floor(position, out=position)
            position -= self.first
            index = position.astype(np.intp)
            self.counts += np.bincount(index, minlength=self.counts.size)
            self.zeros += chunk.size - np.count_nonzero(chunk)

    def _fit(self) -> None:
        """Widen bins and move the window until it holds the extent and zero."""
        low, high = min(self.extent.low, 0.0), max(self.extent.high, 0.0)
        exponent = self.exponent
        while True:
            first, last = (math.floor(math.ldexp(end, -exponent)) for end in (low, high))
            if last - first < self.counts.size:
                break
            # Straight to the width at which the span is all the bins, then one by one.
            needed = math.frexp((high - low) / self.counts.size)[1] - 1
            exponent = max(exponent + 1, needed)
        if (first, exponent) == (self.first, self.exponent):
            return
        # Python's integers: a shift of 64 bits and more has to give 0 or -1.
        shift = exponent - self.exponent
        used = np.flatnonzero(self.counts)
        merged = (used + self.first) >> min(shift, 63)
        counts = np.zeros_like(self.counts)
        np.add.at(counts, merged - first, self.counts[used])
        self.counts, self.first, self.exponent = counts, first, exponent

    def density(self, magnitudes: bool = False) -> Density:
        """Return the distribution of the values that are not zero, or of their magnitudes.

        Zero is represented exactly by every scale. The many zeros of a relu would drown the rest.
        """
        counts = self.counts.astype("float64")
        counts[-self.first] -= self.zeros
        if not magnitudes:
            return Density(counts, self.first, self.width)
        negative, positive = counts[: -self.first][::-1], counts[-self.first :]
        folded = np.zeros(max(negative.size, positive.size))
        folded[: negative.size] += negative
        folded[: positive.size] += positive
        return Density(folded, 0, self.width)


@dataclass(frozen=True)
class Density:
    """A distribution that is uniform inside each bin.

    Attributes
    ----------
    counts : (bins,) float64 array
    first : int
        Position of the left border of ``counts[0]``, in bins from zero; none or negative.
    width : float
        Of a bin.
    """

    counts: np.ndarray
    first: int
    width: float

    @property
    def total(self) -> float:
        """Number of values."""
        return float(self.counts.sum())

    def borders(self) -> np.ndarray:
        """Return the positions of the bins' borders, in bins from zero: (bins + 1,) int64."""
        return np.arange(self.counts.size + 1) + self.first

    def integral(self, per_bin: np.ndarray) -> Integral:
        """Return the integral of a function that is constant inside each bin."""
        return Integral(per_bin, self.first)


class Integral:
    """Integrals, from the left, of a function that is constant inside each bin.

    Positions are in bins from zero; outside the bins the function is 0.
    """

    def __init__(self, per_bin: np.ndarray, first: int) -> None:
        self.first, self.bins = first, per_bin.size
        # One more bin of nothing, so that the last border has a bin to its right.
        self._value = np.append(per_bin, 0.0)
        left = np.arange(self.bins + 1) + first
        self._sum = np.concatenate([[0.0], np.cumsum(per_bin)])
        self._moment = np.concatenate([[0.0], np.cumsum(per_bin * (left[:-1] + 0.5))])

    def __call__(self, position: np.ndarray) -> np.ndarray:
        """Return the integrals of f up to the positions."""
        index, inside = self._locate(position)
        return self._sum[index] + self._value[index] * inside

    def with_moment(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the integrals of f and of f times the position up to the positions."""
        index, inside = self._locate(position)
        part = self._value[index] * inside
        moment = part * (index + self.first + inside / 2)
        return self._sum[index] + part, self._moment[index] + moment

    def _locate(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the bin of each position and how far it is inside, both clipped to the bins."""
        shifted = np.clip(position - self.first, 0, self.bins)
        index = shifted.astype(np.intp)
        return index, shifted - index
