"""bench/cli.py and bench/run.py: commands on tiny layers, outputs, refusals, exit codes."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import cli, machine, run, targets
from bench.rivals import Unavailable
from bench.shape_lines import parse_line

FAST = ["--min-time", "0.002", "--rounds", "2"]
TINY = 'ic16ih6oc16kh3ph1n"tiny*2"'


def bench(*args: str):
    return CliRunner().invoke(cli.app, [*args], terminal_width=200)


def test_conv(tmp_path: Path):
    out_csv, out_json = tmp_path / "out.csv", tmp_path / "out.json"
    batch = tmp_path / "batch"
    batch.write_text(f"# two\n{TINY}\ng16ic16ih6oc16kh3ph1\n")
    done = bench(
        "conv", "--batch", str(batch), "--shape", "ic8ih4oc8kh1", "--rivals", "tvm", "--check",
        "--why", "--isa", "generic", "--csv", str(out_csv), "--json", str(out_json), *FAST,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "tiny" in done.output and "geomean" in done.output and "not conv2d_" in done.output
    rows = list(csv.DictReader(out_csv.open()))
    assert [row["count"] for row in rows] == ["2", "1", "1"]
    assert all(float(row["min_us"]) > 0 and float(row["tvm_min_us"]) > 0 for row in rows)
    assert all(row["checked"] == "True" and not row["error"] for row in rows)
    document = json.loads(out_json.read_text())
    assert document["options"]["threads"] == 1 and len(document["options"]["cores"]) == 1
    about = document["machine"]
    assert about["cpu"] and about["packages"]["apache-tvm"] and re.match(r"\d{4}-", about["date"])
    assert document["totals"]["layers"] == 4
    assert [layer["line"] for layer in document["layers"]] == [row["line"] for row in rows]


def test_dense(tmp_path: Path):
    out = tmp_path / "out.json"
    args = ["--rivals", "none", "--dtype", "s8s8", "--epilogue", "s32", "--json", str(out), *FAST]
    done = bench("dense", "--shape", "5x24:24x20", *args)
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["layers"][0]["rivals"] == {}


def test_mb_overrides(tmp_path: Path):
    out = tmp_path / "out.csv"
    done = bench("conv", "--shape", TINY, "--mb", "3", "--rivals", "none", "--csv", str(out), *FAST)
    assert done.exit_code == 0, done.output
    assert next(csv.DictReader(out.open()))["line"].startswith("mb3")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["conv"], "nothing to run: give --batch FILE"),
        (["conv", "--batch", "nowhere"], "batch is 'nowhere'"),
        (["conv", "--shape", "ic8oz8"], "'oz8': unknown key"),
        (["conv", "--shape", "5x24:24x20"], "use `bench dense`"),
        (["dense", "--shape", TINY], "use `bench conv`"),
        (["conv", "--shape", TINY, "--isa", "mmx"], "isa is 'mmx'; allowed: host"),
        (["conv", "--shape", TINY, "--target", "{"], "target is '{'"),
        (["conv", "--shape", TINY, "--rivals", "mkl"], "rivals has 'mkl'"),
        (["conv", "--shape", TINY, "--dtype", "s4"], "dtype is 's4'"),
        (["conv", "--shape", TINY, "--epilogue", "gelu+u8"], "epilogue has 'gelu'"),
        (["conv", "--shape", TINY, "--weight-bits", "6"], "weight_bits is 6"),
        (["conv", "--shape", TINY, "--threads", "0"], "threads is 0"),
        (["conv", "--shape", TINY, "--threads", "999"], "threads is 999"),
        (["conv", "--shape", TINY, "--cpu", "one"], "cpu is 'one'"),
        (["conv", "--shape", TINY, "--cpu", "99999"], "cpu is 99999"),
        (["conv", "--shape", TINY, "--rounds", "0"], "rounds is 0"),
        (["conv", "--shape", TINY, "--min-time", "0"], "min_time is 0"),
        (["conv", "--shape", TINY, "--mb", "-1"], "mb is -1"),
        (["conv", "--shape", TINY, "--tvm-limit", "0"], "limit is 0"),
        (["peaks", "--cpu", "x"], "cpu is 'x'"),
    ],
)
def test_refusals(args, words):
    done = bench(*args)
    assert done.exit_code == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_isa_that_this_cpu_lacks(monkeypatch):
    def refuse(_target):
        return ["amx-int8"]

    monkeypatch.setattr(targets, "missing_features", refuse)
    done = bench("conv", "--shape", TINY, "--isa", "amx")
    assert done.exit_code == 2
    assert "--isa amx: this CPU lacks amx-int8; it cannot run here" in done.stderr


def test_a_failing_layer_is_reported_and_the_rest_run(tmp_path: Path):
    out = tmp_path / "out.csv"
    # A layer that parses, and that no workload can express.
    args = ["--shape", "ic8id4oc8kd3pd1", "--shape", TINY, "--rivals", "none"]
    done = bench("conv", *args, "--csv", str(out), *FAST)
    assert done.exit_code == 1
    assert "1 of 2 layers failed" in done.stderr
    broken, fine = csv.DictReader(out.open())
    assert "allowed: 1- and 2-D" in broken["error"] and float(fine["min_us"]) > 0


def test_a_rival_that_cannot_says_so(monkeypatch, tmp_path: Path):
    class Shy:
        name, title = "tvm", "Shy"

        def prepare(self, workload, target, place):
            raise Unavailable("not today")

        def close(self):
            self.closed = True

    shy = Shy()
    monkeypatch.setitem(run.RIVALS, "tvm", lambda limit: shy)
    done = bench("conv", "--shape", TINY, "--rivals", "tvm", *FAST)
    assert done.exit_code == 0 and shy.closed
    assert "not today" in done.output and "Shy µs" in done.output


def test_peaks(tmp_path: Path):
    out = tmp_path / "peaks.json"
    done = bench("peaks", "--min-time", "0.002", "--json", str(out))
    assert done.exit_code == 0, done.output
    assert "AMX tdpbusd" in done.output
    found = json.loads(out.read_text())["gops"]
    assert all(value > 0 for value in found.values())
    assert ("AVX2 vpmaddwd ymm" in found) == targets.targets.runs_here("avx2")


def test_shapes():
    done = bench("shapes")
    assert done.exit_code == 0
    assert re.search(r"resnet50_v1_5 .* 53 .* 4\.087", done.output)


def test_pinned_restores():
    before, threads = os.sched_getaffinity(0), os.environ.get("OMP_NUM_THREADS")
    with machine.pinned(1) as cores:
        assert os.sched_getaffinity(0) == set(cores) == {max(before)}
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.sched_getaffinity(0) == before
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_commit_is_this_checkout():
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?|unknown", machine.commit())


def test_no_rival_is_asked_twice():
    assert [rival.name for rival in run.make_rivals("tvm,tvm,none", 1.0)] == ["tvm"]


def test_layer_errors_are_one_line():
    options = run.Options(targets.choose("host"))
    result = run.run_layer(parse_line("ic8id4oc8kd3pd1"), options, [])
    assert result.ours is None and "\n" not in result.error


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "conv", "--shape", "nonsense"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 2 and "shape line 'nonsense'" in done.stderr
