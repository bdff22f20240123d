"""Timings and how they are taken: samples in microseconds, of runs long enough for the clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

# Takes samples for about that many seconds; returns microseconds of one call each, at least one.
Sampler = Callable[[float], list[float]]

# Long against the timer and the call overhead, short against the scheduler's tick.
SAMPLE_SECONDS = 2e-4


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, over all samples of all rounds.

    Minima are what is compared: neighbours slow a shared machine, nothing speeds it up.
    """

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples or min(self.samples) <= 0:
            raise ValueError(f"samples is {self.samples!r}; allowed: one or more, all > 0")

    @property
    def min(self) -> float:
        """The fastest sample, µs."""
        return min(self.samples)

    @property
    def median(self) -> float:
        """The median sample, µs."""
        return statistics.median(self.samples)

    def gops(self, macs: int) -> float:
        """GOP/s of the fastest sample, two operations a MAC."""
        return 2 * macs / self.min / 1e3


def evaluator_sampler(evaluate: Callable[[int, int], list[float]]) -> Sampler:
    """Return the sampler around a TVM time evaluator.

    Parameters
    ----------
    evaluate : callable
        ``evaluate(number, repeat)`` returns `repeat` means over `number` calls, in seconds.
    """

    def sample(seconds: float) -> list[float]:
        once = min(evaluate(1, 2))
        number = max(1, round(SAMPLE_SECONDS / max(once, 1e-7)))
        repeat = max(1, round(seconds / (number * max(once, 1e-7))))
        return [1e6 * mean for mean in evaluate(number, min(repeat, 1000))]

    return sample


def interleave(
    samplers: dict[str, Sampler], rounds: int, seconds: float
) -> dict[str, Timing | Exception]:
    """Return each sampler's Timing over alternate rounds, or the error that stopped it.

    A slow stretch of the machine then falls on all of them alike.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    failed: dict[str, Exception] = {}
    for _ in range(rounds):
        for name, sampler in samplers.items():
            if name in failed:
                continue
            try:
                samples[name] += sampler(seconds)
            except Exception as error:
                failed[name] = error
    return {name: failed.get(name) or Timing(tuple(taken)) for name, taken in samples.items()}
