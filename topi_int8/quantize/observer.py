"""Observers: what calibration remembers of a tensor, and the range it makes of it.

A calibration method is a name in `OBSERVERS` (or any callable that makes an Observer). One observer
watches one tensor: `update` sees each calibration value, `range` closes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np


class Observer(ABC):
    """Watches one tensor over all calibration inputs."""

    @abstractmethod
    def update(self, values: np.ndarray) -> None:
        """Take in the tensor's float32 values for one calibration input."""

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """Return (low, high) of the reals to represent; what lies outside will saturate."""


class MinMax(Observer):
    """The smallest and the largest value seen: nothing saturates, outliers cost resolution."""

    def __init__(self) -> None:
        self._low, self._high = np.inf, -np.inf

    def update(self, values: np.ndarray) -> None:
        """Widen the range to the values; an empty tensor changes nothing."""
        if values.size:
            self._low = min(self._low, float(values.min()))
            self._high = max(self._high, float(values.max()))

    def range(self) -> tuple[float, float]:
        """Return (min, max) seen; ValueError if nothing was."""
        if self._low > self._high:
            raise ValueError("observer has seen no values; allowed: at least one update")
        return self._low, self._high


OBSERVERS: dict[str, Callable[[], Observer]] = {"minmax": MinMax}


def make_observer(method: str | Callable[[], Observer]) -> Callable[[], Observer]:
    """Return what makes observers of a method.

    Parameters
    ----------
    method : str or callable
        A name in `OBSERVERS`, or a callable without arguments that returns an Observer.
    """
    if callable(method):
        return method
    if method not in OBSERVERS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(sorted(OBSERVERS))}")
    return OBSERVERS[method]
