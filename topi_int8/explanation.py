"""What `explain` and `library_counts` find, and how it is printed, for either of TVM's graphs.

Which strategy each operator gets and why the faster ones declined; and how many dot-product
instructions are in a library. Who looks at graphs and libraries is `explain.py` for Relax,
`relay/explain.py` for Relay.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from .workload import Conv2dWorkload, MatmulWorkload

_WIDTH = 190  # columns where the output is no terminal


@dataclass(frozen=True)
class Row:
    """One operator that a strategy of ours runs.

    ``declined`` holds (strategy, reason) for each faster strategy that said no.
    """

    name: str
    op: str
    work: Conv2dWorkload | MatmulWorkload
    strategy: str
    intrinsic: str
    data_layout: str
    out_layout: str
    declined: tuple[tuple[str, str], ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.work.macs

    @property
    def shape(self) -> str:
        """The shape in a few words."""
        w = self.work
        if isinstance(w, MatmulWorkload):
            batch = f"{w.batch}x" if w.batch > 1 else ""
            return f"{batch}{w.m}x{w.k}x{w.n}"
        stride = f"s{w.strides[0]}" if max(w.strides) > 1 else ""
        groups = f" g{w.groups}" if w.groups > 1 else ""
        batch = f" n{w.n}" if w.n > 1 else ""
        return f"{w.kh}x{w.kw}{stride} {w.ic}-{w.oc} @{w.ih}x{w.iw}{groups}{batch}"

    @property
    def dtypes(self) -> str:
        """Data, weight and output types."""
        return f"{self.work.data_dtype} {self.work.weight_dtype} {self.work.epilogue.out_dtype}"


@dataclass(frozen=True)
class Other:
    """An operator left to TVM: how many, and what that means for its speed."""

    op: str
    count: int
    note: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. Printing it gives the tables; iterating it gives the rows."""

    target: str
    rows: tuple[Row, ...]
    others: tuple[Other, ...]
    naive: tuple[tuple[str, str], ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def strategies(self) -> Counter:
        """Return how many operators each strategy runs."""
        return Counter(row.strategy for row in self.rows)

    def tables(self) -> list[Table]:
        """Return the tables: operators, reasons, what is left to TVM."""
        main = Table(title=f"topi_int8 on {self.target}", title_justify="left")
        for column in (
            "#",
            "layer",
            "op",
            "shape",
            "types",
            "strategy",
            "intrinsic",
            "layout",
            "MMAC",
        ):
            main.add_column(
                column, justify="right" if column in ("#", "MMAC") else "left", no_wrap=True
            )
        for i, row in enumerate(self.rows):
            main.add_row(
                str(i), row.name, row.op, row.shape, row.dtypes, row.strategy, row.intrinsic,
                f"{row.data_layout} > {row.out_layout}", f"{row.macs / 1e6:.1f}",
            )  # fmt: skip
        tables = [main]
        reasons: dict[tuple[str, str], list[str]] = {}
        for i, row in enumerate(self.rows):
            for strategy, reason in row.declined:
                reasons.setdefault((strategy, reason), []).append(str(i))
        if reasons:
            why = Table(title="why a faster strategy declined", title_justify="left")
            for column in ("strategy", "reason", "operators"):
                why.add_column(column)
            for (strategy, reason), numbers in reasons.items():
                why.add_row(strategy, reason, _ranges(numbers))
            tables.append(why)
        if self.others or self.naive:
            rest = Table(title="left to TVM", title_justify="left")
            for column in ("operator", "count", "note"):
                rest.add_column(column)
            for other in self.others:
                rest.add_row(other.op, str(other.count), other.note)
            for name, reason in self.naive:
                rest.add_row(name, "1", f"NAIVE LOOPS: {reason}")
            tables.append(rest)
        return tables

    def show(self) -> None:
        """Print the tables."""
        terminal = Console()
        console = terminal if terminal.is_terminal else Console(width=_WIDTH)
        for table in self.tables():
            console.print(table)

    def __str__(self) -> str:
        console = Console(width=_WIDTH)
        with console.capture() as capture:
            for table in self.tables():
                console.print(table)
        return capture.get()


def _ranges(numbers: list[str]) -> str:
    """Return "0-3, 7" for ["0", "1", "2", "3", "7"]."""
    out: list[list[int]] = []
    for n in map(int, numbers):
        if out and out[-1][-1] == n - 1:
            out[-1][-1:] = [n] if len(out[-1]) > 1 else [out[-1][0], n]
        else:
            out.append([n])
    return ", ".join("-".join(map(str, run)) for run in out)


# ---------------------------------------------------------------- what was built

# Instructions that multiply 8- or 16-bit integers into 32-bit sums.
_DOT = re.compile(
    r"^\s+(?:\{e?vex\}\s+)?(vpdpbusds?|vpdpwssds?|tdpb[us][us]d|vpmaddubsw|v?pmaddwd|v?pmaddubsw"
    r"|vmull\.[su]8|vmlal\.[su](?:8|16)|vpadal\.[su]16"
    # on vectors: general registers have a smull and a smmla of their own
    r"|(?:[su]dot|usdot|smmla|ummla|usmmla|[su]mull2?|[su]mlal2?|[su]adalp)(?=\s+v\d))\b",
    re.MULTILINE,
)
_TYPE = re.compile(
    r"(?<![\w.%@])(?:<\d+ x (float|double|i8|i16|i32|i64)>|(float|double|i8|i16|i32|i64))\b"
)


@dataclass(frozen=True)
class LibraryCounts:
    """Static counts over a built library: instructions by mnemonic, data types in the LLVM IR."""

    instructions: dict[str, int]
    dtypes: dict[str, int]


def count_sources(sources: Iterable[tuple[str, str]]) -> LibraryCounts:
    """Return the counts over (assembly, LLVM IR) of a library's modules."""
    instructions: Counter = Counter()
    dtypes: Counter = Counter()
    for asm, ll in sources:
        instructions.update(_DOT.findall(asm))
        for vector, scalar in _TYPE.findall(ll):
            dtypes[vector or scalar] += 1
    return LibraryCounts(dict(instructions), dict(dtypes))
