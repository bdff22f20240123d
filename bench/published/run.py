"""Running the published tables: engines timed table by table, results as tables and as JSON."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from bench import machine, mca, seed_table
from bench.results import RivalResult

from . import tables, workers
from .engine import Engine, Memory
from .workers import WorkerError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Options:
    """How the tables are made.

    Parameters
    ----------
    threads : int
        Of tables 1 to 4.
    seconds : float
        Each engine is sampled so long a round.
    rounds : int
        Alternations between a table's engines.
    batches : tuple of int
        Of table 3.
    predict : bool
        Whether table 2 predicts the published board's cells, which takes minutes.
    """

    threads: int = 1
    seconds: float = 0.5
    rounds: int = 5
    batches: tuple[int, ...] = tables.BATCHES
    predict: bool = True

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; allowed: 1 or more")
        if not self.seconds > 0:
            raise ValueError(f"min_time is {self.seconds}; allowed: seconds > 0")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batch is {self.batches}; allowed: 1 or more")


@dataclass
class Record:
    """What was measured, for the JSON."""

    timings: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    counts: list[dict[str, Any]] = field(default_factory=list)


class _Bench:
    """Measurements with one set of options, and their record."""

    def __init__(self, options: Options, console: Console, folder: Path) -> None:
        self.options, self.console, self.record = options, console, Record()
        self._folder = folder

    def weights(self, network: str) -> Path:
        path = self._folder / f"{network}.npz"
        return path if path.exists() else workers.save_weights(network, self._folder)

    def timings(self, engines: Iterable[Engine], threads: int) -> dict[Engine, RivalResult]:
        """Time distinct engines of one network in turn."""
        distinct = list(dict.fromkeys(engines))
        weights = self.weights(distinct[0].network)
        options = self.options
        with self.console.status(f"{len(distinct)} engines") as status, machine.pinned(threads):
            found = workers.time_engines(
                distinct, weights, options.rounds, options.seconds, status.update
            )
        for engine, result in found.items():
            timing = result.timing
            self.record.timings.append({
                "engine": asdict(engine), "threads": threads, "note": result.note,
                "min_us": timing and timing.min, "median_us": timing and timing.median,
            })  # fmt: skip
        return found

    def asker(
        self, ask: Callable[[Engine, Path], Value], record: list[dict[str, Any]],
        value: Callable[[Value], Any],
    ) -> Callable[[Engine], Value | str]:  # fmt: skip
        """Return a function that asks a worker about an engine, and returns its words if it fails.
        """

        def found(engine: Engine) -> Value | str:
            weights = self.weights(engine.network)
            with self.console.status(engine.key), machine.pinned(self.options.threads):
                try:
                    result = ask(engine, weights)
                except WorkerError as error:
                    record.append({"engine": asdict(engine), "error": str(error)})
                    return str(error)
            record.append({"engine": asdict(engine), "value": value(result)})
            return result

        return found


# ---------------------------------------------------------------- tables by their names


def _executors(bench: _Bench) -> Table:
    engines = (row.engine for row in tables.EXECUTORS)
    return tables.executors_table(bench.timings(engines, bench.options.threads))


def _schedules(bench: _Bench) -> Table:
    rows = tables.SCHEDULES
    engines = [e for row in rows for e in (row.upstream, row.relay, row.relax) if e is not None]
    timings = bench.timings(engines, bench.options.threads)
    predicted: Mapping[str, float | None] = {}
    if bench.options.predict:
        try:
            with bench.console.status("Cortex-A72, by llvm-mca"):
                results, _ = seed_table.predict_all()
            predicted = {name: pair[1] for name, pair in seed_table.ratios(results).items()}
            for note in sorted({result.note for result in results if result.note}):
                bench.console.print(f"not predicted: {note}", markup=False)
        except (OSError, mca.McaError) as error:
            bench.console.print(f"the Cortex-A72 is not predicted: {error}", markup=False)
    return tables.schedules_table(timings, predicted)


def _batches(bench: _Bench) -> Table:
    timings: dict[Engine, RivalResult] = {}
    for batch in bench.options.batches:
        engines = [replace(engine, batch=batch) for _, engine in tables.BATCH_ENGINES]
        timings |= bench.timings(engines, bench.options.threads)
    ask: Callable[[Engine], Memory | str] = bench.asker(
        workers.memory, bench.record.memory, asdict
    )
    return tables.batches_table(timings, ask, bench.options.batches)


def _activations(bench: _Bench) -> Table:
    timings = bench.timings((e for _, e in tables.ACTIVATIONS), bench.options.threads)
    return tables.activations_table(
        timings, bench.asker(workers.counts, bench.record.counts, lambda found: found)
    )


def _goals(bench: _Bench) -> Table:
    found = {}
    for threads in tables.GOAL_THREADS:
        for batch in tables.GOAL_BATCHES:
            try:
                found[batch, threads] = bench.timings(tables.goal_engines(batch), threads)
            except ValueError as error:  # this machine has fewer cores
                bench.console.print(f"{threads} cores: {error}", markup=False)
    return tables.goals_table(found)


TABLES: dict[str, Callable[[_Bench], Table]] = {
    "executors": _executors,
    "schedules": _schedules,
    "batches": _batches,
    "activations": _activations,
    "goals": _goals,
}


def run(names: Iterable[str], options: Options, console: Console) -> dict[str, Any]:
    """Measure tables by their names and print each when it is done; return all as JSON values.

    Raises
    ------
    ValueError
        For an unknown table.
    WorkerError
        When there is no TVM with Relay.
    """
    chosen = list(names) or list(TABLES)
    for name in chosen:
        if name not in TABLES:
            raise ValueError(f"table is {name!r}; allowed: {', '.join(TABLES)}")
    workers.relay_python()
    about = machine.describe()
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(options, console, Path(folder))
        for name in chosen:
            console.print(TABLES[name](bench))
    return {"machine": about, "options": asdict(options), **asdict(bench.record)}


def to_json(found: dict[str, Any]) -> str:
    """Return what `run` found as the text of a JSON file."""
    return json.dumps(found, indent=2) + "\n"
