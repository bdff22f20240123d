"""What a converter of an ONNX node works with: its operands, their scales and zero points.

Converters (`_onnx_quantized`, `_onnx_integer`) know no importer: all they ask of one is in `Node`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst

from ..op import static_shape
from ..workload import DTYPE_RANGE, INT8_DTYPES

Expr = relax.Expr


@dataclass(frozen=True)
class Node:
    """One node of an ONNX graph, its operands converted already.

    Parameters
    ----------
    op : str
        The ONNX operator's name.
    inputs : sequence of relax.Expr or None
        None where an optional input is left out.
    attrs : dict
        The node's attributes, strings as bytes.
    convert : callable
        ``convert(op, inputs, attrs)``: TVM's own conversion of another operator.
    typed : callable
        Returns an expression with its type inferred, as a variable where it is a tensor.
    """

    op: str
    inputs: Sequence[Expr | None]
    attrs: dict[str, Any]
    convert: Callable[[str, Sequence[Expr | None], dict[str, Any]], Expr]
    typed: Callable[[Expr], Expr]

    def optional(self, index: int) -> Expr | None:
        """Return an operand; None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def operand(self, index: int) -> Expr:
        """Return an operand; ValueError where it is left out."""
        found = self.optional(index)
        if found is None:
            raise ValueError(f"{self.op} lacks input {index}; allowed: all but optional ones")
        return found

    def stock(self, op: str, *inputs: Expr | None, **attrs: Any) -> Expr:
        """Return another operator of these inputs, typed, by TVM's converter."""
        typed = [x if x is None else self.typed(x) for x in inputs]
        return self.typed(self.convert(op, typed, attrs))

    # ------------------------------------------------------------ quantization

    def dequantized(self, index: int, axis: int | None = None) -> Expr:
        """Return inputs (q, scale, zero point) from `index` on as float32.

        `axis` is where scales and zero points of more than one value, of one dimension, lie.
        """
        q, dtype = self.operand(index), dtype_of(self.operand(index))
        scale, zero_point, axis = self._parameters(
            self.operand(index + 1), self.optional(index + 2), dtype, q, axis
        )
        array, points = array_of(q), array_of(zero_point)
        if array is not None and points is not None and points.size > 1 and dtype in INT8_DTYPES:
            if np.any(points != points[0]):
                found = rebased(array, along(points, array.ndim, axis))
                if found is not None:
                    q = constant(found[0])
                    zero_point = constant(np.full(points.shape, found[1]), "int8")
        return self.typed(relax.op.dequantize(q, scale, zero_point, axis=axis, out_dtype="float32"))

    def quantized(self, real: Expr, index: int, dtype: str = "uint8", axis: int = 0) -> Expr:
        """Return a float32 tensor quantized by inputs (scale, zero point) from `index` on.

        Without a zero point the type is `dtype`, and the zero point 0.
        """
        real = self.typed(real)
        scale, zero_point = self.operand(index), self.optional(index + 1)
        dtype = dtype_of(zero_point) if zero_point is not None else dtype
        scale, zero_point, axis = self._parameters(scale, zero_point, dtype, real, axis)
        return self.typed(relax.op.quantize(real, scale, zero_point, axis=axis, out_dtype=dtype))

    def _parameters(
        self, scale: Expr, zero_point: Expr | None, dtype: str, of: Expr, axis: int | None
    ) -> tuple[Expr, Expr, int]:
        """Return (scale, zero point, axis) as Relax takes them: scalars, or vectors of one length.

        Raises
        ------
        ValueError
            For constants that vary along several axes.
        """
        rank = rank_of(of)
        positive = 0 if axis is None else axis % max(rank, 1)
        if zero_point is None:
            zero_point = relax.const(0, dtype)
        arrays = array_of(scale), array_of(zero_point)
        if arrays[0] is None or arrays[1] is None:
            if dtype_of(scale) != "float32":
                scale = self.typed(relax.op.astype(scale, "float32"))
            return scale, zero_point, positive
        if all(array.size == 1 for array in arrays):
            vectors = [array.reshape(()) for array in arrays]
            return constant(vectors[0], "float32"), constant(vectors[1]), positive
        full = np.broadcast_arrays(*arrays)
        if full[0].ndim > 1:
            axis = _one_axis(full[0], rank)
        if axis is None:
            raise ValueError(f"scale has shape {full[0].shape}; allowed: values along one axis")
        vectors = [array.reshape(-1) for array in full]
        return constant(vectors[0], "float32"), constant(vectors[1]), axis % rank


def dtype_of(expr: Expr) -> str:
    """Return a tensor's dtype."""
    return str(expr.ty.dtype)


def rank_of(expr: Expr) -> int:
    """Return how many dimensions a tensor has."""
    return int(expr.ty.ndim)


def array_of(expr: Expr | None) -> np.ndarray | None:
    """Return the value of a constant; None for anything else."""
    return expr.value.numpy() if isinstance(expr, GenericConst) else None


def constant(array: np.ndarray, dtype: str | None = None) -> Expr:
    """Return an array as a Relax constant."""
    array = np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array)
    return relax.const(array if dtype is None else array.astype(dtype), dtype or str(array.dtype))


def rebased(q: np.ndarray, zero_point: np.ndarray) -> tuple[np.ndarray, int] | None:
    """Return integers and one zero point that stand for ``q - zero_point``, exactly.

    Zero points that differ between channels are no kernel's; but where the differences span at most
    255, as those of weights do unless they were meant not to, one zero point serves them all.

    Parameters
    ----------
    q : np.ndarray
        uint8 or int8.
    zero_point : np.ndarray
        Integers that broadcast to `q`.

    Returns
    -------
    (np.ndarray, int) or None
        int8 integers and their zero point; None where they span more.
    """
    real = q.astype("int32") - zero_point.astype("int32")
    low, high = (int(real.min()), int(real.max())) if real.size else (0, 0)
    smallest, largest = DTYPE_RANGE["int8"]
    shift = max(smallest - low, 0) or min(largest - high, 0)
    if low + shift < smallest or high + shift > largest or not smallest <= shift <= largest:
        return None
    return (real + shift).astype("int8"), shift


def _one_axis(array: np.ndarray, rank: int) -> int | None:
    """Return the axis, from the end of `rank`, of an array's only dimension beside 1; or None."""
    long = [axis for axis, size in enumerate(array.shape) if size > 1]
    return long[0] + rank - array.ndim if len(long) == 1 else None


def along(vector: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """Return a vector that broadcasts along one axis of `rank`; a scalar as it is."""
    if vector.size == 1:
        return vector.reshape(())
    return vector.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def known_shape(data: Expr, indices: Expr) -> Expr:
    """Return Gather's data; a shape that is known, as a constant where indices are a vector.

    What is computed from it is then constant, too. TVM's importer leaves it to the run for vectors,
    and slices by such indices, as ShuffleNet's channel splits, have no shape.
    """
    points = array_of(indices)
    if not isinstance(data, relax.ShapeExpr) or points is None or points.ndim == 0:
        return data
    dims = [getattr(dim, "value", None) for dim in data.values]
    return data if None in dims else constant(np.array(dims), "int64")


def with_explicit_pads(data: Expr, weight: Expr, attrs: dict[str, Any]) -> dict[str, Any]:
    """Return a convolution's attributes with ``auto_pad`` turned into ``pads``.

    TVM's importer pads by a loop nest of its own, which FuseQDQ cannot see through. Symbolic shapes
    are left to it.
    """
    mode = attrs.get("auto_pad", b"NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    shape = static_shape(data)
    kernel = (static_shape(weight) or ())[2:]
    if mode not in ("SAME_UPPER", "SAME_LOWER") or shape is None or not kernel:
        return attrs
    spatial = shape[2:]
    strides = attrs.get("strides") or (1,) * len(spatial)
    dilations = attrs.get("dilations") or (1,) * len(spatial)
    before, after = [], []
    for size, k, stride, dilation in zip(spatial, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return {**attrs, "auto_pad": b"NOTSET", "pads": (*before, *after)}
