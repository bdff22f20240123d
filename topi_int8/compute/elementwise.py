"""The operators between convolutions, in TE: sums, products, requantize, average pool, layouts.

All are layout-blind or take the layout as an index map; none knows the graph.
"""

from __future__ import annotations

from typing import Any

from tvm import te

from intrinsics.compat import tir

from ..layout import Layout
from ..workload import DTYPE_RANGE, Epilogue
from .epilogue import clip_value, dequantize_value, f32, quantize_value


def _stored(value: Any, attrs: dict[str, Any]) -> Any:
    """Return a float32 value in units of the output as the stored type."""
    dtype = attrs["out_dtype"]
    low, high = attrs.get("clip_min"), attrs.get("clip_max")
    if dtype == "float32":
        return clip_value(value, low, high, "float32")
    epilogue = Epilogue(dtype, scale=True, clip_min=low, clip_max=high)
    low, high = epilogue.bounds()
    return quantize_value(value, int(attrs["out_zero_point"]), low, high, dtype)


def quantize(data: Any, scale: float, zero_point: int, dtype: str) -> Any:
    """Return ``clip(rint(data / scale) + zero_point)``: ONNX QuantizeLinear by scalars."""
    low, high = DTYPE_RANGE[dtype]

    def value(*i: Any) -> Any:
        return quantize_value(data[i] / f32(float(scale)), zero_point, low, high, dtype)

    return te.compute(data.shape, value, name="quantize")


def quantize_along(data: Any, scale: Any, zero_point: Any, axis: int, dtype: str) -> Any:
    """Return `quantize` by tensors: of one element, or of one an index of an axis of the data."""
    low, high = DTYPE_RANGE[dtype]

    def value(*i: Any) -> Any:
        at = i[axis] if i else 0
        by, offset = (_of_axis(tensor, at) for tensor in (scale, zero_point))
        steps = tir.nearbyint(data[i] / by) + f32(offset)
        return clip_value(steps, low, high, "float32").astype(dtype)

    return te.compute(data.shape, value, name="quantize")


def _of_axis(tensor: Any, at: Any) -> Any:
    """Return a vector's element, or the only one of a tensor of any rank."""
    single = all(isinstance(dim, tir.IntImm) and int(dim) == 1 for dim in tensor.shape)
    return tensor[(0,) * len(tensor.shape)] if single else tensor[at]


def add(a: Any, b: Any, attrs: dict[str, Any]) -> Any:
    """Return the quantized sum of two tensors of one shape (`op.add`)."""

    def total(*i: Any) -> Any:
        left = dequantize_value(a[i], attrs["a_zero_point"], attrs["a_scale"])
        right = dequantize_value(b[i], attrs["b_zero_point"], attrs["b_scale"])
        return _stored(left + right, attrs)

    return te.compute(a.shape, total, name="qadd")


def requantize(data: Any, attrs: dict[str, Any]) -> Any:
    """Return a tensor in another quantization (`op.requantize`)."""

    def value(*i: Any) -> Any:
        return _stored(dequantize_value(data[i], attrs["zero_point"], attrs["scale"]), attrs)

    return te.compute(data.shape, value, name="requantize")


def _beside(tensor: Any, i: tuple) -> Any:
    """Return a tensor's element for index `i` of one that it broadcasts to, of the same rank."""
    return tensor[tuple(
        0 if int(dim) == 1 else at for dim, at in zip(tensor.shape, i, strict=True)
    )]  # fmt: skip


def affine(data: Any, scale: Any, bias: Any, attrs: dict[str, Any]) -> Any:
    """Return a scale and a bias a channel, and requantization, in one pass (`op.affine`)."""

    def value(*i: Any) -> Any:
        real = dequantize_value(data[i], attrs["zero_point"], 1.0)
        return _stored(real * _beside(scale, i) + _beside(bias, i), attrs)

    return te.compute(data.shape, value, name="affine")


def multiply(a: Any, b: Any, attrs: dict[str, Any]) -> Any:
    """Return the quantized product of two tensors, the second broadcast (`op.multiply`)."""

    def value(*i: Any) -> Any:
        left = dequantize_value(a[i], attrs["a_zero_point"], attrs["scale"])
        return _stored(left * dequantize_value(_beside(b, i), attrs["b_zero_point"], 1.0), attrs)

    return te.compute(a.shape, value, name="qmultiply")


def avg_pool2d(data: Any, attrs: dict[str, Any], out_shape: tuple[int, ...]) -> Any:
    """Return the integer average pool (`op.avg_pool2d`): exact int32 sums, one rounding.

    Windows that hang over a border average what they cover, or count the padding's real zeros too.
    """
    layout = Layout.parse(attrs["layout"])
    rows = 1 if layout.name == "NHWC" else 2
    height, width = int(data.shape[rows]), int(data.shape[rows + 1])
    (kh, kw), (sh, sw) = attrs["pool_size"], attrs["strides"]
    top, left, bottom, right = attrs["padding"]
    zero_point = tir.const(attrs["zero_point"], "int32")
    ry, rx = te.reduce_axis((0, kh), "ry"), te.reduce_axis((0, kw), "rx")
    overhangs = any(attrs["padding"]) or attrs["ceil_mode"]

    def window(y: Any, x: Any) -> tuple[Any, Any, Any]:
        row, column = y * sh - top + ry, x * sw - left + rx
        inside = tir.all(row >= 0, row < height, column >= 0, column < width)
        return row, column, inside

    def summand(*i: Any) -> Any:
        row, column, inside = window(i[rows], i[rows + 1])
        value = data[(*i[:rows], row, column, *i[rows + 2 :])].astype("int32")
        if overhangs:
            value = tir.if_then_else(inside, value - zero_point, tir.const(0, "int32"))
        return te.sum(value, axis=[ry, rx])

    total = te.compute(out_shape, summand, name="pool_sum")

    def covered(position: Any, stride: int, before: int, after: int, kernel: int, size: int) -> Any:
        """Return how many elements the window covers along one axis."""
        start = position * stride - before
        low, high = (-before, size + after) if attrs["count_include_pad"] else (0, size)
        return tir.min(start + kernel, high) - tir.max(start, low)

    def mean(*i: Any) -> Any:
        value = total[i]
        if not overhangs:
            count = kh * kw
            value = value - zero_point * count
            return _stored(f32(value) * f32(float(attrs["scale"]) / count), attrs)
        ny = covered(i[rows], sh, top, bottom, kh, height)
        nx = covered(i[rows + 1], sw, left, right, kw, width)
        return _stored(f32(value) * f32(float(attrs["scale"])) / f32(ny * nx), attrs)

    return te.compute(out_shape, mean, name="pool_mean")


def layout_transform(data: Any, src: Layout, dst: Layout, channels: int, pad_value: float) -> Any:
    """Return data in another layout; channels that fill a block hold `pad_value`."""
    n, c, h, w = src.logical(tuple(int(d) for d in data.shape), channels)

    def logical_index(i: tuple) -> tuple:
        """(n, c, h, w) of an element of the destination."""
        if dst.is_packed:
            return i[0], i[1] * dst.block + i[4], i[2], i[3]
        return (i[0], i[3], i[1], i[2]) if dst.name == "NHWC" else i

    def source_index(ni: Any, ci: Any, hi: Any, wi: Any) -> tuple:
        if src.is_packed:
            return ni, tir.floordiv(ci, src.block), hi, wi, tir.floormod(ci, src.block)
        return (ni, hi, wi, ci) if src.name == "NHWC" else (ni, ci, hi, wi)

    def move(*i: Any) -> Any:
        ni, ci, hi, wi = logical_index(i)
        value = data[source_index(ni, ci, hi, wi)]
        if not dst.is_packed or channels % dst.block == 0:
            return value
        fill = tir.const(
            int(pad_value) if str(data.dtype) in DTYPE_RANGE else pad_value, data.dtype
        )
        return tir.if_then_else(ci < channels, value, fill)

    return te.compute(dst.shape(n, c, h, w), move, name="layout_transform")
