"""Changes to an ONNX graph: integer weights and biases, QuantizeLinear/DequantizeLinear pairs.

What goes where is `write_onnx`'s to say; here are the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..qparams import QParams

if TYPE_CHECKING:
    import onnx

INSTEAD = "write .json instead"


@dataclass(frozen=True)
class Constant:
    """An integer constant of the Relax graph: real = scale * value.

    ``scale`` is one a channel, along ``axis``, or one in all.
    """

    values: np.ndarray
    scale: np.ndarray
    axis: int


@dataclass(frozen=True)
class Layer:
    """A convolution or matmul with a quantized weight.

    ``tensor`` is the Relax tensor that holds its sums, the bias included.
    """

    name: str
    tensor: str
    is_conv: bool
    weight: Constant
    bias: Constant | None


class Editor:
    """Puts quantization into a copy of a model.

    Its methods raise ValueError for what has no place in the graph.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx

        self.onnx = onnx
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        graph = self.model.graph
        self.nodes = [_copy(node) for node in graph.node]
        self.initializers = [_copy(tensor) for tensor in graph.initializer]
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.outputs = {entry.name for entry in graph.output}
        self.values = {t.name: onnx.numpy_helper.to_array(t) for t in self.initializers} | {
            node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t)
            for node in self.nodes
            if node.op_type == "Constant" and node.attribute[0].name == "value"
        }
        self.taken = {*self.producer, *self.values, *(entry.name for entry in graph.input)}
        self.first: list[Any] = []  # nodes that read initializers and inputs only
        self.after: dict[int, list[Any]] = {}  # nodes to put behind one, by its id
        self.removed: set[int] = set()
        self.done: set[int] = set()
        self.pairs: dict[str, QParams] = {}

    # ------------------------------------------------------------ layers

    def quantize_layer(self, layer: Layer, candidates: Sequence[str]) -> None:
        """Give the node behind one of these tensors the integer weight and bias of a layer."""
        for tensor in candidates:
            if self._try_layer(layer, tensor):
                return
        raise ValueError(
            f"the ONNX graph has no node that computes {layer.name!r} of the Relax graph with the "
            f"same weight; {INSTEAD}"
        )

    def _try_layer(self, layer: Layer, tensor: str) -> bool:
        last = self.producer.get(tensor)
        if last is None:
            return False
        node, factor = last, None
        if last.op_type == "BatchNormalization":
            node, factor = self._only_producer(last.input[0]), self._factor(last)
        elif last.op_type == "Add":
            node = self._sum_of(last)
        accepts = ("Conv",) if layer.is_conv else ("Gemm", "MatMul")
        if node is None or node.op_type not in accepts or id(node) in self.done:
            return False
        attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        transposed = bool(attributes.get("transB", 0))
        weight = layer.weight
        if transposed:
            weight = Constant(weight.values.T, weight.scale, 1 - weight.axis)
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            return False
        if not is_rounded(weight, self.values.get(node.input[1]), factor):
            return False
        node.input[1] = self._constant(weight, f"{node.input[1]}_{layer.name}")
        self.done.add(id(node))
        if layer.bias is not None:
            self._set_bias(node, last, layer)
        if last.op_type == "BatchNormalization":
            self.removed.add(id(last))
            node.output[0] = tensor
            self.producer[tensor] = node
        return True

    def _set_bias(self, node: Any, last: Any, layer: Layer) -> None:
        bias = layer.bias
        if last.op_type == "Add":
            index = 0 if last.input[0] in self.values else 1
            shape = self.values[last.input[index]].shape
            axis = max(i for i, size in enumerate(shape) if size == bias.values.size)
            real = Constant(bias.values.reshape(shape), bias.scale, axis)
            last.input[index] = self._constant(real, f"{layer.name}_bias")
            return
        real = Constant(bias.values.reshape(-1), bias.scale, 0)
        name = self._constant(real, f"{layer.name}_bias")
        del node.input[2:]
        node.input.append(name)

    def _only_producer(self, tensor: str) -> Any:
        """Return the node behind a tensor that one node reads."""
        readers = sum(list(node.input).count(tensor) for node in self.nodes)
        alone = readers == 1 and tensor not in self.outputs
        return self.producer.get(tensor) if alone else None

    def _factor(self, norm: Any) -> np.ndarray | None:
        """Return what a BatchNormalization multiplies each channel by."""
        gamma, _, _, variance = (self.values.get(name) for name in norm.input[1:5])
        if gamma is None or variance is None:
            return None
        given = {a.name: self.onnx.helper.get_attribute_value(a) for a in norm.attribute}
        return gamma / np.sqrt(variance + given.get("epsilon", 1e-5))

    def _sum_of(self, add: Any) -> Any:
        """Return the MatMul whose bias an Add adds."""
        known = [name in self.values for name in add.input]
        if sum(known) != 1:
            return None
        node = self._only_producer(add.input[known.index(False)])
        return node if node is not None and node.op_type == "MatMul" else None

    # ------------------------------------------------------------ tensors

    def quantize_tensor(self, tensor: str, params: QParams) -> None:
        """Put a pair behind a tensor, for all that read it."""
        known = self.pairs.get(tensor)
        if known is not None:
            if known != params:
                raise ValueError(f"the ONNX tensor {tensor!r} would have two scales; {INSTEAD}")
            return
        self.pairs[tensor] = params
        behind = self.producer.get(tensor)
        if tensor in self.outputs and behind is not None:
            # A graph's output keeps its name: what is quantized gets another.
            source, end = self._fresh(f"{tensor}_real"), tensor
            behind.output[list(behind.output).index(tensor)] = source
        else:
            source, end = tensor, self._fresh(f"{tensor}_dq")
            for node in self.nodes:
                for i, name in enumerate(node.input):
                    if name == tensor:
                        node.input[i] = end
        scale = self._initializer(np.float32(params.scale), f"{tensor}_scale")
        zero = np.array(params.zero_point, params.dtype)
        zero_point = self._initializer(zero, f"{tensor}_zero_point")
        integers = self._fresh(f"{tensor}_q")
        make = self.onnx.helper.make_node
        pair = [
            make("QuantizeLinear", [source, scale, zero_point], [integers], name=integers),
            make("DequantizeLinear", [integers, scale, zero_point], [end], name=f"{tensor}_dq"),
        ]
        place = self.first if behind is None else self.after.setdefault(id(behind), [])
        place += pair

    # ------------------------------------------------------------ constants

    def _constant(self, value: Constant, name: str) -> str:
        """Add a dequantized integer constant; return the name of its reals."""
        one = value.scale.size == 1
        steps = value.scale.astype("float32").reshape(() if one else -1)
        integers = self._initializer(value.values, f"{name}_q")
        operands = [integers, self._initializer(steps, f"{name}_scale")]
        if value.values.dtype != np.int32:  # whose zero point is 0 and left out
            zeros = np.zeros(steps.shape, value.values.dtype)
            operands.append(self._initializer(zeros, f"{name}_zero_point"))
        reals = self._fresh(f"{name}_dq")
        along = {} if one else {"axis": value.axis}
        self.first.append(
            self.onnx.helper.make_node("DequantizeLinear", operands, [reals], name=reals, **along)
        )
        return reals

    def _initializer(self, array: np.ndarray, name: str) -> str:
        name = self._fresh(name)
        # Not ascontiguousarray alone: it makes a vector of a scalar.
        plain = np.ascontiguousarray(array).reshape(np.shape(array))
        self.initializers.append(self.onnx.numpy_helper.from_array(plain, name))
        return name

    def _fresh(self, name: str) -> str:
        found, count = name, 0
        while found in self.taken:
            count += 1
            found = f"{name}_{count}"
        self.taken.add(found)
        return found

    def finish(self) -> onnx.ModelProto:
        """Return the model, its nodes in order, without what nobody reads any more."""
        graph = self.model.graph
        nodes = list(self.first)
        for node in self.nodes:
            if id(node) not in self.removed:
                nodes += [node, *self.after.get(id(node), ())]
        read = {name for node in nodes for name in node.input} | self.outputs
        # Old models list their initializers among the inputs, too.
        inputs = [
            _copy(entry) for entry in graph.input
            if entry.name not in self.values or entry.name in read
        ]  # fmt: skip
        kept = [tensor for tensor in self.initializers if tensor.name in read]
        for name, entries in (
            ("node", nodes), ("initializer", kept), ("input", inputs), ("value_info", []),
        ):  # fmt: skip
            graph.ClearField(name)
            getattr(graph, name).extend(entries)
        self.onnx.checker.check_model(self.model)
        return self.model


def _copy(message: Any) -> Any:
    """Return a protobuf message that no other owns."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def is_rounded(weight: Constant, real: np.ndarray | None, factor: np.ndarray | None) -> bool:
    """Return whether a weight is a float32 one, scaled by a factor a channel, rounded.

    What is larger than the largest integer may have been clipped.
    """
    if real is None or real.shape != weight.values.shape:
        return False
    along = [1] * real.ndim
    along[weight.axis] = -1
    if factor is not None:
        real = real * factor.reshape(along)
    scale = weight.scale.reshape(along if weight.scale.size > 1 else ())
    values = weight.values.astype("float32")
    top = np.abs(values).max()
    return bool(np.all(np.abs(values - np.clip(real / scale, -top, top)) <= 0.51))
