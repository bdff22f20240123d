"""quantize on small networks: structure, numbers, options, refusals; the input is never changed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

import topi_int8
from tests import graphs
from topi_int8.quantize import instrument, layer_errors, list_layers, quantize
from topi_int8.quantize.report import stored_tensors

simulate = pytest.importorskip(
    "tests.simulate", reason="the float reference needs torch (extra `torch`)"
).simulate

SHAPE = (1, 8, 10, 10)


def _const(seed: int, *shape: int) -> relax.Expr:
    rng = np.random.default_rng(seed)
    fan_in = max(1, int(np.prod(shape[1:])))
    return relax.const((rng.normal(size=shape) / np.sqrt(fan_in)).astype("float32"))


def _conv(emit, x, seed: int, oc: int = 8, k: int = 3, groups: int = 1, strides: int = 1):
    ic = int(x.ty.shape[1])
    weight = _const(seed, oc, ic // groups, k, k)
    conv = op.nn.conv2d(x, weight, strides=strides, padding=k // 2, groups=groups)
    return emit(op.add(emit(conv), _const(seed + 50, 1, oc, 1, 1)))


def _residual(emit, x):
    first = emit(op.nn.relu(_conv(emit, x, 1)))
    total = emit(op.nn.relu(emit(op.add(_conv(emit, first, 2), first))))
    pooled = emit(op.nn.max_pool2d(total, (2, 2), (2, 2)))
    mean = emit(op.mean(emit(op.nn.relu(_conv(emit, pooled, 3, oc=16))), [2, 3], keepdims=True))
    flat = emit(op.reshape(mean, (1, 16)))
    return emit(op.add(emit(op.matmul(flat, _const(4, 16, 10))), _const(5, 10)))


def _inverted(emit, x):
    wide = emit(op.clip(_conv(emit, x, 1, oc=24, k=1), 0.0, 6.0))
    deep = emit(op.clip(_conv(emit, wide, 2, oc=24, groups=24), 0.0, 6.0))
    narrow = emit(op.add(x, _conv(emit, deep, 3, k=1)))
    return _conv(emit, narrow, 4, oc=4)


def _branches(emit, x):
    a, b = emit(op.nn.relu(_conv(emit, x, 1))), emit(op.nn.relu(_conv(emit, x, 2, k=1)))
    both = emit(op.concat([a, b], 1))
    return _conv(emit, emit(op.nn.avg_pool2d(both, (2, 2), (2, 2))), 3)


def _grouped_norm(emit, x):
    params = [relax.const(np.linspace(low, 1.5, 8).astype("float32")) for low in (0.5, -1, -1, 0.3)]
    conv = emit(op.nn.conv2d(x, _const(1, 8, 4, 3, 3), padding=1, groups=2))
    norm = emit(op.nn.batch_norm(conv, *params, axis=1, training=False)[0])
    return _conv(emit, emit(op.nn.relu(norm)), 2)


NETS = [_residual, _inverted, _branches, _grouped_norm]


def _inputs(count: int, seed: int = 0, shape=SHAPE) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype("float32") for _ in range(count)]


@pytest.fixture(scope="module", params=NETS, ids=lambda net: net.__name__.strip("_"))
def pair(request) -> tuple[tvm.IRModule, tvm.IRModule]:
    """An fp32 module and its QDQ form."""
    mod = graphs.build(SHAPE, request.param)
    return mod, quantize(mod, _inputs(8), progress=False)


def test_qdq_graph_keeps_the_signal(pair) -> None:
    mod, qdq = pair
    inputs = _inputs(4, seed=1)
    want = np.concatenate([simulate(mod, x) for x in inputs])
    got = np.concatenate([simulate(qdq, x) for x in inputs])
    # Two to four int8 layers of white noise: 30 dB and more were seen; 8 bits alone give about 40.
    assert graphs.sqnr(want, got) > 25


def test_every_convolution_reads_integers_and_int8_weights(pair) -> None:
    _, qdq = pair
    values = dict(graphs.bindings(qdq))
    for value in values.values():
        if graphs.op_name(value) not in ("nn.conv2d", "matmul"):
            continue
        data, weight = (values[arg] for arg in value.args)
        assert graphs.op_name(data) == graphs.op_name(weight) == "dequantize"
        assert str(values[data.args[0]].ty.dtype) == "uint8"
        assert str(weight.args[0].ty.dtype) == "int8"
        assert np.abs(weight.args[0].value.numpy().astype(int)).max() == 127


def test_biases_are_int32_at_data_scale_times_weight_scale(pair) -> None:
    _, qdq = pair
    values = dict(graphs.bindings(qdq))
    biases = 0
    for value in values.values():
        if graphs.op_name(value) != "add":
            continue
        pairs = [(a, values.get(a)) for a in value.args]
        conv = next((v for _, v in pairs if graphs.op_name(v) in ("nn.conv2d", "matmul")), None)
        bias = next((v for _, v in pairs if graphs.op_name(v) == "dequantize"), None)
        if conv is None or str(bias.args[0].ty.dtype) != "int32":
            continue
        scales = [values[arg].args[1].value.numpy() for arg in conv.args]
        np.testing.assert_array_equal(bias.args[1].value.numpy(), scales[0] * scales[1])
        biases += 1
    assert biases == len(stored_tensors(qdq))


def test_input_module_is_untouched() -> None:
    mod = graphs.build(SHAPE, _grouped_norm)
    before = mod.script(show_meta=True)
    quantize(mod, _inputs(1), progress=False)
    assert mod.script(show_meta=True) == before


def test_stock_tvm_runs_the_qdq_graph(pair) -> None:
    _, qdq = pair
    x = _inputs(1, seed=2)[0]
    with topi_int8.disabled():
        vm = relax.VirtualMachine(tvm.compile(qdq, target="llvm"), tvm.cpu())
        got = vm["main"](tvm.runtime.tensor(x)).numpy()
    want = simulate(qdq, x)
    # Another order of float sums may turn a rounding; one step of the last layers is some percent.
    assert graphs.sqnr(want, got) > 35


def test_layers_are_listed_by_the_names_that_skip_takes() -> None:
    mod = graphs.build(SHAPE, _residual)
    layers = list_layers(mod)
    names = [layer.name for layer in layers]
    assert names == [
        "conv2d_0", "conv2d_1", "add_0", "max_pool2d_0", "conv2d_2", "mean_0", "matmul_0"
    ]  # fmt: skip
    assert layers[0].weight_shape == (8, 8, 3, 3) and layers[-1].shape == (1, 10)


def _float_layers(qdq: tvm.IRModule) -> set[str]:
    values = dict(graphs.bindings(qdq))
    return {
        var.name
        for var, value in values.items()
        if graphs.op_name(value) in ("nn.conv2d", "matmul")
        and graphs.op_name(values.get(value.args[1])) != "dequantize"
    }


@pytest.mark.parametrize(
    "options, left",
    [
        (dict(), set()),
        (dict(skip_first=True), {"conv2d_0"}),
        (dict(skip_last=True), {"matmul_0"}),
        (dict(skip=["conv2d_1"]), {"conv2d_1"}),
        (dict(skip=[re.compile(r"conv2d_[12]")]), {"conv2d_1", "conv2d_2"}),
    ],
)  # fmt: skip
def test_skipped_layers_stay_float(options: dict, left: set[str]) -> None:
    mod = graphs.build(SHAPE, _residual)
    qdq = quantize(mod, _inputs(2), progress=False, **options)
    assert _float_layers(qdq) == left
    x = _inputs(1, seed=3)[0]
    assert graphs.sqnr(simulate(mod, x), simulate(qdq, x)) > 25


def test_int8_activations() -> None:
    mod = graphs.build(SHAPE, _residual)
    qdq = quantize(mod, _inputs(4), activation_dtype="int8", progress=False)
    kinds = {
        str(value.ty.dtype)
        for _, value in graphs.bindings(qdq)
        if graphs.op_name(value) == "quantize"
    }
    assert kinds == {"int8"}
    x = _inputs(1, seed=3)[0]
    assert graphs.sqnr(simulate(mod, x), simulate(qdq, x)) > 25


def test_calibration_items_may_be_arrays_tuples_and_dicts() -> None:
    mod = graphs.build(SHAPE, _inverted)
    x = _inputs(1)[0]
    forms = [quantize(mod, [item], progress=False) for item in (x, (x,), {"x": x})]
    for other in forms[1:]:
        tvm.ir.assert_structural_equal(forms[0], other)
    quantize(mod, iter([x]), progress=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(calibration=[]), "calibration is empty"),
        (dict(calibration=[np.zeros((1, 8, 9, 9))]), "item 0: x has shape .*allowed: .1, 8, 10"),
        (dict(calibration=[{"y": np.zeros(SHAPE)}]), r"inputs \['y'\]; allowed: \['x'\]"),
        (dict(calibration=[(np.zeros(SHAPE),) * 2]), "2 inputs; allowed: 1"),
        (dict(calibration=[np.full(SHAPE, np.nan)]), "infinite or NaN"),
        (dict(method="magic"), "method is 'magic'"),
        (dict(activation_dtype="int4"), "activation_dtype is 'int4'"),
        (
            dict(activation_dtype="int16"),
            r"activation_dtype is 'int16'; allowed: uint8, int8 \(products of int16 .* leave int32",
        ),
        (dict(activation_dtype="int32"), r"allowed: uint8, int8 \(no kernel here multiplies int32"),
        (dict(skip=["conv2d_9"]), "skip holds 'conv2d_9'; allowed: conv2d_0"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(arguments: dict, message: str) -> None:
    mod = graphs.build(SHAPE, _inverted)
    arguments = {"calibration": _inputs(1), **arguments}
    with pytest.raises(ValueError, match=message):
        quantize(mod, arguments.pop("calibration"), progress=False, **arguments)


def test_wrong_types_are_refused() -> None:
    mod = graphs.build(SHAPE, _inverted)
    with pytest.raises(TypeError, match="skip is 'conv2d_0'"):
        quantize(mod, _inputs(1), skip="conv2d_0", progress=False)
    with pytest.raises(TypeError, match="mod is str"):
        quantize("resnet18", _inputs(1), progress=False)
    with pytest.raises(ValueError, match="allowed: a Relax function 'main'"):
        quantize(tvm.IRModule({"other": mod["main"]}), _inputs(1), progress=False)


def test_instrument_returns_tensors_by_name() -> None:
    mod = graphs.build(SHAPE, _inverted)
    qdq = quantize(mod, _inputs(2), progress=False)
    x = _inputs(1, seed=4)[0]
    result, seen, x_q = simulate(instrument(qdq, ["x", "x_q"]), x)
    np.testing.assert_array_equal(seen, x)
    np.testing.assert_array_equal(x_q, simulate(qdq, x, trace=True)[1]["x_q"])
    np.testing.assert_array_equal(result, simulate(qdq, x))
    with pytest.raises(ValueError, match=r"names is \['nope'\]"):
        instrument(qdq, ["nope"])


def test_layer_errors_report_every_layer_of_int8_against_float() -> None:
    mod = graphs.build(SHAPE, _residual)
    qdq = quantize(mod, _inputs(4), progress=False)
    inputs = _inputs(2, seed=5)
    errors = {error.name: error for error in layer_errors(mod, qdq, inputs)}
    assert list(errors) == ["conv2d_0", "conv2d_1", "conv2d_2", "matmul_0"]
    assert all(25 < error.sqnr < 70 and error.max_error > 0 for error in errors.values())
    # The first layer by hand: what its kernel stores is the tensor after relu.
    name = stored_tensors(qdq)["conv2d_0"]
    traces = [(simulate(mod, x, trace=True)[1], simulate(qdq, x, trace=True)[1]) for x in inputs]
    fp32_name = next(v.name for v, e in graphs.bindings(mod) if graphs.op_name(e) == "nn.relu")
    want = np.concatenate([fp32[fp32_name] for fp32, _ in traces])
    got = np.concatenate([quantized[name] for _, quantized in traces])
    assert errors["conv2d_0"].sqnr == pytest.approx(graphs.sqnr(want, got), abs=0.2)


def test_other_weight_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_bits is 6; allowed: 2, 4, 7, 8$"):
        quantize(None, [], weight_bits=6)
    with pytest.raises(ValueError, match=r"weight_bits is 1; allowed: 2, 4, 7, 8 \(.* no zero"):
        quantize(None, [], weight_bits=1)


@pytest.mark.parametrize(("bits", "top"), [(4, 7), (2, 1)])
def test_few_bits_stand_in_the_graph_as_int8_and_reach_the_workloads(bits: int, top: int) -> None:
    mod = graphs.build(SHAPE, _residual)
    qdq = quantize(mod, _inputs(4), weight_bits=bits, progress=False)
    constants = [e.args[0] for _, e in graphs.bindings(qdq) if graphs.op_name(e) == "dequantize"]
    weights = [c.value.numpy() for c in constants if hasattr(c, "value")]
    weights = [w for w in weights if w.dtype == "int8"]
    assert len(weights) == 4 and {int(np.abs(w).max()) for w in weights} == {top}
    rows = topi_int8.explain(qdq, topi_int8.host_target(), show=False)
    assert {row.work.weight_range for row in rows} == {(-top, top)}
    x = _inputs(1, seed=4)[0]
    vm = relax.VirtualMachine(tvm.compile(qdq, topi_int8.host_target()), tvm.cpu())
    got = vm["main"](tvm.runtime.tensor(x)).numpy()
    assert graphs.sqnr(simulate(qdq, x), got) > 50
