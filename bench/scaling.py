"""How the cost of a few layers grows with the batch, the size of the image, and the channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from . import report
from .results import LayerResult
from .shape_lines import ConvShape, parse_line

# One of each family that ResNet and MobileNet are made of.
BASES: tuple[ConvShape, ...] = tuple(
    parse_line(line)
    for line in (
        'ic64ih56oc64kh3ph1n"3x3"', 'ic256ih14oc1024kh1n"1x1"',
        'g192ic192ih28oc192kh3ph1n"depthwise"',
    )
)  # fmt: skip

# What is varied, and the values by default: powers of two, and channels that fill no block up.
AXES: Mapping[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "image": (7, 14, 28, 56, 112),
    "channels": (16, 17, 32, 33, 64, 100, 128, 256, 257, 512, 1024),
}


@dataclass(frozen=True)
class Case:
    """A layer with one thing varied.

    Parameters
    ----------
    base : ConvShape
    axis : str
        A key of `AXES`.
    value : int
        The batch, the side of the image, or the input channels; output channels keep their ratio.
    """

    base: ConvShape
    axis: str
    value: int

    def __post_init__(self) -> None:
        if self.axis not in AXES:
            raise ValueError(f"axis is {self.axis!r}; allowed: {', '.join(AXES)}")
        if self.value < 1:
            raise ValueError(f"{self.axis} is {self.value}; allowed: 1 or more")

    @property
    def shape(self) -> ConvShape:
        """The layer."""
        base, value = self.base, self.value
        if self.axis == "batch":
            return replace(base, mb=value)
        if self.axis == "image":
            axis = base.h
            out = (value + 2 * axis.p - axis.extent) // axis.s + 1
            axis = replace(axis, i=value, o=out)
            return replace(base, h=axis, w=axis)
        groups = value if base.g > 1 else 1
        return replace(base, ic=value, oc=value * base.oc // base.ic, g=groups)


def cases(axes: Mapping[str, Sequence[int]], bases: Sequence[ConvShape] = BASES) -> list[Case]:
    """Return every base with each axis' values."""
    return [Case(base, axis, v) for base in bases for axis, values in axes.items() for v in values]


def table(found: Sequence[tuple[Case, LayerResult]], title: str, rivals: dict[str, str]) -> Table:
    """Return one row a case; a section a layer and axis."""
    out = Table(title=title, title_justify="left", pad_edge=False)
    for column in ("layer", "varied"):
        out.add_column(column, no_wrap=True)
    for column in ("", "µs", "µs/image", "GOP/s", "% peak"):
        out.add_column(column, justify="right")
    for rival in rivals.values():
        out.add_column(f"vs {rival}", justify="right")
    before = None
    for case, result in found:
        group = case.base.name, case.axis
        if before not in (None, group):
            out.add_section()
        before = group
        cells = [*group, str(case.value)]
        if result.ours is None:
            cells += [report.escape(result.error), "", "", ""]
        else:
            each = result.ours.min / result.shape.mb
            cells += [
                report.number(result.ours.min), report.number(each),
                report.number(result.gops, 0), report.number(result.peak_percent),
            ]  # fmt: skip
        out.add_row(*cells, *(report.times(result.speedup(name)) for name in rivals))
    return out


def to_document(
    found: Sequence[tuple[Case, LayerResult]], run: dict[str, Any]
) -> dict[str, Any]:
    """Return the JSON values of a run: the machine and the options, then the cases."""
    return {
        **run,
        "scaling": [
            {
                "layer": case.base.name, "axis": case.axis, "value": case.value,
                **report.record(result),
            }
            for case, result in found
        ],
    }  # fmt: skip


def draw(path: Path, document: Mapping[str, Any]) -> None:
    """Write the picture of a document: cost above, GOP/s below, one column an axis.

    The format follows the name: .png, .svg or .pdf.

    Raises
    ------
    ValueError
        When no case was measured, or the name has no such ending.
    """
    # No pyplot: it would ask for a display.
    from matplotlib.figure import Figure

    rows = [row for row in document["scaling"] if row["min_us"]]
    if not rows:
        raise ValueError("scaling: nothing was measured; allowed: one case or more")
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure = Figure(figsize=(4.5 * len(axes), 7), layout="constrained")
    grid = figure.subplots(2, len(axes), sharex="col", squeeze=False)
    for column, axis in enumerate(axes):
        for layer in layers:
            line = [row for row in rows if (row["layer"], row["axis"]) == (layer, axis)]
            for place, field in zip(grid[:, column], ("min_us", "gops"), strict=True):
                place.plot(
                    [row["value"] for row in line], [row[field] for row in line], marker="o",
                    ms=3, lw=1, label=layer,
                )  # fmt: skip
        for place in grid[:, column]:
            place.set_xscale("log", base=2)
            place.set_yscale("log")
            place.grid(True, which="both", alpha=0.2)
        grid[1, column].set_xlabel(axis)
    for row, label in enumerate(("µs a run", "GOP/s")):
        grid[row, 0].set_ylabel(label)
    grid[0, 0].legend()
    options, machine = document["options"], document["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {options['threads']} thread{'s'[: options['threads'] > 1]}, "
        f"{options['dtype']}, {machine['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
