"""The noise of each layer by itself, held against networks of that layer alone."""

from __future__ import annotations

import numpy as np
import pytest
from tvm.relax import op

from tests import graphs
from tests.quantize import networks
from topi_int8.quantize.calibrate import calibrate
from topi_int8.quantize.graph import Graph, prepare
from topi_int8.quantize.insert import insert_qdq
from topi_int8.quantize.observer import MinMax
from topi_int8.quantize.plan import make_plan
from topi_int8.quantize.quantize import _qparams
from topi_int8.quantize.sensitivity import own_noise

simulate = pytest.importorskip(
    "tests.simulate", reason="the float reference needs torch (extra `torch`)"
).simulate

DATA = networks.inputs(3)


def _noise(body):
    """Return (fp32 module, its QDQ form, own noise of its layers)."""
    mod = graphs.build(networks.SHAPE, body)
    prepared = prepare(mod)
    graph = Graph(prepared)
    plan = make_plan(graph)
    watched = {var.name: MinMax() for var in plan.tensors}
    calibrate(prepared, DATA, watched, progress=False)
    qparams = _qparams(plan, watched, "uint8")
    qdq = insert_qdq(prepared, graph, plan, qparams)
    return mod, qdq, own_noise(prepared, qdq, plan, qparams, DATA)


def test_of_one_layer_it_is_the_network_s() -> None:
    def body(emit, x):
        conv = emit(op.nn.conv2d(x, networks.const(networks.weights(1, 8, 8, 3, 3)), padding=1))
        return emit(op.add(conv, networks.const(np.full((1, 8, 1, 1), 3.0))))

    mod, qdq, noise = _noise(body)
    want, got = (np.stack([simulate(m, x) for x in DATA]) for m in (mod, qdq))
    assert 10 * np.log10(1 / noise["conv2d_0"]) == pytest.approx(graphs.sqnr(want, got), abs=0.1)


def test_earlier_layers_are_no_part_of_it() -> None:
    def body(emit, x):
        weight = networks.weights(1, 8, 8, 1, 1)
        weight[0] *= 1000  # the second layer's data, of which this channel counts for nothing
        y = emit(op.nn.relu(emit(op.nn.conv2d(x, networks.const(weight)))))
        weight = networks.weights(2, 8, 8, 1, 1)
        weight[:, 0] *= 1e-4
        y = emit(op.nn.relu(emit(op.nn.conv2d(y, networks.const(weight)))))
        y = emit(op.nn.conv2d(y, networks.const(networks.weights(3, 8, 8, 1, 1))))
        flat = emit(op.reshape(y, (1, 8, 100)))
        return emit(op.matmul(flat, emit(op.permute_dims(flat, [0, 2, 1]))))

    _, _, noise = _noise(body)
    assert list(noise) == ["conv2d_0", "conv2d_1", "conv2d_2", "matmul_0"]
    assert noise["conv2d_1"] > 100 * max(noise["conv2d_0"], noise["conv2d_2"], noise["matmul_0"])
    assert 0 < noise["matmul_0"] < 1e-2
