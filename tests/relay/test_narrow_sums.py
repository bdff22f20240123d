"""Sums of 8 and 16 bits, which relay.quantize asks for by `dtype_activation`."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relay

import topi_int8
from tests.relay.calls import run


def convolution(dtype: str, constant: bool) -> tvm.IRModule:
    data = relay.var("data", shape=(1, 16, 6, 7), dtype="int8")
    weight = relay.var("weight", shape=(24, 16, 3, 3), dtype="int8")
    variables = [data] if constant else [data, weight]
    if constant:
        weight = relay.const(np.random.default_rng(1).integers(-128, 128, (24, 16, 3, 3), "int8"))
    out = relay.nn.conv2d(
        data, weight, padding=(1, 1), channels=24, kernel_size=(3, 3), out_dtype=dtype
    )
    return relay.transform.InferType()(tvm.IRModule.from_expr(relay.Function(variables, out)))


def layer(dtype: str) -> tvm.IRModule:
    data = relay.var("data", shape=(3, 70), dtype="int8")
    weight = relay.const(np.random.default_rng(1).integers(-128, 128, (17, 70), "int8"))
    out = relay.nn.dense(data, weight, out_dtype=dtype)
    return relay.transform.InferType()(tvm.IRModule.from_expr(relay.Function([data], out)))


def inputs(mod: tvm.IRModule) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        var.name_hint: rng.integers(-128, 128, [int(d) for d in var.type_annotation.shape], "int8")
        for var in mod["main"].params
    }


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize(
    "make",
    [lambda d: convolution(d, True), lambda d: convolution(d, False), layer],
    ids=["conv2d", "conv2d_run_time", "dense"],
)
def test_they_wrap_as_upstream_does(make, dtype):
    mod = make(dtype)
    given = inputs(mod)
    (got,) = run(mod, given, "llvm")
    with topi_int8.disabled():
        (expected,) = run(mod, given, "llvm")
    (whole,) = run(make("int32"), given, "llvm")
    assert (whole != expected).any()  # something wrapped
    assert str(got.dtype) == dtype
    np.testing.assert_array_equal(got, expected)
    rows = topi_int8.explain(mod, "llvm", show=False)
    assert [row.strategy.endswith(".topi_int8") for row in rows] == [True]
