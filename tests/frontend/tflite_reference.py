"""TFLite's int8 kernels in numpy: 31-bit fixed-point multipliers, two roundings, NHWC.

What the reference kernels of TFLite do, written from its quantization specification and gemmlowp's
fixed-point arithmetic. Everything is in integers but tables of functions and softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tests import reference
from topi_int8.workload import Conv2dWorkload

# (lowest, highest) real value of a fused activation.
ACTIVATIONS = {
    "NONE": (-math.inf, math.inf),
    "RELU": (0.0, math.inf),
    "RELU6": (0.0, 6.0),
    "RELU_N1_TO_1": (-1.0, 1.0),
}
Params = tuple[float, int]  # scale, zero point
Padding = tuple[int, int, int, int]  # top, left, bottom, right


# ---------------------------------------------------------------- fixed point


def quantized_multiplier(real: float) -> tuple[int, int]:
    """Return (m, e): real = m * 2**(e - 31), m of 31 bits."""
    mantissa, exponent = math.frexp(real)
    m = round(mantissa * 2**31)
    return (m // 2, exponent + 1) if m == 2**31 else (m, exponent)


def multiply_by_multiplier(x: np.ndarray, real: float) -> np.ndarray:
    """Return x * real: a rounding high product of 32 bits, then a rounding shift to the right."""
    m, exponent = quantized_multiplier(real)
    product = (x.astype("int64") << max(exponent, 0)) * m
    high = (product + 2**30) >> 31  # gemmlowp's SaturatingRoundingDoublingHighMul: half up
    shift = max(-exponent, 0)
    remainder = high & ((1 << shift) - 1)  # its RoundingDivideByPOT: half away from zero
    threshold = (((1 << shift) - 1) >> 1) + (high < 0)
    return (high >> shift) + (remainder > threshold)


def stored(steps: np.ndarray, out: Params, activation: str = "NONE") -> np.ndarray:
    """Return multiples of the output's scale as int8: zero point, activation, saturation."""
    scale, zero_point = out
    low, high = (
        edge if math.isinf(real) else zero_point + _round(real / scale)
        for real, edge in zip(ACTIVATIONS[activation], (-128, 127), strict=True)
    )
    return np.clip(steps + zero_point, max(low, -128), min(high, 127)).astype("int8")


def _round(x: float) -> int:
    return int(math.copysign(math.floor(abs(x) + 0.5), x))


def quantize(real: np.ndarray, out: Params) -> np.ndarray:
    """Return real numbers as int8; half away from zero."""
    steps = real.astype("float32") / np.float32(out[0])
    return stored((np.sign(steps) * np.floor(np.abs(steps) + 0.5)).astype("int64"), out)


def dequantize(q: np.ndarray, params: Params) -> np.ndarray:
    """Return int8 as real numbers."""
    return (q.astype("float32") - np.float32(params[1])) * np.float32(params[0])


# ---------------------------------------------------------------- layers


def conv2d_sums(
    x: np.ndarray, zero_point: int, weight: np.ndarray, bias: np.ndarray, strides: tuple[int, int],
    padding: Padding, dilation: tuple[int, int] = (1, 1), groups: int = 1,
) -> np.ndarray:  # fmt: skip
    """Return the int32 sums and bias of a convolution: x NHWC, weight OHWI, sums NHWC."""
    n, ih, iw, ic = x.shape
    oc, kh, kw, _ = weight.shape
    work = Conv2dWorkload(
        n, ic, ih, iw, oc, kh, kw, strides, padding, dilation, groups, data_dtype="int8",
        data_zero_point=zero_point,
    )  # fmt: skip
    nchw, oihw = x.transpose(0, 3, 1, 2), weight.transpose(0, 3, 1, 2)
    return reference.conv2d_accumulator(work, nchw, oihw).transpose(0, 2, 3, 1) + bias


def transposed_sums(
    x: np.ndarray, zero_point: int, weight: np.ndarray, bias: np.ndarray, stride: int,
    padding: Padding, size: tuple[int, int],
) -> np.ndarray:  # fmt: skip
    """Return the sums of a transposed convolution: each element scattered by the kernel."""
    n, ih, iw, _ = x.shape
    oc, kh, kw, _ = weight.shape
    top, left, bottom, right = padding
    full = np.zeros((n, size[0] + top + bottom, size[1] + left + right, oc), "int64")
    scattered = np.einsum("nyxi,ohwi->nyxhwo", x.astype("int64") - zero_point, weight)
    for y, z in np.ndindex(ih, iw):
        at = np.s_[:, y * stride : y * stride + kh, z * stride : z * stride + kw]
        full[at] += scattered[:, y, z]
    return full[:, top : top + size[0], left : left + size[1]] + bias


def requantized(
    sums: np.ndarray, scales: np.ndarray, out: Params, activation: str = "NONE"
) -> np.ndarray:
    """Return sums whose last axis has these scales, one or one a channel, as `out` says."""
    scales = np.broadcast_to(np.asarray(scales, "float64"), sums.shape[-1:])
    steps = [
        multiply_by_multiplier(sums[..., channel], float(scale) / out[0])
        for channel, scale in enumerate(scales)
    ]
    return stored(np.stack(steps, -1), out, activation)


def add(
    a: np.ndarray, b: np.ndarray, params: tuple[Params, Params], out: Params,
    activation: str = "NONE", sign: int = 1,
) -> np.ndarray:  # fmt: skip
    """Return ADD, or with a `sign` of -1 SUB: both to one scale with 20 more bits, added, rounded
    again."""
    twice = 2 * max(params[0][0], params[1][0])
    a, b = (
        multiply_by_multiplier((x.astype("int64") - zero) << 20, scale / twice)
        for x, (scale, zero) in zip((a, b), params, strict=True)
    )
    return stored(multiply_by_multiplier(a + sign * b, twice / (2**20 * out[0])), out, activation)


def multiply(
    a: np.ndarray, b: np.ndarray, params: tuple[Params, Params], out: Params,
    activation: str = "NONE",
) -> np.ndarray:  # fmt: skip
    """Return MUL."""
    (a_scale, a_zero), (b_scale, b_zero) = params
    product = (a.astype("int64") - a_zero) * (b.astype("int64") - b_zero)
    return stored(multiply_by_multiplier(product, a_scale * b_scale / out[0]), out, activation)


def requantize(x: np.ndarray, params: Params, out: Params) -> np.ndarray:
    """Return QUANTIZE of int8."""
    steps = multiply_by_multiplier(x.astype("int64") - params[1], params[0] / out[0])
    return stored(steps, out)


# ---------------------------------------------------------------- pooling, functions


def _windows(x: np.ndarray, kernel: int, stride: int, padding: Padding, fill: int) -> np.ndarray:
    """Return (n, oh, ow, kernel * kernel, c): the windows of an NHWC tensor."""
    top, left, bottom, right = padding
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    views = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (1, 2))
    views = views[:, ::stride, ::stride]
    return np.moveaxis(views.reshape(*views.shape[:4], -1), 3, 4)


def max_pool(x: np.ndarray, kernel: int, stride: int, padding: Padding) -> np.ndarray:
    """Return MAX_POOL_2D."""
    return _windows(x, kernel, stride, padding, -128).max(3)


def average_pool(
    x: np.ndarray, kernel: int, stride: int, padding: Padding, out: Params,
    activation: str = "NONE",
) -> np.ndarray:  # fmt: skip
    """Return AVERAGE_POOL_2D: of a window's elements inside the image, half away from zero."""
    sums = _windows(x.astype("int64"), kernel, stride, padding, 0).sum(3)
    count = _windows(np.ones_like(x, "int64"), kernel, stride, padding, 0).sum(3)
    mean = np.sign(sums) * ((np.abs(sums) + count // 2) // count)
    return stored(mean - out[1], out, activation)


def mean(x: np.ndarray, axes: tuple[int, ...], keep: bool, params: Params, out: Params):
    """Return MEAN."""
    count = math.prod(x.shape[axis] for axis in axes)
    sums = (x.astype("int64") - params[1]).sum(axes, keepdims=keep)
    return stored(multiply_by_multiplier(sums, params[0] / (out[0] * count)), out)


def function(
    x: np.ndarray, params: Params, out: Params, real: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return a function of each element, or of a last axis, computed in real numbers."""
    return quantize(real(dequantize(x, params).astype("float64")), out)


def logistic(x: np.ndarray) -> np.ndarray:
    """Return LOGISTIC's function."""
    return 1 / (1 + np.exp(-x))


def hard_swish(x: np.ndarray) -> np.ndarray:
    """Return HARD_SWISH's function."""
    return x * np.clip(x + 3, 0, 6) / 6


def softmax(x: np.ndarray) -> np.ndarray:
    """Return SOFTMAX's function."""
    power = np.exp(x - x.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)
