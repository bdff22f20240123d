"""quantize: fp32 Relax in, QDQ Relax out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import tvm
from tvm import relax

from ..workload import INT8_DTYPES, TOO_WIDE
from .bias_correction import MODES, correct_biases, unbiased
from .budget import AccuracyFunction, check_budget, within_budget
from .calibrate import calibrate
from .equalize import MODES as EQUALIZATIONS
from .equalize import equalized
from .graph import Graph, prepare
from .input_mean import input_means
from .insert import insert_qdq
from .layers import SkipEntry, select_layers
from .methods import make_observer
from .observer import Grid, Observer
from .plan import Plan, make_plan
from .qparams import WEIGHT_MAX, QParams, activation_qparams
from .rewrite import with_biases
from .sensitivity import own_noise


def quantize(
    mod: tvm.IRModule,
    calibration: Iterable[Any],
    *,
    method: str | Callable[[], Observer] = "minmax",
    skip: Iterable[SkipEntry] = (),
    skip_first: bool = False,
    skip_last: bool = False,
    activation_dtype: str = "uint8",
    weight_bits: int = 8,
    per_channel: bool = True,
    symmetric: bool = False,
    equalize: bool | str = False,
    bias_correction: str | None = None,
    accuracy_fn: AccuracyFunction | None = None,
    budget: float | None = None,
    target: tvm.target.Target | None = None,
    progress: bool = True,
) -> tvm.IRModule:
    """Return an fp32 Relax module as a QDQ one, by post-training static quantization.

    BatchNorm is folded; activations are asymmetric per tensor, weights symmetric int8 per output
    channel in [-127, 127], biases int32; options change that. `plan` says where the pairs go. The
    input is left alone.

    Parameters
    ----------
    mod : tvm.IRModule
        A float32 ``main`` with its parameters bound as constants, such as TVM's frontends import.
    calibration : iterable
        Representative inputs, at least one: arrays, tuples of arrays (one for each parameter) or
        dicts by parameter name, of the shapes of ``main``.
    method : str or callable
        How the ranges of activations are found: "minmax", "moving_average", "percentile", "kl",
        "mse", or a callable that returns an `Observer` (``lambda: Percentile(99.9)``). Tensors that
        share a scale get the union of the ranges found for each.
    skip : iterable of str, re.Pattern or int
        Layers that stay float32: exact names as `list_layers` gives them, patterns that match a
        whole name, operators ("relax.nn.conv2d": every one), or positions among the convolutions
        and matmuls (negative ones from the end).
    skip_first, skip_last : bool
        Keep the first, the last convolution or matmul in float32.
    activation_dtype : str
        "uint8" or "int8".
    weight_bits : int
        8, or 7: weights in [-63, 63], with which vpmaddubsw is proven not to saturate. Faster on
        CPUs without VNNI (AVX2, AVX-512BW), a little less accurate; ONNX Runtime's
        ``reduce_range``. 4 and 2: [-7, 7] and [-1, 1], int8 in the graph all the same; kernels that
        read packed weights find that they fit. Without training 2 bits are of no use
        (docs/bit_widths.md).
    per_channel : bool
        A weight scale for each output channel; False: one for the whole tensor, for which the
        weights of depthwise convolutions and of folded BatchNorms often differ too much.
    symmetric : bool
        Activations with zero in the middle of their type: zero point 0 of int8, 128 of uint8. Costs
        what is never negative (a relu's output) half of its levels.
    equalize : bool or str
        Scale channels between consecutive layers to be alike (`equalize`), which changes no result
        of the float32 network. For depthwise networks. True is "activations": by the ranges of
        the tensors between layers, found by one more compile and run of the float32 network;
        "weights": by weights alone, for weights with one scale a tensor.
    bias_correction : None, "fast" or "full"
        Let biases take up what rounding weights does to the mean of each channel
        (`bias_correction`). "fast" costs nothing to speak of; "full", which counts what earlier
        layers do too, a compile and a run of the quantized network over the calibration inputs.
    accuracy_fn : callable, optional
        Gets a `Network` ``main``, float32 or quantized, to be called as ``main(*arrays)``, and
        returns a float: its accuracy on data of yours, higher is better. Give ``budget`` with it.
    budget : float, optional
        By how much less than the float32 network's the accuracy may be. Where it is less, layers
        go back to float32, those that make most noise by themselves first, until it holds;
        `budget_report` tells which, and what each step measured, as does the logger
        ``topi_int8.quantize``. Costs a compile and a call of ``accuracy_fn`` for the float32
        network and each step (``2 log2(layers) + 3`` at most), and once a run over the calibration
        inputs.
    target : tvm.target.Target, optional
        Where calibration runs, and everything that is measured; this machine by default.
    progress : bool
        Show a progress bar over the calibration inputs.

    Returns
    -------
    tvm.IRModule
        The same function with quantize/dequantize pairs.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is allowed; the message names it. So for a budget that no choice of
        float32 layers keeps.
    """
    if activation_dtype not in INT8_DTYPES:
        why = f" ({TOO_WIDE[activation_dtype]})" if activation_dtype in TOO_WIDE else ""
        raise ValueError(
            f"activation_dtype is {activation_dtype!r}; allowed: {', '.join(INT8_DTYPES)}{why}"
        )
    if weight_bits not in WEIGHT_MAX:
        allowed = ", ".join(map(str, sorted(WEIGHT_MAX)))
        why = " (one bit has no zero, with which kernels fill up channels)"
        why = why if weight_bits == 1 else ""
        raise ValueError(f"weight_bits is {weight_bits!r}; allowed: {allowed}{why}")
    for name, flag in (("per_channel", per_channel), ("symmetric", symmetric)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {flag!r}; allowed: True, False")
    if bias_correction not in (None, *MODES):
        raise ValueError(f"bias_correction is {bias_correction!r}; allowed: None, 'fast', 'full'")
    equalization = "activations" if equalize is True else equalize or None
    if equalization not in (None, *EQUALIZATIONS):
        allowed = ", ".join(map(repr, (True, False, *EQUALIZATIONS)))
        raise ValueError(f"equalize is {equalize!r}; allowed: {allowed}")
    check_budget(accuracy_fn, budget)
    make = make_observer(method)
    fp32 = prepared = prepare(mod)
    repeated = equalization == "activations" or bias_correction == "full"
    if repeated or accuracy_fn is not None:
        calibration = list(calibration)
    if equalization is not None:
        prepared = equalized(prepared, equalization, calibration, target)
    graph = Graph(prepared)
    skipped = {var.name for var in select_layers(graph, skip, skip_first, skip_last)}
    plan = _plan_without(graph, skipped)
    if bias_correction is not None:
        prepared = with_biases(prepared, unbiased(plan))
        graph = Graph(prepared)
        plan = _plan_without(graph, skipped)
    means = {} if bias_correction is None else input_means(graph, plan)
    watched: dict[str, Observer] = {}

    def observe(plan: Plan, **more: Any) -> None:
        new = {var.name: make() for var in plan.tensors if var.name not in watched}
        calibrate(prepared, calibration, new, target=target, progress=progress, **more)
        watched.update(new)

    def insert(plan: Plan) -> tvm.IRModule:
        qparams = _qparams(plan, watched, activation_dtype, symmetric)
        return insert_qdq(prepared, graph, plan, qparams, weight_bits, per_channel)

    def build(float_layers: Collection[str] = ()) -> tvm.IRModule:
        smaller = _plan_without(graph, skipped.union(float_layers)) if float_layers else plan
        if any(var.name not in watched for var in smaller.tensors):
            observe(smaller)
        qdq = insert(smaller)
        if bias_correction is None:
            return qdq
        return insert(correct_biases(bias_correction, smaller, qdq, means, calibration, target))

    def rank() -> list[str]:
        qparams = _qparams(plan, watched, activation_dtype, symmetric)
        noise = own_noise(prepared, insert(plan), plan, qparams, calibration, target)
        return sorted(noise, key=lambda name: -noise[name])

    observe(plan, means=means.values())
    if accuracy_fn is None or budget is None:
        return build()
    return within_budget(fp32, build, rank, accuracy_fn, budget, target)


def _plan_without(graph: Graph, names: Collection[str]) -> Plan:
    """Return the plan that leaves layers of these names in float32."""
    return make_plan(graph, [var for var in graph.order if var.name in names])


def _qparams(
    plan: Plan, watched: dict[str, Observer], activation_dtype: str, symmetric: bool = False
) -> dict[relax.Var, QParams]:
    """Return the parameters of each quantized tensor; a group's cover all its members."""
    ranges: dict[relax.Var, tuple[float, float]] = {}
    for var in plan.tensors:
        group = plan.representative(var)
        low, high = watched[var.name].range(Grid(symmetric=symmetric or group in plan.symmetric))
        if group in ranges:
            low, high = min(low, ranges[group][0]), max(high, ranges[group][1])
        ranges[group] = low, high
    params = {
        group: activation_qparams(low, high, "int8", symmetric=True)
        if group in plan.symmetric
        else activation_qparams(low, high, activation_dtype, symmetric)
        for group, (low, high) in ranges.items()
    }
    return {var: params[plan.representative(var)] for var in plan.tensors}
