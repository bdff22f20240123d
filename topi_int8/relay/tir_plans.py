"""Which plan a TIR block follows: TE carries a key to it in the block's annotations.

A strategy chooses the plan when Relay asks it for a computation; the schedule is asked for later,
and sees nothing but the PrimFunc that came of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

ATTRIBUTE = "topi_int8.plan"


@dataclass(frozen=True)
class Placed:
    """A plan, and how the output of its call lies; see `te_compute.Lowered`.

    Parameters
    ----------
    plan : SpatialPack, BlockPlan or DepthwisePlan
    axes : tuple of int or None
    exact : bool
    shape : tuple of int
        Of the call's output.
    """

    plan: Any
    axes: tuple[int | None, ...]
    exact: bool
    shape: tuple[int, ...]


_keys: dict[Any, str] = {}
_placed: dict[str, Placed] = {}
_numbers = itertools.count()


def key(request: Any, plan: Any) -> str:
    """Return the key of a request's plan: the same whenever it is lowered."""
    return _keys.setdefault((request, plan), str(next(_numbers)))


def place(name: str, placed: Placed) -> None:
    """Remember what a key stands for."""
    _placed[name] = placed


def placed(annotations: Any) -> Placed | None:
    """Return what a block's annotations lead to, or None if it is none of ours."""
    return _placed.get(str(annotations[ATTRIBUTE])) if ATTRIBUTE in annotations else None
