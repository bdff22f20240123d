"""A small ONNX network that has what the writer of QDQ must match."""

from __future__ import annotations

from typing import Any

import numpy as np


def small_classifier(opset: int = 17, batch: int | str = 1) -> Any:
    """Return a float32 model from "image" (batch, 3, 16, 16) to "scores" (batch, 10).

    A convolution with BatchNormalization, a residual block whose shortcut has no bias, pooling, a
    Gemm of a transposed weight, a MatMul with its bias in an Add.
    """
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    parameters, nodes = [], []

    def parameter(name: str, array: np.ndarray) -> str:
        parameters.append(numpy_helper.from_array(array.astype("float32"), name))
        return name

    def weight(name: str, *shape: int) -> str:
        return parameter(name, rng.normal(0, np.prod(shape[1:]) ** -0.5, shape))

    def bias(name: str, count: int) -> str:
        return parameter(name, rng.normal(0, 0.1, count))

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=f"{op}_{output}", **attributes))
        return output

    x = node("Conv", ["image", weight("w0", 16, 3, 3, 3), bias("b0", 16)], "c0", pads=[1] * 4)
    norm = [parameter(n, rng.uniform(0.5, 1.5, 16)) for n in ("gamma", "beta", "mean", "variance")]
    x = node("Relu", [node("BatchNormalization", [x, *norm], "n0")], "r0")
    left = node("Conv", [x, weight("w1", 24, 16, 3, 3), bias("b1", 24)], "c1", pads=[1] * 4)
    right = node("Conv", [x, weight("w2", 24, 16, 1, 1)], "c2")
    x = node("Relu", [node("Add", [left, right], "a")], "r1")
    x = node("MaxPool", [x], "p", kernel_shape=[2, 2], strides=[2, 2])
    x = node("Flatten", [node("GlobalAveragePool", [x], "g")], "f")
    x = node("Relu", [node("Gemm", [x, weight("w3", 20, 24), bias("b3", 20)], "d", transB=1)], "r2")
    x = node("MatMul", [x, weight("w4", 20, 10)], "m")
    node("Add", [bias("b4", 10), x], "scores")
    shapes = {"image": [batch, 3, 16, 16], "scores": [batch, 10]}
    ends = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    }
    graph = helper.make_graph(nodes, "small", [ends["image"]], [ends["scores"]], parameters)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
