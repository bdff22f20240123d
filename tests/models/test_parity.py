"""Whole networks, quantized by onnxruntime, there and here: the same file, nearly the same bits.

Two ways of rounding the same sum differ now and then by one, and networks carry that on; what is to
be expected of it is what onnxruntime differs by from itself. In steps of the output's quantization,
and docs/parity.md's networks keep to it too:

- QDQ: the mean difference is at most 1.5 times that between onnxruntime with its optimisations and
  without, plus 0.05; the largest at most 1.5 times that one's, plus 2;
- QOperator, which onnxruntime runs by the same kernels at all of its levels, so that it differs
  from itself by nothing: the mean is below one step.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
pytest.importorskip("onnx", reason="onnx is not installed (extra `onnx`)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra `test`)")

import topi_int8
from bench import parity

pytestmark = pytest.mark.model

# Small images: the same graphs and channel counts, a tenth of the work.
CASES = [
    pytest.param("squeezenet1_1", "QDQ", id="squeezenet1_1-QDQ"),
    pytest.param(parity.ENCODER, "QOperator", id="encoder-QOperator"),
    pytest.param(
        "mobilenet_v3_small", "QDQ", id="mobilenet_v3_small-QDQ", marks=pytest.mark.network_full
    ),
]


@pytest.fixture(scope="module")
def worker():
    running = parity.start_onnxruntime()
    yield running
    running.close()


@pytest.mark.parametrize("name, form", CASES)
def test_outputs_are_onnxruntimes(name: str, form: str, worker, tmp_path: Path) -> None:
    options = parity.Options(
        (name,), (form,), image=64, inputs=16, calibration=4, min_time=0.0, folder=tmp_path
    )
    target = topi_int8.host_target(num_cores=1)
    found = parity.measure(parity.source(name, options), form, options, target, worker)
    assert found.unit == "step" and found.int8 > 10 and not found.names
    assert found.ours.mean < 1
    if form == "QDQ":
        assert found.ours.mean <= 1.5 * found.theirs.mean + 0.05
        assert found.ours.largest <= 1.5 * found.theirs.largest + 2
