"""SignActivations: which tensors become signed, and the same real numbers."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax

import topi_int8
from tests import graphs
from topi_int8.target import features, isa_target
from topi_int8.transform.sign_activations import SignActivations, prefers_signed

NN = relax.op.nn


def _pair(emit, x, scale=0.05, zero_point=128, dtype="uint8"):
    args = relax.const(np.float32(scale)), relax.const(zero_point, dtype)
    q = emit(relax.op.quantize(x, *args, out_dtype=dtype))
    return q, emit(relax.op.dequantize(q, *args))


def _conv(emit, x, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (16, 16, 3, 3)).astype("int8")
    real = emit(
        relax.op.dequantize(
            relax.const(weight), relax.const(np.full(16, 0.004, "float32")),
            relax.const(np.zeros(16, "int8")), axis=0,
        )
    )  # fmt: skip
    return emit(NN.relu(emit(NN.conv2d(x, real, padding=(1, 1)))))


def _net(zero_points=(128, 0, 7)):
    def body(emit, x):
        for seed, zero_point in enumerate(zero_points[:-1]):
            _, x = _pair(emit, x, 0.03, zero_point)
            x = _conv(emit, x, seed)
        return _pair(emit, x, 0.03, zero_points[-1])[1]

    return graphs.build((1, 16, 9, 8), body)


def _quantizers(mod):
    values = [value for _, value in graphs.bindings(mod)]
    return [v for v in values if graphs.op_name(v) in ("quantize", "dequantize")]


@pytest.mark.parametrize(
    ("isa", "signed"),
    [
        ("neon", True), ("neon_dotprod", True), ("armv7_neon", True), ("neon_i8mm", False),
        ("avx512_vnni", False), ("generic", False),
    ],
)  # fmt: skip
def test_only_where_products_are_signed(isa, signed):
    assert prefers_signed(features(isa_target(isa))) == signed
    mod = _net()
    new = SignActivations(isa_target(isa))(mod)
    assert tvm_ffi.structural_equal(new, mod) != signed


def test_types_and_zero_points():
    new = SignActivations(isa_target("neon"))(_net())
    found = [v for v in _quantizers(new) if graphs.op_name(v) == "quantize"]
    assert [str(v.ty.dtype) for v in found] == ["int8"] * 3
    assert [int(v.args[2].value.numpy()) for v in found] == [0, -128, -121]
    relax.analysis.well_formed(new)  # raises


def test_the_argument_is_not_changed():
    mod = _net()
    before = mod.script(show_meta=True)
    SignActivations(isa_target("neon"))(mod)
    assert mod.script(show_meta=True) == before


def test_a_tensor_that_somebody_else_reads_keeps_its_type():
    def body(emit, x):
        q, real = _pair(emit, x)
        pooled = emit(NN.max_pool2d(q, pool_size=(2, 2)))
        again = emit(relax.op.astype(pooled, "float32"))
        return emit(relax.op.add(emit(relax.op.sum(real)), emit(relax.op.sum(again))))

    mod = graphs.build((1, 16, 4, 4), body)
    assert tvm_ffi.structural_equal(SignActivations(isa_target("neon"))(mod), mod)


def test_a_tensor_that_is_returned_keeps_its_type():
    def body(emit, x):
        return _pair(emit, x)[0]

    mod = graphs.build((1, 16, 4, 4), body)
    new = SignActivations(isa_target("neon"))(mod)
    assert str(new["main"].ret_ty.dtype) == "uint8"


def test_the_network_computes_the_same_bits():
    mod, target = _net(), isa_target("avx2")
    x = np.random.default_rng(3).normal(size=(1, 16, 9, 8)).astype("float32")
    results = []
    for graph in (mod, SignActivations(isa_target("neon"))(mod)):
        machine = relax.VirtualMachine(tvm.compile(graph, target), tvm.cpu())
        results.append(machine["main"](tvm.runtime.tensor(x)).numpy())
    assert len(np.unique(results[0])) > 10
    np.testing.assert_array_equal(*results)


def test_convolutions_read_signed_data():
    rows = list(topi_int8.explain(_net(), isa_target("neon_dotprod"), show=False))
    assert [row.work.data_dtype for row in rows] == ["int8", "int8"]
    assert rows[0].work.epilogue.out_dtype == "int8"
