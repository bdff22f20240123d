"""``bench bits``: a network with weights and activations of other widths: works, accuracy, speed.

Weights of fewer than 8 bits are int8 in the graph; which layers read them packed is the strategy
table's choice. Beside it stands the same network on a target that cannot unpack, where they are
bytes. What `quantize` refuses stands in the table with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from rich.table import Table
from tvm.target import Target

import topi_int8
from topi_int8.frontend.torch import from_torch
from topi_int8.kernel import UNPACKS

from . import demo, models
from .place import Graph
from .timing import Sampler, Timing, interleave

# Between which a page has the tables.
MARKS = ("<!-- bits -->", "<!-- /bits -->")

# (bits of a weight, type of the activations): the sweep of which this project's seed spoke.
SWEEP: tuple[tuple[int, str], ...] = (
    (8, "uint8"), (7, "uint8"), (4, "uint8"), (2, "uint8"), (1, "uint8"),
    (8, "int8"), (8, "int16"), (8, "int32"),
)  # fmt: skip


@dataclass(frozen=True)
class Widths:
    """One line of the table.

    Attributes
    ----------
    bits : int
        Of a weight.
    activations : str
    refused : str
        Why `quantize` does not make it; empty where it does.
    sqnr : float
        Logits beside torch's fp32, dB, over all images.
    same : (int, int)
        Images of how many on which the first class is torch's.
    packed : (int, int)
        Convolutions and matmuls of how many that read packed weights.
    timing, bytes_timing : Timing or None
        A run; the same on a target that does not unpack, where any weights are packed.
    """

    bits: int
    activations: str
    refused: str = ""
    sqnr: float = 0.0
    same: tuple[int, int] = (0, 0)
    packed: tuple[int, int] = (0, 0)
    timing: Timing | None = None
    bytes_timing: Timing | None = None

    def cells(self) -> list[str]:
        """Return it as a line of the table."""
        head = [str(self.bits), self.activations]
        if self.refused:
            return [*head, f"refused: {self.refused}", "", "", "", "", ""]
        works = "yes"
        times = [f"{t.min / 1e3:.2f}" if t else "" for t in (self.timing, self.bytes_timing)]
        return [
            *head, works, f"{self.sqnr:.1f}", f"{self.same[0]}/{self.same[1]}",
            f"{self.packed[0]}/{self.packed[1]}", *times,
        ]  # fmt: skip


HEADER = (
    "weight bits", "activations", "works", "SQNR of the logits, dB", "top-1 as fp32's",
    "layers on packed weights", "ms", "ms, weights as bytes",
)  # fmt: skip


def without_unpacking(target: Target) -> Target:
    """Return a target that lacks what unpacks weights."""
    config = {key: value for key, value in dict(target.attrs).items() if key != "feature"}
    named = [str(feature) for feature in config.get("mattr", ())]
    config["mattr"] = [name for name in named if name != f"+{UNPACKS}"]
    kept = ("mtriple", "mcpu", "mattr", "num-cores")
    return Target({"kind": "llvm", **{key: config[key] for key in kept if key in config}})


def measure(
    name: str, target: Target, sweep: Sequence[tuple[int, str]] = SWEEP, image: int = 224,
    calibration: int = 16, inputs: int = 16, rounds: int = 5, min_time: float = 1.0,
) -> list[Widths]:  # fmt: skip
    """Return a network's lines.

    Parameters
    ----------
    name : str
        A torchvision classifier.
    target : Target
    sweep : sequence of (int, str)
    image, calibration, inputs : int
        Side of an image; images to calibrate on, and to compare with torch's fp32 on.
    rounds, min_time
        As of `bench e2e`: all variants are sampled in turn.

    Raises
    ------
    RuntimeError
        When packed weights give other logits than the same weights as bytes.
    """
    import torch

    module, example = models.load(name, image=image)
    mod = from_torch(module, example)
    images = models.unseen_images(inputs, image)
    with torch.inference_mode():
        wanted = np.concatenate([module(torch.from_numpy(x)).numpy() for x in images])
    lines, samplers = [], {}
    for bits, activations in sweep:
        try:
            qdq = topi_int8.quantize(
                mod, models.calibration_images(calibration, image), weight_bits=bits,
                activation_dtype=activations, progress=False,
            )  # fmt: skip
        except ValueError as error:
            lines.append(Widths(bits, activations, str(error)))
            continue
        rows = list(topi_int8.explain(qdq, target, show=False))
        packed = sum(row.strategy.endswith(("_2bit", "_4bit")) for row in rows)
        graph = Graph(tvm.compile(qdq, target=target))
        got = np.concatenate([graph(x) for x in images])
        same = int(np.sum(got.argmax(1) == wanted.argmax(1))), len(got)
        line = Widths(
            bits, activations, "", demo.decibel(wanted, got), same, (packed, len(rows))
        )
        samplers[len(lines), "timing"] = graph.sampler(images[0])
        if packed:
            plain = Graph(tvm.compile(qdq, target=without_unpacking(target)))
            if not np.array_equal(plain(images[0]), got[: len(images[0])]):
                raise RuntimeError(f"{name}: packed weights of {bits} bits give other logits")
            samplers[len(lines), "bytes_timing"] = plain.sampler(images[0])
        lines.append(line)
    return _timed(lines, samplers, rounds, min_time)


def _timed(
    lines: list[Widths], samplers: dict[Any, Sampler], rounds: int, min_time: float
) -> list[Widths]:
    timings = interleave(samplers, rounds, min_time / rounds)
    for (at, field), timing in timings.items():
        if isinstance(timing, Exception):
            raise timing
        lines[at] = replace(lines[at], **{field: timing})
    return lines


def table(lines: Sequence[Widths], title: str) -> Table:
    """Return the lines as a table of the terminal."""
    out = Table(title=title, title_justify="left")
    for name in HEADER:
        out.add_column(name)
    for line in lines:
        out.add_row(*line.cells())
    return out


def markdown(lines: Sequence[Widths]) -> str:
    """Return the lines as Markdown."""
    rows = [HEADER, ["---"] * len(HEADER), *(line.cells() for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def put(page: str, tables: str) -> str:
    """Return a page with these tables between its `MARKS`.

    Raises
    ------
    ValueError
        When the page does not have both, once and in order.
    """
    start, end = MARKS
    before, found, rest = page.partition(start)
    _, ended, after = rest.partition(end)
    if not (found and ended) or page.count(start) + page.count(end) != 2:
        raise ValueError(f"the page's marks are not {start} .. {end}; allowed: both, once")
    return f"{before}{start}\n{tables.strip()}\n{end}{after}"
