"""ResNet-18 and MobileNet whole, on all executors: bit for bit what upstream's exact build gives.

Upstream is built for plain ``llvm``, where no sum of two products saturates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import tvm

from tests.kernels import require
from tests.relay import qnn_models, relay_models
from tests.relay.calls import X86, in_float32, run, upstream

SIZE = 32

MODELS: dict[str, Callable[[], tvm.IRModule]] = {
    "resnet18": lambda: relay_models.quantized(*relay_models.resnet18("NCHW", SIZE)),
    "resnet18_nhwc": lambda: relay_models.quantized(*relay_models.resnet18("NHWC", SIZE)),
    "mobilenet": lambda: relay_models.quantized(*relay_models.mobilenet_v1(SIZE)),
    "qnn_resnet18": lambda: qnn_models.resnet(18, qnn_models.Network("NHWC"), size=SIZE),
    "qnn_resnet50": lambda: qnn_models.resnet(50, qnn_models.Network("NCHW"), size=SIZE),
    "qnn_mobilenet": lambda: qnn_models.mobilenet(qnn_models.Network("NCHW"), size=SIZE),
    "qnn_mobilenet_nhwc": lambda: qnn_models.mobilenet(qnn_models.Network("NHWC"), size=SIZE),
    "qnn_signed": lambda: qnn_models.mobilenet(qnn_models.Network("NCHW", "int8"), size=SIZE),
    "branches": lambda: qnn_models.branches(),
    "branches_nhwc": lambda: qnn_models.branches(qnn_models.Network("NHWC")),
}

# (model, executor, opt_level, instruction set); the rest of the table is `relay_full`.
_SAMPLE = (
    ("resnet18", "graph", 3, "avx512_vnni"), ("resnet18", "vm", 3, "avx2"),
    ("qnn_mobilenet", "aot", 2, "avx512_vnni"), ("branches_nhwc", "graph", 1, "avx2"),
)  # fmt: skip
_REST = [
    (model, executor, level, isa)
    for model in MODELS
    for executor, level, isa in (
        ("graph", 3, "avx2"), ("vm", 3, "avx512_vnni"), ("aot", 2, "avx512_vnni"),
        ("graph", 1, "generic"),
    )
]  # fmt: skip
_CASES = [
    *(pytest.param(*case, id="-".join(map(str, case))) for case in _SAMPLE),
    *(pytest.param(*case, id="-".join(map(str, case)), marks=pytest.mark.relay_full)
      for case in _REST if case not in _SAMPLE),
]  # fmt: skip


@functools.cache
def _model(name: str) -> tuple[tvm.IRModule, dict[str, np.ndarray], list[np.ndarray]]:
    """Return (module, inputs, outputs of upstream's exact build)."""
    mod = MODELS[name]()
    inputs = relay_models.inputs(mod)
    return mod, inputs, upstream(mod, inputs)


@pytest.mark.model
@pytest.mark.parametrize(("name", "executor", "level", "isa"), _CASES)
def test_whole_network(name: str, executor: str, level: int, isa: str) -> None:
    require(isa)
    mod, inputs, expected = _model(name)
    with in_float32():
        got = run(mod, inputs, X86[isa], executor, level)
    assert len(got) == len(expected)
    most = max(len(np.unique(output)) for output in expected)
    assert most > 20, "the network's outputs say nothing"
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
