"""bench/compare.py: rows matched, ratios to a rival of both runs, regressions and exit codes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import cli, compare

BIG = 'mb1ic64ih56oc64oh56kh3ph1n"big"'
SMALL = 'mb2ic64ih56oc64oh56kh1ph0n"small"'


def layer(line: str, us: float | None, **rivals: float) -> dict:
    return {
        "name": "", "line": line, "strategy": "conv2d_x", "min_us": us, "macs": 1000,
        "rivals": {
            name: {"min_us": time, "note": "~" if name == "tvm" else "jit"}
            for name, time in rivals.items()
        },
    }  # fmt: skip


def layers(*rows: dict, **options) -> dict:
    return {
        "machine": {"cpu": "a cpu"},
        "options": {"threads": 1, "dtype": "u8s8", "target": "t", **options},
        "layers": list(rows),
    }


def network(name: str, ms: float | None, threads: int = 1, batch: int = 1, **rivals: float) -> dict:
    engines = {"int8": {"min_ms": ms, "note": ""}}
    engines |= {rival: {"min_ms": time, "note": ""} for rival, time in rivals.items()}
    return {"name": name, "threads": threads, "batch": batch, "engines": engines}


def networks(*rows: dict) -> dict:
    return {"machine": {"cpu": "a cpu"}, "options": {"threads": [1, 2]}, "networks": list(rows)}


def test_the_machine_is_divided_out():
    # The second machine is twice as slow, and so is the rival: no regression.
    old, new = layers(layer(BIG, 10, onednn=20)), layers(layer(BIG, 20, onednn=40))
    [pair] = compare.compare(old, new).pairs
    assert (pair.rival, pair.ratio, pair.note) == ("onednn", pytest.approx(1), "")
    # As fast as before where the rival became twice as fast: a regression.
    [pair] = compare.compare(old, layers(layer(BIG, 10, onednn=10))).pairs
    assert pair.ratio == pytest.approx(2) and pair.is_slower(1.1)


def test_the_fastest_rival_of_both_stands_for_the_machine():
    old = layers(layer(BIG, 10, tvm=5, onednn=20, other=15))
    new = layers(layer(BIG, 10, tvm=50, onednn=20))
    [pair] = compare.compare(old, new).pairs
    assert pair.rival == "onednn" and pair.ratio == pytest.approx(1)
    # One that ran a few times is better than none.
    [pair] = compare.compare(layers(layer(BIG, 10, tvm=5)), new).pairs
    assert pair.rival == "tvm" and pair.note == "few runs of tvm"


def test_without_a_common_rival_times_are_compared_and_it_is_said():
    found = compare.compare(layers(layer(BIG, 10, onednn=9)), layers(layer(BIG, 12, tvm=8)))
    [pair] = found.pairs
    assert pair.ratio == pytest.approx(1.2) and pair.note == "no rival of both: absolute times"
    assert found.regressions(1.1) == [pair] and found.regressions(1.3) == []


def test_rows_of_one_run_are_said():
    found = compare.compare(layers(layer(BIG, 1)), layers(layer(SMALL, 1)))
    assert not found.pairs
    assert compare.remarks(found) == [
        f"only in the old run: {BIG}, 1 thread", f"only in the new run: {SMALL}, 1 thread",
    ]  # fmt: skip
    # Another count of threads is another row.
    found = compare.compare(layers(layer(BIG, 1)), layers(layer(BIG, 1), threads=2))
    assert not found.pairs and found.only_new[0].label.endswith("2 threads")


def test_another_strategy_is_the_same_layer():
    other = layer(BIG, 30) | {"strategy": "conv2d_y"}
    [pair] = compare.compare(layers(layer(BIG, 10)), layers(other)).pairs
    assert "strategy was conv2d_x" in pair.note and pair.ratio == 3
    # Where a run has the layer under several, the same one is compared.
    [pair] = compare.compare(layers(other, layer(BIG, 10)), layers(layer(BIG, 10))).pairs
    assert pair.ratio == 1 and "strategy" not in pair.note


def test_a_row_that_fails_now_is_a_regression_and_one_that_failed_is_none():
    [pair] = compare.compare(layers(layer(BIG, 10)), layers(layer(BIG, None))).pairs
    assert pair.note == "fails now" and pair.is_slower(1000)
    assert not compare.compare(layers(layer(BIG, None)), layers(layer(BIG, 10))).pairs


def test_machines_and_targets_that_differ_are_said():
    new = copy.deepcopy(old := layers(layer(BIG, 1)))
    new["machine"]["cpu"] = "another"
    assert compare.compare(old, new).remarks == ("the machine was a cpu, is another",)


def test_networks_by_threads_and_batch():
    old = networks(
        network("r", 2, openvino=3), network("r", 1.5, 2, openvino=2), network("r", 90, 1, 64)
    )
    new = networks(network("r", 4, openvino=3), network("r", 1.5, 2, openvino=2))
    found = compare.compare(old, new)
    assert [round(pair.ratio, 6) for pair in found.pairs] == [2, 1]
    assert [row.label for row in found.only_old] == ["r, 1 thread, batch 64"]
    # Files from before there were several counts.
    before = {
        "machine": {"cpu": "a cpu"}, "options": {"threads": 2},
        "networks": [{"name": "r", "engines": {"int8": {"min_ms": 3.0, "note": ""}}}],
    }  # fmt: skip
    [pair] = compare.compare(before, new).pairs
    assert pair.new.threads == 2 and pair.ratio == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "no JSON"), ("[]", "holds no layers"), ('{"networks": []}', "holds no layers")],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text, words):
    path = tmp_path / "old.json"
    path.write_text(text)
    done = CliRunner().invoke(
        cli.app, ["conv", "--shape", "ic8ih4oc8kh1", "--compare", str(path)], terminal_width=200
    )
    assert done.exit_code == 2 and words in done.stderr


def test_command(tmp_path: Path):
    out = tmp_path / "out.json"
    args = ["conv", "--shape", 'ic16ih6oc16kh3ph1n"tiny"', "--rivals", "none"]
    args += ["--min-time", "0.002", "--rounds", "2"]
    runner = CliRunner()
    assert runner.invoke(cli.app, [*args, "--json", str(out)]).exit_code == 0
    more = [*args, "--compare", str(out), "--threshold"]
    done = runner.invoke(cli.app, [*more, "1e9"], terminal_width=200)
    assert done.exit_code == 0 and "no rival of both" in done.output
    document = json.loads(out.read_text())
    document["layers"][0]["min_us"] /= 1e6
    out.write_text(json.dumps(document))
    done = runner.invoke(cli.app, [*more, "1000"], terminal_width=200)
    assert done.exit_code == 1 and "1 of 1 rows regressed" in done.stderr
