"""QNN's convolutions keep int8 operands on every target: groups, dilation and zero points too."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relay

import topi_int8
from tests import kernels
from tests.relay import qnn_models
from tests.relay.calls import run
from topi_int8.target import isa_target

CPUS = {"generic": "llvm", "avx2": "llvm -mcpu=haswell", "avx512_vnni": "llvm -mcpu=cascadelake"}


def network(layout: str, dtype: str) -> tvm.IRModule:
    """Return a plain, a grouped, a depthwise and a dilated convolution, and a dense layer."""
    net = qnn_models.Network(layout, dtype)
    data = net.input(1, 14, 16)
    x = net.conv(data, 16, 32, 3)
    x = net.conv(x, 32, 32, 3, groups=2)
    x = net.conv(x, 32, 32, 3, groups=32)
    x = net.conv(x, 32, 48, 3, dilation=2)
    return qnn_models._module(data, net.classify(x, 48, 10))


@pytest.mark.parametrize("isa", CPUS)
@pytest.mark.parametrize("layout, dtype", [("NCHW", "uint8"), ("NHWC", "int8")])
def test_all_are_ours_and_exact(layout, dtype, isa):
    kernels.require(isa)
    mod = network(layout, dtype)
    shape = [int(extent) for extent in mod["main"].params[0].type_annotation.shape]
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    data = np.random.default_rng(0).integers(low, high, shape, endpoint=True).astype(dtype)
    (got,) = run(mod, {"data": data}, CPUS[isa])
    with topi_int8.disabled():
        (expected,) = run(mod, {"data": data}, "llvm")
    assert expected.std() > 5
    np.testing.assert_array_equal(got, expected)
    rows = topi_int8.explain(mod, CPUS[isa], show=False)
    assert len(rows) == 5 and not [other for other in rows.others if "NOT OURS" in other.note]


@pytest.mark.parametrize("isa", ["neon", "neon_dotprod", "armv7_neon"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_all_are_ours_on_arm(layout, isa):
    rows = topi_int8.explain(network(layout, "uint8"), isa_target(isa), show=False)
    assert len(rows) == 5 and not [other for other in rows.others if "NOT OURS" in other.note]


def test_zero_points_by_channel_are_left_to_upstream():
    net = qnn_models.Network()
    data = net.input(1, 8, 16)
    zeros = relay.const(np.arange(32, dtype="int32"))
    out = relay.qnn.op.conv2d(
        data, net._weight((32, 8, 3, 3)), relay.const(3, "int32"), zeros, relay.const(1.0),
        relay.const(np.ones(32, "float32")), kernel_size=(3, 3), channels=32, groups=2,
    )  # fmt: skip
    mod = qnn_models._module(data, out)
    array = np.random.default_rng(0).integers(0, 256, (1, 16, 8, 8)).astype("uint8")
    (got,) = run(mod, {"data": array}, "llvm")
    with topi_int8.disabled():
        (expected,) = run(mod, {"data": array}, "llvm")
    np.testing.assert_array_equal(got, expected)
