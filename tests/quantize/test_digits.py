"""Accuracy on real data: trained networks in int8 against float32, on digits they never saw."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tvm
from tvm import relax

import topi_int8

torch = pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra `test`)")

from tests.data import digits  # noqa: E402
from topi_int8.frontend.torch import from_torch  # noqa: E402

pytestmark = pytest.mark.model

BATCH = 20
CALIBRATION = 300
# Top-1 of int8 may be off float32's by half a point: 2 of the 500 test images.
BOUND = 0.005


def batches(images: np.ndarray) -> list[np.ndarray]:
    return np.split(images, len(images) // BATCH)


@functools.cache
def network(name: str) -> tuple[tvm.IRModule, np.ndarray]:
    """Return a network in Relax, and whether torch's float32 is right about each test image."""
    _, unseen = digits.load_digits()
    module = digits.load_network(name)
    mod = from_torch(module, torch.zeros(BATCH, 1, 8, 8))
    return mod, module(torch.from_numpy(unseen.images)).argmax(1).numpy() == unseen.labels


def right_in_int8(name: str, **options: object) -> np.ndarray:
    """Return whether the compiled int8 network is right about each test image."""
    seen, unseen = digits.load_digits()
    mod, _ = network(name)
    calibration = batches(seen.images[:CALIBRATION])
    qdq = topi_int8.quantize(mod, calibration, progress=False, **options)
    main = relax.VirtualMachine(tvm.compile(qdq, topi_int8.host_target()), tvm.cpu())["main"]
    logits = [main(tvm.runtime.tensor(part)).numpy() for part in batches(unseen.images)]
    return np.concatenate(logits).argmax(1) == unseen.labels


@pytest.mark.parametrize("name", digits.NETWORKS)
def test_float32_has_learned(name: str) -> None:
    right = network(name)[1]
    assert right.size == 500 and right.mean() > 0.97


@pytest.mark.parametrize(
    "method",
    ["kl", "percentile", "mse", pytest.param("minmax", marks=pytest.mark.network_full)],
)
@pytest.mark.parametrize("name", digits.NETWORKS)
def test_int8_is_within_half_a_point_of_float32(name: str, method: str, record_property) -> None:
    want, got = network(name)[1], right_in_int8(name, method=method)
    record_property("top1", (name, method, float(want.mean()), float(got.mean())))
    assert abs(got.mean() - want.mean()) <= BOUND
