"""Predictions as a table on the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
from io import StringIO
from typing import Any

from rich.markup import escape
from rich.table import Table

from . import emulated, mca
from .arm_core import Core
from .predict import COLUMNS, GOALS, Prediction, is_dense_conv


def title(core: Core, dtype: str) -> str:
    """Return the table's title."""
    model = mca.model_of(core.mcpu)
    return f"PREDICTED for {core.mcpu} by llvm-mca ({model}), not measured | {dtype}"


CAPTION = (
    "cycles, MACs/cycle: one pass of the inner loop, all loads hitting the first cache, branches "
    "foreseen. % mix: of the same multiplies if nothing held them up (goal: {goal}). % issue: of "
    "all its instructions if none waited for another. % core: of the core's best int8 (float32) "
    "stream, {peak}. spills: stack accesses in any multiplying loop."
)


def table(predictions: list[Prediction], core: Core, dtype: str) -> Table:
    """Return the rich table of predictions; red where a goal is missed."""
    goal = None if dtype == "f32" else GOALS.get(core.isa)
    peaks = [p.core_peak for p in predictions if p.core_peak]
    caption = CAPTION.format(
        goal=f"{goal:.0f}" if goal else "none",
        peak=f"{peaks[0]:.1f} MACs/cycle" if peaks else "unknown",
    )
    out = Table(
        title=title(core, dtype), caption=caption, title_justify="left",
        caption_justify="left", header_style="bold", pad_edge=False,
    )  # fmt: skip
    out.add_column("layer", no_wrap=True)
    out.add_column("count", justify="right")
    out.add_column("strategy / intrinsic", overflow="fold", min_width=24)
    whole = any(p.whole for p in predictions)
    names = ["cycles", "MACs", "MACs/cycle", "% mix", "% issue", "% core", "ld,st/kMAC"]
    for name in [*names, "spills", *["layer kcyc", "MACs/cyc"] * whole]:
        out.add_column(name, justify="right")
    for prediction in predictions:
        out.add_row(*_row(prediction, goal, whole))
    good = [p for p in predictions if p.analysis is not None]
    if good:
        out.add_section()
        out.add_row(*_summary(good), style="bold")
    return out


def _row(prediction: Prediction, goal: float | None, whole: bool) -> list[str]:
    shape, values = prediction.shape, prediction.record()
    chosen = "\n".join(part for part in (prediction.strategy, prediction.intrinsic) if part)
    head = [shape.name or shape.format(), str(shape.count), escape(chosen)]
    if prediction.analysis is None:
        return [*head[:2], f"[red]{escape(prediction.error)}[/red]"]
    inner = prediction.analysis.inner
    percent = f"{inner.percent:.0f}"
    if goal is not None and is_dense_conv(prediction) and inner.percent < goal:
        percent = f"[red]{percent}[/red]"
    spills = str(values["spills"])
    cells = [
        *head, f"{inner.cycles:.1f}", str(inner.macs), f"{inner.macs_per_cycle:.2f}", percent,
        f"{inner.issue_percent:.0f}",
        f"{prediction.core_percent:.0f}",
        f"{values['loads_per_kmac']:.0f},{values['stores_per_kmac']:.0f}",
        spills if spills == "0" else f"[red]{spills}[/red]",
    ]  # fmt: skip
    return [*cells, *_whole_cells(prediction.whole, shape.macs)] if whole else cells


def _whole_cells(kernel: emulated.WholeKernel | None, macs: int) -> list[str]:
    if kernel is None:
        return ["", ""]
    return [f"{kernel.cycles / 1e3:,.0f}", f"{macs / kernel.cycles:.2f}"]


def _summary(good: list[Prediction]) -> list[str]:
    dense = [p for p in good if is_dense_conv(p)] or good
    lowest = min(p.analysis.inner.percent for p in dense)
    core = min(p.core_percent or 0.0 for p in dense)
    spills = sum(p.analysis.spills for p in good)
    cells = ["lowest (1x1, 3x3), sums", str(sum(p.shape.count for p in good)), "", "", "", ""]
    ports = min(p.analysis.inner.issue_percent for p in dense)
    cells += [f"{lowest:.0f}", f"{ports:.0f}", f"{core:.0f}", "", str(spills)]
    layers = [(p.shape.count, p.shape.macs, p.whole.cycles) for p in good if p.whole]
    if not layers:
        return cells
    cycles = sum(count * each for count, _, each in layers)
    macs = sum(count * each for count, each, _ in layers)
    return [*cells, f"{cycles / 1e3:,.0f}", f"{macs / cycles:.2f}"]


def to_csv(predictions: list[Prediction]) -> str:
    """Return CSV of `COLUMNS`."""
    out = StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for prediction in predictions:
        values = prediction.record()
        writer.writerow({k: "" if v is None else v for k, v in values.items()})
    return out.getvalue()


def to_json(predictions: list[Prediction], run: dict[str, Any]) -> str:
    """Return JSON: `run`, then each layer with all its multiplying loops."""
    layers = []
    for prediction in predictions:
        loops = prediction.analysis.loops if prediction.analysis else ()
        layers.append({**prediction.record(), "loops": [loop.record() for loop in loops]})
    return json.dumps({**run, "predicted": True, "layers": layers}, indent=2) + "\n"
