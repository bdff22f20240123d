"""The quantization of a Relax module, written into the ONNX model that it was imported from.

Scales, zero points and integer weights are those that `topi_int8.quantize` chose, as pairs of
QuantizeLinear and DequantizeLinear. `_onnx_match` finds the tensors they belong to, and the model
that comes out is imported and run beside the Relax one. What has no counterpart, or runs otherwise,
is refused: nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax

from ..op import op_name
from ..qparams import QParams
from ..quantize.graph import Graph, constant, prepare
from . import _onnx_match as match
from ._onnx_edit import INSTEAD, Constant, Editor, Layer
from .files import Shapes, import_onnx

if TYPE_CHECKING:
    import onnx

_LEAST_OPSET = 13  # from which DequantizeLinear has an axis
# Both models have the same integers: they agree to the bit (ResNet-18, MobileNetV2), but where
# float32 sums in another order round an integer otherwise. One pair left out of the tests' small
# network gives 47 to 56 dB, or changes nothing where the tensor has its input's scale.
_LEAST_SQNR = 60.0


def write(
    model: onnx.ModelProto,
    mod: tvm.IRModule,
    quantized: tvm.IRModule,
    item: Sequence[np.ndarray],
    path: Path,
    shapes: Shapes | None = None,
) -> None:
    """Write the QDQ form of an ONNX model.

    Parameters
    ----------
    model : onnx.ModelProto
        float32. Not changed.
    mod, quantized : tvm.IRModule
        What was imported from it, and what `topi_int8.quantize` made of that.
    item : sequence of numpy.ndarray
        A calibration input.
    path : Path
        Of the .onnx file, overwritten.
    shapes : mapping, optional
        Those it was imported with.

    Raises
    ------
    ValueError
        Where a quantized tensor or layer has no counterpart in the ONNX graph, or the result would
        not compute what `quantized` computes.
    """
    import onnx

    shapes = shapes or {}
    _check(model)
    activations, layers = _read(quantized)
    inputs = match.probes(item)
    names = list(dict.fromkeys([*activations, *(layer.tensor for layer in layers)]))
    wanted = match.relax_values(prepare(mod), names, inputs)
    held = match.onnx_values(model, inputs, shapes)
    editor = Editor(model)
    for layer in layers:
        editor.quantize_layer(layer, match.find(wanted[layer.tensor], held))
    for name, params in activations.items():
        found = match.find(wanted[name], held)
        if not found:
            raise ValueError(f"the ONNX graph has no tensor like {name!r} of the Relax graph, "
                             f"which is to be quantized; {INSTEAD}")  # fmt: skip
        editor.quantize_tensor(found[0], params)
    result = editor.finish()
    _compare(result, quantized, inputs, shapes)
    onnx.save(result, path)


def _check(model: onnx.ModelProto) -> None:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx", 1))
    if opset < _LEAST_OPSET:
        raise ValueError(
            f"model has opset {opset}; allowed for .onnx: {_LEAST_OPSET} or more "
            f"(onnx.version_converter.convert_version(model, {_LEAST_OPSET})); or {INSTEAD}"
        )
    for node in model.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ValueError(f"model has control flow ({node.op_type}); {INSTEAD}")


def _compare(
    result: onnx.ModelProto, quantized: tvm.IRModule, inputs: Sequence[Any], shapes: Shapes
) -> None:
    """Refuse a model that does not compute what the Relax module does."""
    wanted = match.run(quantized, inputs)
    got = match.run(import_onnx(result, shapes), inputs)
    pairs = [zip(a, b, strict=True) for a, b in zip(wanted, got, strict=True)]
    for i, (a, b) in (found for pair in pairs for found in enumerate(pair)):
        noise = float(np.sum((a.astype("float64") - b) ** 2))
        signal = float(np.sum(a.astype("float64") ** 2))
        sqnr = math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
        if sqnr < _LEAST_SQNR:
            raise ValueError(
                f"the ONNX model would differ from the Relax one by {sqnr:.1f} dB in output {i}; "
                f"allowed: {_LEAST_SQNR:g} dB or more; {INSTEAD}"
            )


# ---------------------------------------------------------------- what is to be written


def _read(quantized: tvm.IRModule) -> tuple[dict[str, QParams], list[Layer]]:
    """Return the quantized tensors and layers of a module that `topi_int8.quantize` returned."""
    graph = Graph(quantized)
    activations: dict[str, QParams] = {}
    layers: list[Layer] = []
    sums: dict[str, tuple[str, Constant]] = {}  # layer -> the tensor with its bias, the bias
    for var in graph.order:
        call = graph.values[var]
        name = op_name(call)
        if name == "relax.quantize":
            scale, zero_point = (constant(arg) for arg in call.args[1:])
            activations[call.args[0].name] = QParams(
                float(scale.item()), int(zero_point.item()), str(call.ty.dtype)
            )
        elif name == "relax.add":
            for data, other in (call.args, call.args[::-1]):
                bias = _constant(graph, other)
                if bias is not None:
                    sums[data.name] = (var.name, bias)
        elif name in ("relax.nn.conv2d", "relax.matmul"):
            weight = _constant(graph, call.args[1])
            if weight is not None:
                layers.append(Layer(var.name, var.name, name != "relax.matmul", weight, None))
    return activations, [
        replace(layer, tensor=sums[layer.name][0], bias=sums[layer.name][1])
        if layer.name in sums
        else layer
        for layer in layers
    ]


def _constant(graph: Graph, expr: Any) -> Constant | None:
    """Return the integers behind a dequantized constant; None for anything else."""
    call = graph.values.get(expr) if isinstance(expr, relax.Var) else None
    if op_name(call) != "relax.dequantize":
        return None
    values, scale, zero_point = map(constant, call.args)
    if values is None or scale is None or zero_point is None:
        return None
    if zero_point.any():
        raise ValueError(f"a constant of the Relax graph has the zero point {zero_point}; allowed: "
                         f"0; {INSTEAD}")  # fmt: skip
    return Constant(values, scale, int(call.attrs.axis) % values.ndim)
