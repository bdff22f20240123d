"""The accuracy report: its numbers against numpy, what is a layer's own error, and its forms."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.relax import op

import topi_int8
from tests import graphs
from topi_int8.qparams import QParams
from topi_int8.quantize import AccuracyReport, Grid, MinMax, quantize
from topi_int8.quantize.accuracy import Accuracy, LayerAccuracy
from topi_int8.quantize.noise import Noise, Rounding

SHAPE = (1, 8, 10, 10)


def _inputs(count: int, seed: int = 0, shape=SHAPE) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype("float32") for _ in range(count)]


def _weight(seed: int, oc: int = 8, ic: int = 8, k: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(oc, ic, k, k)) / math.sqrt(ic * k * k)).astype("float32")


def _network(weights: list[np.ndarray], shape=SHAPE) -> tvm.IRModule:
    """Return a chain of convolutions, relu between them."""

    def body(emit, x):
        for i, weight in enumerate(weights):
            x = emit(op.nn.conv2d(x, relax.const(weight), padding=weight.shape[2] // 2))
            if i + 1 < len(weights):
                x = emit(op.nn.relu(x))
        return x

    return graphs.build(shape, body)


def _report(mod, qdq, inputs, **options) -> AccuracyReport:
    return topi_int8.accuracy_report(mod, qdq, inputs, progress=False, **options)


# ---------------------------------------------------------------- sums against numpy


def test_sums_are_numpys_however_the_data_comes() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(6, 5, 4, 3)).astype("float32")
    values = reference + rng.normal(size=reference.shape).astype("float32") / 50
    values[:, 3] += 1  # the known worst channel
    values[:, 1] = reference[:, 1]  # and one without an error
    whole, parts = Noise(channel_axis=1), Noise(channel_axis=1)
    whole.update(reference, values)
    for r, v in zip(reference, values, strict=True):
        parts.update(r[None], v[None])
    r, v = reference.astype("float64"), values.astype("float64")
    cosine = np.vdot(r, v) / np.linalg.norm(r) / np.linalg.norm(v)
    by_channel = np.sum((r - v) ** 2, axis=(0, 2, 3))
    for noise in (whole, parts):
        assert noise.sqnr == pytest.approx(graphs.sqnr(reference, values), abs=1e-9)
        assert noise.cosine == pytest.approx(cosine, abs=1e-12)
        assert noise.max_error == np.abs(r - v).max()
        worst = noise.worst(5)
        assert [index for index, _, _ in worst] == [3, *(i for i, _, _ in worst[1:])]
        assert 1 not in [index for index, _, _ in worst] and len(worst) == 4
        assert worst[0][1] == pytest.approx(graphs.sqnr(r[:, 3], v[:, 3]), abs=1e-9)
        assert worst[0][2] == pytest.approx(by_channel[3] / by_channel.sum())
        assert noise.noisiest() == worst[0]


def test_sums_at_their_limits() -> None:
    zeros, ones = np.zeros((1, 2)), np.ones((1, 2))
    exact, silent, nothing, away = Noise(), Noise(), Noise(), Noise()
    exact.update(ones, ones)
    silent.update(zeros, ones)
    away.update(ones, -ones)
    nothing.update(zeros[:0], zeros[:0])
    assert (exact.sqnr, exact.cosine, exact.noisiest()) == (math.inf, 1.0, None)
    assert (silent.sqnr, silent.cosine) == (-math.inf, 0.0)
    # A dead channel has no SQNR to be ranked by; its noise counts.
    assert silent.worst(3) == [] and silent.noisiest() == (0, -math.inf, 1.0)
    assert away.cosine == -1.0 and away.max_error == 2
    assert (nothing.sqnr, nothing.cosine) == (math.inf, 1.0)


def test_saturation_counts_what_the_range_cuts_off() -> None:
    params = QParams(0.1, 10, "uint8")  # -1 .. 24.5
    fp32 = np.array([-1.0, -1.04, -1.2, 24.5, 24.54, 30.0, 40.0, 0.0], "float32")
    # Of those beyond the range, the int8 network stored one inside it: that one is an error, but
    # not by saturation.
    stored = np.array([-1.0, -1.0, -1.0, 24.5, 24.5, 24.5, 20.0, 24.5], "float32")
    rounding = Rounding(params)
    rounding.update(fp32, stored)
    assert (rounding.low, rounding.high) == pytest.approx((-1.0, 24.5))
    assert rounding.saturated == 2 / 8
    alone = params.dequantize(params.quantize(fp32))
    assert rounding.sqnr == pytest.approx(graphs.sqnr(fp32, alone), abs=1e-9)


# ---------------------------------------------------------------- a network made by hand


class Cut(MinMax):
    """Cuts every range off at 1.5, as a bad calibration method would."""

    def range(self, grid: Grid = Grid()) -> tuple[float, float]:
        low, high = super().range(grid)
        return max(low, -1.5), min(high, 1.5)


def test_a_1x1_convolution_by_hand() -> None:
    """One layer on values that its range holds exactly: what is left is its weights' rounding."""
    weight = np.zeros((4, 2, 1, 1), "float32")
    # Output channel 1 has weights of two magnitudes: in steps of 1/127 the small one is wrong.
    weight[:, :, 0, 0] = [[1, 0], [1, 0.003], [0, 0.5], [0.25, 0]]
    mod = _network([weight], (1, 2, 4, 4))
    # 0 .. 255 in steps of 1: scale 1, zero point 0, nothing is rounded.
    x = np.random.default_rng(1).integers(0, 256, (1, 2, 4, 4)).astype("float32")
    x[0, 0, 0, :2] = 0, 255
    qdq = quantize(mod, [x], progress=False)
    report = _report(mod, qdq, [x])
    [layer], [output] = report.layers, report.outputs
    want = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0].astype("float64"), x)
    rounded = np.rint(weight[:, :, 0, 0] / np.abs(weight[:, :, 0, 0]).max(1, keepdims=True) * 127)
    scale = np.abs(weight[:, :, 0, 0]).max(1, keepdims=True) / 127
    got = np.einsum("oi,nihw->nohw", rounded * scale, x)
    assert layer.sqnr == pytest.approx(graphs.sqnr(want, got), abs=0.01)
    assert layer.max_error == pytest.approx(np.abs(want - got).max(), rel=1e-4)
    cosine = np.vdot(want, got) / np.linalg.norm(want) / np.linalg.norm(got)
    assert layer.cosine == pytest.approx(cosine, abs=1e-7)  # scales are float32
    assert layer.worst_channels[0].index == 1 and layer.worst_channels[0].noise > 0.99
    # Nothing came before it and it is the result: all three are the same.
    assert layer.own_sqnr == pytest.approx(layer.sqnr, abs=1e-3)
    assert (output.sqnr, output.cosine) == (layer.sqnr, layer.cosine)
    assert layer.own_noisiest.index == 1
    [stored] = layer.inputs
    assert (stored.tensor, stored.dtype, stored.zero_point) == ("x", "uint8", 0)
    assert (stored.scale, stored.low, stored.high) == (1.0, 0.0, 255.0)
    assert (stored.saturated, stored.sqnr) == (0.0, math.inf)
    assert layer.stored is None and layer.saturated == 0


def test_known_saturation() -> None:
    """A range that is cut off: how many values lie beyond it, and what the int8 network lost."""
    eye = np.eye(8, dtype="float32").reshape(8, 8, 1, 1)
    mod = _network([eye, eye])
    inputs = [np.abs(x) for x in _inputs(3)]
    qdq = quantize(mod, inputs, method=Cut, progress=False)
    report = _report(mod, qdq, inputs)
    first, second = report.layers
    high = first.stored.high
    assert high == pytest.approx(1.5)
    beyond = np.mean([np.count_nonzero(x > high + first.stored.scale / 2) / x.size for x in inputs])
    assert 0.1 < beyond < 0.2
    assert first.saturated == pytest.approx(beyond, abs=1e-9)
    # The next one reads what was cut off: the same tensor, the same numbers.
    assert second.inputs == (first.stored,)
    clipped = [np.minimum(x, 1.5) for x in inputs]
    assert first.sqnr == pytest.approx(
        graphs.sqnr(np.concatenate(inputs), np.concatenate(clipped)), abs=0.3
    )
    assert first.max_error == pytest.approx(max(x.max() for x in inputs) - 1.5, abs=0.02)


def test_one_pass_over_a_stream_equals_one_batch() -> None:
    weights = [_weight(1), _weight(2)]
    inputs = _inputs(3)
    one = _network(weights)
    qdq = quantize(one, inputs, progress=False)
    whole = np.concatenate(inputs)
    three = _network(weights, (3, 8, 10, 10))
    passes = iter(inputs)  # can be read once only
    streamed = _report(one, qdq, passes)
    batched = _report(three, quantize(three, [whole], progress=False), [whole])
    assert (streamed.items, batched.items) == (3, 1)
    for a, b in zip(streamed.layers, batched.layers, strict=True):
        assert (a.name, a.saturated, a.stored.scale if a.stored else 0) == (
            b.name, b.saturated, b.stored.scale if b.stored else 0,
        )  # fmt: skip
        assert a.sqnr == pytest.approx(b.sqnr, abs=1e-3)
        assert a.own_sqnr == pytest.approx(b.own_sqnr, abs=1e-3)
        assert a.cosine == pytest.approx(b.cosine, abs=1e-7)
        assert [c.index for c in a.worst_channels] == [c.index for c in b.worst_channels]


def test_modules_are_untouched() -> None:
    mod = _network([_weight(1), _weight(2)])
    qdq = quantize(mod, _inputs(1), progress=False)
    before = mod.script(show_meta=True), qdq.script(show_meta=True)
    _report(mod, qdq, _inputs(1))
    assert (mod.script(show_meta=True), qdq.script(show_meta=True)) == before


# ---------------------------------------------------------------- who is to blame


def _sabotaged_weights() -> list[np.ndarray]:
    """Four convolutions; in the third, one giant weight on an input channel that is nearly silent.

    Its products are as large as the others', but the channel's other weights become zeros, and
    each step of the silent channel is a giant one.
    """
    weights = [_weight(seed) for seed in range(1, 5)]
    weights[1][5] /= 200
    weights[2][4, 5, 1, 1] = 60.0
    return weights


@pytest.fixture(scope="module")
def report() -> AccuracyReport:
    mod = _network(_sabotaged_weights())
    return _report(mod, quantize(mod, _inputs(4), progress=False), _inputs(2, seed=1))


def test_a_layer_that_spoils_the_result_is_named_and_skipping_it_helps(
    report: AccuracyReport,
) -> None:
    mod = _network(_sabotaged_weights())
    calibration, inputs = _inputs(4), _inputs(2, seed=1)
    assert [skip.name for skip in report.layers_to_skip()] == ["conv2d_2"]
    reason = report.layers_to_skip()[0].reason
    assert "channel 4 makes" in reason and "median of the network" in reason
    by_name = {layer.name: layer for layer in report.layers}
    # The layer after it is spoilt too, but by what it was handed.
    assert by_name["conv2d_3"].sqnr < 25 < by_name["conv2d_3"].own_sqnr
    assert by_name["conv2d_2"].worst_channels[0].index == 4
    better = quantize(mod, calibration, skip=["conv2d_2"], progress=False)
    after = _report(mod, better, inputs)
    assert after.outputs[0].sqnr > report.outputs[0].sqnr + 6
    other = _report(mod, quantize(mod, calibration, skip=["conv2d_3"], progress=False), inputs)
    assert other.outputs[0].sqnr < report.outputs[0].sqnr + 3
    # The skipped layer adds nothing of its own now.
    skipped = after.layers[2]
    assert (skipped.is_int8, skipped.own_sqnr, skipped.inputs) == (False, math.inf, ())
    assert after.layers_to_skip() == ()


def test_the_reader_of_a_tensor_that_was_cut_off_is_named() -> None:
    # The third convolution makes values of 20 and more, all others stay below the cut.
    weights = [_weight(seed) for seed in range(1, 5)]
    weights[2] *= 40
    weights[3] /= 40
    mod = _network(weights)
    calibration, inputs = [x / 4 for x in _inputs(4)], [x / 4 for x in _inputs(4, seed=1)]
    qdq = quantize(mod, calibration, method=Cut, progress=False)
    report = _report(mod, qdq, inputs)
    assert report.layers[2].saturated > 0.05
    # The third is not to blame: its sums are right. Skipping it would leave its result cut off.
    assert report.layers[2].own_sqnr > 25 > report.layers[2].sqnr
    assert [skip.name for skip in report.layers_to_skip()] == ["conv2d_3"]
    assert "is cut off: " in report.layers_to_skip()[0].reason
    outputs = {
        name: _report(
            mod, quantize(mod, calibration, method=Cut, skip=[name], progress=False), inputs
        ).outputs[0].sqnr
        for name in ("conv2d_2", "conv2d_3")
    }  # fmt: skip
    assert outputs["conv2d_3"] > report.outputs[0].sqnr + 10
    assert outputs["conv2d_2"] < report.outputs[0].sqnr + 1


def test_readers_of_one_tensor_are_named_together() -> None:
    loud = _weight(1) * 40

    def body(emit, x):
        shared = emit(op.nn.relu(emit(op.nn.conv2d(x, relax.const(loud), padding=1))))
        a = emit(op.nn.conv2d(shared, relax.const(_weight(2) / 100), padding=1))
        b = emit(op.nn.conv2d(shared, relax.const(_weight(3) / 100), padding=1))
        return emit(op.add(a, b))

    mod = graphs.build(SHAPE, body)
    inputs = [x / 4 for x in _inputs(2)]
    report = _report(mod, quantize(mod, inputs, method=Cut, progress=False), inputs)
    reasons = {skip.name: skip.reason for skip in report.layers_to_skip(below=25)}
    assert set(reasons) == {"conv2d_1", "conv2d_2"}
    assert "stays in 8 bits for conv2d_2 as well" in reasons["conv2d_1"]


def test_residuals_pools_and_matmuls_are_compared() -> None:
    def body(emit, x):
        first = emit(op.nn.relu(emit(op.nn.conv2d(x, relax.const(_weight(1)), padding=1))))
        second = emit(op.nn.conv2d(first, relax.const(_weight(2)), padding=1))
        total = emit(op.nn.relu(emit(op.add(second, first))))
        pooled = emit(op.nn.max_pool2d(total, (2, 2), (2, 2)))
        flat = emit(op.reshape(emit(op.mean(pooled, [2, 3])), (1, 8)))
        return emit(op.matmul(flat, relax.const(_weight(3, k=1).reshape(8, 8))))

    mod = graphs.build(SHAPE, body)
    report = _report(mod, quantize(mod, _inputs(4), progress=False), _inputs(2, seed=1))
    names = [layer.name for layer in report.layers]
    assert names == ["conv2d_0", "conv2d_1", "matmul_0"]
    first, second, dense = report.layers
    # The residual is one of the second's inputs, and the sum is what it stores.
    assert [x.tensor for x in second.inputs] == [first.tensor, first.tensor]
    assert second.op == "conv2d" and dense.op == "matmul" and dense.stored is None
    for layer in report.layers:
        assert 25 < layer.sqnr < 60 and layer.own_sqnr > layer.sqnr - 3
    assert report.outputs[0].sqnr == pytest.approx(dense.sqnr)


def test_attention_and_several_outputs_of_any_batch() -> None:
    n = tirx.Var("n", "int64")

    def body(emit, x):
        query, key, value = (
            emit(op.matmul(x, relax.const(_weight(seed, k=1).reshape(8, 8)))) for seed in (1, 2, 3)
        )
        scores = emit(op.matmul(query, emit(op.permute_dims(key, [0, 2, 1]))))
        mixed = emit(op.matmul(emit(op.nn.softmax(scores, -1)), value))
        last = emit(op.matmul(mixed, relax.const(_weight(4, k=1).reshape(8, 8))))
        return relax.Tuple([last, scores])

    mod = graphs.build((n, 6, 8), body)
    inputs = [x for count in (1, 3) for x in _inputs(1, seed=count, shape=(count, 6, 8))]
    report = _report(mod, quantize(mod, inputs, progress=False), inputs)
    *_, scores, mixed, last = report.layers
    # Both operands of a matmul of activations are its inputs; the second is symmetric.
    assert len(scores.inputs) == len(mixed.inputs) == 2 and len(last.inputs) == 1
    assert scores.inputs[1].dtype == "int8" and scores.inputs[1].zero_point == 0
    assert all(layer.is_int8 and layer.own_sqnr > 30 for layer in report.layers)
    assert [output.tensor for output in report.outputs] == [last.tensor, scores.tensor]
    # The very tensors that two layers made, by the same channels.
    for output, layer in zip(report.outputs, (last, scores), strict=True):
        assert output.sqnr == layer.sqnr and output.worst_channels == layer.worst_channels


def test_a_network_that_was_left_in_float_has_nothing_to_skip() -> None:
    mod = _network([_weight(1)])
    report = _report(mod, quantize(mod, _inputs(1), skip=["conv2d_0"], progress=False), _inputs(1))
    assert not report.layers[0].is_int8 and report.layers[0].sqnr > 100
    assert report.layers_to_skip() == () and report.worst_layers() == ()
    assert "float32" in str(report)


# ---------------------------------------------------------------- forms


def test_printing_it_prints_its_table(report: AccuracyReport) -> None:
    text = str(report)
    for words in ("conv2d_0", "conv2d_3", "output 0", "own", "uint8", "saturated", "4 ("):
        assert words in text
    assert len(report.table().columns) == 11 and report.table().row_count == 5
    assert report.table(worst=2).row_count == 3
    assert report.worst_layers(2)[0].name == "conv2d_2"


def test_json_round_trip(report: AccuracyReport, tmp_path: Path) -> None:
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text == report.to_json()
    values = json.loads(text)
    assert values["items"] == 2 and values["skip"][0]["name"] == "conv2d_2"
    assert values["layers"][0]["sqnr"] == report.layers[0].sqnr
    assert values["layers"][0]["stored"]["scale"] == report.layers[0].stored.scale
    assert AccuracyReport.from_json(text) == report
    with pytest.raises(ValueError, match="text is no accuracy report"):
        AccuracyReport.from_json('{"layers": [{}]}')


def _made(name: str, own: float, **changed) -> LayerAccuracy:
    values = dict(
        name=name, tensor="t", sqnr=own, cosine=1.0, max_error=0.0, stored=None, worst_channels=(),
        op="conv2d", own_sqnr=own, own_noisiest=None, inputs=(), is_int8=True,
    )  # fmt: skip
    return LayerAccuracy(**{**values, **changed})


def test_infinite_decibels_in_every_form(tmp_path: Path) -> None:
    layers = (_made("a", math.inf), _made("b", -math.inf), _made("c", 40.0, is_int8=False))
    output = Accuracy("output 0", "t", math.inf, 1.0, 0.0, None, ())
    report = AccuracyReport(layers, (output,), 1)
    assert AccuracyReport.from_json(report.to_json()) == report
    assert "-inf" in str(report)
    report.plot(tmp_path / "report.svg")


def test_layers_to_skip_and_its_thresholds() -> None:
    def names(decibels: list[float], *args, **options) -> list[str]:
        layers = tuple(_made(str(i), own) for i, own in enumerate(decibels))
        return [s.name for s in AccuracyReport(layers, (), 1).layers_to_skip(*args, **options)]

    assert names([40, 41, 39, 28, 20]) == ["4", "3"]  # 10 dB under the median, the worst first
    assert names([40, 41, 39, 28, 20], limit=1) == ["4"]
    assert names([40, 41, 39, 28, 20], 41) == ["4", "3", "2", "0"]
    assert names([16, 17, 14]) == ["2"]  # at least 15 dB, however bad the others are
    assert names([]) == []
    with pytest.raises(ValueError, match="limit is -1"):
        names([40], limit=-1)


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_plot_writes_a_picture(report: AccuracyReport, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    path = tmp_path / f"report{ending}"
    report.plot(path)
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(begins) and path.stat().st_size > 5000
    if ending == ".svg":
        # It draws text as shapes, but names each in a comment.
        assert "conv2d_3" in path.read_text()


def test_plot_refusals(
    report: AccuracyReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"report.jpg'; allowed: names ending in \.png, \.svg"):
        report.plot(tmp_path / "report.jpg")
    with pytest.raises(ValueError, match="no layer to plot"):
        AccuracyReport((), (), 1).plot(tmp_path / "report.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'topi_int8\[bench\]'"):
        report.plot(tmp_path / "report.png")


def test_refusals_name_the_argument() -> None:
    mod = _network([_weight(1)])
    qdq = quantize(mod, _inputs(1), progress=False)
    with pytest.raises(ValueError, match="data is empty"):
        _report(mod, qdq, [])
    with pytest.raises(ValueError, match=r"data item 1: x has shape .*allowed: .1, 8, 10, 10"):
        _report(mod, qdq, [_inputs(1)[0], np.zeros((1, 8, 9, 9))])
    with pytest.raises(ValueError, match="data item 0 makes conv2d_0 infinite or NaN"):
        _report(mod, qdq, [np.full(SHAPE, np.nan)])
    with pytest.raises(TypeError, match="int8 is str; allowed: a tvm"):
        _report(mod, "resnet18", _inputs(1))
    deeper = _network([_weight(1), _weight(2)])
    with pytest.raises(ValueError, match=r"int8 has the tensors .*conv2d_1.* which fp32 lacks"):
        _report(mod, quantize(deeper, _inputs(1), progress=False), _inputs(1))


def test_progress_is_shown_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    mod = _network([_weight(1)])
    qdq = quantize(mod, _inputs(1), progress=False)
    topi_int8.accuracy_report(mod, qdq, iter(_inputs(2)), progress=True)
    assert capfd.readouterr().out == ""
