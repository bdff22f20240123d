"""Two runs of one command compared: which rows became slower, by their ratio to a rival of both.

A machine is not twice the same; a rival measured in turn with ours has seen the same machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from . import report
from .shape_lines import parse_line

THRESHOLD = 1.1


@dataclass(frozen=True)
class Entry:
    """A row of a JSON file.

    Parameters
    ----------
    name : str
        A layer's line or a network.
    threads, batch : int
    dtype, strategy : str
        Empty for networks.
    us : float or None
        Our minimum; None where ours failed.
    rivals : dict of str to float
        Theirs, µs.
    few : frozenset of str
        The rivals that were run a few times only.
    """

    name: str
    threads: int
    batch: int
    dtype: str
    strategy: str
    us: float | None
    rivals: dict[str, float]
    few: frozenset[str] = frozenset()

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What has to be the same in both runs, beside the strategy."""
        return self.name, self.dtype, self.threads, self.batch

    @property
    def label(self) -> str:
        """How the row is called."""
        words = f"{self.name}, {self.threads} thread{'s'[: self.threads > 1]}"
        # A layer's line has its batch.
        return words if self.dtype else f"{words}, batch {self.batch}"


@dataclass(frozen=True)
class Pair:
    """A row of both runs.

    Attributes
    ----------
    rival : str
        Whose time ours is divided by; empty where the runs have none in common and times are
        compared as they are.
    ratio : float or None
        How many times slower the new run is; None where ours fails now.
    """

    old: Entry
    new: Entry
    rival: str
    ratio: float | None

    def is_slower(self, threshold: float) -> bool:
        """Whether this is a regression."""
        return self.ratio is None or self.ratio > threshold

    @property
    def note(self) -> str:
        """What a reader of the ratio must know."""
        words = [] if self.rival else ["no rival of both: absolute times"]
        if self.ratio is None:
            words = ["fails now"]
        if self.rival in self.old.few | self.new.few:
            words.append(f"few runs of {self.rival}")
        if self.old.strategy != self.new.strategy:
            words.append(f"strategy was {self.old.strategy or 'none'}")
        return "; ".join(words)


@dataclass(frozen=True)
class Comparison:
    """Two runs, row by row.

    Attributes
    ----------
    pairs : tuple of Pair
        In the order of the new run.
    only_old, only_new : tuple of Entry
        Rows of one run alone.
    remarks : tuple of str
        Where the runs differ as a whole.
    """

    pairs: tuple[Pair, ...]
    only_old: tuple[Entry, ...]
    only_new: tuple[Entry, ...]
    remarks: tuple[str, ...] = ()

    def regressions(self, threshold: float) -> list[Pair]:
        """Return the pairs that became slower by more than `threshold` times."""
        return [pair for pair in self.pairs if pair.is_slower(threshold)]


def read(path: Path, rows: str) -> dict[str, Any]:
    """Return what ``--json`` wrote.

    Parameters
    ----------
    rows : str
        What it must hold: "layers" or "networks".

    Raises
    ------
    ValueError
        When it is no such file.
    OSError
        When it cannot be read.
    """
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    if not isinstance(document, dict) or rows not in document:
        raise ValueError(f"{path}: holds no {rows}; allowed: a --json of the same command")
    return document


def entries(document: Mapping[str, Any]) -> list[Entry]:
    """Return the rows of a document."""
    options = document["options"]
    if "networks" in document:
        return [_network(row, options) for row in document["networks"]]
    return [_layer(row, options) for row in document["layers"]]


def _layer(row: Mapping[str, Any], options: Mapping[str, Any]) -> Entry:
    times = {name: rival["min_us"] for name, rival in row["rivals"].items() if rival["min_us"]}
    few = frozenset(name for name in times if row["rivals"][name]["note"] == "~")
    batch = getattr(parse_line(row["line"]), "mb", 1)
    return Entry(
        row["line"], options["threads"], batch, options["dtype"], row["strategy"], row["min_us"],
        times, few,
    )  # fmt: skip


def _network(row: Mapping[str, Any], options: Mapping[str, Any]) -> Entry:
    times = {
        name: 1e3 * engine["min_ms"] for name, engine in row["engines"].items() if engine["min_ms"]
    }
    few = frozenset(name for name in times if row["engines"][name]["note"] == "~")
    # Files of format 1 have one count of threads, and batch 1.
    threads = row["threads"] if "threads" in row else options["threads"]
    return Entry(
        row["name"], threads, row.get("batch", 1), "", "", times.pop("int8", None), times, few
    )


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Comparison:
    """Return the comparison of two documents of one command (both of layers, or of networks).

    Rows are matched by layer or network, dtype, threads and batch, and by strategy where a run has
    such a row under several; a layer that another strategy was chosen for is still that layer.
    """
    left = entries(old)
    pairs, only_new = [], []
    for entry in entries(new):
        alike = [other for other in left if other.key == entry.key]
        same = [other for other in alike if other.strategy == entry.strategy]
        if not alike:
            only_new.append(entry)
            continue
        match = (same or alike)[0]
        left.remove(match)
        if match.us is not None:
            pairs.append(_pair(match, entry))
    remarks = [
        f"{name} was {before}, is {after}"
        for name, before, after in (
            ("the machine", old["machine"]["cpu"], new["machine"]["cpu"]),
            ("the target", old["options"].get("target"), new["options"].get("target")),
        )
        if before != after
    ]
    return Comparison(tuple(pairs), tuple(left), tuple(only_new), tuple(remarks))


def _pair(old: Entry, new: Entry) -> Pair:
    """Return the pair; the fastest rival of both stands for the machine."""
    if new.us is None:
        return Pair(old, new, "", None)
    few = old.few | new.few
    common = sorted(
        set(old.rivals) & set(new.rivals), key=lambda name: (name in few, old.rivals[name])
    )
    ratio = new.us / old.us
    if not common:
        return Pair(old, new, "", ratio)
    rival = common[0]
    return Pair(old, new, rival, ratio * old.rivals[rival] / new.rivals[rival])


def table(found: Comparison, threshold: float) -> Table:
    """Return one row a pair, the regressions in red."""
    out = Table(
        title=f"compared; a regression is more than {threshold:g} times slower",
        title_justify="left", pad_edge=False,
    )  # fmt: skip
    out.add_column("row", overflow="fold")
    for column in ("old µs", "new µs"):
        out.add_column(column, justify="right", no_wrap=True)
    out.add_column("by the ratio to")
    out.add_column("times slower", justify="right")
    out.add_column("")
    for pair in found.pairs:
        out.add_row(
            report.escape(pair.new.label), report.number(pair.old.us), report.number(pair.new.us),
            pair.rival or "-", "" if pair.ratio is None else f"{pair.ratio:.2f}", pair.note,
            style="red" if pair.is_slower(threshold) else None,
        )  # fmt: skip
    return out


def remarks(found: Comparison) -> list[str]:
    """Return, in words, what the table cannot say: what only one run has, how the runs differ."""
    only = (("old", found.only_old), ("new", found.only_new))
    return [
        *found.remarks,
        *(f"only in the {which} run: {row.label}" for which, rows in only for row in rows),
    ]
