"""bench/rivals/networks.py and its worker: the same network, by other engines."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
import torch

from bench import demo, models
from bench.rivals import Unavailable, network_worker, networks
from bench.rivals.onednn import MAX_CPU_ISA
from bench.targets import isa_of
from bench.worker import ROOT, WorkerError
from topi_int8.target import host_target

NAME, IMAGE = "squeezenet1_1", 64
INT8 = [name for name, rival in networks.NETWORK_RIVALS.items() if rival.int8]


def installed(name: str) -> networks.NetworkRival:
    rival = networks.NETWORK_RIVALS[name]
    try:
        rival.python()
    except Unavailable as why:
        pytest.skip(f"{rival.title}: {why}")
    return rival


@pytest.fixture(scope="module")
def module():
    return models.load(NAME, image=IMAGE)


@pytest.fixture
def files(tmp_path: Path, module):
    return networks.NetworkFiles(
        tmp_path, NAME, *module, models.calibration_images(4, IMAGE)
    )


def test_every_rival_has_an_engine():
    assert set(networks.NETWORK_RIVALS) == set(network_worker.ENGINES)
    assert INT8 == ["openvino", "ort"]


def test_absence_is_said_in_words(monkeypatch, files):
    monkeypatch.setenv(networks.PYTHON, "/nowhere/python")
    for name in INT8:
        with pytest.raises(Unavailable, match="not installed; make openvino"):
            networks.prepare(networks.NETWORK_RIVALS[name], files, np.zeros(1), 1)
    # This interpreter has no OpenVINO.
    monkeypatch.setenv(networks.PYTHON, sys.executable)
    with pytest.raises(Unavailable, match=r"does not start: ModuleNotFoundError: .*openvino"):
        networks.prepare(networks.NETWORK_RIVALS["openvino"], files, np.zeros(1), 1)


def test_the_worker_needs_no_tvm():
    code = "import sys, bench.rivals.network_worker; sys.exit('tvm' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_files_are_written_once(files, tmp_path: Path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra `onnx`)")
    first = files.onnx()
    before = first.stat().st_mtime_ns
    assert files.onnx() == first and first.stat().st_mtime_ns == before
    assert files.torch().name == f"{NAME}-{IMAGE}x{IMAGE}.pt"
    model = onnx.load(first)
    [x], [y] = model.graph.input, model.graph.output
    assert (x.name, y.name) == (network_worker.INPUT, network_worker.OUTPUT)
    dims = [dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim]
    assert dims == [network_worker.BATCH, 3, IMAGE, IMAGE]
    assert [entry.version for entry in model.opset_import] == [13]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", networks.NETWORK_RIVALS)
def test_it_is_the_same_network(name, batch, files, module):
    rival = installed(name)
    [data] = models.unseen_images(batch, IMAGE, batch)
    with torch.inference_mode():
        wanted = module[0](torch.from_numpy(data)).numpy()
    prepared = networks.prepare(rival, files, data, 1)
    try:
        assert prepared.logits.shape == wanted.shape
        # float32 is equal but for the order of sums; int8 is what calibration on 4 images gives.
        assert demo.decibel(wanted, prepared.logits) > (5 if rival.int8 else 80)
        assert prepared.version.split()[1][0].isdigit()
        assert min(prepared.sampler(0.01)) > 0 and min(prepared.sampler(0.01)) > 0
        # NNCF's telemetry would leave a fork behind.
        worker = prepared.close.__self__._process.pid
        assert not Path(f"/proc/{worker}/task/{worker}/children").read_text()
    finally:
        prepared.close()


@pytest.mark.parametrize("name", INT8)
def test_memory_of_a_fresh_process(name, files, module, tmp_path: Path):
    rival = installed(name)
    worker = rival.start()
    path = files.model(rival, worker)
    worker.close()
    worker = rival.start()
    try:
        data = files.array(".data.npy", models.images(1, IMAGE))
        found = worker.ask("memory", path=str(path), data=str(data), threads=1)
    finally:
        worker.close()
    assert 1 << 20 < found["before"] < found["peak"]


def test_engines_are_held_to_the_instruction_set(monkeypatch):
    started = []

    class Quiet:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            started.append(env)

        def ask(self, do: str) -> str:
            return ""

    monkeypatch.setattr(networks, "Worker", Quiet)
    host = isa_of(host_target())
    other = "avx2" if host != "avx2" else "avx512_vnni"
    torch = networks.NETWORK_RIVALS["torch"]
    for isa in ("", host, other):
        torch.start(isa)
    assert started == [{}, {}, {"ONEDNN_MAX_CPU_ISA": MAX_CPU_ISA[other]}]
    with pytest.raises(Unavailable, match=f"cannot be held to {other}"):
        replace(torch, held=False).start(other)


def test_a_failing_engine_says_so(files):
    worker = networks.NETWORK_RIVALS["torch"].start()
    try:
        images = files.array(".npy", np.zeros(1, "float32"))
        with pytest.raises(WorkerError, match="engine is torch; allowed for int8"):
            worker.ask("quantize", source="a", images=str(images), target="b")
        with pytest.raises(WorkerError, match="FileNotFoundError"):
            worker.ask("load", key="k", path="nowhere", data=str(images), threads=1)
    finally:
        worker.close()


def test_the_input_lives_as_long_as_the_network(tmp_path: Path):
    seen = []

    class InPlace:
        """An engine that reads its input where it lies, and does not own it, as OpenVINO does."""

        version = "in place 1"

        def load(self, path, data, threads):
            seen.append(weakref.ref(data))
            return lambda: np.ones((1, 2), "float32")

    np.save(tmp_path / "data.npy", np.ones((1, 3, 4, 4), "float32"))
    handler = network_worker.Handler(InPlace)
    assert handler.load("key", "path", str(tmp_path / "data.npy"), 1) == [[1.0, 1.0]]
    gc.collect()
    assert seen[0]() is not None and min(handler.sample("key", 0.001)) > 0
    handler.drop("key")
    gc.collect()
    assert seen[0]() is None


def test_setup_says_what_failed(tmp_path: Path):
    # Something in the way of the virtual environment.
    (tmp_path / "venv").write_text("")
    with pytest.raises(RuntimeError, match="-m venv"):
        networks.setup(tmp_path / "venv")
