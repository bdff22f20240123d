"""Calibration methods: an observer's name, or what makes one, as `quantize` takes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from .clipping import KLDivergence, MeanSquaredError, Percentile
from .observer import Grid, MinMax, MovingAverage, Observer

OBSERVERS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "kl": KLDivergence,
    "mse": MeanSquaredError,
}


def make_observer(method: str | Callable[[], Observer]) -> Callable[[], Observer]:
    """Return what makes observers of a method.

    Parameters
    ----------
    method : str or callable
        A name in `OBSERVERS`, or a callable without arguments that returns a new Observer:
        ``lambda: Percentile(99.9)``. It is called here, too, so that what is wrong with it is said
        before anything runs.

    Raises
    ------
    TypeError
        ``method`` is neither, or makes something else.
    ValueError
        The name is unknown.
    """
    allowed = f"{', '.join(OBSERVERS)}, or a callable that makes an Observer"
    if isinstance(method, str):
        if method not in OBSERVERS:
            raise ValueError(f"method is {method!r}; allowed: {allowed}")
        return OBSERVERS[method]
    if not callable(method):
        # An observer, too: it watches one tensor, and each needs its own.
        raise TypeError(f"method is {method!r}; allowed: {allowed}")
    made = method()
    if not isinstance(made, Observer):
        raise TypeError(f"method makes {made!r}; allowed: {allowed}")
    try:
        inspect.signature(made.range).bind(Grid())
    except TypeError:
        problem = f"method makes {made!r}, whose range() takes no Grid; allowed: {allowed}"
        raise TypeError(problem) from None
    if method() is made:
        raise TypeError(f"method makes one {made!r} again and again; allowed: a new one each time")
    return method
