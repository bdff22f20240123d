"""The accuracy budget: who goes back to float32, when the search ends, what it says of itself."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tvm
from tvm.relax import op

from tests import graphs
from tests.quantize import networks
from topi_int8.quantize import Network, budget_report, quantize
from topi_int8.quantize.budget import _fewest, within_budget

LAYERS = 6
CALIBRATION = networks.inputs(2)
const, weights = networks.const, networks.weights


def _noisy(emit, x):
    """Six convolutions; the third reads one channel that is large and of no weight to it."""
    y = x
    for i in range(LAYERS):
        weight = weights(i, 8, 8, 3, 3)
        if i == 1:
            weight[0] *= 1000
        if i == 2:
            weight[:, 0] *= 1e-4
        y = emit(op.nn.relu(emit(op.nn.conv2d(y, const(weight), padding=1))))
    return y


MOD = graphs.build(networks.SHAPE, _noisy)


def _count(main: Network) -> float:
    """An accuracy that grows by one with every float32 layer; needs no run."""
    return float(len(networks.float_layers(main.mod)))


def test_without_need_nothing_is_skipped() -> None:
    qdq = quantize(MOD, CALIBRATION, accuracy_fn=_count, budget=LAYERS, progress=False)
    report = budget_report(qdq)
    assert networks.float_layers(qdq) == [] == list(report.skipped)
    assert (report.fp32, report.budget, report.accuracy) == (LAYERS, LAYERS, 0)
    assert [step.skipped for step in report.steps] == [()]


@pytest.mark.parametrize("budget", range(LAYERS))
def test_as_many_layers_as_the_budget_needs(budget: int, caplog) -> None:
    calls = []

    def accuracy(main: Network) -> float:
        calls.append(main)
        return _count(main)

    before = MOD.script(show_meta=True)
    with caplog.at_level(logging.INFO, logger="topi_int8.quantize"):
        qdq = quantize(MOD, iter(CALIBRATION), accuracy_fn=accuracy, budget=budget, progress=False)
    assert MOD.script(show_meta=True) == before
    report = budget_report(qdq)
    assert sorted(report.skipped) == networks.float_layers(qdq)
    assert len(report.skipped) == report.accuracy == LAYERS - budget
    assert report.skipped[0] == "conv2d_2"  # the noisiest first
    assert len(calls) == 1 + len(report.steps) <= 2 * np.log2(LAYERS) + 3
    assert all(step.accuracy == len(step.skipped) for step in report.steps)
    assert len([r for r in caplog.records if "with float32" in r.message]) == len(report.steps)


def test_skip_lists_are_kept_beside_it() -> None:
    qdq = quantize(
        MOD, CALIBRATION, skip=[0], accuracy_fn=_count, budget=LAYERS - 2, progress=False
    )
    assert budget_report(qdq).skipped == ("conv2d_2",)
    assert networks.float_layers(qdq) == ["conv2d_0", "conv2d_2"]


def test_a_measured_accuracy() -> None:
    data = networks.inputs(2, seed=4)
    with pytest.raises(TypeError, match=r"main got 2 inputs; allowed: 1, \['x'\]"):
        Network(MOD)(data[0], data[0])
    want = [Network(MOD)(x) for x in data]

    def sqnr(main: Network) -> float:
        got = [main(x) for x in data]
        return min(60.0, graphs.sqnr(np.stack(want), np.stack(got)))

    plain = quantize(MOD, CALIBRATION, progress=False)
    qdq = quantize(
        MOD, CALIBRATION, accuracy_fn=sqnr, budget=40, bias_correction="fast", progress=False
    )
    report = budget_report(qdq)
    assert sqnr(Network(plain)) < 20 <= report.accuracy == sqnr(Network(qdq))
    assert report.skipped == ("conv2d_2",)


def test_tuples_come_as_tuples() -> None:
    def body(emit, x):
        return emit(op.split(x, 2, 1))

    first, second = Network(graphs.build(networks.SHAPE, body))(CALIBRATION[0])
    np.testing.assert_array_equal(np.concatenate([first, second], 1), CALIBRATION[0])


def test_an_accuracy_that_is_never_the_same_ends_in_an_error() -> None:
    calls = []

    def worse_and_worse(main: Network) -> float:
        calls.append(main)
        return -float(len(calls))

    with pytest.raises(ValueError, match=r"budget is 0.5; allowed: 1 or more, .* all 6 layers in"):
        quantize(MOD, CALIBRATION, accuracy_fn=worse_and_worse, budget=0.5, progress=False)
    assert len(calls) <= 2 * np.log2(LAYERS) + 3


def test_no_layers_to_give_back() -> None:
    values = iter([1.0, 0.0])
    with pytest.raises(ValueError, match="all 0 layers in float32"):
        within_budget(MOD, lambda names: MOD, list, lambda main: next(values), 0.0)


def test_what_the_search_returns_held_whatever_the_accuracy_does() -> None:
    # 3 and 5 hold, 4 does not: no order of trials may return what failed.
    for good in ({3, 5}, {5}, {1, 4}, {2}, set(range(1, 6)), {4, 5}):
        tried = []

        def holds(n: int, good=good, tried=tried) -> bool:
            tried.append(n)
            return n in good

        found = _fewest(holds, 5)
        assert found in good or (found == 0 and 5 not in good)
        assert len(tried) == len(set(tried))
    assert [_fewest(lambda n, k=k: n >= k, 53) for k in range(1, 54)] == list(range(1, 54))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(accuracy_fn=_count), ValueError, "accuracy_fn is given alone"),
        (dict(budget=0.1), ValueError, "budget is given alone; allowed: accuracy_fn and budget"),
        (dict(accuracy_fn=3, budget=0.1), TypeError, "accuracy_fn is 3; allowed: a callable"),
        (dict(accuracy_fn=_count, budget=-1), ValueError, "budget is -1; allowed: a finite number"),
        (dict(accuracy_fn=_count, budget=True), TypeError, "budget is True; allowed: a number"),
        (dict(accuracy_fn=lambda main: float("nan"), budget=0), ValueError, "returned nan"),
        (dict(accuracy_fn=lambda main: None, budget=0), TypeError, "returned None; allowed"),
    ],
)
def test_refusals(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(MOD, CALIBRATION[:1], progress=False, **arguments)
    assert budget_report(MOD) is None and isinstance(MOD, tvm.IRModule)
