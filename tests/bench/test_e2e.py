"""bench/e2e.py: a small network, int8 beside fp32: here, over RPC, and under qemu."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bench import cli, models, site
from tests.bench.local_board import NO_QEMU, QEMU_PYTHON, local_board
from topi_int8 import target as targets

pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
from bench import e2e as e2e_module

pytestmark = pytest.mark.model

FAST = ["--image", "32", "--calibration", "2", "--inputs", "2", "--min-time", "0.02"]
FAST += ["--rounds", "2", "--network", "squeezenet1_1"]


def e2e(*args: str):
    return CliRunner().invoke(cli.app, ["e2e", *args], terminal_width=200)


def test_here(tmp_path: Path):
    out = tmp_path / "out.json"
    done = e2e(*FAST, "--check", "--json", str(out))
    assert done.exit_code == 0, done.output
    assert "squeezenet1_1" in done.output and "fp32, stock TVM" in done.output
    document = json.loads(out.read_text())
    assert document["machine"]["cpu"] and len(document["options"]["cores"]) == 1
    [network] = document["networks"]
    assert network["checked"] and not network["error"] and network["top1_of"] == 2
    assert network["macs"] == sum(layer["macs"] for layer in network["layers"])
    assert all(layer["min_us"] > 0 and layer["strategy"] for layer in network["layers"])
    assert (network["threads"], network["batch"]) == (1, 1)
    engines = network["engines"]
    assert set(engines) == {"int8", "openvino", "ort", "torch", "fp32", "tvm"}
    assert all(engines[name]["min_ms"] > 0 for name in ("int8", "torch", "fp32", "tvm"))
    # Rivals that are not installed say so, in the table too.
    for name in ("openvino", "ort"):
        if engines[name]["min_ms"] is None:
            assert engines[name]["note"] == "not installed; make openvino"
            assert f"{e2e_module.TITLES[name]}: not installed; make openvino" in done.output
    assert engines["int8"]["over_int8"] == 1 and engines["torch"]["sqnr_db"] > 80
    assert engines["torch"]["version"].startswith("torch ")


def test_batches_and_an_earlier_run(tmp_path: Path):
    out, old = tmp_path / "out.json", tmp_path / "old.json"
    rows = [
        {"name": "squeezenet1_1", "threads": 1, "batch": batch, "engines": {
            "int8": {"min_ms": 1.0, "note": ""}, "torch": {"min_ms": torch_ms, "note": ""},
        }}
        for batch, torch_ms in ((1, 1e9), (4, 1.0))
    ]  # fmt: skip
    old.write_text(json.dumps({"machine": {"cpu": "-"}, "options": {}, "networks": rows}))
    args = [*FAST, "--rivals", "torch", "--no-layers", "--batch", "1,3"]
    done = e2e(*args, "--json", str(out), "--compare", str(old))
    # It was 1e9 times faster than torch before.
    assert done.exit_code == 1 and "1 of 1 rows regressed" in done.stderr, done.output
    assert "only in the old run: squeezenet1_1, 1 thread, batch 4" in done.output
    assert "only in the new run: squeezenet1_1, 1 thread, batch 3" in done.output
    document = json.loads(out.read_text())
    assert document["options"]["batch"] == [1, 3] and document["options"]["threads"] == [1]
    one, three = document["networks"]
    assert (one["batch"], three["batch"]) == (1, 3) and three["macs"] == 3 * one["macs"]
    assert three["top1_of"] == 3  # two were asked for, and a batch has three
    ours = three["engines"]["int8"]
    assert ours["per_image_ms"] == pytest.approx(ours["min_ms"] / 3)


def test_counts_of_threads_have_processes_of_their_own(tmp_path: Path):
    cores = len(os.sched_getaffinity(0))
    # Two counts need two cores; one, run the same way, shows that it works.
    counts = (1, 2) if cores > 1 else (1,)
    settings = {
        "image": 32, "calibration": 2, "inputs": 2, "min_time": 0.02, "rounds": 2,
        "rivals": ("torch",), "layers": False, "folder": tmp_path,
    }  # fmt: skip
    plan = e2e_module.Plan(("squeezenet1_1",), (1,), settings)
    parts = [
        e2e_module._run_apart(site.Request(threads=count), plan, "a note") for count in counts
    ]
    assert [part.results[0].threads for part in parts] == list(counts)
    assert [len(part.cores) for part in parts] == list(counts)
    assert all(part.results[0].speedup("torch") > 0 for part in parts)
    document = e2e_module.to_document(parts, {"threads": list(counts)})
    assert len(document["networks"]) == len(counts) and document["note"] == "a note"
    assert list(tmp_path.iterdir()), "the rivals' files are kept for the next count"


def test_over_rpc(tmp_path: Path):
    pytest.importorskip("tornado", reason="tornado is not installed (extra `rpc`)")
    if not targets.runs_here("avx2"):
        pytest.skip("this CPU lacks avx2: no local board of it")
    out = tmp_path / "out.json"
    with local_board("haswell", tmp_path) as address:
        rpc = ["--rpc", address, "--key", "haswell", "--rivals", "fp32", "--check"]
        done = e2e(*FAST, *rpc, "--note", "a test", "--json", str(out))
    assert done.exit_code == 0, done.output
    document = json.loads(out.read_text())
    assert document["machine"]["arch"] == "x86_64" and document["host"]["commit"]
    assert document["options"]["weight_bits"] == 7 and document["note"] == "a test"
    [network] = document["networks"]
    assert network["checked"] and network["engines"]["fp32"]["min_ms"] > 0


@pytest.mark.slow_emulator
@pytest.mark.skipif(NO_QEMU is not None, reason=str(NO_QEMU))
def test_on_a_raspberry_pi_under_qemu(tmp_path: Path):
    out = tmp_path / "out.json"
    with local_board("rpi4", tmp_path, QEMU_PYTHON, {"QEMU_CPU": "cortex-a72"}) as address:
        rpc = ["--rpc", address, "--key", "rpi4", "--rivals", "none", "--no-layers", "--check"]
        done = e2e(*FAST, *rpc, "--json", str(out))
    assert done.exit_code == 0, done.output
    document = json.loads(out.read_text())
    assert document["machine"]["cpu"] == "emulated" and document["options"]["weight_bits"] == 8
    [network] = document["networks"]
    assert network["checked"] and network["engines"]["int8"]["min_ms"] > 0
    assert {layer["min_us"] for layer in network["layers"]} == {None}


def test_a_wrong_result_is_said(monkeypatch):
    monkeypatch.setattr(e2e_module.Graph, "__call__", lambda self, *x: np.random.rand(1, 1000))
    done = e2e(*FAST, "--check", "--rivals", "none", "--no-layers")
    assert done.exit_code == 1
    assert "differs from this machine's result" in done.output.replace("\n", " ")
    assert "1 of 1 networks failed" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--network", "resnet19"], "name is 'resnet19'; allowed:"),
        (["--rivals", "mkl"], "rivals has 'mkl'; allowed: openvino, ort, torch, fp32, tvm, none"),
        (["--threads", "1,x"], "threads is 1,x; allowed: 1 or more, as 1 or 1,2"),
        (["--threads", "0"], "threads is 0"),
        (["--batch", "1", "--batch", "0"], "batch is 1,0"),
        (["--compare", "nowhere.json"], "nowhere.json"),
        (["--image", "0"], "image is 0"),
        (["--weight-bits", "6"], "weight_bits is 6; allowed: 7, 8"),
        (["--tvm-limit", "0"], "tvm_limit is 0"),
        (["--key", "rpi4"], "key is 'rpi4'; allowed only with --rpc"),
    ],
)
def test_refusals(args, words):
    done = e2e(*args)
    assert done.exit_code == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_weight_bits_follow_the_target():
    for name, bits in (("haswell", 7), ("cascadelake", 8), ("rpi4", 8), ("rpi2", 8)):
        assert models.default_weight_bits(targets.named(name)) == bits
