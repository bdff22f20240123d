"""Which tensor of an ONNX graph is which tensor of the Relax graph that was imported from it.

An importer takes operators apart, and keeps no names that would last through the passes before
quantization. So tensors are matched by what they hold: both graphs run on the same inputs, a real
one and noise, and tensors of one shape that agree in every element are the same function of the
input. Where several do (an Identity's input and output), any of them will do for a scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax

from ..quantize.calibrate import run_instrumented
from ..target import host_target
from .files import Shapes, import_onnx

if TYPE_CHECKING:
    import onnx

Values = Mapping[str, Sequence[np.ndarray]]  # by tensor, one array for each input of `probes`
# Both are float32 sums of up to some thousand products, in different orders.
_TOLERANCE = 1e-4


def probes(item: Sequence[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """Return the inputs to compare on: a real one and, of floats, noise of its mean and spread."""
    arrays = tuple(map(np.asarray, item))
    rng = np.random.default_rng(0)
    noise = tuple(
        rng.normal(x.mean(), x.std() or 1, x.shape).astype(x.dtype) if x.dtype.kind == "f" else x
        for x in arrays
    )
    return [arrays, noise]


def relax_values(prepared: tvm.IRModule, names: Sequence[str], inputs: Iterable[Any]) -> Values:
    """Return what tensors of a prepared module hold."""
    runs = list(run_instrumented(prepared, names, inputs))
    return dict(zip(names, zip(*runs, strict=True), strict=True))


def onnx_values(
    model: onnx.ModelProto, inputs: Sequence[tuple[np.ndarray, ...]], shapes: Shapes
) -> Values:
    """Return what the float32 tensors of an ONNX graph hold, in the order of its nodes."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    floats = {
        info.name: info for info in (*inferred.input, *inferred.value_info, *inferred.output)
        if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }  # fmt: skip
    parameters = {tensor.name for tensor in model.graph.initializer}
    given = [entry.name for entry in model.graph.input if entry.name not in parameters]
    found = {name: [item[i] for item in inputs] for i, name in enumerate(given) if name in floats}

    names = [
        name for node in model.graph.node if node.op_type != "Constant"
        for name in node.output if name in floats
    ]  # fmt: skip
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    exposed.graph.output.extend(floats[name] for name in names)
    results = run(import_onnx(exposed, shapes), inputs)
    return found | dict(zip(names, zip(*results, strict=True), strict=True))


def run(mod: tvm.IRModule, inputs: Iterable[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
    """Return the results of a module for each input, on this machine."""
    executable = tvm.compile(mod, host_target())
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    found = []
    for item in inputs:
        result = main(*map(tvm.runtime.tensor, item))
        parts = [result] if hasattr(result, "numpy") else result
        found.append([part.numpy() for part in parts])
    return found


def same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    """Return whether two tensors hold the same on every input, up to rounding."""
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return False
        if x.size and np.abs(x - y).max() > _TOLERANCE * np.abs(x).max():
            return False
    return True


def find(values: Sequence[np.ndarray], among: Values) -> list[str]:
    """Return the ONNX tensors that hold these values, in the order of the graph."""
    return [name for name, other in among.items() if same(values, other)]
