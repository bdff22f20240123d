"""What the command line reads from words, and what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .explanation import Explanation
from .signature import TensorInfo

_TOP = 5
_NARROWEST_TABLE = 120  # columns, where the output is no terminal that says its width


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, _NARROWEST_TABLE))


def say(text: str) -> None:
    """Print a line as it is."""
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def numbers(name: str, text: str) -> tuple[float, ...] | None:
    """Return the numbers of ``0.5,0.5``; None for an empty text."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else None
    except ValueError:
        raise ValueError(f"{name} is {text!r}; allowed: numbers, as 0.5 or 0.5,0.5,0.5") from None


def size(text: str) -> tuple[int, int] | None:
    """Return the rows and columns of ``224`` or ``224x320``; None for an empty text."""
    parts = text.split("x")
    if not text:
        return None
    if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"size is {text!r}; allowed: as 224, or rows x columns as 224x320")
    return int(parts[0]), int(parts[-1])


def shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of ``NAME=1,3,224,224``."""
    found = {}
    for text in texts or []:
        name, _, dims = text.rpartition("=")
        if not name or not all(part.isdigit() for part in dims.split(",")):
            raise ValueError(f"shape is {text!r}; allowed: NAME=1,3,224,224")
        found[name] = tuple(map(int, dims.split(",")))
    return found


def show(info: TensorInfo, array: np.ndarray, names: list[str] | None) -> None:
    """Print the likeliest classes of (N, classes), a line about anything else."""
    if array.ndim != 2 or array.shape[1] < 2:
        low, high = (f"{bound:.6g}" for bound in (array.min(), array.max())) if array.size else "--"
        say(f"{info.name}: {array.dtype} {array.shape}, {low} to {high}")
        return
    if names is not None and len(names) != array.shape[1]:
        raise ValueError(f"labels are {len(names)}; allowed: {array.shape[1]}, one a class")
    quantized = info.quantization is not None and array.dtype != np.float32
    values = info.quantization.dequantize(array) if quantized else array.astype("float64")
    table = Table(title=f"{info.name}: {array.dtype} {array.shape}", title_justify="left")
    for column in ("input", "rank", "class", "value"):
        table.add_column(column)
    for row, scores in enumerate(values):
        for rank, index in enumerate(np.argsort(-scores, kind="stable")[:_TOP], 1):
            label = str(index) if names is None else f"{index} {names[index]}"
            table.add_row(str(row), str(rank), label, f"{scores[index]:.5g}")
    _console().print(table)


def slow(found: Explanation) -> list[str]:
    """Return a line for each operator that runs without a kernel of ours where it had better."""
    lines = [
        f"{other.count} x {other.op}: {other.note}"
        for other in found.others if other.note.startswith("SLOW")
    ]  # fmt: skip
    return lines + [f"{name}: naive loops, {reason}" for name, reason in found.naive]


def as_dict(found: Explanation) -> dict[str, Any]:
    """Return what JSON can hold of an explanation."""
    return {
        "target": found.target,
        "operators": [
            {
                "name": row.name, "op": row.op, "shape": row.shape, "types": row.dtypes,
                "strategy": row.strategy, "intrinsic": row.intrinsic,
                "layout": row.data_layout, "out_layout": row.out_layout, "macs": row.macs,
                "declined": [
                    {"strategy": name, "reason": reason} for name, reason in row.declined
                ],
            }
            for row in found
        ],
        "left_to_tvm": [
            {"op": other.op, "count": other.count, "note": other.note} for other in found.others
        ],
        "naive": [{"function": name, "reason": reason} for name, reason in found.naive],
    }  # fmt: skip
