"""Scales and zero points: real = scale * (q - zero_point), from ranges and from weights.

Activations are asymmetric per tensor and represent zero exactly, since padding and relu put exact
zeros into them. Weights are symmetric per output channel in [-127, 127]: without -128 the negation
and the pairwise products of older instruction sets stay in range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .. import qparams
from ..workload import DTYPE_RANGE

# Bits of a weight -> its largest value. One bit has no zero, with which kernels fill up channels,
# groups and windows.
WEIGHT_MAX = {8: 127, 7: 63, 4: 7, 2: 1}
# Fewer steps than these: the scale that loses least is smaller than the one that clips nothing.
_FEW = 63
# Parts of the largest weight that are tried for the largest value to stand for.
_CLIPS = np.linspace(1.0, 0.2, 33)
# A bias of more than 2**24 steps is not exact in float32, and near 2**31 it leaves int32.
_BIAS_MAX = 2.0**24


@dataclass(frozen=True)
class QParams(qparams.QParams):
    """Parameters of an activation that we choose ourselves: the zero point is of the type."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = DTYPE_RANGE[self.dtype]
        if not low <= self.zero_point <= high:
            raise ValueError(f"zero_point is {self.zero_point}; allowed: [{low}, {high}]")


def activation_qparams(low: float, high: float, dtype: str, symmetric: bool = False) -> QParams:
    """Return the parameters that represent the reals [low, high] and zero.

    Parameters
    ----------
    low, high : float
        Finite, low <= high.
    dtype : str
        "uint8" or "int8".
    symmetric : bool
        Zero point in the middle (0 for int8): for operands whose zero point must vanish.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"range is ({low}, {high}); allowed: finite low <= high")
    qmin, qmax = DTYPE_RANGE.get(dtype, (0, 0))
    if symmetric:
        middle = (qmin + qmax + 1) // 2
        scale = np.float32(max(abs(low), abs(high)) / (qmax - middle))
        return QParams(float(scale) if _usable(scale) else 1.0, middle, dtype)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / (qmax - qmin)) if qmax > qmin else np.float32(1)
    if not _usable(scale):
        # A tensor that is always zero: any scale will do.
        return QParams(1.0, max(qmin, 0), dtype)
    zero_point = int(np.clip(np.rint(qmin - low / float(scale)), qmin, qmax))
    return QParams(float(scale), zero_point, dtype)


def _usable(scale: np.float32) -> bool:
    # Subnormal scales have no reciprocal in float32.
    return float(scale) >= float(np.finfo("float32").tiny)


@dataclass(frozen=True)
class QuantizedWeight:
    """int8 weights and their float32 scales, (oc,); or one scale, of shape ()."""

    values: np.ndarray
    scale: np.ndarray


def quantize_weight(
    weight: np.ndarray,
    channel_axis: int,
    data_scale: float = 1.0,
    bias: np.ndarray | None = None,
    bits: int = 8,
    per_channel: bool = True,
) -> QuantizedWeight:
    """Return symmetric int8 weights in [-127, 127], [-63, 63], [-7, 7] or [-1, 1].

    A channel whose weights are far smaller than its bias (a channel that training killed) gets a
    scale at which the int32 bias, in steps of ``data_scale * scale``, still fits. With 4 and 2 bits
    the largest weights are clipped where the sum of squared errors is smaller so (Banner et al.,
    "Post training 4-bit quantization of convolutional networks", NeurIPS 2019; here searched).

    Parameters
    ----------
    weight : float32 array
    channel_axis : int
        Axis of the output channels (of length oc).
    data_scale : float
        Scale of the data operand.
    bias : (oc,) float32 array or None
    bits : int
        A key of `WEIGHT_MAX`.
    per_channel : bool
        A scale for each output channel; False: one for all of them, the largest.
    """
    top = WEIGHT_MAX[bits]
    axis = channel_axis % weight.ndim
    rows = weight.shape[axis] if per_channel else 1
    channels = np.moveaxis(weight, axis, 0).reshape(rows, -1)
    scale = np.abs(channels).max(axis=1).astype("float64") / top
    if top < _FEW:
        scale *= _best_clip(channels, scale, top)
    if bias is not None:
        scale = np.maximum(scale, np.abs(bias) / (data_scale * _BIAS_MAX))
    if not per_channel:
        scale = np.asarray(scale.max())
    # All-zero channels without a bias: any scale will do.
    scale = np.where(scale < np.finfo("float32").tiny, 1.0, scale).astype("float32")
    along = [1] * weight.ndim
    along[axis] = -1
    values = np.rint(weight / scale.reshape(along))
    return QuantizedWeight(np.clip(values, -top, top).astype("int8"), scale)


def _best_clip(channels: np.ndarray, scale: np.ndarray, top: int) -> np.ndarray:
    """Return for each row the part of its scale with the smallest sum of squared errors.

    Parameters
    ----------
    channels : (oc, n) float32 array
    scale : (oc,) float64 array
        At which no weight is clipped.
    top : int
        Largest value of a weight.
    """
    best, least = np.ones(len(scale)), np.full(len(scale), np.inf)
    for clip in _CLIPS:
        step = np.where(scale > 0, clip * scale, 1.0).astype("float32")[:, None]
        error = channels - np.clip(np.rint(channels / step), -top, top) * step
        lost = np.einsum("ij,ij->i", error, error)
        best = np.where(lost < least, clip, best)
        least = np.minimum(least, lost)
    return best


def quantize_bias(bias: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return a bias as int32 at ``scale`` (data scale times weight scale), half to even."""
    low, high = DTYPE_RANGE["int32"]
    steps = np.rint(bias.astype("float64") / scale.astype("float64"))
    return np.clip(steps, low, high).astype("int32")
