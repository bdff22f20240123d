"""Networks with the faults that equalisation and bias correction mend, and how they are checked."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op

import topi_int8
from tests import graphs
from topi_int8.op import op_name

SHAPE = (1, 8, 10, 10)


def const(values: np.ndarray) -> relax.Expr:
    return relax.const(np.ascontiguousarray(values, "float32"))


def weights(seed: int, *shape: int) -> np.ndarray:
    fan_in = max(1, int(np.prod(shape[1:])))
    return np.random.default_rng(seed).normal(size=shape) / np.sqrt(fan_in)


def rounded_down(seed: int, *shape: int) -> np.ndarray:
    """Weights that int8 makes smaller, each by 0.4 steps: the mean of an output moves."""
    steps = np.random.default_rng(seed).integers(-60, 60, shape) + 0.4
    steps.reshape(shape[0], -1)[:, 0] = 127  # the scale of every channel is one step
    return steps / (40 * np.sqrt(np.prod(shape[1:])))


def inputs(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[np.ndarray]:
    """Positive inputs, as after a relu."""
    rng = np.random.default_rng(seed)
    return [np.abs(rng.normal(size=shape)).astype("float32") for _ in range(count)]


def bare(emit, x):
    """Convolutions and a matmul without biases, a residual, a depthwise one, borders, strides."""
    first = emit(op.nn.relu(emit(op.nn.conv2d(x, const(rounded_down(1, 8, 8, 3, 3)), padding=1))))
    second = emit(op.nn.conv2d(first, const(rounded_down(2, 8, 1, 3, 3)), padding=1, groups=8))
    total = emit(op.nn.relu(emit(op.add(second, first))))
    third = emit(op.nn.conv2d(total, const(rounded_down(3, 16, 8, 3, 3)), padding=1, strides=2))
    mean = emit(op.mean(emit(op.nn.relu(third)), [2, 3], keepdims=True))
    flat = emit(op.reshape(mean, (1, 16)))
    return emit(op.matmul(flat, const(rounded_down(4, 10, 16).T)))


def _biased(emit, call, seed: int):
    bias = np.random.default_rng(seed).normal(size=(1, int(call.ty.shape[1]), 1, 1)) * 0.1
    return emit(op.add(call, const(bias)))


def uneven(emit, x, act=op.nn.relu, hidden: int = 24):
    """Expand, depthwise, project, twice; channels of the hidden tensors differ by up to 200."""
    spread = np.geomspace(1, 200, hidden)[np.random.default_rng(7).permutation(hidden)]
    expand = weights(1, hidden, 8, 1, 1) * spread.reshape(-1, 1, 1, 1)
    y = emit(act(_biased(emit, emit(op.nn.conv2d(x, const(expand))), 11)))
    depthwise = weights(2, hidden, 1, 3, 3) + 0.3
    y = emit(op.nn.conv2d(y, const(depthwise), padding=1, groups=hidden))
    y = emit(act(_biased(emit, y, 12)))
    project = weights(3, 8, hidden, 1, 1) / spread.reshape(1, -1, 1, 1)
    y = _biased(emit, emit(op.nn.conv2d(y, const(project))), 13)
    grouped = emit(op.nn.conv2d(y, const(weights(4, 8, 2, 3, 3)), padding=1, groups=4))
    return _biased(emit, emit(op.nn.conv2d(emit(act(grouped)), const(weights(5, 4, 8, 1, 1)))), 14)


def float_layers(mod: tvm.IRModule) -> list[str]:
    """Return the names of the convolutions and matmuls whose weight is not int8."""
    values = dict(graphs.bindings(mod))
    return [
        var.name
        for var, value in values.items()
        if op_name(value) in ("relax.nn.conv2d", "relax.matmul")
        and op_name(values.get(value.args[1])) != "relax.dequantize"
    ]


def assert_all_int8(qdq: tvm.IRModule, layers: int) -> None:
    """Assert that every layer runs on integers, with nothing of its epilogue left beside it."""
    explanation = topi_int8.explain(qdq, topi_int8.host_target(), show=False)
    assert len(explanation) == layers
    assert all(row.dtypes.startswith(("uint8 int8", "int8 int8")) for row in explanation)
    left = {other.op for other in explanation.others}
    assert not left & {"relax.add", "relax.nn.relu", "relax.clip", "relax.nn.conv2d"}, left
