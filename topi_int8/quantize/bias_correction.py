"""Bias correction: quantizing a weight moves the mean of its output; the bias moves it back.

Rounding errors of one channel's weights do not average out when all inputs are positive, as after
a relu: ``E[W_q x] != E[W x]``. Nagel et al., "Data-Free Quantization Through Weight Equalization
and Bias Correction" (ICCV 2019), section 4.2 and appendix D:

- "fast": the error of each layer alone, ``E[(W_q - W) x]``, from the means of its float32 inputs
  (theirs come from BatchNorm's parameters, ours from calibration). No run of its own.
- "full": layer by layer in order, what is left of the error in the output's mean once all layers
  before it are quantized and corrected: that counts what they, and the rounding of activations, do
  too. One compile and one run of the quantized network over the calibration inputs, in parts;
  what is alive between two parts is held for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..op import op_name
from .chains import LAYERS, dequantized_constant
from .graph import Graph
from .input_mean import InputMean
from .plan import Compute, Plan
from .segments import sweep

MODES = ("fast", "full")


def unbiased(plan: Plan) -> list[str]:
    """Return the names of layers with a constant weight and no bias that could be corrected."""
    biased = {source for source, _, _ in plan.bias.values()}
    return [
        var.name
        for var, compute in plan.computes.items()
        if compute.weight is not None and var not in biased
    ]


def correct_biases(
    mode: str,
    plan: Plan,
    qdq: tvm.IRModule,
    means: Mapping[relax.Var, InputMean],
    inputs: Iterable[Any],
    target: tvm.target.Target | None = None,
) -> Plan:
    """Return the plan with corrected biases, in float32.

    Parameters
    ----------
    mode : str
        One of `MODES`.
    plan : Plan
        Every layer to be corrected has a bias in it.
    qdq : tvm.IRModule
        What `insert_qdq` made of the plan.
    means : mapping
        Of the float32 network, over the calibration inputs; by layer.
    inputs : iterable
        The calibration inputs; read by "full" only.
    target : tvm.target.Target, optional
        Where "full" runs; this machine by default.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")
    if mode == "fast":
        shifts = _analytic(plan, qdq, means)
    else:
        shifts = _sequential(plan, qdq, means, inputs, target)
    corrected = {
        var: (source, (value + shifts[var].reshape(value.shape)).astype("float32"), axis)
        for var, (source, value, axis) in plan.bias.items()
    }
    return replace(plan, bias=corrected)


def quantized_weights(qdq: tvm.IRModule) -> dict[str, np.ndarray]:
    """Return layer name -> its int8 weight dequantized, for those with a constant one."""
    graph = Graph(qdq)
    layers = [var for var in graph.order if op_name(graph.values[var]) in LAYERS]
    found = {v.name: dequantized_constant(graph, graph.values[v].args[1]) for v in layers}
    return {name: weight for name, weight in found.items() if weight is not None}



def _analytic(
    plan: Plan, qdq: tvm.IRModule, means: Mapping[relax.Var, InputMean]
) -> dict[relax.Var, np.ndarray]:
    """Return what "fast" adds to each bias."""
    weights = quantized_weights(qdq)
    shifts = {}
    for var, (source, _, _) in plan.bias.items():
        difference = weights[source.name] - _weight(plan.computes[source])
        shifts[var] = -means[source].expected(difference)
    return shifts


def _sequential(
    plan: Plan,
    qdq: tvm.IRModule,
    means: Mapping[relax.Var, InputMean],
    inputs: Iterable[Any],
    target: tvm.target.Target | None,
) -> dict[relax.Var, np.ndarray]:
    """Return what "full" adds to each bias."""
    by_name = {var.name: var for var in plan.bias}
    shifts: dict[relax.Var, np.ndarray] = {}

    def correct(name: str, outputs: list[np.ndarray]) -> np.ndarray:
        var = by_name[name]
        source, value, _ = plan.bias[var]
        compute = plan.computes[source]
        wanted = means[source].expected(_weight(compute)) + value.reshape(-1)
        others = tuple(i for i in range(outputs[0].ndim) if i != compute.channel_axis)
        total = sum(x.sum(axis=others, dtype="float64") for x in outputs)
        shifts[var] = wanted - total * (compute.channels / sum(x.size for x in outputs))
        return np.expand_dims(shifts[var], others)

    sweep(qdq, list(by_name), inputs, correct, target)
    return shifts


def _weight(compute: Compute) -> np.ndarray:
    assert compute.weight is not None  # a layer with a bias has a constant weight
    return compute.weight
