"""bench/e2e.py: a small network, int8 beside fp32: here, over RPC, and under qemu."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bench import cli, models
from tests.bench.local_board import NO_QEMU, QEMU_PYTHON, local_board
from topi_int8 import target as targets

pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
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
    engines = network["engines"]
    assert set(engines) == {"int8", "fp32", "tvm"}
    assert all(engine["min_ms"] > 0 for engine in engines.values())
    assert engines["int8"]["over_int8"] == 1


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
    from bench import e2e as module

    monkeypatch.setattr(module.Graph, "__call__", lambda self, *x: np.random.rand(1, 1000))
    done = e2e(*FAST, "--check", "--rivals", "none", "--no-layers")
    assert done.exit_code == 1
    assert "differs from this machine's result" in done.output.replace("\n", " ")
    assert "1 of 1 networks failed" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--network", "resnet19"], "name is 'resnet19'; allowed:"),
        (["--rivals", "mkl"], "rivals has 'mkl'; allowed: fp32, tvm, none"),
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
