"""A roofline picture of a run: what each layer reached beside what computing and memory allow.

After Williams, Waterman, Patterson: Roofline (CACM 2009). The bounds are measured on the machine of
the run: the peaks stand beside the layers (`peaks`), the bandwidths are `bandwidth`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from . import bandwidth, workloads
from .shape_lines import parse_line
from .workloads import Workload

# Markers of the rivals, in the order a document names them; ours is a dot.
_MARKERS = ("x", "+", "^", "s")


@dataclass(frozen=True)
class Point:
    """A layer in the picture.

    Parameters
    ----------
    name : str
    intensity : float
        Operations a byte: two a MAC, each operand and result once.
    gops : float or None
        Ours, GOP/s; None where ours failed.
    rivals : dict of str to float
        Theirs, GOP/s.
    """

    name: str
    intensity: float
    gops: float | None
    rivals: dict[str, float]


def moved_bytes(workload: Workload) -> int:
    """Return the bytes of a workload's operands and result, each once; the bias and scale are few
    and left out.
    """
    data, weight, out, _ = workloads.shapes_of(workload)
    epilogue = workload.epilogue
    tensors = [
        (data, workload.data_dtype), (weight, workload.weight_dtype), (out, epilogue.out_dtype),
    ]  # fmt: skip
    if epilogue.residual_dtype:
        tensors.append((out, epilogue.residual_dtype))
    return sum(prod(shape) * np.dtype(dtype).itemsize for shape, dtype in tensors)


def points(document: Mapping[str, Any]) -> list[Point]:
    """Return the layers of a document of `bench conv` or `bench dense` that anyone could run."""
    options = document["options"]
    epilogue = "" if options["epilogue"] == "default" else options["epilogue"]
    found = []
    for row in document["layers"]:
        rivals = {
            name: 2 * row["macs"] / rival["min_us"] / 1e3
            for name, rival in row["rivals"].items()
            if rival["min_us"]
        }
        if row["gops"] is None and not rivals:
            continue
        shape = parse_line(row["line"])
        work = workloads.make(shape, options["dtype"], epilogue, options["weight_bits"])
        intensity = 2 * row["macs"] / moved_bytes(work)
        found.append(Point(row["name"] or row["line"], intensity, row["gops"], rivals))
    return found


def bounds(document: Mapping[str, Any]) -> dict[str, float]:
    """Return GOP/s of each compute peak of the run, by the loop it was measured with."""
    found: dict[str, float] = {}
    for row in document["layers"]:
        if row["peak_gops"]:
            loop = row["peak_loop"]
            found[loop] = max(found.get(loop, 0.0), row["peak_gops"])
    return found


def bandwidths(threads: int, cpu: int, seconds: float = 0.25) -> dict[str, float]:
    """Return GB/s by level, of the cores used; empty where this CPU has no loop.

    Second-level caches are a core's own, and count once a thread. Memory is shared: one core's
    reads are what is measured, and what is stated.
    """
    found = {}
    for level in bandwidth.levels(cpu):
        speed = bandwidth.measure(level, seconds)
        if speed is not None:
            found[level.name] = speed * (threads if level.name == "L2" else 1)
    return found


def draw(path: Path, document: Mapping[str, Any]) -> None:
    """Write the picture of a document: its `bandwidth_gbs`, peaks and layers.

    The format follows the name: .png, .svg or .pdf.

    Raises
    ------
    ValueError
        When the document has no layer to show, or the name no such ending.
    """
    # No pyplot: it would ask for a display.
    from matplotlib.figure import Figure

    shown = points(document)
    if not shown:
        raise ValueError("roofline: no layer was measured; allowed: one or more")
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    intensities = [point.intensity for point in shown]
    span = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
    _draw_bounds(axes, span, bounds(document), document.get("bandwidth_gbs", {}))
    _draw_points(axes, shown, list(document.get("rivals", {})))
    options, machine = document["options"], document["machine"]
    axes.set_xlabel("operations a byte (each operand and the result once)")
    axes.set_ylabel("GOP/s")
    axes.set_title(
        f"{machine['cpu']}, {options['threads']} thread{'s'[: options['threads'] > 1]}, "
        f"{options['dtype']}, {machine['date'][:10]}",
        fontsize=10,
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def _draw_bounds(
    axes: Any, span: np.ndarray, peaks: Mapping[str, float], speeds: Mapping[str, float]
) -> None:
    """Draw the roofs over a span of intensities: flat ones, and those that end at the highest."""
    text = {"textcoords": "offset points", "fontsize": 8, "color": "0.3"}
    top = max(peaks.values(), default=np.inf)
    for name, speed in speeds.items():
        roof = np.minimum(speed * span, top)
        axes.plot(span, roof, lw=1, color="0.5")
        axes.annotate(f"{name}, {speed:.0f} GB/s", (span[0], roof[0]), xytext=(2, 10), **text)
    for name, peak in peaks.items():
        axes.plot(span, np.full_like(span, peak), lw=1, ls="--", color="0.3")
        at = (span[-1], peak)
        axes.annotate(f"{name}, {peak:,.0f} GOP/s", at, xytext=(-2, 3), ha="right", **text)


def _draw_points(axes: Any, shown: list[Point], rivals: list[str]) -> None:
    ours = [(point.intensity, point.gops) for point in shown if point.gops is not None]
    if ours:
        axes.scatter(*zip(*ours, strict=True), marker="o", s=28, label="topi_int8", zorder=3)
    for index, name in enumerate(rivals):
        theirs = [(p.intensity, p.rivals[name]) for p in shown if name in p.rivals]
        if theirs:
            marker = _MARKERS[index % len(_MARKERS)]
            axes.scatter(*zip(*theirs, strict=True), marker=marker, s=28, label=name, zorder=2)
    for point in shown:
        if point.gops is not None:
            axes.annotate(
                point.name, (point.intensity, point.gops), xytext=(4, -8), fontsize=6,
                textcoords="offset points",
            )  # fmt: skip
