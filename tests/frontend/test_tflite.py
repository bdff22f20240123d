"""int8 TFLite models: every layer on an int8 strategy, and the numbers of TFLite's own arithmetic.

Models are written by `tflite_builder`, which computes by `tflite_reference` what TFLite makes of
their sample input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

import topi_int8
from tests.kernels import require
from topi_int8 import op
from topi_int8.frontend.tflite import from_tflite
from topi_int8.target import isa_target
from topi_int8.transform.pipeline import integer_passes

pytest.importorskip("tflite", reason="tflite is not installed (extra `tflite`)")
builder = pytest.importorskip("tests.frontend.tflite_builder")
Net, Tensor = builder.Net, builder.Tensor

TARGET = isa_target("avx2")
SOFTMAX = {"relax.dequantize", "relax.multiply", "relax.nn.softmax"}  # the product is its beta


# ---------------------------------------------------------------- what is asserted


def in_float(mod: tvm.IRModule, target: Any = TARGET) -> set[str]:
    """Return the operators that make float32 after the passes to integer operators."""
    found: set[str] = set()

    def visit(expr: relax.Expr) -> None:
        if op.op_name(expr) and getattr(expr.ty, "dtype", None) == "float32":
            found.add(op.op_name(expr))

    passed = tvm.transform.Sequential(integer_passes(target))(mod)
    for _, func in passed.functions_items():
        if isinstance(func, relax.Function):
            relax.analysis.post_order_visit(func, visit)
    return found


def run(mod: tvm.IRModule, *inputs: np.ndarray, target: Any = TARGET) -> list[np.ndarray]:
    require("avx2")
    built = tvm.compile(mod, target, relax_pipeline=topi_int8.pipeline(target))
    out = relax.VirtualMachine(built, tvm.cpu())["main"](*map(tvm.runtime.tensor, inputs))
    return [out.numpy()] if isinstance(out, tvm.runtime.Tensor) else [t.numpy() for t in out]


def check(net: Any, *outputs: Any, few: float = 0.004) -> Any:
    """Compile a network and compare; nothing is left in float.

    At most one step from TFLite's arithmetic, and equal in all but a few of a thousand. Returns
    what `explain` found.
    """
    mod = from_tflite(net.model(*outputs))
    assert not in_float(mod)
    explanation = topi_int8.explain(mod, TARGET, show=False)
    for row in explanation:
        assert (row.work.data_dtype, row.work.weight_dtype) == ("int8", "int8"), row
        assert row.work.epilogue.out_dtype == "int8" and "float" not in row.strategy, row
    assert not explanation.naive
    results = run(mod, *(x.value for x in net.inputs))
    for result, expected in zip(results, outputs, strict=True):
        compare(result, expected.value, few)
    return explanation


def compare(result: np.ndarray, expected: np.ndarray, few: float) -> None:
    assert result.shape == expected.shape and result.dtype == expected.dtype
    assert np.unique(expected).size > 2, "a constant output proves nothing"
    error = np.abs(result.astype(int) - expected.astype(int))
    assert error.max() <= 1 and (error > 0).sum() <= 1 + few * error.size


def check_steps(build: Callable[[Any], Any], allowed: set[str] = frozenset()) -> Any:
    """Compile a network and compare every tensor with what TFLite makes of our values before it.

    (Steps add up from layer to layer: TFLite's own implementations differ as much.) Nothing but
    `allowed` is left in float. Returns what `explain` found.
    """
    net = Net()
    mod = from_tflite(net.model(build(net)))
    assert in_float(mod) <= allowed
    every = run(from_tflite(net.model(*net.steps)), *(x.value for x in net.inputs))
    replay = Net(first=net, values=every)
    build(replay)
    for name, value, computed in zip(net.operators, every, replay.computed, strict=True):
        compare(value, computed, few_of(name))
    (result,) = run(mod, *(x.value for x in net.inputs))
    np.testing.assert_array_equal(result, every[-1])  # with everything fused that can be
    return topi_int8.explain(mod, TARGET, show=False)


# An average of 4 is a half one time in 4: TFLite rounds it away from zero, we to even. Few steps by
# less than 1 show that it rounds twice: 0.4 * 1 becomes 0.8, that 1, and 1 / 2 then 1.
ROUNDED_OTHERWISE = ("AVERAGE_POOL", "CONCAT", "MEAN", "QUANTIZE")


def few_of(name: str) -> float:
    """Return the part of an operator's elements that may differ by a step."""
    return 0.25 if name.upper().startswith(ROUNDED_OTHERWISE) else 0.015


def others(explanation: Any) -> dict[str, int]:
    """Return what is left beside the layers, by name."""
    return {other.op.removeprefix("topi_int8."): other.count for other in explanation.others}


# ---------------------------------------------------------------- layers

LAYERS: dict[str, Callable[[Any, Any], Any]] = {
    "same": lambda net, x: net.conv2d(x, 16, 3),
    "valid": lambda net, x: net.conv2d(x, 16, 3, padding="VALID"),
    "same_stride_2": lambda net, x: net.conv2d(x, 16, 3, 2),
    "same_stride_3_of_5x4": lambda net, x: net.conv2d(x, 17, (5, 4), 3),
    "valid_stride_3": lambda net, x: net.conv2d(x, 16, 2, 3, "VALID"),
    "relu": lambda net, x: net.conv2d(x, 16, 1, activation="RELU"),
    "relu6": lambda net, x: net.conv2d(x, 16, 3, activation="RELU6"),
    "relu_n1_to_1": lambda net, x: net.conv2d(x, 16, 3, activation="RELU_N1_TO_1"),
    "dilation": lambda net, x: net.conv2d(x, 16, 3, dilation=2),
    "groups": lambda net, x: net.conv2d(x, 16, 3, groups=2),
    "one_channel": lambda net, x: net.conv2d(x, 1, 3),
    "per_tensor": lambda net, x: net.conv2d(x, 16, 3, per_channel=False),
    "no_bias": lambda net, x: net.conv2d(x, 16, 3, bias=False),
    "bias_without_params": lambda net, x: net.conv2d(x, 16, 3, bias_params=False),
    "depthwise": lambda net, x: net.depthwise(x, 3, activation="RELU6"),
    "depthwise_stride_2": lambda net, x: net.depthwise(x, 3, stride=2),
    "depthwise_5x5_valid": lambda net, x: net.depthwise(x, 5, padding="VALID"),
    "depthwise_dilation": lambda net, x: net.depthwise(x, 3, dilation=2),
    "depthwise_per_tensor": lambda net, x: net.depthwise(x, 3, per_channel=False),
    "depthwise_times_2": lambda net, x: net.depthwise(x, 3, 2),
    "depthwise_times_3_per_tensor": lambda net, x: net.depthwise(x, 3, 3, per_channel=False),
    "dense_rows": lambda net, x: net.dense(x, 24, "RELU"),
    "dense_kept": lambda net, x: net.dense(x, 24, keep=True),
    "dense_per_tensor": lambda net, x: net.dense(x, 10, per_channel=False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    net = Net()
    rows = list(check(net, LAYERS[name](net, net.input((1, 13, 14, 12)))))
    assert len(rows) == 1
    kind = "matmul" if "dense" in name else "depthwise" if "depthwise" in name else "conv2d"
    assert rows[0].op == ("conv2d" if "times" in name else kind)


@pytest.mark.parametrize("multiplier", [1, 8])
def test_depthwise_of_one_channel(multiplier: int) -> None:
    net = Net()
    check(net, net.depthwise(net.input((1, 12, 12, 1)), 3, multiplier))


# ---------------------------------------------------------------- operators between layers


def _squeezed(net: Any, x: Any) -> Any:
    """Squeeze and excitation: x times a sigmoid of a network of its mean."""
    gate = net.conv2d(net.mean(x, keep=True), 8, 1, activation="RELU")
    return net.multiply(x, net.logistic(net.conv2d(gate, x.shape[3], 1)))


OPERATORS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "add": lambda net, x, y: net.add(x, y),
    "add_relu6": lambda net, x, y: net.add(x, y, "RELU6"),
    "sub_relu": lambda net, x, y: net.add(x, y, "RELU", sign=-1),
    "mul": lambda net, x, y: net.multiply(x, y),
    "mul_relu": lambda net, x, y: net.multiply(x, y, "RELU"),
    "squeeze_and_excitation": lambda net, x, _: _squeezed(net, x),
    "average_pool": lambda net, x, _: net.pool(x, "average", 2, 2),
    "average_pool_same": lambda net, x, _: net.pool(x, "average", 3, 2, "SAME"),
    "average_pool_relu": lambda net, x, _: net.pool(x, "average", 3, 1, "SAME", "RELU"),
    "max_pool": lambda net, x, _: net.pool(x, "max", 2, 2),
    "max_pool_same": lambda net, x, _: net.pool(x, "max", 3, 2, "SAME"),
    "max_pool_relu6": lambda net, x, _: net.pool(x, "max", 3, 2, "SAME", "RELU6"),
    "mean": lambda net, x, _: net.mean(x),
    "mean_kept": lambda net, x, _: net.mean(x, (2, 1), keep=True),
    "quantize": lambda net, x, _: net.quantize(x, (0.05, 7)),
    "concat": lambda net, x, y: net.concat([x, net.quantize(y, x.params)]),
    "concat_rows": lambda net, x, y: net.concat([net.quantize(y, x.params), x], axis=1),
    "pad": lambda net, x, _: net.pad(x, (0, 0), (1, 2), (0, 1), (0, 0)),
    "pad_channels": lambda net, x, _: net.pad(x, (0, 0), (0, 0), (0, 0), (3, 4)),
    "reshape": lambda net, x, _: net.reshape(x, 1, -1, x.shape[3]),
    "logistic": lambda net, x, _: net.logistic(x),
    "hard_swish": lambda net, x, _: net.hard_swish(x),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str) -> None:
    net = Net()
    x, y = net.input((1, 9, 10, 16)), net.input((1, 9, 10, 16), 0.03, 11)
    check(net, OPERATORS[name](net, x, y), few=few_of(name))


@pytest.mark.parametrize("name", ["logistic", "hard_swish"])
def test_functions_are_tables(name: str) -> None:
    def build(net: Any) -> Any:
        return getattr(net, name)(net.conv2d(net.input((1, 9, 9, 8)), 16, 3))

    assert others(check_steps(build))["lookup"] == 1


def test_constants_beside_a_tensor() -> None:
    """MUL and ADD by a vector of constants are one affine a channel."""

    def build(net: Any) -> Any:
        x = net.conv2d(net.input((1, 9, 9, 8)), 16, 3)
        factor = net.constant(net.rng.integers(1, 128, (1, 1, 1, 16)).astype("int8"), 0.01)
        shift = net.constant(net.rng.integers(-128, 128, 16).astype("int8"), 0.02)
        return net.add(net.multiply(x, factor), shift)

    assert others(check_steps(build))["affine"] == 2


MOVES: dict[str, Callable[[Any, Any], Any]] = {
    "squeeze": lambda net, x: net.move(
        "SQUEEZE", x, x.value.squeeze(0), kind="Squeeze", SqueezeDims=[0]
    ),
    "expand_dims": lambda net, x: net.move(
        "EXPAND_DIMS", x, x.value[:, None], 1, kind="ExpandDims"
    ),
    "transpose": lambda net, x: net.move(
        "TRANSPOSE", x, x.value.transpose(0, 3, 1, 2), (0, 3, 1, 2), kind="Transpose"
    ),
    "slice": lambda net, x: net.move(
        "SLICE", x, x.value[:, 2:6, :, 4:], (0, 2, 0, 4), (1, 4, -1, -1), kind="Slice"
    ),
    "strided_slice": lambda net, x: net.move(
        "STRIDED_SLICE", x, x.value[:, ::2, 1:, :8], (0, 0, 1, 0), (1, 0, 0, 8), (1, 2, 1, 1),
        kind="StridedSlice", EndMask=0b0110,
    ),
    "mirror_pad": lambda net, x: net.move(
        "MIRROR_PAD", x, np.pad(x.value, ((0, 0), (1, 1), (2, 0), (0, 0)), "reflect"),
        ((0, 0), (1, 1), (2, 0), (0, 0)), kind="MirrorPad", Mode=0,
    ),
    "tile": lambda net, x: net.move(
        "TILE", x, np.tile(x.value, (1, 2, 1, 1)), (1, 2, 1, 1), kind="Tile"
    ),
    "resize_nearest": lambda net, x: net.move(
        "RESIZE_NEAREST_NEIGHBOR", x, x.value.repeat(2, 1).repeat(2, 2), (16, 20),
        kind="ResizeNearestNeighbor",
    ),
    "space_to_depth": lambda net, x: net.move(
        "SPACE_TO_DEPTH", x,
        x.value.reshape(1, 4, 2, 5, 2, 16).transpose(0, 1, 3, 2, 4, 5).reshape(1, 4, 5, 64),
        kind="SpaceToDepth", BlockSize=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_moves_of_integers(name: str) -> None:
    """What TVM's importer refuses in int8, and only moves values."""
    net = Net()
    y = MOVES[name](net, net.input((1, 8, 10, 16)))
    assert (run(from_tflite(net.model(y)), net.inputs[0].value)[0] == y.value).all()


def test_split_and_pack() -> None:
    net = Net()
    x = net.input((1, 8, 10, 16))
    halves = net.split(x, 3, 2)
    packed = net.move("PACK", halves[0], np.stack([h.value for h in halves], 1), kind="Pack",
                      others=halves[1:], Axis=1, ValuesCount=2)  # fmt: skip
    (result,) = run(from_tflite(net.model(packed)), x.value)
    assert (result == packed.value).all()


# ---------------------------------------------------------------- networks


def _residual_net(net: Any) -> Any:
    """As Keras writes ResNets: explicit pads before strides and before the maximum."""
    x = net.quantize(net.input((1, 34, 34, 3)), (0.02, -3))
    x = net.pad(x, (0, 0), (3, 3), (3, 3), (0, 0))
    x = net.conv2d(x, 32, 7, 2, "VALID", "RELU")
    x = net.pool(net.pad(x, (0, 0), (1, 1), (1, 1), (0, 0)), "max", 3, 2)
    for stride in (1, 2):
        y = net.conv2d(x, 32, 1, stride, "VALID", "RELU")
        y = net.conv2d(y, 32, 3, 1, "SAME", "RELU")
        y = net.conv2d(y, 64, 1, 1, "VALID")
        x = net.add(net.conv2d(x, 64, 1, stride, "VALID"), y, "RELU")
    y = net.conv2d(net.conv2d(x, 32, 1, activation="RELU6"), 64, 3)
    x = net.add(x, y, "RELU")
    return net.dense(net.mean(x), 10)


def _separable_net(net: Any) -> Any:
    """As MobileNets: pads before strides, depthwise, a multiplier, bare projections, SE."""
    x = net.conv2d(net.input((1, 33, 33, 3)), 16, 3, 2, activation="RELU6")
    x = net.depthwise(x, 3, activation="RELU6")
    x = net.conv2d(x, 16, 1)
    y = net.conv2d(x, 48, 1, activation="RELU6")
    y = net.pad(y, (0, 0), (0, 1), (0, 1), (0, 0))
    y = net.depthwise(y, 3, stride=2, padding="VALID", activation="RELU6")
    x = net.conv2d(y, 32, 1)
    y = net.conv2d(x, 96, 1, activation="RELU6")
    y = net.depthwise(y, 5, activation="RELU6")
    x = net.add(x, net.conv2d(_squeezed(net, y), 32, 1))
    x = net.hard_swish(net.conv2d(x, 64, 1))
    x = net.pool(net.depthwise(x, 3, 2), "average", 8, 8)
    return net.dense(net.reshape(x, 1, -1), 12)


def _classifier(net: Any) -> Any:
    """A classifier's tail behind branches that are joined."""
    x = net.conv2d(net.input((1, 8, 8, 24)), 32, 3, activation="RELU")
    left, right = net.conv2d(x, 32, 1), net.conv2d(x, 16, 3)
    x = net.concat([net.quantize(left, (0.9, 2)), net.quantize(right, (0.9, 2))])
    x = net.dense(net.mean(x, keep=True), 40, "RELU")
    return net.softmax(net.dense(x, 10), beta=0.03)


NETWORKS = {"residual": _residual_net, "separable": _separable_net, "classifier": _classifier}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    check_steps(NETWORKS[name], SOFTMAX if name == "classifier" else set())


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_packed_once(name: str) -> None:
    """One transform where the data enters, at most one where they leave; pads are folded."""
    net = Net()
    mod = from_tflite(net.model(NETWORKS[name](net)))
    explanation = topi_int8.explain(mod, TARGET, show=False)
    for row in explanation:
        assert "int8" in row.dtypes and "float" not in row.dtypes and "float" not in row.strategy
        assert row.data_layout.startswith(("NCHW", "row-major"))
    left = others(explanation)
    assert left.get("layout_transform", 0) <= 2
    assert not {"relax.permute_dims", "relax.nn.pad", "relax.clip"} & left.keys()


def test_adds_in_the_epilogue() -> None:
    """Where ADD need not see a rounded layer: fewer passes, not a step of the sum away."""
    net = Net()
    x = net.conv2d(net.input((1, 12, 12, 8)), 16, 1)
    y = net.add(net.conv2d(net.conv2d(x, 16, 3, activation="RELU"), 16, 3), x, "RELU")
    z = net.add(net.conv2d(y, 32, 1), net.conv2d(y, 32, 3))
    model = net.model(z)
    mods = [from_tflite(model, exact_adds=exact) for exact in (True, False)]
    adds = [others(topi_int8.explain(mod, TARGET, show=False)).get("add", 0) for mod in mods]
    assert adds == [2, 0] and not in_float(mods[1])
    exact, fused = (run(mod, net.inputs[0].value)[0].astype(int) for mod in mods)
    assert 0 < (exact != fused).mean() < 0.7 and np.abs(exact - fused).max() <= 3


def test_tvms_own_import_is_fused_too() -> None:
    """FuseQDQ takes in clips of integers, and reshapes of depthwise weights, as TVM writes them."""
    import tflite
    from tvm.relax.frontend.tflite import from_tflite as tvms

    net = Net()
    x = net.conv2d(net.input((1, 13, 13, 3)), 16, 3, 2, activation="RELU6")
    y = net.dense(net.mean(net.depthwise(x, 3, activation="RELU")), 10, "RELU")
    mod = tvms(tflite.Model.GetRootAsModel(net.model(y), 0))
    assert not in_float(mod)
    explanation = topi_int8.explain(mod, TARGET, show=False)
    assert "relax.clip" not in others(explanation)
    compare(run(mod, net.inputs[0].value)[0], y.value, 0.1)


# ---------------------------------------------------------------- the interface


def test_a_path_and_another_batch(tmp_path: Path) -> None:
    net = Net()
    x = net.input((1, 9, 9, 8), name="serving_default_x:0")
    y = net.dense(net.reshape(net.conv2d(x, 16, 3, 2), -1, 400), 6)
    path = tmp_path / "net.tflite"
    path.write_bytes(net.model(y))
    for model in (path, str(path), bytearray(path.read_bytes())):
        tvm.ir.assert_structural_equal(from_tflite(model), from_tflite(path))
    batch = np.concatenate([x.value, x.value[:, ::-1]])
    mod = from_tflite(path, {"serving_default_x:0": batch.shape})
    assert op.shape_of(mod["main"].params[0]) == batch.shape
    assert "params" not in mod["main"].attrs
    (result,) = run(mod, batch)
    assert result.shape == (2, 6)
    compare(result[:1], y.value, 0.1)


def test_errors_name_the_argument() -> None:
    net = Net()
    model = net.model(net.conv2d(net.input((1, 5, 5, 4)), 8, 1))
    with pytest.raises(TypeError, match="model is int; allowed: bytes or a path"):
        from_tflite(3)
    with pytest.raises(ValueError, match=r"model starts with b'nothing '; allowed: a TFLite"):
        from_tflite(b"nothing of TFLite")
    with pytest.raises(ValueError, match="shape_dict names y; allowed: input0"):
        from_tflite(model, {"y": (1, 5, 5, 4)})


def test_what_cannot_be_imported_is_named() -> None:
    net = Net()
    x = net.input((1, 6, 6, 4))
    y = net.move("TRANSPOSE", x, x.value.T, (3, 2, 1, 0), kind="Transpose", params=(0.5, 0))
    with pytest.raises(tvm.error.OpNotImplemented, match="TRANSPOSE changes the scale"):
        from_tflite(net.model(y))
    net = Net()
    y = net.function("GELU", net.input((1, 6, 6, 4)), np.tanh, kind="Gelu")
    with pytest.raises(tvm.error.OpNotImplemented, match="GELU"):
        from_tflite(net.model(y))


@pytest.mark.parametrize(
    "kernel, size, padding",
    [(3, (12, 14), "SAME"), (2, (12, 13), "SAME"), (4, (14, 16), "VALID"), (1, (12, 14), "VALID")],
)
def test_transposed_convolutions_are_right_and_named_slow(
    kernel: int, size: tuple[int, int], padding: str
) -> None:
    net = Net()
    x = net.input((1, 6, 7, 8))
    y = net.transposed(x, 5, kernel, 2, size, padding, "RELU")
    mod = from_tflite(net.model(y))
    explanation = topi_int8.explain(mod, TARGET, show=False)
    notes = {other.op: other.note for other in explanation.others}
    assert notes["relax.nn.conv2d_transpose"].startswith("SLOW")
    compare(run(mod, x.value)[0], y.value, 0.015)


def test_what_stays_float_is_named_with_a_reason() -> None:
    net = Net()
    x = net.input((1, 6, 6, 8))
    size = np.asarray([12, 12], "int32")
    big = net.function("RESIZE_BILINEAR", x, lambda real: real.repeat(2, 1).repeat(2, 2),
                       operands=(size,), kind="ResizeBilinear")  # fmt: skip
    y = net.softmax(net.conv2d(big, 16, 1))
    explanation = topi_int8.explain(from_tflite(net.model(y)), TARGET, show=False)
    notes = {other.op: other.note for other in explanation.others}
    assert notes["relax.image.resize2d"].endswith("in float: it interpolates")
    assert notes["relax.nn.softmax"].endswith("in float: it sums exponentials")


def test_without_tflite_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tflite", None)
    with pytest.raises(ImportError, match=r"pip install 'topi_int8\[tflite\]'"):
        from_tflite(b"")
