"""FoldBatchNorm: what is left in the graph, and that the numbers stay."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from tests import graphs
from topi_int8.transform.fold_batch_norm import FoldBatchNorm

simulate = pytest.importorskip(
    "tests.simulate", reason="the float reference needs torch (extra `torch`)"
).simulate

SHAPE = (2, 6, 5, 5)


def _const(seed: int, *shape: int, low: float = -1.0) -> relax.Expr:
    rng = np.random.default_rng(seed)
    return relax.const(rng.uniform(low, 1.0, shape).astype("float32"))


def _norm(emit, x: relax.Expr, channels: int, axis: int = 1) -> relax.Expr:
    params = [_const(seed, channels) for seed in (10, 11, 12)]
    var = _const(13, channels, low=0.1)
    return emit(op.nn.batch_norm(x, *params, var, axis=axis, training=False)[0])


def _conv(emit, x: relax.Expr, oc: int = 8, groups: int = 1) -> relax.Expr:
    return emit(op.nn.conv2d(x, _const(1, oc, 6 // groups, 3, 3), padding=1, groups=groups))


def _same_numbers(before: tvm.IRModule, after: tvm.IRModule, shape=SHAPE) -> None:
    x = np.random.default_rng(9).normal(size=shape).astype("float32")
    np.testing.assert_allclose(simulate(after, x), simulate(before, x), rtol=2e-5, atol=2e-5)


def _conv_norm(emit, x):
    return emit(op.nn.relu(_norm(emit, _conv(emit, x), 8)))


def _conv_bias_norm(emit, x):
    bias = emit(op.reshape(_const(2, 8), (1, 8, 1, 1)))
    return _norm(emit, emit(op.add(_conv(emit, x), bias)), 8)


def _grouped(emit, x):
    return _norm(emit, _conv(emit, x, oc=12, groups=3), 12)


def _depthwise(emit, x):
    return _norm(emit, _conv(emit, x, oc=6, groups=6), 6)


def _decomposed(emit, x):
    mean, root, gamma, beta = (_const(20 + i, 8, 1, 1, low=0.2) for i in range(4))
    centred = emit(op.subtract(_conv(emit, x), mean))
    return emit(op.add(beta, emit(op.multiply(emit(op.divide(centred, root)), gamma))))


def _twice(emit, x):
    return _norm(emit, _norm(emit, _conv(emit, x), 8), 8)


def _scalar(emit, x):
    return emit(op.add(emit(op.multiply(_conv(emit, x), _const(3))), _const(4)))


@pytest.mark.parametrize(
    "body, left",
    [
        (_conv_norm, ["nn.conv2d", "add", "nn.relu"]),
        (_conv_bias_norm, ["nn.conv2d", "add"]),
        (_grouped, ["nn.conv2d", "add"]),
        (_depthwise, ["nn.conv2d", "add"]),
        (_decomposed, ["nn.conv2d", "add"]),
        (_twice, ["nn.conv2d", "add"]),
        (_scalar, ["nn.conv2d", "add"]),
    ],
)
def test_folds_into_conv2d(body, left) -> None:
    before = graphs.build(SHAPE, body)
    after = FoldBatchNorm()(before)
    assert graphs.ops(after) == left
    _same_numbers(before, after)


def test_folds_into_matmul_through_a_permuted_weight() -> None:
    def body(emit, x):
        weight = emit(op.permute_dims(_const(1, 4, 6), [1, 0]))
        return _norm(emit, emit(op.add(_const(2, 4), emit(op.matmul(x, weight)))), 4)

    before = graphs.build((3, 6), body)
    after = FoldBatchNorm()(before)
    assert graphs.ops(after) == ["matmul", "add"]
    _same_numbers(before, after, (3, 6))


def test_batch_norm_without_a_convolution_becomes_multiply_and_add() -> None:
    before = graphs.build(SHAPE, lambda emit, x: _norm(emit, x, 6))
    after = FoldBatchNorm()(before)
    assert graphs.ops(after) == ["multiply", "add"]
    _same_numbers(before, after)


def test_a_convolution_with_another_use_is_not_duplicated() -> None:
    def body(emit, x):
        conv = _conv(emit, x)
        return emit(op.add(_norm(emit, conv, 8), conv))

    before = graphs.build(SHAPE, body)
    after = FoldBatchNorm()(before)
    assert graphs.ops(after) == ["nn.conv2d", "multiply", "add", "add"]
    _same_numbers(before, after)


def test_a_spatial_constant_is_left_alone() -> None:
    def body(emit, x):
        return emit(op.multiply(_conv(emit, x), _const(3, 5, 5)))

    before = graphs.build(SHAPE, body)
    assert graphs.ops(FoldBatchNorm()(before)) == ["nn.conv2d", "multiply"]


def test_training_batch_norm_is_left_alone() -> None:
    def body(emit, x):
        params = [_const(i, 8, low=0.1) for i in range(4)]
        return emit(op.nn.batch_norm(_conv(emit, x), *params, axis=1, training=True)[0])

    before = graphs.build(SHAPE, body)
    assert "nn.batch_norm" in graphs.ops(FoldBatchNorm()(before))


def test_input_module_is_untouched_and_folding_twice_changes_nothing() -> None:
    before = graphs.build(SHAPE, _conv_bias_norm)
    text = before.script(show_meta=True)
    once = FoldBatchNorm()(before)
    assert before.script(show_meta=True) == text
    tvm.ir.assert_structural_equal(FoldBatchNorm()(once), once)
