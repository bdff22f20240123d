"""Accuracy report: how far each layer's int8 output is from its float32 one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..op import op_name
from .calibrate import run_instrumented
from .graph import Graph
from .preparation import prepare_like

# What a kernel's epilogue consists of, from its sum to the tensor it stores.
_EPILOGUE = frozenset(
    ("relax.add", "relax.nn.relu", "relax.nn.relu6", "relax.clip", "relax.quantize")
)


@dataclass(frozen=True)
class LayerError:
    """Error of one layer's stored output, over all inputs, after dequantization.

    Attributes
    ----------
    name : str
        The layer, as `list_layers` and `topi_int8.explain` name it.
    tensor : str
        The fp32 tensor that its kernel stores: after bias, residual and activation.
    sqnr : float
        Signal to quantization noise ratio, dB: ``10 log10(sum r^2 / sum (r - v)^2)``.
    max_error : float
        Largest absolute difference.
    """

    name: str
    tensor: str
    sqnr: float
    max_error: float


def stored_tensors(qdq: tvm.IRModule) -> dict[str, str]:
    """Return layer name -> name of the float32 tensor that holds what its kernel stores.

    For every conv2d and matmul of a module from `quantize`; a quantized output is named as the
    dequantize after it, ``<fp32 name>_dq``.
    """
    graph = Graph(qdq)
    consumer: dict[relax.Var, relax.Var] = {}
    for var in graph.order:
        for used in graph.tensors(graph.values[var]):
            consumer[used] = var
    stored = {}
    for var in graph.order:
        if op_name(graph.values[var]) not in ("relax.nn.conv2d", "relax.matmul"):
            continue
        end = var
        while graph.single_use(end) and end in consumer:
            following = consumer[end]
            name = op_name(graph.values[following])
            if name not in _EPILOGUE:
                break
            end = following
            if name == "relax.quantize":
                end = next(v for v in graph.order if _dequantizes(graph.values[v], end))
                break
        stored[var.name] = end.name
    return stored


def _dequantizes(expr: Any, var: relax.Var) -> bool:
    return op_name(expr) == "relax.dequantize" and expr.args[0].same_as(var)


def layer_errors(
    mod: tvm.IRModule,
    qdq: tvm.IRModule,
    inputs: Iterable[Any],
    *,
    target: tvm.target.Target | None = None,
) -> list[LayerError]:
    """Return the error of each conv2d and matmul, both graphs compiled and run on the same inputs.

    Parameters
    ----------
    mod : tvm.IRModule
        The fp32 module given to `quantize`.
    qdq : tvm.IRModule
        What `quantize` returned for it.
    inputs : iterable
        As for `quantize`.
    target : tvm.target.Target, optional
        This machine by default.
    """
    stored = stored_tensors(qdq)
    tensors = [name.removesuffix("_dq") for name in stored.values()]
    signal, noise, largest = (np.zeros(len(stored)) for _ in range(3))
    inputs = list(inputs)
    wanted = run_instrumented(prepare_like(mod, qdq), tensors, inputs, target)
    got = run_instrumented(qdq, list(stored.values()), inputs, target)
    for reference, values in zip(wanted, got, strict=True):
        for i, (r, v) in enumerate(zip(reference, values, strict=True)):
            difference = r.astype("float64") - v
            signal[i] += np.sum(r.astype("float64") ** 2)
            noise[i] += np.sum(difference**2)
            largest[i] = max(largest[i], np.abs(difference).max())
    return [
        LayerError(name, tensor, _decibel(signal[i], noise[i]), float(largest[i]))
        for i, (name, tensor) in enumerate(zip(stored, tensors, strict=True))
    ]


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
