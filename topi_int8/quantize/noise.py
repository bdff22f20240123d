"""Sums over streams of tensor pairs, a reference and what stands for it: SQNR, cosine, saturation.

Each is fed one input's tensors at a time and keeps a few numbers a channel, no tensors.
"""

from __future__ import annotations

import math

import numpy as np

from ..qparams import QParams
from ..workload import DTYPE_RANGE


def decibel(signal: float, noise: float) -> float:
    """Return ``10 log10(signal / noise)``: inf without noise, -inf without a signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


class Noise:
    """How far values are from their references.

    Parameters
    ----------
    channel_axis : int or None
        Axis of the channels that are told apart; None: there is one.
    """

    def __init__(self, channel_axis: int | None = None) -> None:
        self._axis = channel_axis
        # By channel: sums of r^2 and (r - v)^2.
        self._signal: np.ndarray | float = 0.0
        self._noise: np.ndarray | float = 0.0
        self._product = self._values = 0.0
        self.max_error = 0.0

    def update(self, reference: np.ndarray, values: np.ndarray) -> None:
        """Take in one input's tensors, of one shape; empty ones change nothing."""
        if not reference.size:
            return
        r, v = self._by_channel(reference), self._by_channel(values)
        difference = r - v
        self._signal = self._signal + np.einsum("cx,cx->c", r, r)
        self._noise = self._noise + np.einsum("cx,cx->c", difference, difference)
        self._product += float(np.vdot(r, v))
        self._values += float(np.vdot(v, v))
        self.max_error = max(self.max_error, float(np.abs(difference).max()))

    def _by_channel(self, tensor: np.ndarray) -> np.ndarray:
        """Return a tensor as float64 (channels, everything else)."""
        if self._axis is None or tensor.ndim == 0:
            return tensor.reshape(1, -1).astype("float64")
        moved = np.moveaxis(tensor, self._axis, 0).astype("float64")
        return moved.reshape(len(moved), -1)

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise ratio, dB: ``10 log10(sum r^2 / sum (r - v)^2)``."""
        return decibel(float(np.sum(self._signal)), float(np.sum(self._noise)))

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the tensors as vectors; 1 where both are all zero."""
        lengths = math.sqrt(float(np.sum(self._signal)) * self._values)
        if lengths == 0:
            return 1.0 if float(np.sum(self._noise)) == 0 else 0.0
        return self._product / lengths

    def worst(self, count: int) -> list[tuple[int, float, float]]:
        """Return (channel, SQNR in dB, share of all noise) of those of least SQNR, worst first.

        Channels without noise are left out, and those that are all zero in the reference: dead ones
        would stand before all others with -inf dB, however little noise they have.
        """
        alive = [channel for channel in self._noisy_channels() if channel[1] > -math.inf]
        return sorted(alive, key=lambda channel: channel[1])[:count]

    def noisiest(self) -> tuple[int, float, float] | None:
        """Return the same of the channel with most noise, dead ones too; None without noise."""
        return max(self._noisy_channels(), key=lambda channel: channel[2], default=None)

    def _noisy_channels(self) -> list[tuple[int, float, float]]:
        noise = np.atleast_1d(self._noise)
        total = float(noise.sum())
        return [
            (index, decibel(float(s), float(n)), float(n) / total)
            for index, (s, n) in enumerate(zip(np.atleast_1d(self._signal), noise, strict=True))
            if n > 0
        ]


class Rounding:
    """What storing one tensor in 8 bits costs: saturation in the int8 network, rounding alone.

    Parameters
    ----------
    params : QParams
    """

    def __init__(self, params: QParams) -> None:
        self.params = params
        self._alone = Noise()
        self._count = self._saturated = 0
        low, high = DTYPE_RANGE[params.dtype]
        self.low, self.high = (float(x) for x in params.dequantize(np.array([low, high])))

    def update(self, reference: np.ndarray, stored: np.ndarray) -> np.ndarray:
        """Take in one input's fp32 tensor and what the int8 network stored, dequantized.

        Returns the fp32 tensor rounded to this range.

        A value is saturated where it is stored at an end of the range and its fp32 value lies
        beyond that end by more than the half step that rounding would bring there.
        """
        half = self.params.scale / 2
        above = (reference > self.high + half) & (stored > self.high - half)
        below = (reference < self.low - half) & (stored < self.low + half)
        self._saturated += int(np.count_nonzero(above) + np.count_nonzero(below))
        self._count += reference.size
        rounded = self.params.dequantize(self.params.quantize(reference))
        self._alone.update(reference, rounded)
        return rounded

    @property
    def saturated(self) -> float:
        """Share of saturated values, 0 to 1."""
        return self._saturated / self._count if self._count else 0.0

    @property
    def sqnr(self) -> float:
        """SQNR, dB, of the fp32 values quantized and dequantized: this tensor's own rounding."""
        return self._alone.sqnr
