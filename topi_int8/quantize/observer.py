"""Observers: what calibration remembers of a tensor, and the range it makes of it.

One observer watches one tensor: `update` sees each calibration value, `range` closes it. Here are
the interface and the two that remember no more than ends; `clipping` has those that weigh what
saturates against what is rounded, `methods` the names of all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from .histogram import Extent


@dataclass(frozen=True)
class Grid:
    """The integers that a range will be spread over.

    Attributes
    ----------
    levels : int
        How many integers the type has: 256.
    symmetric : bool
        Zero in the middle and as many steps on either side (127 of 256 levels), whatever the range.
    """

    levels: int = 256
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.levels < 3:
            raise ValueError(f"levels is {self.levels}; allowed: 3 or more")

    @property
    def steps(self) -> int:
        """Steps of the scale in the whole range; where symmetric, in a half of it."""
        return (self.levels - 1) // 2 if self.symmetric else self.levels - 1


EIGHT_BITS = Grid()


class Observer(ABC):
    """Watches one tensor over all calibration inputs.

    An implementation is best a frozen dataclass of its parameters, which it checks as it is made.
    """

    @abstractmethod
    def update(self, values: np.ndarray) -> None:
        """Take in the tensor's float32 values for one calibration input."""

    @abstractmethod
    def range(self, grid: Grid = EIGHT_BITS) -> tuple[float, float]:
        """Return (low, high) of the reals to represent; what lies outside will saturate.

        Parameters
        ----------
        grid : Grid
            What the range will be spread over. Zero will be represented exactly, in the range or
            not.

        Raises
        ------
        ValueError
            No value was seen.
        """


@dataclass(frozen=True)
class MinMax(Observer):
    """The smallest and the largest value seen: nothing saturates, outliers cost resolution."""

    extent: Extent = field(default_factory=Extent, init=False, repr=False, compare=False)

    def update(self, values: np.ndarray) -> None:
        """Widen the range to the values; an empty tensor changes nothing."""
        self.extent.update(values)

    def range(self, grid: Grid = EIGHT_BITS) -> tuple[float, float]:
        """Return (min, max) seen, on every grid; ValueError if nothing was."""
        return self.extent.range()


@dataclass(frozen=True)
class MovingAverage(Observer):
    """The moving average of each calibration input's minimum and maximum.

    ``min = (1 - constant) * min + constant * min(input)``, the first input's as it is, and so the
    maximum: torch's ``MovingAverageMinMaxObserver``. The order of the inputs matters, and what
    counts as one input: an item of `quantize`'s ``calibration``, be it one image or a batch. Made
    for the thousands of steps of training: with torch's weight of 1%, the first of a few dozen
    inputs decides alone. For those take a larger one, or another method.

    Parameters
    ----------
    constant : float
        Weight of each further input, in (0, 1]; torch's ``averaging_constant``.
    """

    constant: float = 0.01
    extent: Extent = field(default_factory=Extent, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.constant <= 1:
            raise ValueError(f"constant is {self.constant!r}; allowed: above 0, at most 1")

    def update(self, values: np.ndarray) -> None:
        """Move both ends towards the values'; an empty tensor changes nothing."""
        if not values.size:
            return
        average = self.extent
        if average.low > average.high:
            average.update(values)
            return
        average.low += self.constant * (float(values.min()) - average.low)
        average.high += self.constant * (float(values.max()) - average.high)

    def range(self, grid: Grid = EIGHT_BITS) -> tuple[float, float]:
        """Return the two averages, on every grid; ValueError if nothing was seen."""
        return self.extent.range()
