"""Observers that keep two ends, and how a method is chosen."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from topi_int8.quantize import (
    OBSERVERS,
    Grid,
    KLDivergence,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
)
from topi_int8.quantize.methods import make_observer


def values(*numbers: float) -> np.ndarray:
    return np.array(numbers, "float32")


def test_minmax_widens_and_ignores_empty_tensors() -> None:
    observer = MinMax()
    observer.update(values(0.5, -1.0))
    observer.update(values())
    observer.update(values(2.0))
    assert observer.range() == observer.range(Grid(symmetric=True)) == (-1.0, 2.0)


def test_moving_average_is_torchs() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
    from torch.ao.quantization.observer import MovingAverageMinMaxObserver

    rng = np.random.default_rng(0)
    theirs, ours = MovingAverageMinMaxObserver(averaging_constant=0.1), MovingAverage(0.1)
    ours.update(values())
    for _ in range(20):
        part = rng.normal(size=50).astype("float32")
        theirs(torch.from_numpy(part))
        ours.update(part)
    assert ours.range() == pytest.approx((float(theirs.min_val), float(theirs.max_val)), rel=1e-5)


def test_moving_average_by_hand_and_between_the_ends() -> None:
    observer = MovingAverage(0.25)
    observer.update(values(-4, 8))
    observer.update(values(0, 16))
    assert observer.range() == (-3.0, 10.0)
    assert MovingAverage() == MovingAverage(0.01)


@pytest.mark.parametrize("method", OBSERVERS)
def test_an_observer_that_saw_nothing_says_so(method: str) -> None:
    observer = OBSERVERS[method]()
    observer.update(values())
    with pytest.raises(ValueError, match="no values"):
        observer.range()


def test_observers_are_made_apart_and_compare_by_their_parameters() -> None:
    first, second = Percentile(99.9), Percentile(99.9)
    first.update(values(1.0))
    assert first == second and hash(first) == hash(second) and first != Percentile(99.0)
    assert repr(first) == "Percentile(bins=8192, percentile=99.9)"
    with pytest.raises(ValueError, match="no values"):
        second.range()
    with pytest.raises(AttributeError):
        first.percentile = 50.0


class Fixed(Observer):
    def update(self, values: np.ndarray) -> None:
        pass

    def range(self, grid: Grid = Grid()) -> tuple[float, float]:
        return -1.0, 1.0


class Old(Fixed):
    def range(self) -> tuple[float, float]:
        return -1.0, 1.0


def test_methods_by_name_and_by_callable() -> None:
    kinds = {name: type(make_observer(name)()) for name in OBSERVERS}
    assert kinds == {
        "minmax": MinMax,
        "moving_average": MovingAverage,
        "percentile": Percentile,
        "kl": KLDivergence,
        "mse": MeanSquaredError,
    }
    assert isinstance(make_observer(Fixed)(), Fixed)
    for method in (lambda: Percentile(99.9), functools.partial(Percentile, 99.9)):
        assert make_observer(method)() == Percentile(99.9)


@pytest.mark.parametrize(
    "make, error, message",
    [
        ("entropy2", ValueError, r"method is 'entropy2'; allowed: minmax, .* or a callable"),
        (None, TypeError, "method is None; allowed: minmax"),
        (Percentile(99.0), TypeError, r"method is Percentile\(.*a callable that makes an Observer"),
        (lambda: "kl", TypeError, "method makes 'kl'; allowed"),
        (Old, TypeError, r"whose range\(\) takes no Grid; allowed"),
        (lambda one=Fixed(): one, TypeError, "again and again; allowed: a new one each time"),
        (lambda: Percentile(101), ValueError, "percentile is 101; allowed: above 0, at most 100"),
    ],
)  # fmt: skip
def test_what_is_no_method_is_refused(make: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make_observer(make)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Percentile(0), "percentile is 0; allowed"),
        (lambda: Percentile(float("nan")), "percentile is nan; allowed"),
        (lambda: MovingAverage(0), "constant is 0; allowed: above 0, at most 1"),
        (lambda: MovingAverage(1.5), "constant is 1.5; allowed"),
        (lambda: KLDivergence(bins=1000), "bins is 1000; allowed: an integer, 1024 or more"),
        (lambda: MeanSquaredError(bins=2048.0), "bins is 2048.0; allowed"),
        (lambda: Grid(levels=2), "levels is 2; allowed: 3 or more"),
    ],
)  # fmt: skip
def test_parameters_are_checked_as_an_observer_is_made(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_steps_of_a_grid() -> None:
    assert Grid().steps == 255 and Grid(symmetric=True).steps == 127
