"""The published tables: which engines stand in which cell, and how a table is shown.

Published: a ResNet-18 on a Cortex-A72 board (Raspberry Pi 4) with TVM's Relay of 2021. Here: the
same cells on this machine, with TVM 0.17's own strategies, with ours there, and with ours on Relax.
What was published on another machine can be compared by its ratios only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from bench.results import RivalResult

from .engine import Engine, Memory

FLOAT = Engine(precision="float32", ours=False)
UPSTREAM = Engine(ours=False)
OURS = Engine()
RELAX = Engine(tvm="relax")
RELAX_FLOAT = Engine(tvm="relax", precision="float32")
TORCH = Engine(tvm="torch", precision="float32")
_PLAIN_CPU = "x86-64"  # no int8 instruction beyond SSE2

Timings = Mapping[Engine, RivalResult]


def nhwc(engine: Engine, kept: bool = False) -> Engine:
    """Return an engine whose network is written in NHWC."""
    return replace(engine, layout="NHWC", kept=kept)


# ---------------------------------------------------------------- 1: executors and opt levels


@dataclass(frozen=True)
class Row:
    """A cell of the first table: what it is, what was published, what is run."""

    label: str
    published_ms: float | None
    engine: Engine


def _executors(name: str, engine: Engine, published: Mapping[str, float]) -> list[Row]:
    rows = []
    for executor, title in (("vm", "VM"), ("graph", "graph executor")):
        for level in (2, 3):
            made = replace(engine, executor=executor, level=level)
            ms = published.get(executor) if level == 3 else None
            rows.append(Row(f"{name}, {title}, opt_level {level}", ms, made))
    return rows


EXECUTORS: tuple[Row, ...] = (
    Row("PyTorch float32", 69.26, TORCH),
    Row("TVM float32, NCHW spatial_pack", 13.29, FLOAT),
    *_executors("int8, upstream", UPSTREAM, {"vm": 29.19, "graph": 8.27}),
    *_executors("int8, ours", OURS, {}),
    Row("int8, ours, AOT executor", None, replace(OURS, executor="aot")),
    Row("float32, ours, Relax", None, RELAX_FLOAT),
    Row("int8, ours, Relax", None, RELAX),
)


def executors_table(timings: Timings) -> Table:
    """Return table 1."""
    out = _table("1. ResNet-18, batch 1: executors and opt levels")
    for name in ("published ms", "of float32", "here ms", "of float32"):
        out.add_column(name, justify="right")
    base = next(row for row in EXECUTORS if row.engine == FLOAT)
    for row in EXECUTORS:
        ratio = row.published_ms and base.published_ms and row.published_ms / base.published_ms
        out.add_row(
            row.label, _ms(row.published_ms), _times(ratio), cell(timings, row.engine),
            _times(_over(timings, row.engine, FLOAT)),
        )  # fmt: skip
    return out


# ---------------------------------------------------------------- 2: layout, schedule, precision


@dataclass(frozen=True)
class Schedule:
    """A row of the second table: a layout, a schedule and a precision, by three implementations.

    ``relay`` is None where our package leaves the operator to upstream. ``label`` is also that of
    `bench.seed_table`, which predicts it on the board that was published.
    """

    label: str
    published_ms: float
    upstream: Engine
    relay: Engine | None
    relax: Engine


SCHEDULES: tuple[Schedule, ...] = (
    Schedule("NCHW spatial_pack float32", 13.29, FLOAT, None, RELAX_FLOAT),
    Schedule(
        "NCHW spatial_pack int8", 8.27, replace(UPSTREAM, cpu=_PLAIN_CPU),
        replace(OURS, cpu=_PLAIN_CPU), replace(RELAX, cpu=_PLAIN_CPU),
    ),
    Schedule("NCHW spatial_pack simd int8", 11.36, UPSTREAM, OURS, RELAX),
    Schedule("NHWC float32", 35.15, nhwc(FLOAT), nhwc(replace(FLOAT, ours=True)),
             nhwc(RELAX_FLOAT)),
    Schedule(
        "NHWC quantized_interleaved int8", 12.09, nhwc(UPSTREAM), nhwc(OURS, kept=True),
        nhwc(RELAX, kept=True),
    ),
)  # fmt: skip


def schedules_table(timings: Timings, predicted: Mapping[str, float | None]) -> Table:
    """Return table 2; `predicted` is float32 over each row's cycles on the board, by label."""
    out = _table("2. ResNet-18, batch 1: layout x schedule x precision")
    for name in (
        "published ms", "A72: float32/int8 published", "predicted", "upstream ms", "ours ms",
        "upstream/ours", "ours, Relax ms",
    ):  # fmt: skip
        out.add_column(name, justify="right")
    base: Schedule | None = None
    for row in SCHEDULES:
        if row.upstream.precision == "float32":
            base = row
        published = base.published_ms / row.published_ms if base and base is not row else None
        ours = row.relay
        out.add_row(
            row.label, _ms(row.published_ms), _times(published), _times(predicted.get(row.label)),
            cell(timings, row.upstream), cell(timings, ours) if ours else "as upstream",
            _times(_over(timings, row.upstream, ours)) if ours else "", cell(timings, row.relax),
        )  # fmt: skip
    out.caption = (
        f"int8 without simd: for a plain {_PLAIN_CPU}. NHWC int8 of ours is kept in NHWC here; "
        "relay.build would put it in packed layouts, as the goals' table shows."
    )
    return out


# ---------------------------------------------------------------- 3: batches and memory

BATCHES: tuple[int, ...] = (1, 64, 256)
_PUBLISHED_BATCHES = {1: (13.29, 8.27), 64: (19.65, 11.99), 256: (22.15, 11.36)}
# relay.quantize leaves the first convolution in float32, and its output outweighs all else: so the
# memory of an integer network is shown with the first convolution quantized, too.
BATCH_ENGINES: tuple[tuple[str, Engine], ...] = (
    ("float32, upstream", FLOAT),
    ("int8, upstream", UPSTREAM),
    ("int8, ours", OURS),
    ("int8 from the stem on, ours", replace(OURS, stem=True)),
    ("float32, ours, Relax", RELAX_FLOAT),
    ("int8, ours, Relax", RELAX),
)


def batches_table(
    timings: Timings, memory: Callable[[Engine], Memory | str], batches: Sequence[int]
) -> Table:
    """Return table 3."""
    out = _table("3. ResNet-18: time an image and memory against batch")
    for name in (
        "batch", "published ms: float32, int8", "ms an image", "float32/this", "activations MiB",
        "of float32", "peak RSS MiB",
    ):  # fmt: skip
        out.add_column(name, justify="right")
    for batch in batches:
        bases = {}
        for label, small in BATCH_ENGINES:
            engine = replace(small, batch=batch)
            found = memory(engine)
            if engine.precision == "float32":
                bases[engine.tvm] = (engine, found)
            base, base_memory = bases[engine.tvm]
            share = ""
            if isinstance(found, Memory) and isinstance(base_memory, Memory):
                share = f"{found.activations / max(base_memory.activations, 1e-3):.2f}"
            published = _PUBLISHED_BATCHES.get(batch)
            out.add_row(
                label, str(batch), "{:.2f}, {:.2f}".format(*published) if published else "",
                cell(timings, engine, batch), _times(_over(timings, base, engine)),
                f"{found.activations:,.1f}" if isinstance(found, Memory) else found, share,
                f"{found.peak:,.0f}" if isinstance(found, Memory) else "",
            )  # fmt: skip
        out.add_section()
    out.caption = (
        "activations: what the first run of a fresh process adds to its resident memory. Published "
        "peaks did not fall with int8 (5279 MiB -> 5331 MiB): intermediates had stayed float32."
    )
    return out


# ---------------------------------------------------------------- 4: activations' dtypes


def _resnet50(engine: Engine, **more: str) -> Engine:
    return replace(engine, network="resnet50", **more)


ACTIVATIONS: tuple[tuple[str, Engine], ...] = (
    ("float32, upstream", _resnet50(FLOAT)),
    *(
        (f"int8, activations {dtype}, {name}", _resnet50(engine, activation=dtype))
        for dtype in ("int32", "int16", "int8")
        for name, engine in (("upstream", UPSTREAM), ("ours", OURS))
    ),
    ("float32, ours, Relax", _resnet50(RELAX_FLOAT)),
    ("int8, ours, Relax", _resnet50(RELAX)),
)
_TYPES = {"float": "float", "i8": "i8", "i16": "i16", "i32": "i32"}


def activations_table(
    timings: Timings, counts: Callable[[Engine], Mapping[str, Mapping[str, int]] | str]
) -> Table:
    """Return table 4."""
    out = _table("4. ResNet-50, batch 1: activations' dtypes, and what stands in the built code")
    for name in ("ms", "float32/this", *(f"{name} in the IR" for name in _TYPES)):
        out.add_column(name, justify="right")
    out.add_column("dot products in the assembly")
    for label, engine in ACTIVATIONS:
        found = counts(engine)
        base = replace(engine, precision="float32", activation="int32", ours=engine.tvm == "relax")
        cells, dots = [""] * len(_TYPES), str(found)
        if not isinstance(found, str):
            cells = [f"{found['dtypes'].get(name, 0):,}" for name in _TYPES.values()]
            named = sorted(found["instructions"].items(), key=lambda item: -item[1])
            dots = ", ".join(f"{name} {count:,}" for name, count in named)
        out.add_row(
            label, cell(timings, engine), _times(_over(timings, base, engine)), *cells, dots
        )
    out.caption = "Published: float32 110 -> 19, int8 440 -> 971 in the built module."
    return out


# ---------------------------------------------------------------- what is to be reached

GOAL_BATCHES, GOAL_THREADS = (1, 8), (1, 2)
# "stem too": the first convolution is quantized as well, by upstream and by us.
GOALS: tuple[tuple[str, Engine, Engine, float], ...] = (
    ("upstream int8 / ours", UPSTREAM, OURS, 3.3),
    ("upstream float32 / ours", FLOAT, OURS, 2.8),
    ("the same int8, stem too", replace(UPSTREAM, stem=True), replace(OURS, stem=True), 3.3),
    ("the same float32, stem too", FLOAT, replace(OURS, stem=True), 2.8),
    ("ours NCHW / ours NHWC", OURS, nhwc(OURS), 1 / 1.15),
    ("upstream int8 NHWC / ours NHWC", nhwc(UPSTREAM), nhwc(OURS), 3.3),
)


def goal_engines(batch: int) -> list[Engine]:
    """Return the distinct engines of the goals."""
    both = [engine for _, *pair, _ in GOALS for engine in pair]
    return [replace(engine, batch=batch) for engine in dict.fromkeys(both)]


def goals_table(timings: Mapping[tuple[int, int], Timings]) -> Table:
    """Return the table of goals; timings by (batch, threads)."""
    out = _table("ResNet-18: what is to be reached")
    for name in ("batch", "cores", "ms", "ours ms", "ratio", "at least", ""):
        out.add_column(name, justify="right")
    for (batch, threads), found in timings.items():
        for label, rival, ours, goal in GOALS:
            first, second = replace(rival, batch=batch), replace(ours, batch=batch)
            ratio = _over(found, first, second)
            verdict = "" if ratio is None else "reached" if ratio >= goal else "NOT REACHED"
            out.add_row(
                label, str(batch), str(threads), cell(found, first), cell(found, second),
                _times(ratio), f"{goal:.2f}x", verdict,
            )  # fmt: skip
        out.add_section()
    return out


# ---------------------------------------------------------------- cells


def _table(title: str) -> Table:
    out = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    out.caption_justify = "left"
    out.add_column("")
    return out


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _times(value: float | None) -> str:
    return "" if not value else f"{value:.2f}x"


def cell(timings: Timings, engine: Engine, batch: int = 1) -> str:
    """Return an engine's milliseconds, an image of its batch, or why there are none."""
    found = timings.get(engine)
    if found is None:
        return "not run"
    return found.note if found.timing is None else f"{found.timing.min / 1e3 / batch:.2f}"


def _over(timings: Timings, first: Engine, second: Engine) -> float | None:
    """Return the first's time over the second's."""
    both = [timings.get(engine) for engine in (first, second)]
    if any(found is None or found.timing is None for found in both):
        return None
    return both[0].timing.min / both[1].timing.min
