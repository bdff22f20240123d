"""ONNX's integer operators (ConvInteger, MatMulInteger) and its dynamic quantization.

With zero points A = a - za, B = b - zb (b's may be one a column), MatMulInteger is the int32

    (A - x) B = A B - x colsum(B),    x: the part of za that is no constant scalar,

so that the product is one of 8-bit integers less constant zero points, which FuseQDQ reads,
whatever DynamicQuantizeLinear finds at run time; a constant B's column sums are constants. The same
holds for the other operand, and for ConvInteger with the sums of the taps that lie inside the
image: ONNX pads with the zero point, so that a border adds nothing to ``sum(a w)`` and nothing to
``x sum(w)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from tvm import relax

from ..op import static_shape
from ._onnx_node import (
    Expr,
    Node,
    array_of,
    constant,
    dtype_of,
    rank_of,
    rebased,
    with_explicit_pads,
)


@dataclass(frozen=True)
class _Integers:
    """8-bit integers less a constant zero point, and what is still to be taken off.

    Parameters
    ----------
    expr : relax.Expr
        ``q - zero_point`` in int32, in the form that FuseQDQ reads.
    array : np.ndarray or None
        Its value, where constant.
    rest : relax.Expr or None
        int32, broadcasting; None for nothing.
    """

    expr: Expr
    array: np.ndarray | None
    rest: Expr | None = None


def _widened(node: Node, q: Expr, zero_point: int = 0, rest: Expr | None = None) -> _Integers:
    array = array_of(q)
    # A constant stays 8 bits, too: the cast of it is what says so.
    wide = node.typed(relax.op.astype(q, "int32"))
    if zero_point:
        wide = node.typed(relax.op.subtract(wide, relax.const(zero_point, "int32")))
    return _Integers(wide, None if array is None else array.astype("int32") - zero_point, rest)


def _integers(
    node: Node, q: Expr, zero_point: Expr | None, shaped: Callable[[tuple], tuple[int, ...]]
) -> _Integers:
    """Return an operand less its zero point; ``shaped`` makes that one's shape broadcast."""
    if zero_point is None:
        return _widened(node, q)
    points, values = array_of(zero_point), array_of(q)
    if points is None:
        wide, shape = node.typed(relax.op.astype(zero_point, "int32")), static_shape(zero_point)
        if shape is None:
            raise ValueError(f"{node.op}'s zero point has {zero_point.ty}; allowed: a known shape")
        return _widened(node, q, rest=node.typed(relax.op.reshape(wide, shaped(shape))))
    if points.size == 1:
        return _widened(node, q, int(points.reshape(())))
    points = points.reshape(shaped(points.shape))
    found = rebased(values, points) if values is not None else None
    if found is not None:
        return _widened(node, constant(found[0]), found[1])
    return _widened(node, q, rest=constant(points, "int32"))


def _sum(node: Node, operand: _Integers, axis: int) -> Expr:
    """Return an operand's sums along an axis, int32, kept as a dimension of 1."""
    if operand.array is not None:
        return constant(operand.array.sum(axis, keepdims=True, dtype="int32"))
    return node.typed(relax.op.sum(operand.expr, [axis], keepdims=True))


def _less(node: Node, value: Expr, *factors: Expr) -> Expr:
    """Return ``value`` minus the product of the factors."""
    product = factors[0]
    for factor in factors[1:]:
        product = node.typed(relax.op.multiply(product, factor))
    return node.typed(relax.op.subtract(value, product))


def matmul_integer(node: Node) -> Expr:
    """MatMulInteger: a, b, a's zero point (a row's), b's (a column's)."""
    a, b = node.operand(0), node.operand(1)
    if rank_of(a) < 2 or rank_of(b) < 2:
        return node.convert(node.op, node.inputs, node.attrs)
    left = _integers(node, a, node.optional(2), lambda p: p if len(p) > 1 else (*p, 1)[-2:])
    right = _integers(node, b, node.optional(3), lambda p: p if len(p) > 1 else (1, *(p or (1,))))
    found = node.typed(relax.op.matmul(left.expr, right.expr, out_dtype="int32"))
    if left.rest is not None:
        found = _less(node, found, left.rest, _sum(node, right, -2))
    if right.rest is not None:
        found = _less(node, found, _sum(node, left, -1), right.rest)
    if left.rest is not None and right.rest is not None:
        shape = static_shape(a)
        if shape is None:
            raise ValueError(f"{node.op} has {a.ty}; allowed with zero points: a known shape")
        found = _less(node, found, left.rest, right.rest, relax.const(-shape[-1], "int32"))
    return found


def conv_integer(node: Node) -> Expr:
    """ConvInteger: x, w, x's zero point (a scalar), w's (a scalar, or an output channel's)."""
    x, w = node.operand(0), node.operand(1)
    attrs = with_explicit_pads(x, w, node.attrs)
    spatial = (1,) * (rank_of(w) - 1)
    weight = _integers(node, w, node.optional(3), lambda p: (*(p or (1,)), *spatial))
    if weight.rest is not None:  # weights that no kernel takes: all of it in int32, by TVM
        wide = node.typed(relax.op.subtract(weight.expr, weight.rest))
        weight = _Integers(wide, None)
    data = _integers(node, x, node.optional(2), lambda p: (1,) * rank_of(x))
    found = node.stock("Conv", data.expr, weight.expr, None, **attrs)
    if data.rest is None:
        return found
    shape = static_shape(x)
    if weight.array is None or shape is None:
        wide = node.typed(relax.op.subtract(data.expr, data.rest))
        return node.stock("Conv", wide, weight.expr, None, **attrs)
    return _less(node, found, data.rest, constant(_taps_inside(weight.array, shape[2:], attrs)))


def _taps_inside(weight: np.ndarray, image: tuple[int, ...], attrs: dict) -> np.ndarray:
    """Return, for each output of a convolution, the sum of its weights that lie inside the image.

    Parameters
    ----------
    weight : np.ndarray
        int32 (oc, ic / groups, *kernel).
    image : tuple of int
        Sizes of the spatial dimensions.
    attrs : dict
        strides, dilations, pads (all that come first, then all that come last).

    Returns
    -------
    np.ndarray
        int32 (1, oc, *output), output's sizes 1 where all are equal.
    """
    count = len(image)
    strides = attrs.get("strides") or (1,) * count
    dilations = attrs.get("dilations") or (1,) * count
    pads = attrs.get("pads") or (0,) * (2 * count)
    sums = weight.sum(1, dtype="int64")
    for axis in range(count):
        size, kernel = image[axis], weight.shape[2 + axis]
        reach = (kernel - 1) * dilations[axis] + 1
        outputs = (size + pads[axis] + pads[axis + count] - reach) // strides[axis] + 1
        at = np.arange(outputs)[:, None] * strides[axis] - pads[axis]
        at = at + np.arange(kernel) * dilations[axis]
        inside = ((at >= 0) & (at < size)).astype("int64")
        sums = np.moveaxis(np.tensordot(sums, inside, ([1 + axis], [1])), -1, 1 + axis)
    if not any(pads):
        sums = sums[(slice(None), *[slice(0, 1)] * count)]
    return sums[None].astype("int32")


def dynamic_quantize(node: Node) -> list[Expr]:
    """DynamicQuantizeLinear: float32 x to uint8 y, its scale and zero point.

    As the operator's specification has it, half to even; where x is nothing but zeros the scale is
    1, as onnxruntime's (the specification divides zero by zero; TVM's converter gives scale 0, and
    255 for each y).
    """
    x = node.operand(0)
    zero, one = (relax.const(np.array([v], "float32")) for v in (0.0, 1.0))
    flat = node.typed(relax.op.reshape(x, [-1]))
    high, low = (
        node.typed(bound(node.typed(of(flat, [0], keepdims=True)), zero))
        for of, bound in ((relax.op.max, relax.op.maximum), (relax.op.min, relax.op.minimum))
    )
    span = node.typed(relax.op.subtract(high, low))
    step = node.typed(relax.op.divide(span, relax.const(np.array([255.0], "float32"))))
    flat_scale = node.typed(relax.op.where(node.typed(relax.op.equal(span, zero)), one, step))
    scale = node.typed(relax.op.reshape(flat_scale, []))
    # Rounded and saturated as any value is: the zero point is where -min lies.
    below = node.typed(relax.op.subtract(zero, low))
    none = relax.const(0, "uint8")
    point = node.typed(relax.op.quantize(below, scale, none, axis=0, out_dtype="uint8"))
    zero_point = node.typed(relax.op.reshape(point, []))
    return [relax.op.quantize(x, scale, zero_point, axis=0, out_dtype="uint8"), scale, zero_point]


def _scaled(node: Node, sums: Expr, scales: list[Expr], bias: Expr | None) -> Expr:
    """Return int32 sums as float32, times scales, plus a bias."""
    product = scales[0]
    for scale in scales[1:]:
        product = node.typed(relax.op.multiply(product, scale))
    real = node.typed(relax.op.multiply(node.typed(relax.op.astype(sums, "float32")), product))
    return real if bias is None else node.typed(relax.op.add(real, bias))


def matmul_integer_to_float(node: Node) -> Expr:
    """MatMulIntegerToFloat: a, b, their scales, their zero points, bias."""
    inner = _like(node, "MatMulInteger", [node.operand(0), node.operand(1), node.optional(4),
                                          node.optional(5)])  # fmt: skip
    scales = [_row_vector(node, node.operand(2)), node.operand(3)]
    return _scaled(node, matmul_integer(inner), scales, node.optional(6))


def _row_vector(node: Node, scale: Expr) -> Expr:
    """Return a row's scales (M,) as (M, 1); one scale as it is."""
    shape = static_shape(scale)
    if shape is None or len(shape) != 1 or shape[0] == 1:
        return scale
    return node.typed(relax.op.expand_dims(scale, -1))


def dynamic_quantize_matmul(node: Node) -> Expr:
    """DynamicQuantizeMatMul: float32 a, b, b's scale, b's zero point, bias."""
    quantized, scale, zero_point = dynamic_quantize(_like(node, "DynamicQuantizeLinear", [
        node.operand(0)
    ]))  # fmt: skip
    a = node.typed(quantized)
    inner = _like(node, "MatMulInteger", [a, node.operand(1), zero_point, node.optional(3)])
    return _scaled(node, matmul_integer(inner), [scale, node.operand(2)], node.optional(4))


def _like(node: Node, op: str, inputs: list[Expr | None]) -> Node:
    return replace(node, op=op, inputs=inputs, attrs={})


def dynamic_quantize_linear(node: Node) -> Expr:
    """DynamicQuantizeLinear as the importer takes it: a tuple of its three results."""
    if dtype_of(node.operand(0)) != "float32":
        raise ValueError(f"x is {dtype_of(node.operand(0))}; allowed: float32")
    return relax.Tuple([node.typed(expr) for expr in dynamic_quantize(node)])


CONVERTERS: dict[str, Callable[[Node], Expr]] = {
    "ConvInteger": conv_integer,
    "DynamicQuantizeLinear": dynamic_quantize_linear,
    "DynamicQuantizeMatMul": dynamic_quantize_matmul,
    "MatMulInteger": matmul_integer,
    "MatMulIntegerToFloat": matmul_integer_to_float,
}
