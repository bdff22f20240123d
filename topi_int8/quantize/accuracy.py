"""What an accuracy report holds: per layer and output, how far int8 is from fp32 and why.

`report.accuracy_report` fills it in, `report_view` shows it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

# A layer is worth skipping where its own SQNR is this far below the median of its network's, dB:
# ten times the noise for its signal.
OUTLIER_DECIBEL = 10.0
# And in any network below this: the noise is a fifth of the signal's amplitude.
LEAST_DECIBEL = 15.0
# Shares from which the reason for a skip names one channel, or a cut-off input.
_MOST_NOISE, _CUT_OFF = 0.5, 1e-3


@dataclass(frozen=True)
class Channel:
    """One channel: its index, its SQNR in dB, and its share of the tensor's noise."""

    index: int
    sqnr: float
    noise: float


@dataclass(frozen=True)
class Stored:
    """How a tensor is stored in 8 bits, and what that costs.

    Attributes
    ----------
    tensor : str
        The fp32 tensor.
    dtype : str
        "uint8" or "int8".
    scale, zero_point : float, int
        real = scale * (q - zero_point).
    low, high : float
        The reals at the two ends of the range.
    saturated : float
        Share, 0 to 1, of values that the int8 network stored at an end of the range and whose fp32
        value lies beyond it, by more than the half step of ordinary rounding.
    sqnr : float
        dB, of the fp32 tensor rounded to this range: nothing else wrong with it.
    """

    tensor: str
    dtype: str
    scale: float
    zero_point: int
    low: float
    high: float
    saturated: float
    sqnr: float


@dataclass(frozen=True)
class Accuracy:
    """A tensor of the int8 network beside the fp32 network's, over all inputs.

    Attributes
    ----------
    name : str
        The layer, or "output" and its number.
    tensor : str
        The fp32 tensor compared; a layer's is what its kernel stores: after bias, residual and
        activation.
    sqnr : float
        Signal to quantization noise ratio, dB: ``10 log10(sum r^2 / sum (r - v)^2)``. All errors up
        to here are in it, those of earlier layers too.
    cosine : float
        Cosine of the angle between the two, as vectors.
    max_error : float
        Largest absolute difference.
    stored : Stored or None
        The range it is stored in; None: float32.
    worst_channels : tuple of Channel
        The three of least SQNR, worst first, of those that have a signal.
    """

    name: str
    tensor: str
    sqnr: float
    cosine: float
    max_error: float
    stored: Stored | None
    worst_channels: tuple[Channel, ...]

    @property
    def saturated(self) -> float:
        """Share of saturated values, 0 to 1; see `Stored`."""
        return self.stored.saturated if self.stored else 0.0


@dataclass(frozen=True)
class LayerAccuracy(Accuracy):
    """A conv2d or matmul.

    Attributes
    ----------
    op : str
        "conv2d" or "matmul".
    own_sqnr : float
        SQNR, dB, of this layer alone: on the fp32 network's own tensors, rounded to the ranges of
        its inputs, with its int8 weights and bias, before its output is stored. What earlier layers
        did wrong is not in it; it is what skipping the layer takes away. inf for a float32 layer.
    own_noisiest : Channel or None
        Of that, the channel with most noise.
    inputs : tuple of Stored
        The 8-bit tensors it reads: data, a matmul's second operand, a residual.
    is_int8 : bool
        False: skipped, or nothing that `quantize` can do.
    """

    op: str
    own_sqnr: float
    own_noisiest: Channel | None
    inputs: tuple[Stored, ...]
    is_int8: bool


@dataclass(frozen=True)
class Skip:
    """A layer better left in float32: a ``name`` for `quantize`'s ``skip``, and why."""

    name: str
    own_sqnr: float
    reason: str


@dataclass(frozen=True)
class AccuracyReport:
    """How far an int8 network is from its fp32 one. Printing it prints its table.

    Attributes
    ----------
    layers : tuple of LayerAccuracy
        Every conv2d and matmul, in order.
    outputs : tuple of Accuracy
        The results of ``main``.
    items : int
        Inputs compared on.
    """

    layers: tuple[LayerAccuracy, ...]
    outputs: tuple[Accuracy, ...]
    items: int

    def worst_layers(self, count: int = 5) -> tuple[LayerAccuracy, ...]:
        """Return the int8 layers of least own SQNR, worst first."""
        ranked = sorted((x for x in self.layers if x.is_int8), key=lambda x: x.own_sqnr)
        return tuple(ranked[:count])

    def layers_to_skip(
        self, below: float | None = None, *, limit: int | None = None
    ) -> tuple[Skip, ...]:
        """Return the layers that spoil the result by themselves, worst first, each with a reason.

        A layer is judged by its own SQNR: one that only passes on what earlier layers did wrong is
        not named. ``quantize(..., skip=[s.name for s in report.layers_to_skip()])`` leaves them
        out.

        Parameters
        ----------
        below : float, optional
            Name layers whose own SQNR is less, dB. Default: 10 dB under the median of the int8
            layers, and 15 dB at least.
        limit : int, optional
            At most so many.
        """
        if limit is not None and limit < 0:
            raise ValueError(f"limit is {limit}; allowed: 0 or more, or None")
        int8 = [layer for layer in self.layers if layer.is_int8]
        if not int8:
            return ()
        median = statistics.median(layer.own_sqnr for layer in int8)
        if below is None:
            below = max(median - OUTLIER_DECIBEL, LEAST_DECIBEL)
        found = [layer for layer in self.worst_layers(len(int8)) if layer.own_sqnr < below]
        return tuple(
            Skip(layer.name, layer.own_sqnr, _reason(layer, int8, median))
            for layer in found[:limit]
        )

    def table(self, worst: int | None = None) -> Table:
        """Return a rich table: a row a layer, then the outputs; those to skip are red.

        With ``worst``, only so many layers, those of least own SQNR, worst first.
        """
        from .report_view import table

        return table(self, self.layers if worst is None else self.worst_layers(worst))

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON text, and write it to a file where one is named.

        Infinite decibels are the strings "inf" and "-inf": JSON has no such number.
        """
        from .report_view import to_json

        text = to_json(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, text: str) -> AccuracyReport:
        """Return the report that `to_json` made this text of."""
        from .report_view import from_json

        return from_json(text)

    def plot(self, path: str | Path) -> None:
        """Draw SQNR and saturation of every layer, the worst ones in another colour.

        Parameters
        ----------
        path : str or Path
            Its ending says the format: .png, .svg or .pdf.

        Raises
        ------
        ImportError
            matplotlib is not installed (extra ``bench``).
        ValueError
            Another ending, or no layer to show.
        """
        from .report_view import plot

        plot(self, Path(path))

    def __str__(self) -> str:
        from .report_view import to_text

        return to_text(self)


def _reason(layer: LayerAccuracy, int8: Iterable[LayerAccuracy], median: float) -> str:
    """Return in words why a layer should be skipped: the facts, the strongest first."""
    parts = [
        f"its own SQNR, with exact inputs, is {layer.own_sqnr:.1f} dB (median of the network: "
        f"{median:.1f} dB)"
    ]
    noisiest = layer.own_noisiest
    if noisiest is not None and noisiest.noise > _MOST_NOISE:
        parts.append(f"channel {noisiest.index} makes {noisiest.noise:.0%} of the noise")
    for stored in layer.inputs:
        if stored.saturated > _CUT_OFF:
            parts.append(
                f"its input {stored.tensor} is cut off: {stored.saturated:.1%} of the values lie "
                f"beyond [{stored.low:.4g}, {stored.high:.4g}]"
            )
        others = [
            other.name for other in int8
            if other is not layer and any(x.tensor == stored.tensor for x in other.inputs)
        ]  # fmt: skip
        if others:
            parts.append(f"{stored.tensor} stays in 8 bits for {', '.join(others)} as well")
    return "; ".join(parts)
