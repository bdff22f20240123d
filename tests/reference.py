"""The numpy reference of the integer operators: exact int32 accumulation, float32 epilogue.

One implementation, used by every test. It states the arithmetic of `topi_int8.workload` and of
`topi_int8.op` and nothing else: no blocking, no packing, plain NCHW activations and OIHW weights.

>>> ops = random_operands(workload, seed=0)
>>> expected = conv2d(workload, **ops.named())
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import numpy as np

from topi_int8.workload import DTYPE_RANGE, Conv2dWorkload, Epilogue, MatmulWorkload


@dataclass(frozen=True)
class Operands:
    """Arrays of one workload; optional ones are None. NCHW and OIHW, or (B, M, K) and (B, N, K)."""

    data: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None = None
    scale: np.ndarray | None = None
    residual: np.ndarray | None = None

    def named(self) -> dict[str, np.ndarray | None]:
        """Return the operands as keyword arguments of `conv2d` or `matmul`."""
        return dict(self.__dict__)

    def present(self) -> list[np.ndarray]:
        """Return the arrays that are there, in the order data, weight, bias, scale, residual."""
        return [array for array in self.__dict__.values() if array is not None]


def conv2d(
    workload: Conv2dWorkload,
    data: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """Return the NCHW output of a conv2d workload, its border around it.

    Parameters
    ----------
    data : (n, ic, ih, iw)
    weight : (oc, ic // groups, kh, kw)
    bias, scale : (oc,) or None
    residual : (n, oc, oh, ow), with its border, or None
    """
    if residual is not None:
        top, left, _, _ = workload.residual_border
        residual = residual[:, :, top : top + workload.oh, left : left + workload.ow]
    acc = conv2d_accumulator(workload, data, weight)
    out = apply_epilogue(workload.epilogue, acc, bias, scale, residual, channel_axis=1)
    top, left, bottom, right = workload.out_border
    sides = ((0, 0), (0, 0), (top, bottom), (left, right))
    return np.pad(out, sides, constant_values=workload.epilogue.out_zero_point)


def conv2d_accumulator(
    workload: Conv2dWorkload, data: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Return the bare accumulator of a conv2d workload: NCHW int32, or float32 for float32 data."""
    work = workload
    # float64 holds every int32 sum exactly, and its matmul is BLAS.
    x = data.astype("float64") - work.data_zero_point
    w = weight.astype("float64") - work.weight_zero_point
    top, left, bottom, right = work.padding
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    (sh, sw), (dh, dw) = work.strides, work.dilation
    oh, ow, groups = work.oh, work.ow, work.groups
    icg, ocg = work.ic // groups, work.oc // groups
    columns = np.empty((work.n, work.ic, work.kh * work.kw, oh, ow))
    for kh in range(work.kh):
        for kw in range(work.kw):
            h, v = kh * dh, kw * dw
            window = x[:, :, h : h + (oh - 1) * sh + 1 : sh, v : v + (ow - 1) * sw + 1 : sw]
            columns[:, :, kh * work.kw + kw] = window
    columns = columns.reshape(work.n, groups, icg * work.kh * work.kw, oh * ow)
    acc = np.matmul(w.reshape(1, groups, ocg, -1), columns).reshape(work.n, work.oc, oh, ow)
    return _checked_accumulator(acc, work.is_float)


def matmul(
    workload: MatmulWorkload,
    data: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """Return ``(..., M, N)`` of a matmul workload.

    Parameters
    ----------
    data : (..., M, K)
    weight : (N, K) or (..., N, K); (K, N) or (..., K, N) where the workload's transpose_b is False
    bias, scale : (N,) or None
    residual : (..., M, N) or None
    """
    x = data.astype("float64") - workload.data_zero_point
    w = weight.astype("float64") - workload.weight_zero_point
    acc = np.matmul(x, np.swapaxes(w, -1, -2) if workload.transpose_b else w)
    acc = _checked_accumulator(acc, workload.is_float)
    return apply_epilogue(workload.epilogue, acc, bias, scale, residual, channel_axis=-1)


def _checked_accumulator(acc: np.ndarray, is_float: bool) -> np.ndarray:
    if is_float:
        return acc.astype("float32")
    low, high = DTYPE_RANGE["int32"]
    assert acc.size == 0 or (acc.min() >= low and acc.max() <= high), "accumulator leaves int32"
    return acc.astype("int32")


def apply_epilogue(
    epilogue: Epilogue,
    acc: np.ndarray,
    bias: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    channel_axis: int = 1,
) -> np.ndarray:
    """Return the stored value of an accumulator (int32, or float32 for a float32 workload)."""
    given = (bias is not None, scale is not None, residual is not None)
    wanted = (epilogue.bias, epilogue.scale, epilogue.residual_dtype is not None)
    assert given == wanted, f"(bias, scale, residual) given: {given}, in the epilogue: {wanted}"
    per_channel = [1] * acc.ndim
    per_channel[channel_axis] = -1
    v = acc if bias is None else acc + bias.astype(acc.dtype).reshape(per_channel)
    if epilogue.out_dtype == "int32":
        return _saturate(v, epilogue)
    out = v.astype("float32")
    if scale is not None:
        out = out * scale.astype("float32").reshape(per_channel)
    if residual is not None:
        r = residual.astype("float32") - np.float32(epilogue.residual_zero_point)
        out = out + r * np.float32(epilogue.residual_scale)
    if epilogue.out_dtype != "float32":
        out = np.rint(out) + np.float32(epilogue.out_zero_point)
    return _saturate(out, epilogue)


def _saturate(v: np.ndarray, epilogue: Epilogue) -> np.ndarray:
    low, high = epilogue.bounds()
    if low is not None or high is not None:
        v = np.clip(v, low, high)
    return v.astype(epilogue.out_dtype)


def requantize(
    data: np.ndarray,
    *,
    zero_point: int,
    scale: float,
    out_dtype: str,
    out_zero_point: int,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> np.ndarray:
    """Return ``clip(rint((data - zero_point) * scale) + out_zero_point)``, `op.requantize`."""
    v = (data.astype("float32") - np.float32(zero_point)) * np.float32(scale)
    return _store(v, out_dtype, out_zero_point, clip_min, clip_max)


def affine(
    data: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    *,
    zero_point: int,
    out_dtype: str,
    out_zero_point: int,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> np.ndarray:
    """Return ``clip(rint((data - zero_point) * scale + bias) + out_zero_point)``, `op.affine`."""
    v = (data.astype("float32") - np.float32(zero_point)) * scale + bias
    return _store(v, out_dtype, out_zero_point, clip_min, clip_max)


def multiply(
    a: np.ndarray,
    b: np.ndarray,
    *,
    a_zero_point: int,
    b_zero_point: int,
    scale: float,
    out_dtype: str,
    out_zero_point: int,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> np.ndarray:
    """Return ``clip(rint((a-za) * (b-zb) * scale) + zo)``; `topi_int8.op.multiply`."""
    v = (a.astype("float32") - np.float32(a_zero_point)) * np.float32(scale)
    v = v * (b.astype("float32") - np.float32(b_zero_point))
    return _store(v, out_dtype, out_zero_point, clip_min, clip_max)


def lookup(data: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return a table's entries by the bits of 8-bit data; `topi_int8.op.lookup`."""
    return table[data.view("uint8")]


def add(
    a: np.ndarray,
    b: np.ndarray,
    *,
    a_zero_point: int,
    a_scale: float,
    b_zero_point: int,
    b_scale: float,
    out_dtype: str,
    out_zero_point: int,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> np.ndarray:
    """Return ``clip(rint((a-za)*sa + (b-zb)*sb) + zo)``; `topi_int8.op.add`."""
    v = (a.astype("float32") - np.float32(a_zero_point)) * np.float32(a_scale)
    v = v + (b.astype("float32") - np.float32(b_zero_point)) * np.float32(b_scale)
    return _store(v, out_dtype, out_zero_point, clip_min, clip_max)


def avg_pool2d(
    data: np.ndarray,
    *,
    pool_size: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = False,
    zero_point: int,
    scale: float,
    out_dtype: str,
    out_zero_point: int,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> np.ndarray:
    """Return ``clip(rint(mean(data - zi) * scale) + zo)`` over NCHW windows, `op.avg_pool2d`.

    The mean divides by the window's elements inside the image, or with `count_include_pad` inside
    the padded image, as torch does.
    """
    top, left, bottom, right = padding
    (kh, kw), (sh, sw) = pool_size, strides
    n, c, ih, iw = data.shape
    extra = [s - 1 if ceil_mode else 0 for s in strides]
    oh = (ih + top + bottom - kh + extra[0]) // sh + 1
    ow = (iw + left + right - kw + extra[1]) // sw + 1
    x = data.astype("int64") - zero_point
    v = np.empty((n, c, oh, ow), "float32")
    # The window is cut to what counts (divisor) and to the image (sum: padding is a real zero).
    y0, z0, y1, z1 = (0, 0, ih, iw)
    if count_include_pad:
        y0, z0, y1, z1 = (-top, -left, ih + bottom, iw + right)
    for i in range(oh):
        for j in range(ow):
            y, z = i * sh - top, j * sw - left
            count = (min(y + kh, y1) - max(y, y0)) * (min(z + kw, z1) - max(z, z0))
            total = x[:, :, max(y, 0) : min(y + kh, ih), max(z, 0) : min(z + kw, iw)].sum((2, 3))
            v[:, :, i, j] = total.astype("float32") * np.float32(scale / count)
    return _store(v, out_dtype, out_zero_point, clip_min, clip_max)


def _store(
    v: np.ndarray, out_dtype: str, zero_point: int, low: float | None, high: float | None
) -> np.ndarray:
    out = np.rint(v) + np.float32(zero_point) if out_dtype != "float32" else v
    epilogue = Epilogue(
        out_dtype, scale=True, out_zero_point=zero_point, clip_min=low, clip_max=high
    )
    return _saturate(out, epilogue)


# ---------------------------------------------------------------- random operands


def random_operands(
    workload: Conv2dWorkload | MatmulWorkload, seed: int = 0, extreme: bool = False
) -> Operands:
    """Return seeded operands whose outputs fill the output's range and saturate a little.

    With ``extreme`` the integer data and weights take only the smallest and largest value of their
    ranges (in runs of 8), which is what makes a saturating multiply-add wrong. A workload's
    ``weight_range`` is respected; without one, int8 weights take -128 too.
    """
    rng = np.random.default_rng(seed)
    dshape, wshape, oshape, channels, depth = _shapes(workload)
    weight_range = workload.weight_range or DTYPE_RANGE.get(workload.weight_dtype)
    data = _draw(rng, dshape, workload.data_dtype, DTYPE_RANGE.get(workload.data_dtype), extreme)
    weight = _draw(rng, wshape, workload.weight_dtype, weight_range, extreme)
    epi = workload.epilogue
    # The accumulator's spread, estimated from the operands: a sum of `depth` products.
    x = data.astype("float64") - workload.data_zero_point
    w = weight.astype("float64") - workload.weight_zero_point
    spread = float(np.sqrt(depth * np.mean(x**2) * np.mean(w**2))) + 1.0
    bias = scale = residual = None
    if epi.bias:
        bias = rng.normal(0, spread / 2, channels)
        bias = bias.astype("float32") if workload.is_float else np.rint(bias).astype("int32")
    if epi.scale:
        target = 60.0 if epi.out_dtype in ("uint8", "int8") else 1.0
        scale = (target / spread * rng.uniform(0.5, 1.5, channels)).astype("float32")
    if epi.residual_dtype is not None:
        residual = _draw(
            rng, oshape, epi.residual_dtype, DTYPE_RANGE.get(epi.residual_dtype), False
        )
    return Operands(data, weight, bias, scale, residual)


def _draw(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    dtype: str,
    bounds: tuple[int, int] | None,
    extreme: bool,
) -> np.ndarray:
    if bounds is None:
        return rng.normal(0, 1, shape).astype("float32")
    if extreme:
        runs = np.repeat(rng.integers(0, 2, -(-int(np.prod(shape)) // 8)), 8)
        return np.asarray(bounds)[runs[: int(np.prod(shape))]].reshape(shape).astype(dtype)
    return rng.integers(bounds[0], bounds[1] + 1, shape).astype(dtype)


@singledispatch
def _shapes(workload: object) -> tuple:
    """Return (data shape, weight shape, residual shape, output channels, reduction length)."""
    raise TypeError(f"workload is {workload!r}; allowed: Conv2dWorkload, MatmulWorkload")


@_shapes.register
def _(work: Conv2dWorkload) -> tuple:
    icg = work.ic // work.groups
    return (
        (work.n, work.ic, work.ih, work.iw),
        (work.oc, icg, work.kh, work.kw),
        (work.n, work.oc, *work.residual_shape),
        work.oc,
        icg * work.kh * work.kw,
    )


@_shapes.register
def _(work: MatmulWorkload) -> tuple:
    lead = () if work.batch == 1 else (work.batch,)
    nk = (work.n, work.k) if work.transpose_b else (work.k, work.n)
    return ((*lead, work.m, work.k), (*lead, *nk), (*lead, work.m, work.n), work.n, work.k)
