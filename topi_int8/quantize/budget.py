"""An accuracy budget: layers go back to float32, the noisiest first, until the network is good.

How many is found by doubling, then by halving the rest of the interval: at most
``2 log2(layers) + 3`` networks are built, compiled and measured, each counted once. Halving takes
accuracy to grow with the number of float32 layers; where it does not, a budget that is reported as
met is met all the same, since what is returned was measured, by more layers than were needed.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..target import host_target

logger = logging.getLogger(__name__)

# Module attribute: the report as JSON.
REPORT = "topi_int8.budget"


class Network:
    """A network as ``accuracy_fn`` gets it: call it with arrays, one a parameter of ``main``.

    Returns numpy arrays: one, or a tuple where ``main`` returns a tuple. It is compiled by the
    first call.

    Attributes
    ----------
    mod : tvm.IRModule
        float32 or QDQ.
    """

    def __init__(self, mod: tvm.IRModule, target: tvm.target.Target | None = None) -> None:
        self.mod = mod
        self._target = target

    @cached_property
    def _main(self) -> Callable[..., Any]:
        executable = tvm.compile(self.mod, target=self._target or host_target())
        return relax.VirtualMachine(executable, tvm.cpu())["main"]

    def __call__(self, *inputs: Any) -> Any:
        """Return what ``main`` makes of the inputs."""
        params = self.mod["main"].params
        if len(inputs) != len(params):
            names = [param.name for param in params]
            raise TypeError(f"main got {len(inputs)} inputs; allowed: {len(params)}, {names}")
        arrays = [
            np.ascontiguousarray(x, dtype=str(param.ty.dtype))
            for x, param in zip(inputs, params, strict=True)
        ]
        return _numpy(self._main(*map(tvm.runtime.tensor, arrays)))


def _numpy(value: Any) -> Any:
    return value.numpy() if hasattr(value, "numpy") else tuple(_numpy(field) for field in value)


AccuracyFunction = Callable[[Network], float]


@dataclass(frozen=True)
class BudgetStep:
    """One network that was measured: the layers put back to float32, and its accuracy."""

    skipped: tuple[str, ...]
    accuracy: float


@dataclass(frozen=True)
class BudgetReport:
    """What `quantize` did to keep a budget.

    Attributes
    ----------
    fp32 : float
        Accuracy of the float32 network.
    budget : float
        By how much less was allowed.
    accuracy : float
        Of the network returned.
    skipped : tuple of str
        The layers that stayed float32 for it, beside those of ``skip``; the noisiest first.
    steps : tuple of BudgetStep
        Every quantized network that was measured, in order.
    """

    fp32: float
    budget: float
    accuracy: float
    skipped: tuple[str, ...]
    steps: tuple[BudgetStep, ...]


def budget_report(qdq: tvm.IRModule) -> BudgetReport | None:
    """Return what `quantize` did for the budget of a module it returned; None without one."""
    attrs = qdq.attrs or {}
    if REPORT not in attrs:
        return None
    fields = json.loads(str(attrs[REPORT]))
    steps = tuple(
        BudgetStep(tuple(step["skipped"]), step["accuracy"]) for step in fields.pop("steps")
    )
    return BudgetReport(skipped=tuple(fields.pop("skipped")), steps=steps, **fields)


def check_budget(accuracy_fn: AccuracyFunction | None, budget: float | None) -> None:
    """Raise TypeError or ValueError for what is no accuracy function and budget."""
    if (accuracy_fn is None) != (budget is None):
        given = "accuracy_fn" if budget is None else "budget"
        raise ValueError(f"{given} is given alone; allowed: accuracy_fn and budget, or neither")
    if accuracy_fn is None:
        return
    if not callable(accuracy_fn):
        raise TypeError(f"accuracy_fn is {accuracy_fn!r}; allowed: a callable")
    if isinstance(budget, bool) or not isinstance(budget, (int, float, np.number)):
        raise TypeError(f"budget is {budget!r}; allowed: a number >= 0")
    if not (math.isfinite(budget) and budget >= 0):
        raise ValueError(f"budget is {budget!r}; allowed: a finite number >= 0")


def within_budget(
    fp32: tvm.IRModule,
    build: Callable[[Sequence[str]], tvm.IRModule],
    rank: Callable[[], Sequence[str]],
    accuracy_fn: AccuracyFunction,
    budget: float,
    target: tvm.target.Target | None = None,
) -> tvm.IRModule:
    """Return the quantized module of fewest float32 layers found that keeps the budget.

    Parameters
    ----------
    fp32 : tvm.IRModule
    build : callable
        Names of layers to leave in float32 -> the quantized module.
    rank : callable
        -> the layers' names, in the order in which they go back to float32; asked once, and only
        where the fully quantized module is not good enough.
    accuracy_fn, budget, target
        As `quantize`'s.

    Raises
    ------
    ValueError
        accuracy_fn returns no finite number, or no number of float32 layers keeps the budget.
    """
    reference = _measure(accuracy_fn, Network(fp32, target))
    logger.info("float32: accuracy %g; allowed: %g less", reference, budget)
    steps: list[BudgetStep] = []
    good: list[tuple[BudgetStep, tvm.IRModule]] = []

    def holds(skipped: Sequence[str]) -> bool:
        mod = build(skipped)
        step = BudgetStep(tuple(skipped), _measure(accuracy_fn, Network(mod, target)))
        steps.append(step)
        names = ", ".join(skipped) or "no layer"
        logger.info("accuracy %g with float32: %s", step.accuracy, names)
        if step.accuracy >= reference - budget:
            good[:] = [(step, mod)]
        return bool(good) and good[0][0] is step

    if not holds(()):
        order = list(rank())
        if not _fewest(lambda n: holds(order[:n]), len(order)):
            least = reference - max(step.accuracy for step in steps)
            raise ValueError(
                f"budget is {budget:g}; allowed: {least:g} or more, the least loss of {len(steps)} "
                f"networks, up to all {len(order)} layers in float32 (accuracy of float32 itself: "
                f"{reference:g}; does accuracy_fn return the same for the same?)"
            )
    # The search goes on from what held: the last to do so has the fewest float32 layers.
    chosen, mod = good[0]
    logger.info("accuracy %g with %d layers in float32", chosen.accuracy, len(chosen.skipped))
    report = BudgetReport(reference, float(budget), chosen.accuracy, chosen.skipped, tuple(steps))
    return mod.with_attr(REPORT, json.dumps(asdict(report)))


def _measure(accuracy_fn: AccuracyFunction, network: Network) -> float:
    accuracy = accuracy_fn(network)
    try:
        value = float(accuracy)
    except (TypeError, ValueError):
        raise TypeError(f"accuracy_fn returned {accuracy!r}; allowed: a number") from None
    if not math.isfinite(value):
        raise ValueError(f"accuracy_fn returned {value}; allowed: a finite number")
    return value


def _fewest(holds: Callable[[int], bool], most: int) -> int:
    """Return the least n of 1 .. most that holds, found by bisection; 0 where none does."""
    if most == 0:
        return 0
    failing, n = 0, 1
    while not holds(n):
        if n == most:
            return 0
        failing, n = n, min(2 * n, most)
    while n - failing > 1:
        middle = (failing + n) // 2
        if holds(middle):
            n = middle
        else:
            failing = middle
    return n
