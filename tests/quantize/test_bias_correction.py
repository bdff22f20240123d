"""Bias correction: the means it works with, what it mends, and what it leaves as it was."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from tests import graphs
from tests.quantize import networks
from topi_int8.quantize import layer_errors, quantize
from topi_int8.quantize.graph import Graph, prepare
from topi_int8.quantize.input_mean import input_means
from topi_int8.quantize.plan import make_plan
from topi_int8.quantize.segments import split, sweep

simulate = pytest.importorskip(
    "tests.simulate", reason="the float reference needs torch (extra `torch`)"
).simulate


def _only_mean(mod: tvm.IRModule):
    graph = Graph(prepare(mod))
    plan = make_plan(graph)
    ((var, mean),) = input_means(graph, plan).items()
    return mean, plan.computes[var]


@given(
    st.integers(1, 3), st.sampled_from([(1, 1), (3, 3), (2, 5)]),
    st.tuples(*[st.integers(0, 2)] * 4), st.integers(1, 2), st.integers(1, 3),
    st.sampled_from([1, 2, 4]), st.booleans(),
)  # fmt: skip
def test_the_mean_output_follows_from_the_mean_inputs(
    n: int, kernel: tuple, padding: tuple, dilation: int, stride: int, groups: int, nhwc: bool
) -> None:
    rng = np.random.default_rng(n)
    weight = rng.normal(size=(8, 4 // groups, *kernel)).astype("float32")
    options = dict(strides=stride, padding=padding, dilation=dilation, groups=groups)
    want = graphs.build(
        (n, 4, 11, 9), lambda emit, x: emit(op.nn.conv2d(x, relax.const(weight), **options))
    )
    if nhwc:
        hwio = np.ascontiguousarray(weight.transpose(2, 3, 1, 0))
        mean, compute = _only_mean(graphs.build((n, 11, 9, 4), lambda emit, x: emit(
            op.nn.conv2d(x, relax.const(hwio), data_layout="NHWC", kernel_layout="HWIO", **options)
        )))  # fmt: skip
    else:
        mean, compute = _only_mean(want)
    images = [rng.normal(size=(n, 4, 11, 9)).astype("float32") + 1 for _ in range(2)]
    for image in images:
        mean.update(image.transpose(0, 2, 3, 1) if nhwc else image)
    outputs = np.stack([simulate(want, image) for image in images]).astype("float64")
    np.testing.assert_allclose(
        mean.expected(compute.weight), outputs.mean(axis=(0, 1, 3, 4)), rtol=1e-4, atol=1e-4
    )


def test_the_mean_output_of_a_matmul() -> None:
    weight = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
    mean, compute = _only_mean(
        graphs.build((2, 7, 6), lambda emit, x: emit(op.matmul(x, relax.const(weight))))
    )
    data = np.random.default_rng(1).normal(size=(2, 7, 6)).astype("float32")
    mean.update(data)
    np.testing.assert_allclose(
        mean.expected(compute.weight), (data @ weight).mean(axis=(0, 1)), rtol=1e-5, atol=1e-6
    )


def test_a_mean_of_nothing_says_so() -> None:
    mean, compute = _only_mean(graphs.build((1, 6), lambda emit, x: emit(
        op.matmul(x, networks.const(np.ones((6, 5))))
    )))  # fmt: skip
    with pytest.raises(ValueError, match="x has no values; allowed: at least one update"):
        mean.expected(compute.weight)


MOD = graphs.build(networks.SHAPE, networks.bare)
CALIBRATION = networks.inputs(6)


@pytest.fixture(scope="module")
def quantized() -> dict[str | None, tvm.IRModule]:
    """The network without biases, quantized with each correction and without."""
    before = MOD.script(show_meta=True)
    made = {
        mode: quantize(MOD, CALIBRATION, bias_correction=mode, progress=False)
        for mode in (None, "fast", "full")
    }
    assert MOD.script(show_meta=True) == before
    return made


def _mean_errors(qdq: tvm.IRModule, name: str, fp32_name: str, data: list) -> np.ndarray:
    """Return the mean error of each channel of a layer's sum, by its name with and without bias."""
    want = [simulate(prepare(MOD), x, trace=True)[1][fp32_name] for x in data]
    got = [simulate(qdq, x, trace=True)[1][name] for x in data]
    difference = np.stack(got).astype("float64") - np.stack(want)
    axes = tuple(i for i in range(difference.ndim) if i != 2)
    return difference.mean(axis=axes) / np.abs(np.stack(want)).max()


LAYERS = ["conv2d_0", "conv2d_1", "conv2d_2", "matmul_0"]


@pytest.mark.parametrize("mode, part", [("fast", 0.3), ("full", 0.02)])
def test_the_mean_error_of_each_layer_shrinks(quantized, mode: str, part: float) -> None:
    for layer in LAYERS:
        before = _mean_errors(quantized[None], layer, layer, CALIBRATION)
        after = _mean_errors(quantized[mode], f"{layer}_bias", layer, CALIBRATION)
        # "full" is exact on these inputs, but for what rounds differently from kernel to kernel.
        assert np.abs(after).max() < part * np.abs(before).max(), layer


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_the_error_on_other_inputs_shrinks(quantized, mode: str) -> None:
    data = networks.inputs(6, seed=9)
    want = np.concatenate([simulate(MOD, x) for x in data])
    plain, corrected = (
        graphs.sqnr(want, np.concatenate([simulate(quantized[m], x) for x in data]))
        for m in (None, mode)
    )
    assert corrected > plain + 10  # most of the error is of the mean, by construction


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_biases_that_were_added_fuse(quantized, mode: str) -> None:
    networks.assert_all_int8(quantized[mode], len(LAYERS))
    errors = layer_errors(MOD, quantized[mode], networks.inputs(1))
    assert [error.name for error in errors] == LAYERS
    assert min(error.sqnr for error in errors) > 25


def test_skipped_layers_and_existing_biases_are_left_alone() -> None:
    mod = graphs.build(networks.SHAPE, networks.uneven)
    qdq = quantize(mod, CALIBRATION[:2], bias_correction="full", skip=["conv2d_3"], progress=False)
    assert networks.float_layers(qdq) == ["conv2d_3"]
    names = {var.name for var, _ in graphs.bindings(qdq)}
    assert not any(name.endswith("_bias") for name in names)


def test_a_graph_in_parts_is_the_graph() -> None:
    def body(emit, x):
        conv = emit(op.nn.conv2d(x, networks.const(networks.weights(1, 8, 8, 3, 3)), padding=1))
        first = emit(op.nn.relu(emit(op.add(conv, networks.const(np.ones((1, 8, 1, 1)))), "a")))
        halves = emit(op.split(first, 2, 1))
        swapped = emit(op.concat([halves[1], halves[0]], 1))
        conv = emit(op.nn.conv2d(swapped, networks.const(networks.weights(2, 8, 8, 1, 1))))
        second = emit(op.add(conv, networks.const(np.ones((1, 8, 1, 1)))), "b")
        return emit(op.add(second, first))

    mod = graphs.build(networks.SHAPE, body)
    qdq = quantize(mod, CALIBRATION[:2], progress=False)
    seen: dict[str, list[np.ndarray]] = {}
    shift = np.zeros((1, 8, 1, 1))

    def correct(name: str, outputs: list[np.ndarray]) -> np.ndarray:
        seen[name] = outputs
        return shift

    sweep(qdq, ["b", "a"], CALIBRATION[:2], correct)
    assert list(seen) == ["a", "b"]
    for i, x in enumerate(CALIBRATION[:2]):
        trace = simulate(qdq, x, trace=True)[1]
        for name, outputs in seen.items():
            assert graphs.sqnr(trace[name], outputs[i]) > 45
    first = seen["b"][0]
    shift = np.linspace(-1, 1, 8).reshape(1, 8, 1, 1)
    sweep(qdq, ["a", "b"], CALIBRATION[:1], correct)
    assert np.abs(seen["b"][0] - first).max() > 0.5  # what follows a cut reads the shifted tensor
    with pytest.raises(ValueError, match=r"cuts is \['nope'\]"):
        split(qdq, ["a", "nope"])


def test_a_symbolic_batch_is_corrected_too() -> None:
    n = tvm.tirx.Var("n", "int64")
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((n, 8, 10, 10), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            weight = networks.const(networks.rounded_down(1, 8, 8, 3, 3))
            conv = bb.emit(op.nn.relu(bb.emit(op.nn.conv2d(x, weight, padding=1))))
            out = bb.emit_output(bb.emit(op.nn.conv2d(conv, weight)))
        bb.emit_func_output(out)
    batches = [networks.inputs(1, shape=(count, *networks.SHAPE[1:]))[0] for count in (1, 3)]
    qdq = quantize(bb.get(), batches, bias_correction="full", progress=False)
    want = np.concatenate([simulate(bb.get(), batch) for batch in batches])
    got = np.concatenate([simulate(qdq, batch) for batch in batches])
    assert np.abs((got - want).mean(axis=(0, 2, 3))).max() < 1e-3 * np.abs(want).max()


def test_other_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="bias_correction is 'slow'; allowed: None, 'fast'"):
        quantize(MOD, CALIBRATION, bias_correction="slow")
