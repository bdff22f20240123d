"""An accuracy report as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from .accuracy import Accuracy, AccuracyReport, Channel, LayerAccuracy, Stored

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 160  # columns of the text
_ENDINGS = (".png", ".svg", ".pdf")
_HIGHLIGHTED = 5  # layers of least own SQNR that the picture paints otherwise
_ALL_GOOD = 1.1  # how high an infinite SQNR stands, over the highest finite one


# ---------------------------------------------------------------- table


def table(report: AccuracyReport, layers: Sequence[LayerAccuracy]) -> Table:
    """Return the rich table: a row for each of these layers, to skip in red, then the outputs."""
    bad = {skip.name for skip in report.layers_to_skip()}
    some = "" if len(layers) == len(report.layers) else f"; the {len(layers)} worst layers"
    out = Table(
        title=f"int8 beside fp32, {report.items} input{'s'[: report.items != 1]}{some}",
        title_justify="left", caption_justify="left", header_style="bold", pad_edge=False,
        box=box.SIMPLE_HEAD,
    )  # fmt: skip
    out.add_column("layer", no_wrap=True)
    for column in ("SQNR", "own", "cosine", "max error", "saturated"):
        out.add_column(column, justify="right", no_wrap=True)
    out.add_column("worst channels", no_wrap=True)
    for column in ("stored", "range"):
        out.add_column(column, no_wrap=True)
    for column in ("scale", "zero"):
        out.add_column(column, justify="right", no_wrap=True)
    for layer in layers:
        own = number(layer.own_sqnr) if layer.is_int8 else "float32"
        out.add_row(*_cells(layer, own), style="red" if layer.name in bad else None)
    out.add_section()
    for output in report.outputs:
        out.add_row(*_cells(output, ""), style="bold")
    out.caption = (
        "SQNR, dB: what the layer's kernel stores, dequantized, against fp32's; errors of earlier "
        "layers are in it.\nown, dB: the layer alone, on fp32's tensors rounded to its inputs' "
        "ranges, before its result is stored.\nsaturated: stored at an end of the range, and "
        "fp32's value lies beyond it. channels: their SQNR in brackets. zero: the zero point."
    )
    return out


def _cells(accuracy: Accuracy, own: str) -> list[str]:
    stored = accuracy.stored
    worst = ", ".join(f"{c.index} ({number(c.sqnr, 0)})" for c in accuracy.worst_channels)
    cells = [
        accuracy.name, number(accuracy.sqnr), own, f"{accuracy.cosine:.5f}",
        f"{accuracy.max_error:.3g}", f"{accuracy.saturated:.2%}" if stored else "-", worst,
    ]  # fmt: skip
    if stored is None:
        return [*cells, "float32", "", "", ""]
    # No square brackets: rich reads them as a style.
    span = f"{stored.low:.4g} .. {stored.high:.4g}"
    return [*cells, stored.dtype, span, f"{stored.scale:.4g}", str(stored.zero_point)]


def number(decibel: float, digits: int = 1) -> str:
    """Return decibels as tables show them."""
    return f"{decibel:.{digits}f}" if math.isfinite(decibel) else str(decibel)


def to_text(report: AccuracyReport) -> str:
    """Return the table as text."""
    console = Console(width=_WIDTH)
    with console.capture() as capture:
        console.print(report.table())
    return capture.get()


# ---------------------------------------------------------------- JSON


def to_json(report: AccuracyReport) -> str:
    """Return the JSON text of a report."""
    values = asdict(report)
    values["skip"] = [asdict(skip) for skip in report.layers_to_skip()]
    return json.dumps(_plain(values), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_json(text: str) -> AccuracyReport:
    """Return the report of a JSON text; ValueError for a text that holds none."""
    values = json.loads(text)
    try:
        return AccuracyReport(
            tuple(_read(LayerAccuracy, layer) for layer in values["layers"]),
            tuple(_read(Accuracy, output) for output in values["outputs"]),
            values["items"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"text is no accuracy report ({type(error).__name__}: {error}); "
            "allowed: what AccuracyReport.to_json returns"
        ) from error


# How a field is read that is no plain value.
_READERS = {
    "stored": lambda value: None if value is None else _read(Stored, value),
    "inputs": lambda value: tuple(_read(Stored, one) for one in value),
    "worst_channels": lambda value: tuple(_read(Channel, one) for one in value),
    "own_noisiest": lambda value: None if value is None else _read(Channel, value),
    "sqnr": float,
    "own_sqnr": float,
}


def _read(kind: type, values: Mapping[str, Any]) -> Any:
    """Return a dataclass of the report from its JSON values."""
    names = [field.name for field in fields(kind)]
    return kind(**{name: _READERS.get(name, lambda value: value)(values[name]) for name in names})


# ---------------------------------------------------------------- picture


def plot(report: AccuracyReport, path: Path) -> None:
    """Write the picture: bars of SQNR, a dot for the layer's own, below it the saturation."""
    if path.suffix not in _ENDINGS:
        raise ValueError(f"path is {str(path)!r}; allowed: names ending in {', '.join(_ENDINGS)}")
    if not report.layers:
        raise ValueError("the report has no layer to plot; allowed: one conv2d or matmul, or more")
    try:
        # No pyplot: it would ask for a display.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'topi_int8[bench]'") from error
    figure = Figure(figsize=(max(7.0, 0.24 * len(report.layers)), 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _plot_sqnr(top, report)
    saturated = [100 * layer.saturated for layer in report.layers]
    bottom.bar(range(len(saturated)), saturated, color="0.45")
    bottom.set_ylim(0, max(1.1 * max(saturated), 0.1))
    bottom.set_ylabel("saturated, %")
    bottom.set_xticks(
        range(len(report.layers)), [x.name for x in report.layers], rotation=90, fontsize=7
    )
    bottom.set_xlim(-0.8, len(report.layers) - 0.2)
    figure.savefig(path, dpi=150)


def _plot_sqnr(axes: Axes, report: AccuracyReport) -> None:
    layers = report.layers
    worst = {layer.name for layer in report.worst_layers(_HIGHLIGHTED)}
    finite = [x for one in layers for x in (one.sqnr, one.own_sqnr) if math.isfinite(x)]
    top = max([*finite, 1.0]) * _ALL_GOOD
    colors = ["tab:red" if layer.name in worst else "tab:blue" for layer in layers]
    axes.bar(range(len(layers)), [_within(x.sqnr, top) for x in layers], color=colors)
    own = [(i, _within(x.own_sqnr, top)) for i, x in enumerate(layers) if x.is_int8]
    if own:
        axes.plot(*zip(*own, strict=True), "k.", ms=5, label="the layer's own, inputs exact")
    axes.bar(0, 0, color="tab:red", label=f"the {len(worst)} worst by their own")
    axes.set_ylabel("SQNR, dB")
    axes.set_title(_title(report), fontsize=10)
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)


def _within(decibel: float, top: float) -> float:
    """Return where decibels stand in the picture: infinite ones at its edges."""
    return min(decibel, top) if decibel > -math.inf else 0.0


def _title(report: AccuracyReport) -> str:
    results = ", ".join(f"{x.name}: {number(x.sqnr)} dB" for x in report.outputs)
    return f"int8 beside fp32, {report.items} input{'s'[: report.items != 1]}; {results}"
