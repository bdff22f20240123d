"""ONNX's quantized operators (QLinear*, QGemm) as QDQ: the float operator between dequantize and
quantize, which is what they are defined by and what FuseQDQ reads.

Inputs and attributes: https://onnx.ai/onnx/operators/ (QLinearConv, QLinearMatMul) and
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (com.microsoft's).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from tvm import relax

from ._onnx_node import Expr, Node, along, array_of, constant, dtype_of, rank_of


def _channels_first(node: Node, data: Expr, of: Callable[[Expr], Expr]) -> Expr:
    """Return ``of(data)``, for an operator on NCHW, where the node may say ``channels_last``."""
    if not node.attrs.get("channels_last", 0):
        return of(data)
    rank = rank_of(data)
    to_first = [0, rank - 1, *range(1, rank - 1)]
    to_last = [0, *range(2, rank), 1]
    first = node.typed(relax.op.permute_dims(data, to_first))
    return node.typed(relax.op.permute_dims(node.typed(of(first)), to_last))


def _bias(node: Node, bias: Expr | None, scales: list[Expr], axis: int) -> Expr | None:
    """Return an int32 bias, which counts in products of scales, as float32."""
    if bias is None:
        return None
    arrays = [array_of(bias), *map(array_of, scales)]
    if all(array is not None for array in arrays):
        # In float64: the product of two float32 scales is exact there.
        unit = np.prod(np.broadcast_arrays(*(a.astype("float64").squeeze() for a in arrays[1:])), 0)
        return constant(arrays[0] * along(unit, arrays[0].ndim, axis), "float32")
    product = scales[0]
    for scale in scales[1:]:
        product = node.typed(relax.op.multiply(product, scale))
    return node.typed(
        relax.op.multiply(node.typed(relax.op.astype(bias, "float32")), product)
    )


def conv(node: Node) -> Expr:
    """QLinearConv: x, w and y with scale and zero point each, bias."""
    weight = node.dequantized(3, axis=0)
    bias = _bias(node, node.optional(8), [node.operand(1), node.operand(4)], 0)
    attrs = {key: value for key, value in node.attrs.items() if key != "channels_last"}

    def real(data: Expr) -> Expr:
        return node.stock("Conv", data, weight, bias, **attrs)

    found = _channels_first(node, node.dequantized(0), real)
    return node.quantized(found, 6, dtype_of(node.operand(0)))


def matmul(node: Node) -> Expr:
    """QLinearMatMul: a, b and y with scale and zero point each (a row's, a column's)."""
    a, b = node.dequantized(0, axis=-2), node.dequantized(3, axis=-1)
    real = node.stock("MatMul", a, b)
    return node.quantized(real, 6, dtype_of(node.operand(0)), axis=-2)


def gemm(node: Node) -> Expr:
    """QGemm: a and b with scale and zero point each, int32 bias, y's scale and zero point.

    Without those of y the result is float32.
    """
    attrs = node.attrs
    alpha = np.float32(attrs.get("alpha", 1.0))
    trans_a, trans_b = bool(attrs.get("transA", 0)), bool(attrs.get("transB", 0))
    a_scale = node.operand(1)
    if alpha != 1:
        array = array_of(a_scale)
        a_scale = (
            constant(array * alpha, "float32")
            if array is not None
            else node.typed(relax.op.multiply(a_scale, relax.const(alpha, "float32")))
        )
    node = replace(node, inputs=[node.operand(0), a_scale, *node.inputs[2:]])
    a, b = node.dequantized(0), node.dequantized(3, axis=0 if trans_b else 1)
    bias = _bias(node, node.optional(6), [a_scale, node.operand(4)], -1)
    real = node.stock("Gemm", a, b, bias, transA=int(trans_a), transB=int(trans_b))
    if node.optional(7) is None:
        return real
    return node.quantized(real, 7, dtype_of(node.operand(0)))


def _binary(op: str) -> Callable[[Node], Expr]:
    def convert(node: Node) -> Expr:
        real = node.stock(op, node.dequantized(0), node.dequantized(3))
        return node.quantized(real, 6, dtype_of(node.operand(0)))

    return convert


def _unary(make: Callable[[Node, Expr], Expr]) -> Callable[[Node], Expr]:
    """Return the converter of inputs (x, scale, zero point, y's scale, zero point)."""

    def convert(node: Node) -> Expr:
        real = make(node, node.dequantized(0))
        return node.quantized(real, 3, dtype_of(node.operand(0)))

    return convert


def _average(node: Node, data: Expr) -> Expr:
    attrs = {key: value for key, value in node.attrs.items() if key != "channels_last"}
    return _channels_first(node, data, lambda x: node.stock("AveragePool", x, **attrs))


def _global_average(node: Node, data: Expr) -> Expr:
    return _channels_first(node, data, lambda x: node.stock("GlobalAveragePool", x))


def _leaky_relu(node: Node, data: Expr) -> Expr:
    return relax.op.nn.leakyrelu(data, float(node.attrs.get("alpha", 0.01)))


def _softmax(node: Node, data: Expr) -> Expr:
    axis, rank = int(node.attrs.get("axis", -1)), rank_of(data)
    if int(node.attrs.get("opset", 13)) < 13 and axis % rank != rank - 1:
        raise ValueError(f"axis is {axis}; allowed for QLinearSoftmax of opset < 13: the last")
    return relax.op.nn.softmax(data, axis=axis)


def _reduce_mean(node: Node, data: Expr) -> Expr:
    axes = node.attrs.get("axes")
    axes = None if axes is None else [int(axis) for axis in axes]
    return relax.op.mean(data, axes, keepdims=bool(node.attrs.get("keepdims", 1)))


def concat(node: Node) -> Expr:
    """QLinearConcat: y's scale and zero point, then x, scale and zero point of each input."""
    if len(node.inputs) < 5 or (len(node.inputs) - 2) % 3:
        raise ValueError(f"{node.op} has {len(node.inputs)} inputs; allowed: 2 + 3 a tensor")
    reals = [node.dequantized(at) for at in range(2, len(node.inputs), 3)]
    joined = relax.op.concat(reals, axis=int(node.attrs["axis"]))
    return node.quantized(joined, 0, dtype_of(node.operand(2)))


def where(node: Node) -> Expr:
    """QLinearWhere: a condition, then x, y and z with scale and zero point each."""
    real = relax.op.where(node.operand(0), node.dequantized(1), node.dequantized(4))
    return node.quantized(real, 7, dtype_of(node.operand(1)))


def quantize_linear(node: Node) -> Expr:
    """QuantizeLinear, ai.onnx's and com.microsoft's: TVM's, its parameters brought into shape."""
    return _linear(node, dtype_of(node.optional(2)) if node.optional(2) is not None else "uint8")


def dequantize_linear(node: Node) -> Expr:
    """DequantizeLinear: TVM's; constants whose zero points differ get one."""
    q, scale = node.operand(0), node.operand(1)
    plain = dtype_of(scale) == "float32" and not node.attrs.get("block_size", 0)
    if array_of(q) is not None and plain and not node.attrs.get("output_dtype", 0):
        return node.dequantized(0, axis=int(node.attrs.get("axis", 1)) if rank_of(q) > 1 else 0)
    return _linear(node, dtype_of(q))


def _linear(node: Node, dtype: str) -> Expr:
    scale, zero_point = node.operand(1), node.optional(2)
    arrays = array_of(scale), array_of(zero_point)
    if arrays[0] is not None and arrays[0].size == 1:
        scale = constant(arrays[0].reshape(()))
        if arrays[1] is not None and arrays[1].size == 1:
            zero_point = constant(arrays[1].reshape(()))
    elif arrays[0] is not None and zero_point is None:
        zero_point = constant(np.zeros(arrays[0].shape), dtype)
    return node.convert(node.op, [node.operand(0), scale, zero_point], node.attrs)


CONVERTERS: dict[str, Callable[[Node], Expr]] = {
    "DequantizeLinear": dequantize_linear,
    "QGemm": gemm,
    "QLinearAdd": _binary("Add"),
    "QLinearAveragePool": _unary(_average),
    "QLinearConcat": concat,
    "QLinearConv": conv,
    "QLinearGlobalAveragePool": _unary(_global_average),
    "QLinearLeakyRelu": _unary(_leaky_relu),
    "QLinearMatMul": matmul,
    "QLinearMul": _binary("Mul"),
    "QLinearReduceMean": _unary(_reduce_mean),
    "QLinearSigmoid": _unary(lambda _node, x: relax.op.sigmoid(x)),
    "QLinearSoftmax": _unary(_softmax),
    "QLinearWhere": where,
    "QuantizeLinear": quantize_linear,
}
