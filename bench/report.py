"""Results as a table on the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
from io import StringIO

from rich.table import Table

from .results import LayerResult, Totals, totals

CSV_COLUMNS = (
    "name", "line", "count", "macs", "strategy", "intrinsic", "min_us", "median_us", "gops",
    "peak_gops", "peak_loop", "peak_percent", "checked", "error",
)  # fmt: skip


def number(value: float | None, digits: int = 1) -> str:
    """Return a number as tables show it; nothing for None."""
    return "" if value is None else f"{value:,.{digits}f}"


def times(value: float | None) -> str:
    """Return a ratio as tables show it; nothing for None."""
    return "" if value is None else f"{value:.2f}x"


def table(
    results: list[LayerResult], title: str, rivals: dict[str, str], caption: str = ""
) -> Table:
    """Return the rich table of results.

    Parameters
    ----------
    rivals : dict of str to str
        {name: title} of the rivals to show: for each its µs and its time over ours (above 1 we are
        faster).
    """
    out = Table(
        title=title, caption=caption or None, title_justify="left", caption_justify="left",
        header_style="bold", pad_edge=False,
    )  # fmt: skip
    for name in ("layer", "count"):
        out.add_column(name, justify="right" if name == "count" else "left", no_wrap=True)
    out.add_column("MMACs", justify="right", no_wrap=True)
    out.add_column("strategy / intrinsic", overflow="fold", min_width=28)
    for name in ("min µs", "median µs", "GOP/s", "% peak"):
        out.add_column(name, justify="right", no_wrap=True)
    for rival in rivals.values():
        out.add_column(f"{rival} µs", justify="right", overflow="fold")
        out.add_column(f"vs {rival}", justify="right", no_wrap=True)
    for result in results:
        out.add_row(*_row(result, rivals))
    sums = totals(results)
    if sums.layers:
        out.add_section()
        out.add_row(*_total_row(sums, rivals), style="bold")
        out.add_row(*_geomean_row(sums, rivals), style="bold")
    return out


def _row(result: LayerResult, rivals: dict[str, str]) -> list[str]:
    shape = result.shape
    chosen = "\n".join(part for part in (result.strategy, result.intrinsic) if part)
    cells = [shape.name or shape.format(), str(shape.count), number(shape.macs / 1e6)]
    if result.ours is None:
        cells += [f"[red]{escape(result.error)}[/red]", *[""] * 4]
    else:
        mark = " ✓" if result.checked else ""
        cells += [
            escape(chosen) + mark, number(result.ours.min), number(result.ours.median),
            number(result.gops), number(result.peak_percent),
        ]  # fmt: skip
    for name in rivals:
        cells += _rival_cells(result, name)
    return cells


def _rival_cells(result: LayerResult, name: str) -> list[str]:
    rival = result.rivals.get(name)
    if rival is None:
        return ["", ""]
    if rival.timing is None:
        return [escape(rival.note), ""]
    few = "~" if rival.note == "~" else ""
    # oneDNN's plain loops: it has no kernel for this layer.
    plain = " ref" if rival.note.startswith("ref") else ""
    ratio = result.speedup(name)
    return [few + number(rival.timing.min) + plain, few + times(ratio) if ratio else ""]


def _total_row(sums: Totals, rivals: dict[str, str]) -> list[str]:
    cells = ["total (count x min)", str(sums.layers), number(sums.macs / 1e6), ""]
    cells += [number(sums.us), "", number(sums.gops), ""]
    for name in rivals:
        cells += [number(sums.rival_us.get(name)), times(sums.ratio.get(name))]
    return cells


def _geomean_row(sums: Totals, rivals: dict[str, str]) -> list[str]:
    cells = ["geomean", *[""] * 7]
    for name in rivals:
        rows = sums.rows.get(name)
        cells += [f"{rows} rows" if rows else "", times(sums.geomean.get(name))]
    return cells


def escape(text: str) -> str:
    """Return text that Rich prints as it is: it reads [word] as a style."""
    return text.replace("[", r"\[")


def record(result: LayerResult) -> dict[str, object]:
    """Return a result as JSON values: the columns of the CSV, what declined, and the rivals."""
    ours, shape = result.ours, result.shape
    values: dict[str, object] = {
        "name": shape.name,
        "line": shape.format(),
        "count": shape.count,
        "macs": shape.macs,
        "strategy": result.strategy,
        "intrinsic": result.intrinsic,
        "min_us": ours and ours.min,
        "median_us": ours and ours.median,
        "gops": result.gops,
        "peak_gops": result.peak_gops,
        "peak_loop": result.peak_loop,
        "peak_percent": result.peak_percent,
        "checked": result.checked,
        "error": result.error,
        "declined": [list(pair) for pair in result.declined],
        "rivals": {},
    }
    for name, rival in result.rivals.items():
        values["rivals"][name] = {
            "min_us": rival.timing and rival.timing.min,
            "median_us": rival.timing and rival.timing.median,
            "speedup": result.speedup(name),
            "note": rival.note,
        }
    return values


def to_csv(results: list[LayerResult], rivals: dict[str, str]) -> str:
    """Return CSV with a header: `CSV_COLUMNS`, then four columns a rival."""
    fields = ("min_us", "median_us", "speedup", "note")
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*CSV_COLUMNS, *(f"{name}_{f}" for name in rivals for f in fields)])
    for result in results:
        values = record(result)
        row = [values[column] for column in CSV_COLUMNS]
        for name in rivals:
            row += [values["rivals"].get(name, {}).get(f) for f in fields]
        writer.writerow(["" if value is None else value for value in row])
    return out.getvalue()


def to_document(results: list[LayerResult], run: dict[str, object]) -> dict[str, object]:
    """Return the JSON values of a run: `run` (the machine and the options), layers, totals."""
    sums = totals(results)
    return {
        **run,
        "layers": [record(result) for result in results],
        "totals": {**sums.__dict__, "gops": sums.gops},
    }


def to_text(document: object) -> str:
    """Return JSON values as the text of a file."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def to_json(results: list[LayerResult], run: dict[str, object]) -> str:
    """Return the text of `to_document`."""
    return to_text(to_document(results, run))
