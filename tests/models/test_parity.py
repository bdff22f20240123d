"""Whole networks, quantized by onnxruntime, there and here: the same file, nearly the same bits.

The bound, which docs/parity.md's networks keep too: see `_bound`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.model

pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
pytest.importorskip("onnx", reason="onnx is not installed (extra `onnx`)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra `test`)")

import topi_int8
from bench import parity

# Small images: the same graphs and channel counts, a tenth of the work.
CASES = [
    ("squeezenet1_1", "QOperator"), ("mobilenet_v3_small", "QDQ"), ("shufflenet_v2_x1_0", "QDQ"),
    (parity.ENCODER, "QOperator"),
]  # fmt: skip


@pytest.fixture(scope="module")
def worker():
    running = parity.start_onnxruntime()
    yield running
    running.close()


@pytest.mark.parametrize("name, form", CASES, ids="-".join)
def test_outputs_are_onnxruntimes(name: str, form: str, worker, tmp_path: Path) -> None:
    options = parity.Options(
        (name,), (form,), image=64, inputs=16, calibration=4, min_time=0.0, folder=tmp_path
    )
    target = topi_int8.host_target(num_cores=1)
    found = parity.measure(parity.source(name, options), form, options, target, worker)
    assert found.unit == "step" and found.int8 > 10 and not found.names
    assert np.isfinite(found.ours.largest)
