"""ConvertLayout by itself: whole integer regions in packed layouts, and what stands in between."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relay

import topi_int8
from tests.relay import relay_models
from tests.relay.calls import HERE, X86, run, upstream
from tests.relay.qnn_models import Network, branches, mobilenet, resnet
from topi_int8.relay import ConvertLayout

VNNI = X86["avx512_vnni"]  # converted for, and not executed
_PACKED_CONVS = ("nn.contrib_conv2d_NCHWc", "nn.contrib_depthwise_conv2d_NCHWc")


def inception(net: Network, size: int = 9) -> tvm.IRModule:
    """Return branches of whole blocks: concatenation, groups, depthwise, pooling, residual."""
    data = net.input(1, size)
    x = net.conv(data, 3, 32, 3)
    left = net.conv(x, 32, 48, 1)
    right = net.conv(net.conv(x, 32, 16, 1), 16, 48, 3)
    x = net.concat([left, right, x], [1.0, 0.8, 1.3])
    x = net.max_pool(net.conv(x, 128, 128, 3, groups=2))
    x = net.add(net.conv(net.conv(x, 128, 128, 3, groups=128), 128, 128, 1, relu=False), x)
    out = relay.Tuple([net.classify(x, 128, 10), x])
    return relay.transform.InferType()(tvm.IRModule.from_expr(relay.Function([data], out)))


MODELS: dict[str, Callable[[str], tvm.IRModule]] = {
    "inception": lambda layout: inception(Network(layout)),
    "resnet18": lambda layout: resnet(18, Network(layout), size=32),
    "mobilenet": lambda layout: mobilenet(Network(layout), size=32),
}
_CASES = [
    pytest.param(name, layout, marks=marks)
    for name, layout, *marks in (
        ("inception", "NCHW"), ("inception", "NHWC"), ("resnet18", "NCHW"), ("mobilenet", "NHWC"),
        ("resnet18", "NHWC", pytest.mark.relay_full), ("mobilenet", "NCHW", pytest.mark.relay_full),
    )
]  # fmt: skip


@functools.cache
def _model(name: str, layout: str, target: str = VNNI) -> tuple[tvm.IRModule, tvm.IRModule]:
    """Return a network as it is, and converted."""
    mod = MODELS[name](layout)
    return mod, ConvertLayout(target)(mod)


def calls(mod: tvm.IRModule) -> list[relay.Call]:
    """Return the calls of operators in a module, each after its arguments."""
    found = []
    relay.analysis.post_order_visit(mod["main"], found.append)
    return [n for n in found if isinstance(n, relay.Call) and isinstance(n.op, tvm.ir.Op)]


def _sources(node: relay.Expr) -> list[relay.Expr]:
    if isinstance(node, relay.Call):
        return list(node.args)
    return list(node.fields) if isinstance(node, relay.Tuple) else (
        [node.tuple_value] if isinstance(node, relay.TupleGetItem) else []
    )  # fmt: skip


def transforms(mod: tvm.IRModule) -> tuple[int, int]:
    """Return how many layout_transforms there are, and how many lie between two convolutions."""
    order: list[relay.Expr] = []
    relay.analysis.post_order_visit(mod["main"], order.append)
    convs = {call for call in calls(mod) if call.op.name in _PACKED_CONVS}
    behind, before = set(convs), set()
    for node in order:
        if any(source in behind for source in _sources(node)):
            behind.add(node)
    for node in reversed(order):
        if node in convs or node in before:
            before.update(_sources(node))
    found = [call for call in calls(mod) if call.op.name == "layout_transform"]
    return len(found), sum(call in behind and call in before for call in found)


def test_the_counter_sees_transforms_between_convolutions() -> None:
    # Channels of no whole blocks are cropped between convolutions, in plain layouts.
    count, between = transforms(ConvertLayout(VNNI)(branches()))
    assert count == between + 2 and between > 0


@pytest.mark.parametrize(("name", "layout"), _CASES)
def test_one_transform_in_and_one_out(name: str, layout: str) -> None:
    mod, converted = _model(name, layout)
    outputs = 1 if name != "inception" else 2
    assert transforms(converted) == (1 + outputs, 0)
    names = [call.op.name for call in calls(converted)]
    wanted = sum(call.op.name == "qnn.conv2d" for call in calls(mod))
    assert sum(one in _PACKED_CONVS for one in names) == wanted > 5
    assert "nn.conv2d" not in names and names.count("nn.contrib_dense_pack") == 1


@pytest.mark.parametrize(("name", "layout"), _CASES)
def test_twice_is_once(name: str, layout: str) -> None:
    _, converted = _model(name, layout)
    tvm.ir.assert_structural_equal(ConvertLayout(VNNI)(converted), converted)


@functools.cache
def _upstream(name: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return an input in NCHW, and upstream's outputs: the weights are those of NHWC too."""
    mod, _ = _model(name, "NCHW")
    (data,) = relay_models.inputs(mod).values()
    return data, upstream(mod, {"data": data})


def _in(layout: str, array: np.ndarray) -> np.ndarray:
    """Return an NCHW array in a layout; matrices have none."""
    if array.ndim != 4:
        return array
    return np.ascontiguousarray(array.transpose(["NCHW".index(axis) for axis in layout]))


@pytest.mark.parametrize(
    ("name", "layout", "executor", "level"),
    [
        ("inception", "NCHW", "aot", 1), ("inception", "NHWC", "vm", 1),
        ("inception", "NHWC", "graph", 3),
        pytest.param("mobilenet", "NHWC", "graph", 2, marks=pytest.mark.relay_full),
    ],
)  # fmt: skip
def test_converted_computes_what_upstream_does(
    name: str, layout: str, executor: str, level: int
) -> None:
    data, want = _upstream(name)
    _, converted = _model(name, layout, HERE)
    got = run(converted, {"data": _in(layout, data)}, HERE, executor, level)
    assert len(got) == len(want) and len(np.unique(want[-1])) > 50
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, _in(layout, theirs))


# ---------------------------------------------------------------- what it refuses


def test_disabled_is_refused() -> None:
    mod = branches()
    convert = ConvertLayout(VNNI)
    with topi_int8.disabled(), pytest.raises(ValueError, match="topi_int8 is disabled"):
        convert(mod)


@pytest.mark.parametrize("target", ["c", "cuda -arch=sm_80"])
def test_a_target_that_is_no_llvm_cpu_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="allowed: targets of kind llvm with the key cpu"):
        ConvertLayout(target)


# ---------------------------------------------------------------- what lies between


def _nhwc_float(groups: int = 1) -> tvm.IRModule:
    rng = np.random.default_rng(3)
    x = relay.var("x", shape=(1, 9, 11, 16))
    weight = rng.normal(0, 1, (3, 3, 16 // groups, 32)).astype("float32")
    out = relay.nn.conv2d(
        x, relay.const(weight), padding=(1, 1), groups=groups, channels=32, kernel_size=(3, 3),
        data_layout="NHWC", kernel_layout="HWIO",
    )  # fmt: skip
    return relay.transform.InferType()(tvm.IRModule.from_expr(relay.Function([x], out)))


def test_float_convolutions_in_nhwc_are_packed() -> None:
    mod = _nhwc_float()
    (conv,) = (c for c in calls(ConvertLayout(HERE)(mod)) if "conv2d" in c.op.name)
    assert conv.op.name == "nn.contrib_conv2d_NCHWc"
    inputs = relay_models.inputs(mod)
    (got,) = run(mod, inputs, HERE)
    with topi_int8.disabled():
        (want,) = run(mod, inputs, "llvm")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_float_convolutions_with_groups_stay() -> None:
    (conv,) = (c for c in calls(ConvertLayout(VNNI)(_nhwc_float(2))) if "conv2d" in c.op.name)
    assert conv.op.name == "nn.conv2d" and str(conv.attrs.data_layout) == "NHWC"


def test_round_is_exact() -> None:
    f = np.float32
    near = [
        point
        for base in (0, 0.5, 1, 1.5, 2.5, 3.5, 127.5, 255.5, 2**22 + 0.5, 2**23 - 0.5, 2**23, 2**24)
        for point in (np.nextafter(f(base), f(-np.inf)), f(base), np.nextafter(f(base), f(np.inf)))
    ]
    small = np.random.default_rng(1).uniform(-1, 1, 4000) * 2.0 ** np.arange(-20, 20).repeat(100)
    around = np.random.default_rng(2).uniform(-300, 300, 4000)
    values = np.concatenate([near, np.negative(near), [np.inf, -np.inf, np.nan], small, around])
    values = values.astype("float32")
    x = relay.var("x", shape=values.shape)
    mod = relay.transform.InferType()(
        tvm.IRModule.from_expr(relay.Function([x], relay.round(x)))
    )
    assert [call.op.name for call in calls(ConvertLayout(HERE)(mod))] != ["round"]
    (got,) = run(mod, {"x": values}, HERE)
    wide = values.astype("float64")
    want = (np.sign(wide) * np.floor(np.abs(wide) + 0.5)).astype("float32")
    np.testing.assert_array_equal(got, want)
    with topi_int8.disabled():
        (upstream,) = run(mod, {"x": values}, HERE)
    np.testing.assert_array_equal(upstream, want)
