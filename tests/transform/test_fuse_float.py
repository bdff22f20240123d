"""FuseFloat on small graphs: which operators appear, their attributes, and the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.transform import interpret
from topi_int8 import op
from topi_int8.transform.fuse_float import FuseFloat

NN = relax.op.nn
RNG = np.random.default_rng(3)


def _const(*shape: int) -> relax.Expr:
    return relax.const(RNG.normal(size=shape).astype("float32"))


def _module(build, *shapes: tuple) -> tvm.IRModule:
    bb = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(s, "float32")) for i, s in enumerate(shapes)]
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(build(bb.emit, *params))
        bb.emit_func_output(out)
    return bb.get()


def _check(mod: tvm.IRModule, expected: dict[str, int]) -> tvm.IRModule:
    before = tvm.ir.save_json(mod)
    new = FuseFloat()(mod)
    assert tvm.ir.save_json(mod) == before, "the input module was changed"
    relax.analysis.well_formed(new)  # raises
    assert {k.removeprefix("relax."): v for k, v in interpret.count(new).items()} == expected
    shapes = [op.shape_of(p) for p in mod["main"].params]
    inputs = [RNG.normal(size=s).astype("float32") for s in shapes]
    want, got = interpret.run(mod, *inputs)[0], interpret.run(new, *inputs)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    return new


@pytest.mark.parametrize(
    "layout, kernel, x, weight, groups",
    [
        ("NCHW", "OIHW", (2, 6, 8, 9), (4, 6, 3, 3), 1),
        ("NCHW", "OIHW", (2, 6, 8, 9), (6, 1, 3, 3), 6),
        ("NHWC", "HWIO", (2, 8, 9, 6), (3, 3, 6, 4), 1),
        ("NHWC", "OHWI", (2, 8, 9, 6), (4, 3, 3, 6), 1),
    ],
)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_conv2d(layout, kernel, x, weight, groups, activation) -> None:
    oc = weight[kernel.index("O")]
    bias = (1, oc, 1, 1) if layout == "NCHW" else (oc,)

    def build(emit, data):
        conv = emit(NN.conv2d(data, _const(*weight), padding=1, strides=2, groups=groups,
                              data_layout=layout, kernel_layout=kernel))  # fmt: skip
        out = emit(relax.op.add(conv, _const(*bias)))
        return {"none": lambda v: v, "relu": NN.relu, "relu6": NN.relu6}[activation](out)

    new = _check(_module(build, x), {"topi_int8.conv2d": 1})
    work = op.conv2d_workload(interpret.calls(new, "conv2d")[0])
    assert work.is_float and work.epilogue.bias and not work.epilogue.scale
    clip = {"none": (None, None), "relu": (0.0, None), "relu6": (0.0, 6.0)}[activation]
    assert (work.epilogue.clip_min, work.epilogue.clip_max) == clip


@pytest.mark.parametrize("lead", [(3,), (2, 3)])
@pytest.mark.parametrize("transposed", [True, False])
def test_dense(lead: tuple, transposed: bool) -> None:
    def build(emit, data):
        weight = emit(relax.op.permute_dims(_const(5, 7))) if transposed else _const(7, 5)
        out = emit(relax.op.add(emit(relax.op.matmul(data, weight)), _const(5)))
        return NN.relu(out)

    new = _check(_module(build, (*lead, 7)), {"topi_int8.matmul": 1})
    (call,) = interpret.calls(new, "matmul")
    assert op.shape_of(call.args[1]) == (5, 7) and op.matmul_workload(call).weight_constant
    assert op.attrs_of(call)["clip_min"] == 0.0


def test_second_use_stops_the_chain() -> None:
    def build(emit, data):
        conv = emit(NN.conv2d(data, _const(4, 6, 1, 1)))
        return relax.op.multiply(emit(relax.op.sigmoid(conv)), emit(NN.relu(conv)))

    expected = {"topi_int8.conv2d": 1, "sigmoid": 1, "nn.relu": 1, "multiply": 1}
    _check(_module(build, (1, 6, 4, 4)), expected)


def test_weights_that_are_not_constant_are_left() -> None:
    mod = _module(lambda emit, x, w: NN.conv2d(x, w), (1, 6, 4, 4), (4, 6, 3, 3))
    _check(mod, {"nn.conv2d": 1})
    mod = _module(lambda emit, a, b: relax.op.matmul(a, b), (3, 4), (4, 5))
    _check(mod, {"matmul": 1})


def test_symbolic_batch_is_left() -> None:
    n = tvm.tirx.Var("n", "int64")
    mod = _module(lambda emit, x: NN.conv2d(x, _const(4, 6, 3, 3)), (n, 6, 8, 8))
    assert interpret.count(FuseFloat()(mod)) == {"relax.nn.conv2d": 1}


def test_operators_of_tuples_are_left() -> None:
    def build(emit, data):
        parts = emit(relax.op.split(data, 2, axis=1))
        left, right = (emit(relax.TupleGetItem(parts, i)) for i in range(2))
        return relax.op.concat([emit(NN.conv2d(left, _const(4, 3, 1, 1))), right], 1)

    _check(_module(build, (1, 6, 4, 4)), {"split": 1, "topi_int8.conv2d": 1, "concat": 1})


def test_integer_weights_of_float_data_are_dequantized_once() -> None:
    scale = relax.const(np.float32([0.5, 0.25, 2, 1]))
    zeros = relax.const(np.int8([1, 0, -3, 0]))

    def weight(emit, shape: tuple, axis: int):
        q = relax.const(RNG.integers(-128, 128, shape).astype("int8"))
        return emit(relax.op.dequantize(q, scale, zeros, axis=axis, out_dtype="float32"))

    def build(emit, data):
        y = emit(NN.conv2d(data, weight(emit, (4, 3, 3, 3), 0)))
        y = emit(relax.op.reshape(y, (4, 4)))
        return relax.op.matmul(y, weight(emit, (4, 4), 1))

    expected = {"topi_int8.conv2d": 1, "topi_int8.matmul": 1, "reshape": 1}
    _check(_module(build, (1, 3, 4, 4)), expected)
