"""Pieces of new graph that FuseQDQ writes: constants, stored ranges, pooling windows."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst

from .. import op
from ..op import op_name, static_shape
from ..workload import DTYPE_RANGE
from ._qdq_values import Bounds, QParams, View, narrow


def is_static(value: relax.Expr) -> bool:
    """Return whether every dimension of a tensor, or of a tuple of them, is known."""
    types = value.ty.fields if isinstance(value.ty, relax.TupleType) else [value.ty]
    return all(
        getattr(ty, "shape", None) is not None and all(hasattr(d, "value") for d in ty.shape)
        for ty in types
    )


def constant(array: np.ndarray) -> GenericConst:
    """Return an array as a Relax constant of its own dtype."""
    return relax.const(np.asarray(array, order="C"), str(array.dtype))


def _along(vector: np.ndarray, rank: int, axis: int) -> np.ndarray:
    shape = [1] * rank
    if vector.size > 1:
        shape[axis] = vector.size
    return vector.reshape(shape)


def dequantized(view: View) -> np.ndarray:
    """Return the real values of a constant view, its clip not applied."""
    return dequantized_array(view.array, view.scale, np.asarray(view.zero_point), view.axis or 0)


def dequantized_array(
    q: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int
) -> np.ndarray:
    """Return integers dequantized to float32, per tensor or along an axis."""
    scale, zero_point = (_along(vector, q.ndim, axis) for vector in (scale, zero_point))
    return (q.astype("int64") - zero_point).astype("float32") * scale


def quantized(
    real: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int, dtype: str
) -> np.ndarray:
    """Return a constant quantized per tensor or along an axis."""
    scale = _along(scale.astype("float32"), real.ndim, axis)
    low, high = DTYPE_RANGE[dtype]
    q = np.rint(real.astype("float32") / scale) + _along(zero_point, real.ndim, axis)
    return np.clip(q, low, high).astype(dtype)


def stored(out: QParams, bounds: Bounds) -> dict[str, Any]:
    """Return the attributes that say how a result of our elementwise operators is stored."""
    return dict(
        out_dtype=out.dtype,
        out_zero_point=out.zero_point,
        clip_min=out.bound(bounds[0]),
        clip_max=out.bound(bounds[1]),
    )


def requantized(view: View, out: QParams, bounds: Bounds) -> relax.Expr | None:
    """Return a view in other parameters: the integers themselves, where nothing changes."""
    params = view.per_tensor
    if params is None:
        return None
    bounds = narrow(view.bounds, bounds)
    if view.array is not None:
        return constant(out.quantize(np.clip(dequantized(view), *bounds)))
    attrs = stored(out, bounds)
    type_low, type_high = DTYPE_RANGE[out.dtype]
    unclipped = attrs["clip_min"] in (None, type_low) and attrs["clip_max"] in (None, type_high)
    if params.same(out) and unclipped:
        return view.expr
    scale = 1.0 if params.same(out) else params.scale / out.scale
    return op.requantize(view.expr, zero_point=params.zero_point, scale=scale, **attrs)


def accumulator_scale(
    call: relax.Call, data: QParams, weight: View, channels: int
) -> np.ndarray | None:
    """Return scale_x * scale_w per channel; None for a raw integer operator."""
    if str(call.ty.dtype) == "int32":
        return None
    scale = np.float64(data.scale) * weight.scale.astype("float64")
    return np.broadcast_to(scale.reshape(-1), (channels,)).copy()


def average_window(call: relax.Call) -> dict[str, Any] | None:
    """Return `op.avg_pool2d`'s window of an average over height and width; None for any other."""
    name, attrs, shape = op_name(call), call.attrs, static_shape(call.args[0])
    if shape is None or len(shape) != 4:
        return None
    if name == "relax.mean":
        axes = tuple(sorted(int(axis) % 4 for axis in attrs.axis)) if attrs.axis else ()
        layout = {(2, 3): "NCHW", (1, 2): "NHWC"}.get(axes)
        size = tuple(shape[axis] for axis in axes)
        return dict(pool_size=size, strides=(1, 1), layout=layout) if layout else None
    layout = str(attrs.layout)
    if layout not in ("NCHW", "NHWC") or str(attrs.out_layout) not in ("", layout):
        return None
    if name == "relax.nn.adaptive_avg_pool2d":
        size = shape[2:] if layout == "NCHW" else shape[1:3]
        wanted = static_shape(call)
        out = wanted[2:] if layout == "NCHW" else wanted[1:3]
        if any(a % b for a, b in zip(size, out, strict=True)):
            return None
        step = tuple(a // b for a, b in zip(size, out, strict=True))
        return dict(pool_size=step, strides=step, layout=layout)
    if any(int(d) != 1 for d in attrs.dilation) or len(attrs.padding) != 4:
        return None
    return dict(
        pool_size=tuple(int(v) for v in attrs.pool_size),
        strides=tuple(int(v) for v in attrs.strides),
        padding=tuple(int(v) for v in attrs.padding),
        ceil_mode=bool(attrs.ceil_mode),
        count_include_pad=bool(attrs.count_include_pad),
        layout=layout,
    )
