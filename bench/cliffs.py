"""Cliffs: layers that reach far less of the peak than the layer of ResNet most like them.

Nearness is Euclidean distance between (K, output channels, output points, kernel area, stride
area), each in log2, K being the multiply-accumulates of one output: how much a kernel reduces, how
wide and how long it runs, how much of its input it reads again or skips. Convolutions are held
against ResNet-50's, those with groups against MobileNetV2's depthwise ones. A layer too far from
all of them is of another kind and has no neighbour: the 1x1 images of squeeze and excitation, a
microsecond of which the call is most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import dist, log2
from typing import Any

from rich.table import Table

from . import report
from .results import LayerResult
from .shape_lines import ConvShape, find_batch, read_shapes

SHAPES = "cliffs"  # the file of bench/shapes that is run by default
LIMIT = 0.4  # of the neighbour's efficiency
# Beyond it there is no neighbour: 6.5 of one feature is a factor of 90. In bench/shapes/cliffs that
# is squeeze and excitation (6.6 to 10.2), and VGG's 1080p layers with a 3x3 over 3 or 64 channels.
MAX_DISTANCE = 6.5
_NEIGHBOURS, _GROUPED_NEIGHBOURS = "resnet50_v1_5", "mobilenet_v2"


def features(shape: ConvShape) -> tuple[float, ...]:
    """Return the point of a shape: log2 of K, output channels, points, kernel and stride area."""
    area, strides = shape.h.k * shape.w.k, shape.h.s * shape.w.s
    points = shape.mb * shape.h.o * shape.w.o
    return tuple(map(log2, (area * shape.ic // shape.g, shape.oc, points, area, strides)))


@cache
def neighbours(grouped: bool) -> tuple[ConvShape, ...]:
    """Return the layers that others are held against, those with groups or those without."""
    shapes = read_shapes(find_batch(_GROUPED_NEIGHBOURS if grouped else _NEIGHBOURS))
    return tuple(shape for shape in shapes if (shape.g > 1) == grouped)


def nearest(shape: ConvShape) -> tuple[ConvShape, float]:
    """Return the layer nearest to a shape and its distance (1: a factor of two in one feature)."""
    point = features(shape)
    found = min(neighbours(shape.g > 1), key=lambda other: dist(features(other), point))
    return found, dist(features(found), point)


@dataclass(frozen=True)
class Held:
    """A layer held against its neighbour.

    Attributes
    ----------
    layer : LayerResult
    neighbour : LayerResult or None
        None where the nearest is too far to be one.
    distance : float
        Of the nearest.
    """

    layer: LayerResult
    neighbour: LayerResult | None
    distance: float

    @property
    def ratio(self) -> float | None:
        """The layer's share of its peak over the neighbour's; None where either has none."""
        if self.neighbour is None:
            return None
        ours, other = self.layer.peak_percent, self.neighbour.peak_percent
        return None if ours is None or other is None else ours / other

    def is_cliff(self, limit: float = LIMIT) -> bool:
        """Whether the layer falls below `limit` of its neighbour."""
        return self.ratio is not None and self.ratio < limit

    @property
    def is_unknown(self) -> bool:
        """Whether it could not be held: the layer or its neighbour failed, or has no peak."""
        return self.ratio is None and (self.neighbour is not None or self.layer.ours is None)


def plan(
    shapes: Iterable[ConvShape], max_distance: float = MAX_DISTANCE
) -> list[ConvShape]:
    """Return what has to be run: each different shape once, and their neighbours.

    Raises
    ------
    ValueError
        For a 1- or 3-D convolution, which is near to none, or a negative `max_distance`.
    """
    if max_distance < 0:
        raise ValueError(f"max_distance is {max_distance}; allowed: 0 or more")
    found: dict[str, ConvShape] = {}
    for shape in shapes:
        if shape.ndims != 2:
            raise ValueError(f"{shape.format()}: allowed: 2-D convolutions")
        other, distance = nearest(shape)
        for one in (shape, other) if distance <= max_distance else (shape,):
            found.setdefault(_key(one), one)
    return list(found.values())


def _key(shape: ConvShape) -> str:
    """Return a shape's line without its name and count."""
    return replace(shape, name="", count=1).format()


def hold(
    shapes: Sequence[ConvShape],
    results: Iterable[LayerResult],
    max_distance: float = MAX_DISTANCE,
) -> list[Held]:
    """Return each different shape held against its neighbour.

    The worst come first, those without a neighbour after the others, failures last.

    Parameters
    ----------
    results : iterable of LayerResult
        Of what `plan` returned for the same `max_distance`.
    """
    by_key = {_key(result.shape): result for result in results}
    found: dict[str, Held] = {}
    for shape in shapes:
        other, distance = nearest(shape)
        neighbour = by_key[_key(other)] if distance <= max_distance else None
        found.setdefault(_key(shape), Held(by_key[_key(shape)], neighbour, distance))
    return sorted(found.values(), key=lambda one: (one.is_unknown, one.ratio is None, one.ratio))


def table(found: Sequence[Held], title: str, rivals: dict[str, str], limit: float) -> Table:
    """Return one row a layer, cliffs in red."""
    out = Table(title=title, title_justify="left", caption_justify="left", pad_edge=False)
    out.add_column("layer", overflow="fold")
    for column in ("µs", "GOP/s", "% peak"):
        out.add_column(column, justify="right", no_wrap=True)
    for rival in rivals.values():
        out.add_column(f"vs {rival}", justify="right", no_wrap=True)
    out.add_column("neighbour", overflow="fold")
    for column in ("its GOP/s", "its % peak", "distance", "of its efficiency"):
        out.add_column(column, justify="right")
    for held in found:
        out.add_row(
            *_cells(held, rivals), style="red" if held.is_cliff(limit) else None
        )
    cliffs = sum(held.is_cliff(limit) for held in found)
    alone = sum(held.neighbour is None for held in found)
    out.caption = (
        f"{cliffs} of {len(found)} below {limit:g} of their neighbour; {alone} are too far from "
        "all to have one. Distance: in log2 of K, channels, points, kernel and stride area."
    )
    return out


def _cells(held: Held, rivals: dict[str, str]) -> list[str]:
    layer, other = held.layer, held.neighbour
    cells = [layer.shape.format()]
    if layer.ours is None:
        cells += [report.escape(layer.error), "", ""]
    else:
        cells += [
            report.number(layer.ours.min), report.number(layer.gops, 0),
            report.number(layer.peak_percent),
        ]  # fmt: skip
    for name in rivals:
        cells.append(report.times(layer.speedup(name)))
    if other is None:
        return [*cells, "no neighbour", "", "", f"{held.distance:.1f}", ""]
    cells += [
        other.shape.name or other.shape.format(), report.number(other.gops, 0),
        report.number(other.peak_percent), f"{held.distance:.1f}",
        "" if held.ratio is None else f"{held.ratio:.2f}",
    ]  # fmt: skip
    return cells


def to_document(found: Sequence[Held], run: dict[str, Any], limit: float) -> dict[str, Any]:
    """Return the JSON values of a run: the machine and the options, then the layers."""
    return {
        **run,
        "limit": limit,
        "cliffs": [
            {
                **report.record(held.layer), "ratio": held.ratio, "is_cliff": held.is_cliff(limit),
                "distance": held.distance,
                "neighbour": None if held.neighbour is None else report.record(held.neighbour),
            }
            for held in found
        ],
    }  # fmt: skip
