"""Observers: what they remember, and how a method is chosen."""

from __future__ import annotations

import numpy as np
import pytest

from topi_int8.quantize import MinMax, Observer
from topi_int8.quantize.observer import make_observer


def test_minmax_widens_and_ignores_empty_tensors() -> None:
    observer = MinMax()
    observer.update(np.array([0.5, -1.0], "float32"))
    observer.update(np.empty(0, "float32"))
    observer.update(np.array([2.0], "float32"))
    assert observer.range() == (-1.0, 2.0)


def test_an_observer_that_saw_nothing_says_so() -> None:
    with pytest.raises(ValueError, match="no values"):
        MinMax().range()


def test_methods_by_name_and_by_callable() -> None:
    class Fixed(Observer):
        def update(self, values: np.ndarray) -> None:
            pass

        def range(self) -> tuple[float, float]:
            return -1.0, 1.0

    assert isinstance(make_observer("minmax")(), MinMax)
    assert isinstance(make_observer(Fixed)(), Fixed)
    with pytest.raises(ValueError, match=r"method is 'entropy2'; allowed: .*minmax"):
        make_observer("entropy2")
