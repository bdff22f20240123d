"""The demo, run as a person runs it, on one small network."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")


def _demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: the demo pins itself to its cores.
    command = [sys.executable, "-m", "bench.demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.model
def test_demo_shows_each_layer_and_both_times() -> None:
    done = _demo(
        "--models", "squeezenet1_1", "--image", "64", "--inputs", "2", "--calibration", "2"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("conv2d_0", "conv2d_25", "SQNR dB", "torch fp32 ms", "of 2", "in the library"):
        assert text in done.stdout


def test_demo_names_a_network_it_does_not_know() -> None:
    done = _demo("--models", "resnet19")
    assert done.returncode == 2
    assert "name is 'resnet19'; allowed:" in done.stderr and "Traceback" not in done.stderr
