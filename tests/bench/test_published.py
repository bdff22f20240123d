"""`bench tables`: engines and cells, without measuring anything."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bench.published import run, served, tables, workers
from bench.published.engine import Engine, Memory
from bench.results import RivalResult
from bench.timing import Timing


def text(table) -> str:
    console = Console(width=240)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def row(table, label: str) -> list[str]:
    line = next(line for line in text(table).splitlines() if label in line)
    return [part.strip() for part in line.replace("│", "┃").split("┃")]


def ms(value: float) -> RivalResult:
    return RivalResult(Timing((1e3 * value,)))


@pytest.mark.parametrize("field, value", [("tvm", "tvm"), ("layout", "NHCW"), ("batch", 0)])
def test_an_engine_says_what_is_allowed(field, value):
    with pytest.raises(ValueError, match=rf"{field} is .*{value}.*allowed"):
        Engine(**{field: value})


def test_engines_of_a_table_have_keys_of_their_own():
    engines = [r.engine for r in tables.EXECUTORS] + [e for _, e in tables.ACTIVATIONS]
    assert len({engine.key for engine in engines}) == len(set(engines))


def test_the_first_table_shows_ratios_to_its_float32():
    timings = {r.engine: RivalResult(None, "no such executor") for r in tables.EXECUTORS}
    timings |= {tables.FLOAT: ms(10), tables.OURS: ms(2.5)}
    made = tables.executors_table(timings)
    ours = row(made, "int8, ours, graph executor, opt_level 3")
    assert "2.50" in ours and "0.25x" in ours
    assert "no such executor" in row(made, "PyTorch")
    assert {"8.27", "0.62x"} <= set(row(made, "int8, upstream, graph executor, opt_level 3"))


def test_the_second_table_names_the_rows_that_the_board_is_predicted_by():
    from bench import seed_table

    labels = {entry.label for entry in seed_table.ROWS}
    assert {entry.label for entry in tables.SCHEDULES} <= labels
    made = tables.schedules_table({}, {"NCHW spatial_pack simd int8": 1.75})
    assert {"1.75x", "1.17x", "not run"} <= set(row(made, "NCHW spatial_pack simd int8"))


def test_the_third_table_compares_memory_within_a_tvm():
    taken = {"relay": 100.0, "relax": 50.0}

    def memory(engine: Engine) -> Memory | str:
        if engine.stem:
            return "it failed"
        share = 1.0 if engine.precision == "float32" else 0.25
        return Memory(500.0, taken[engine.tvm] * share)

    timings = {replace(tables.FLOAT, batch=4): ms(40), replace(tables.OURS, batch=4): ms(8)}
    made = tables.batches_table(timings, memory, (4,))
    assert {"2.00", "5.00x", "25.0", "0.25", "500"} <= set(row(made, "int8, ours "))
    assert {"12.5", "0.25"} <= set(row(made, "int8, ours, Relax"))
    assert "it failed" in row(made, "from the stem on")


def test_the_fourth_table_counts():
    found = {"dtypes": {"float": 19, "i8": 971}, "instructions": {"vpdpbusd": 64, "vpmaddwd": 2}}
    made = tables.activations_table({}, lambda engine: found if engine.ours else "it failed")
    assert {"19", "971", "vpdpbusd 64, vpmaddwd 2"} <= set(row(made, "activations int16, ours"))
    assert "it failed" in row(made, "activations int16, upstream")


def test_goals_are_said_to_be_missed():
    engines = dict.fromkeys(tables.goal_engines(8), ms(2))
    engines[replace(tables.UPSTREAM, batch=8)] = ms(8)
    made = text(tables.goals_table({(8, 2): engines}))
    # Both float32, upstream's NHWC, and the stem's int8 are 1.0x.
    assert made.count("NOT REACHED") == 4
    assert "4.00x" in made and made.count("    reached") == 2


def test_a_worker_answers_and_says_what_failed(tmp_path):
    class Running:
        def evaluate(self, number, repeat):
            return [0.25] * repeat

        def output(self, data):
            return data * 2

    weights = tmp_path / "w.npz"
    np.savez(weights, a=np.arange(3))
    seen = {}

    def build(engine, arrays):
        seen[engine] = arrays["a"].tolist()
        return Running()

    worker = served._Worker(build, lambda folder, batch: lambda: None)
    worker.build(asdict(tables.OURS), str(weights))
    assert seen == {tables.OURS: [0, 1, 2]}
    assert min(worker.sample(tables.OURS.key, 0.5)) == 250_000
    found = worker.memory(str(tmp_path), 1)
    assert found["peak"] > 10 and found["activations"] < found["peak"]
    worker.drop(tables.OURS.key)
    with pytest.raises(KeyError):
        worker.sample(tables.OURS.key, 0.5)


def test_a_real_worker_process_reports_errors_and_ends():
    with workers.opened(["torch", "relax"]) as opened:
        assert opened["torch"] is opened["relax"]
        worker = opened["relax"]
        with pytest.raises(workers.WorkerError, match="KeyError"):
            worker.ask("sample", key="none", seconds=1.0)
        with pytest.raises(workers.WorkerError, match="tvm is 'x'"):
            worker.ask("build", engine={"tvm": "x"}, weights="none")
    with pytest.raises(workers.WorkerError):
        worker.ask("sample", key="none", seconds=1.0)


def test_missing_relay_is_said_in_words(monkeypatch):
    monkeypatch.setenv(workers.RELAY_PYTHON, "/nowhere/python")
    with pytest.raises(workers.WorkerError, match=r"/nowhere/python.*make test-relay"):
        run.run((), run.Options(), Console())
    done = subprocess.run(
        [sys.executable, "-m", "bench", "tables"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 2 and "no TVM with Relay at /nowhere/python" in done.stderr


@pytest.mark.parametrize(
    "more, words",
    [({"rounds": 0}, "rounds is 0"), ({"seconds": 0}, "min_time is 0"), ({"batches": ()}, "batch")],
)
def test_options_say_what_is_allowed(more, words):
    with pytest.raises(ValueError, match=words):
        run.Options(**more)


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match=r"table is 'five'; allowed: executors"):
        run.run(["five"], run.Options(), Console())


def test_results_are_json():
    assert json.loads(run.to_json({"a": [1, None]})) == {"a": [1, None]}
