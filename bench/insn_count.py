"""``bench count``: instructions that whole layers execute under qemu, beside onnxruntime's.

Counts, not times: exact, the same on every machine, and blind to what an instruction costs.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from math import exp, log
from typing import Any

from rich.markup import escape
from rich.table import Table

from topi_int8.workload import Conv2dWorkload

from . import emulated, predict, workloads
from .arm_core import Core
from .rivals import ort_arm
from .shape_lines import Shape

COLUMNS = ("name", "line", "count", "macs", "strategy", "instructions", "ort", "ratio", "error")


@dataclass(frozen=True)
class LayerCount:
    """Instructions of one layer: ours and onnxruntime's, or the words for why there are none."""

    shape: Shape
    strategy: str = ""
    instructions: int | None = None
    ort: int | None = None
    error: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over onnxruntime's: below 1 we execute fewer."""
        return self.instructions / self.ort if self.instructions and self.ort else None

    def record(self) -> dict[str, Any]:
        """Return the row of the CSV and JSON."""
        return {
            "name": self.shape.name, "line": self.shape.format(), "count": self.shape.count,
            "macs": self.shape.macs, "strategy": self.strategy,
            "instructions": self.instructions, "ort": self.ort, "ratio": self.ratio,
            "error": self.error,
        }  # fmt: skip


def count_layers(
    shapes: Sequence[Shape], core: Core, dtype: str = "u8s8", cpu: str = "", rival: bool = True
) -> tuple[list[LayerCount], str]:
    """Return the counts of each layer, and onnxruntime's version ("" without it).

    Parameters
    ----------
    dtype : str
        "u8s8" or "s8s8"; the output has the data's type.
    cpu : str
        QEMU's CPU; by default the one with the target's instruction set.
    rival : bool
        Whether to run onnxruntime.

    Raises
    ------
    bench.emulated.EmulatorError
        When QEMU, a compiler or onnxruntime is missing.
    """
    if dtype not in ("u8s8", "s8s8"):
        raise ValueError(f"dtype is {dtype!r}; allowed: u8s8, s8s8")
    cpu = cpu or core.qemu_cpu
    epilogue = "bias+u8" if dtype == "u8s8" else "bias+s8"
    works = [workloads.make(shape, dtype, epilogue) for shape in shapes]
    if not all(isinstance(work, Conv2dWorkload) for work in works):
        raise ValueError("convolutions are counted only")
    version, others = "", [""] * len(works)
    if rival:
        version, others = ort_arm.count(works, cpu)
    found = []
    for shape, work, other in zip(shapes, works, others, strict=True):
        decision, module = predict.compile_layer(work, core.target)
        tensors = emulated.tensor_arguments(decision.kernel().func)
        ort, error = (other, "") if isinstance(other, int) else (None, other)
        ours = None
        try:
            asm = module.mod.inspect_source("asm")
            ours = emulated.execute(asm, tensors, cpu).instructions
        except emulated.EmulatorError as failure:
            error = str(failure)
        found.append(LayerCount(shape, decision.strategy, ours, ort, error))
    return found, version


def geomean(counts: Sequence[LayerCount]) -> float | None:
    """Return the geometric mean of the ratios, each row once."""
    ratios = [count.ratio for count in counts if count.ratio]
    return exp(sum(map(log, ratios)) / len(ratios)) if ratios else None


def table(counts: Sequence[LayerCount], title: str) -> Table:
    """Return the rich table."""
    out = Table(
        title=title, title_justify="left", header_style="bold", pad_edge=False,
        caption="one call, one thread; layout transforms on neither side; ratio below 1: ours "
        "executes fewer.", caption_justify="left",
    )  # fmt: skip
    out.add_column("layer", no_wrap=True)
    out.add_column("count", justify="right")
    out.add_column("strategy")
    for name in ("MMACs", "ours kinsn", "MACs/insn", "onnxruntime kinsn", "ours / ort"):
        out.add_column(name, justify="right")
    for count in counts:
        out.add_row(*_row(count))
    mean = geomean(counts)
    if mean:
        out.add_section()
        out.add_row("geomean", "", "", "", "", "", "", f"{mean:.2f}x", style="bold")
    return out


def _row(count: LayerCount) -> list[str]:
    shape = count.shape
    ours, ort, ratio = count.instructions, count.ort, count.ratio
    return [
        escape(shape.name or shape.format()), str(shape.count), escape(count.strategy),
        f"{shape.macs / 1e6:,.1f}", f"{ours / 1e3:,.0f}" if ours else "",
        f"{shape.macs / ours:.1f}" if ours else "",
        f"{ort / 1e3:,.0f}" if ort else escape(count.error), f"{ratio:.2f}x" if ratio else "",
    ]  # fmt: skip


def to_csv(counts: Sequence[LayerCount]) -> str:
    """Return CSV of `COLUMNS`."""
    out = StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for count in counts:
        writer.writerow({k: "" if v is None else v for k, v in count.record().items()})
    return out.getvalue()


def to_json(counts: Sequence[LayerCount], run: dict[str, Any]) -> str:
    """Return JSON: `run`, the layers, the geometric mean."""
    document = {**run, "layers": [c.record() for c in counts], "geomean": geomean(counts)}
    return json.dumps(document, indent=2) + "\n"
