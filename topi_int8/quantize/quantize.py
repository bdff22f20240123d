"""quantize: fp32 Relax in, QDQ Relax out. list_layers: the names its `skip` takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from ..op import op_name
from ..workload import INT8_DTYPES, TOO_WIDE
from .calibrate import calibrate
from .graph import LAYER_STEMS, Graph, constant, prepare
from .insert import insert_qdq
from .observer import Observer, make_observer
from .plan import Plan, make_plan
from .qparams import WEIGHT_MAX, QParams, activation_qparams


@dataclass(frozen=True)
class Layer:
    """A layer that can be quantized.

    Attributes
    ----------
    name : str
        What `quantize`'s ``skip`` takes, e.g. "conv2d_3".
    op : str
        Relax operator, e.g. "relax.nn.conv2d".
    shape : tuple of int
        Output shape; -1 where symbolic.
    weight_shape : tuple of int or None
    """

    name: str
    op: str
    shape: tuple[int, ...]
    weight_shape: tuple[int, ...] | None


def list_layers(mod: tvm.IRModule) -> list[Layer]:
    """Return the layers of a module's ``main`` in order, named as `quantize` names them."""
    return _layers(Graph(prepare(mod)))


def _layers(graph: Graph) -> list[Layer]:
    layers = []
    for var in graph.order:
        call = graph.values[var]
        if op_name(call) not in LAYER_STEMS or not var.name.startswith(LAYER_STEMS[op_name(call)]):
            continue
        weight = constant(call.args[1]) if len(call.args) > 1 else None
        shape = tuple(int(d.value) if hasattr(d, "value") else -1 for d in call.ty.shape)
        layers.append(
            Layer(var.name, op_name(call), shape, None if weight is None else weight.shape)
        )
    return layers


def quantize(
    mod: tvm.IRModule,
    calibration: Iterable[Any],
    *,
    method: str | Callable[[], Observer] = "minmax",
    skip: Sequence[str | re.Pattern[str]] = (),
    skip_first: bool = False,
    skip_last: bool = False,
    activation_dtype: str = "uint8",
    weight_bits: int = 8,
    target: tvm.target.Target | None = None,
    progress: bool = True,
) -> tvm.IRModule:
    """Return an fp32 Relax module as a QDQ one, by post-training static quantization.

    BatchNorm is folded; activations are asymmetric per tensor, weights symmetric int8 per output
    channel in [-127, 127], biases int32. `plan` says where the pairs go. The input is left alone.

    Parameters
    ----------
    mod : tvm.IRModule
        A float32 ``main`` with its parameters bound as constants, such as TVM's frontends import.
    calibration : iterable
        Representative inputs, at least one: arrays, tuples of arrays (one for each parameter) or
        dicts by parameter name, of the shapes of ``main``.
    method : str or callable
        How ranges are observed: "minmax", or a callable that returns an `Observer`.
    skip : sequence of str or re.Pattern
        Layers that stay float32: exact names as `list_layers` gives them, or patterns that match a
        whole name.
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
    target : tvm.target.Target, optional
        Where calibration runs; this machine by default.
    progress : bool
        Show a progress bar over the calibration inputs.

    Returns
    -------
    tvm.IRModule
        The same function with quantize/dequantize pairs.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is allowed; the message names it.
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
    make = make_observer(method)
    prepared = prepare(mod)
    graph = Graph(prepared)
    plan = make_plan(graph, _skipped(graph, skip, skip_first, skip_last))
    watched = {var.name: make() for var in plan.tensors}
    calibrate(prepared, calibration, watched, target=target, progress=progress)
    return insert_qdq(prepared, graph, plan, _qparams(plan, watched, activation_dtype), weight_bits)


def _skipped(
    graph: Graph, skip: Sequence[str | re.Pattern[str]], first: bool, last: bool
) -> set[relax.Var]:
    """Return the variables of the layers to leave in float32."""
    if isinstance(skip, (str, re.Pattern)):
        raise TypeError(f"skip is {skip!r}; allowed: a sequence of names or patterns")
    names = [layer.name for layer in _layers(graph)]
    by_name = {var.name: var for var in graph.order}
    skipped: set[relax.Var] = set()
    for entry in skip:
        pattern = entry if isinstance(entry, re.Pattern) else re.compile(re.escape(entry))
        matched = [name for name in names if pattern.fullmatch(name)]
        if not matched:
            raise ValueError(f"skip holds {entry!r}; allowed: {', '.join(names)}")
        skipped.update(by_name[name] for name in matched)
    computes = list(make_plan(graph).computes)
    if first:
        skipped.update(computes[:1])
    if last:
        skipped.update(computes[-1:])
    return skipped


def _qparams(
    plan: Plan, watched: dict[str, Observer], activation_dtype: str
) -> dict[relax.Var, QParams]:
    """Return the parameters of each quantized tensor; a group's cover all its members."""
    ranges: dict[relax.Var, tuple[float, float]] = {}
    for var in plan.tensors:
        low, high = watched[var.name].range()
        group = plan.representative(var)
        if group in ranges:
            low, high = min(low, ranges[group][0]), max(high, ranges[group][1])
        ranges[group] = low, high
    params = {
        group: activation_qparams(low, high, "int8", symmetric=True)
        if group in plan.symmetric
        else activation_qparams(low, high, activation_dtype)
        for group, (low, high) in ranges.items()
    }
    return {var: params[plan.representative(var)] for var in plan.tensors}
