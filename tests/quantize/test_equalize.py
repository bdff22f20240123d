"""Equalisation: the float32 function stays what it was, and channels become alike."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tests import graphs
from tests.quantize import networks
from topi_int8.quantize import layer_errors, quantize
from topi_int8.quantize.equalize import (
    EQUALIZED,
    _predicted_noise,
    _Seen,
    equalized,
    find_pairs,
)
from topi_int8.quantize.graph import Graph, prepare
from topi_int8.quantize.plan import make_plan
from topi_int8.quantize.weights import grouped, ungrouped

simulate = pytest.importorskip(
    "tests.simulate", reason="the float reference needs torch (extra `torch`)"
).simulate

MODES = ("activations", "weights")
CALIBRATION = networks.inputs(3)
const, weights = networks.const, networks.weights


def _clip(x, high: float = 6.0):
    return op.clip(x, 0.0, high)


def _mlp(emit, x):
    flat = emit(op.reshape(x, (1, 800)))
    spread = np.geomspace(1, 100, 32)
    y = emit(op.matmul(flat, const(weights(1, 800, 32) * spread)))
    y = emit(op.nn.relu(emit(op.add(y, const(np.ones(32))))))
    return emit(op.matmul(y, const(weights(2, 32, 10))))


def _pooled(emit, x):
    spread = np.geomspace(1, 50, 16).reshape(-1, 1, 1, 1)
    y = emit(op.nn.conv2d(x, const(weights(1, 16, 8, 3, 3) * spread)))
    y = emit(op.nn.max_pool2d(emit(op.nn.relu(y)), (2, 2), (2, 2), (1, 1)))
    y = emit(op.nn.avg_pool2d(y, (2, 2), (1, 1)))
    return emit(op.nn.conv2d(y, const(weights(2, 8, 8, 1, 1)), groups=2))


def _grouped_multiplier(emit, x):
    spread = np.geomspace(1, 50, 8).reshape(-1, 1, 1, 1)
    y = emit(op.nn.relu(emit(op.nn.conv2d(x, const(weights(1, 8, 4, 1, 1) * spread), groups=2))))
    y = emit(op.nn.relu(emit(op.nn.conv2d(y, const(weights(2, 16, 1, 3, 3)), groups=8))))
    return emit(op.nn.conv2d(y, const(weights(3, 8, 4, 1, 1)), groups=4))


def _relu6_chain(emit, x):
    return networks.uneven(emit, emit(_clip(x, 2.0)), act=_clip)


NETS = {
    "depthwise": networks.uneven,
    "mlp": _mlp,
    "pooled": _pooled,
    "grouped": _grouped_multiplier,
    "relu6": _relu6_chain,
    "small_clip": partial(networks.uneven, act=partial(_clip, high=0.01)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", NETS)
def test_the_float32_function_is_unchanged(net: str, mode: str) -> None:
    mod = graphs.build(networks.SHAPE, NETS[net])
    prepared = prepare(mod)
    before = prepared.script(show_meta=True)
    after = equalized(prepared, mode, CALIBRATION)
    assert prepared.script(show_meta=True) == before
    assert (EQUALIZED in (after.attrs or {})) or net == "small_clip"
    # Other inputs than those it was made from, and far larger ones: it holds for every input.
    for scale, x in zip((1, 100), networks.inputs(2, seed=5), strict=True):
        x = scale * (x - 0.5)
        want, got = simulate(mod, x), simulate(after, x)
        assert np.abs(want - got).max() <= 1e-5 * np.abs(want).max()


def _pairs(body) -> list[tuple[str, str]]:
    graph = Graph(prepare(graphs.build(networks.SHAPE, body)))
    pairs = find_pairs(graph, make_plan(graph))
    return [(pair.first.var.name, pair.second.var.name) for pair in pairs]


def test_pairs_are_found_through_what_scales() -> None:
    chain = [(f"conv2d_{i}", f"conv2d_{i + 1}") for i in range(4)]
    assert _pairs(networks.uneven) == chain
    assert _pairs(_pooled) == chain[:1]
    assert _pairs(_mlp) == [("matmul_0", "matmul_1")]


@pytest.mark.parametrize(
    "between",
    [
        lambda emit, y: emit(op.nn.silu(y)),
        lambda emit, y: emit(op.add(y, const(np.ones((10, 10))))),
        lambda emit, y: emit(op.add(y, y)),
        lambda emit, y: emit(op.permute_dims(y, [0, 1, 3, 2])),
    ],
    ids=["silu", "spatial_constant", "two_readers", "permute"],
)  # fmt: skip
def test_no_pair_across_anything_else(between) -> None:
    def body(emit, x):
        y = between(emit, emit(op.nn.conv2d(x, const(weights(1, 8, 8, 1, 1)))))
        return emit(op.nn.conv2d(y, const(weights(2, 8, 8, 1, 1))))

    assert _pairs(body) == []
    prepared = prepare(graphs.build(networks.SHAPE, body))
    assert equalized(prepared, "weights").same_as(prepared)


def test_a_clip_holds_the_channels_that_could_reach_it() -> None:
    def body(emit, x):
        y = emit(_clip(x, 1.0))
        # Two channels that stay below 6 on inputs in [0, 1], and two that need not.
        weight = np.array([0.5, 0.2, 3.0, 9.0]).reshape(4, 1, 1, 1) * np.ones((1, 8, 1, 1))
        y = emit(_clip(emit(op.nn.conv2d(y, const(weight)))))
        return emit(op.nn.conv2d(y, const(weights(2, 8, 4, 1, 1))))

    prepared = prepare(graphs.build(networks.SHAPE, body))
    for mode in MODES:
        scale = equalized(prepared, mode, CALIBRATION).attrs[EQUALIZED]["conv2d_0"].numpy()
        assert (scale[2:] == 1).all() and (scale[:2] != 1).any()
        # 8 channels of up to 1: sums of up to 4 and 1.6, which may grow to 6.
        assert scale[0] >= 4 / 6 and scale[1] >= 1.6 / 6


def test_weights_of_a_pair_get_equal_ranges() -> None:
    mod = equalized(prepare(graphs.build(networks.SHAPE, networks.uneven)), "weights")
    graph = Graph(mod)
    for pair in find_pairs(graph, make_plan(graph)):
        first, second = (
            np.abs(grouped(layer.weight, graph.values[layer.var]))
            for layer in (pair.first, pair.second)
        )
        r1 = first.max(axis=(2, 3, 4)).reshape(-1)
        np.testing.assert_allclose(r1, second.max(axis=(1, 3, 4)).reshape(-1), rtol=0.05)


def test_a_killed_channel_does_not_blow_up_its_bias() -> None:
    def body(emit, x):
        weight = weights(1, 8, 8, 1, 1)
        weight[3] *= 1e-12
        y = emit(op.add(emit(op.nn.conv2d(x, const(weight))), const(np.ones((1, 8, 1, 1)))))
        return emit(op.nn.conv2d(emit(op.nn.relu(y)), const(weights(2, 8, 8, 1, 1))))

    mod = graphs.build(networks.SHAPE, body)
    for mode in MODES:
        after = equalized(prepare(mod), mode, CALIBRATION)
        ((bias, _, _),) = [(v, s, a) for s, v, a in make_plan(Graph(after)).bias.values()]
        assert np.abs(bias).max() < 10


def test_depthwise_networks_gain() -> None:
    mod = graphs.build(networks.SHAPE, networks.uneven)
    before = mod.script(show_meta=True)
    qdq = {mode: quantize(mod, CALIBRATION, equalize=mode, progress=False)
           for mode in (False, True)}  # fmt: skip
    assert mod.script(show_meta=True) == before
    data = networks.inputs(3, seed=9)
    want = np.concatenate([simulate(mod, x) for x in data])
    plain, equal = (
        graphs.sqnr(want, np.concatenate([simulate(q, x) for x in data])) for q in qdq.values()
    )
    assert equal > plain + 6  # a bit
    networks.assert_all_int8(qdq[True], 5)
    # Compared with a float32 network of the same scales: with another it would be some dB.
    worst = {mode: min(e.sqnr for e in layer_errors(mod, qdq[mode], data)) for mode in qdq}
    assert worst[True] > max(20, worst[False])


@pytest.mark.parametrize("layout", ["OIHW", "HWIO", "OHWI"])
def test_grouped_weights_and_back(layout: str) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 2, 3, 1))
    stored = np.ascontiguousarray(weight.transpose(["OIHW".index(a) for a in layout]))
    mod = graphs.build((1, 4, 5, 5), lambda emit, x: emit(
        op.nn.conv2d(x, const(stored), groups=2, kernel_layout=layout)
    ))  # fmt: skip
    call = next(v for _, v in graphs.bindings(mod) if isinstance(v, relax.Call))
    made = grouped(stored, call)
    np.testing.assert_array_equal(made, weight.reshape(2, 3, 2, 3, 1))
    np.testing.assert_array_equal(ungrouped(made, call), stored)


def test_refusals() -> None:
    mod = graphs.build(networks.SHAPE, networks.uneven)
    with pytest.raises(ValueError, match="equalize is 'both'; allowed: True, False, 'activations'"):
        quantize(mod, CALIBRATION, equalize="both")
    with pytest.raises(ValueError, match="mode is 'both'; allowed: activations, weights"):
        equalized(prepare(mod), "both")
    with pytest.raises(ValueError, match="calibration is empty"):
        quantize(mod, [], equalize=True, progress=False)
    assert isinstance(equalized(prepare(mod), "weights"), tvm.IRModule)


@pytest.mark.parametrize("spread", [1, 10, 100])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_predicted_noise_is_that_of_rounding(spread: float, power: float) -> None:
    rng = np.random.default_rng(0)
    channels = np.geomspace(1, spread, 32)
    data = np.abs(rng.normal(size=(32, 4000))) * channels[:, None]
    weight = rng.normal(size=(16, 32))
    seen = _Seen()
    seen.update(data)
    scale = (channels / spread) ** power
    data_step = (data / scale[:, None]).max() / 255
    weight_step = np.abs(weight * scale).max(axis=1, keepdims=True) / 127
    rounded = np.rint(data / scale[:, None] / data_step) * data_step
    noise = (np.rint(weight * scale / weight_step) * weight_step) @ rounded - weight @ data
    measured = np.mean(np.sum(noise**2, axis=0)) * 12  # rounding to steps d: noise of d**2 / 12
    predicted = _predicted_noise(weight[None, :, :, None, None], seen, scale)
    assert predicted == pytest.approx(measured, rel=0.3)
