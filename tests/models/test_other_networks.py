"""Torchvision networks beyond the demo's: they quantize, every convolution becomes an integer one.

Calibration goes through the float simulator here, which needs no compilation: seconds a network.
"""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from tests import graphs
from topi_int8.quantize.graph import Graph, prepare
from topi_int8.quantize.insert import insert_qdq
from topi_int8.quantize.plan import make_plan
from topi_int8.quantize.qparams import activation_qparams
from topi_int8.transform.fuse_elementwise import FuseElementwise
from topi_int8.transform.fuse_qdq import FuseQDQ

torch = pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
models = pytest.importorskip("bench.models")
simulate = pytest.importorskip("tests.simulate").simulate
from_torch = pytest.importorskip("topi_int8.frontend.torch").from_torch

# Network -> operators of the fused graph that stay float. Reshapes and the like move integers.
LEFT = {
    "squeezenet1_1": {"mean"},
    "googlenet": set(),
    "densenet121": set(),
    "shufflenet_v2_x1_0": set(),
    "efficientnet_b0": set(),
    "mobilenet_v3_small": set(),
    "regnet_y_400mf": set(),
}
MOVES = {
    "quantize", "dequantize", "nn.max_pool2d", "concat", "reshape", "permute_dims", "split",
    "TupleGetItem", "Tuple",
}  # fmt: skip


def _quantized(mod: tvm.IRModule, x: np.ndarray) -> tvm.IRModule:
    """Quantize with the ranges of one simulated run."""
    prepared = prepare(mod)
    graph = Graph(prepared)
    plan = make_plan(graph)
    tensors = {"x": x} | simulate(prepared, x, trace=True)[1]
    ranges: dict = {}
    for var in plan.tensors:
        ranges.setdefault(plan.representative(var), []).append(tensors[var.name])
    qparams = {
        group: activation_qparams(
            min(float(t.min()) for t in members), max(float(t.max()) for t in members), "uint8"
        )
        for group, members in ranges.items()
    }
    by_var = {var: qparams[plan.representative(var)] for var in plan.tensors}
    return insert_qdq(prepared, graph, plan, by_var)


@pytest.mark.parametrize("name", LEFT)
def test_network_quantizes_and_fuses(name: str) -> None:
    module, x = models.load(name, image=64)
    mod = from_torch(module, x)
    qdq = _quantized(mod, x.numpy())
    convolutions = graphs.count(prepare(mod))["nn.conv2d"]
    fused = graphs.count(FuseQDQ()(FuseElementwise()(qdq)))
    assert fused["topi_int8.conv2d"] == convolutions
    left = {op for op in fused if not op.startswith("topi_int8.")} - MOVES
    assert left == LEFT[name]
    want, have = module(x).numpy(), simulate(qdq, x.numpy())
    # Untrained networks of this depth amplify noise; structure is the point, not accuracy.
    assert np.isfinite(have).all() and graphs.sqnr(want, have) > 0
