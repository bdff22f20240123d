"""Other engines on the same layers, in the same run: each prepares a workload and is sampled.

A rival has ``prepare(workload, target, place) -> (Sampler, note)``; it raises `Unavailable` with
the reason where it cannot run a workload, which the table then shows in place of a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..timing import Sampler

if TYPE_CHECKING:  # a worker of this package may run where there is no TVM
    from tvm.target import Target

    from ..place import Place
    from ..workloads import Workload


class Unavailable(RuntimeError):
    """A rival that cannot run, or cannot run this workload; the message says why, in brief."""


class Rival(Protocol):
    """Another engine."""

    name: str
    title: str

    def prepare(self, workload: Workload, target: Target, place: Place) -> tuple[Sampler, str]:
        """Return what times the workload, and a note (its kernel's name); or raise Unavailable."""
        ...

    def close(self) -> None:
        """Give up what it holds."""
        ...
