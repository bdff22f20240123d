"""op.py: the integer operators infer their types, keep their attributes, and refuse nonsense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from topi_int8 import op
from topi_int8.workload import Epilogue


def var(shape: tuple, dtype: str = "uint8") -> relax.Var:
    return relax.Var("x", relax.TensorType(shape, dtype))


def type_of(call: relax.Call) -> tuple[tuple[int, ...], str]:
    """Return (shape, dtype) that type inference gives a call."""
    emitted = relax.BlockBuilder().normalize(call)
    return op.shape_of(emitted), str(emitted.ty.dtype)


def ones(*shape: int, dtype: str = "int8") -> relax.Expr:
    return relax.const(np.ones(shape, dtype))


SCALE16 = relax.const(np.ones(16, "float32"))

# ---- types


def test_types_of_the_elementwise_operators() -> None:
    x, table = var((1, 8, 3, 4)), ones(256)
    stored = dict(out_dtype="int8", out_zero_point=1)
    vector = ones(1, 8, 1, 1, dtype="float32")
    assert type_of(op.lookup(x, table)) == ((1, 8, 3, 4), "int8")
    assert type_of(op.affine(x, vector, vector, zero_point=2, **stored)) == ((1, 8, 3, 4), "int8")
    gate = var((1, 8, 1, 1))
    product = op.multiply(x, gate, a_zero_point=1, b_zero_point=2, scale=0.5, **stored)
    assert type_of(product) == ((1, 8, 3, 4), "int8")


def test_type_of_a_concat() -> None:
    parts = [var((2, 1, 3, 4, 64)), var((2, 1, 3, 4, 32))]
    assert type_of(op.concat(parts, (64, 20), 64)) == ((2, 2, 3, 4, 64), "uint8")
    vectors = [ones(1, 2, 1, 1, 64, dtype="float32")] * 2
    call = op.rebuild(op.concat(parts, (64, 20), 64), [*parts, *vectors], affine=True,
                      zero_point=0, out_dtype="int8", out_zero_point=3)  # fmt: skip
    assert type_of(call) == ((2, 2, 3, 4, 64), "int8")


@pytest.mark.parametrize(
    "data, attrs, expected",
    [
        ((1, 8, 10, 12), {}, (1, 16, 8, 10)),
        ((2, 8, 10, 12), dict(padding=(1, 2, 3, 4), strides=(2, 3)), (2, 16, 6, 6)),
        ((1, 8, 10, 12), dict(dilation=(2, 3)), (1, 16, 6, 6)),
        ((1, 10, 12, 8), dict(data_layout="NHWC"), (1, 8, 10, 16)),
        ((1, 10, 12, 8), dict(data_layout="NHWC", out_layout="NCHW16c"), (1, 1, 8, 10, 16)),
        ((1, 2, 10, 12, 4), dict(data_layout="NCHW4c", out_layout="NCHW64c", channels=8),
         (1, 1, 8, 10, 64)),
        ((1, 1, 10, 12, 16), dict(data_layout="NCHW16c", out_layout="NCHW", channels=8),
         (1, 16, 8, 10)),
    ],
)  # fmt: skip
def test_conv2d_type(data: tuple, attrs: dict, expected: tuple) -> None:
    call = op.conv2d(var(data), ones(16, 8, 3, 3), **attrs)
    assert type_of(call) == (expected, "int32")


@pytest.mark.parametrize("layout, shape", [("OIHW", (16, 2, 3, 5)), ("HWIO", (3, 5, 2, 16)),
                                           ("OHWI", (16, 3, 5, 2))])  # fmt: skip
def test_kernel_layouts(layout: str, shape: tuple) -> None:
    call = op.conv2d(var((1, 8, 10, 12)), ones(*shape), groups=4, kernel_layout=layout)
    assert type_of(call) == ((1, 16, 8, 8), "int32")
    work = op.conv2d_workload(call)
    assert (work.oc, work.ic, work.kh, work.kw, work.groups) == (16, 8, 3, 5, 4)


@pytest.mark.parametrize(
    "data, weight, transpose_b, expected",
    [
        ((3, 8), (5, 8), True, (3, 5)),
        ((3, 8), (8, 5), False, (3, 5)),
        ((2, 3, 8), (5, 8), True, (2, 3, 5)),
        ((2, 3, 8), (2, 5, 8), True, (2, 3, 5)),
        ((2, 4, 3, 8), (2, 4, 8, 5), False, (2, 4, 3, 5)),
    ],
)
def test_matmul_type(data: tuple, weight: tuple, transpose_b: bool, expected: tuple) -> None:
    call = op.matmul(var(data), var(weight, "int8"), transpose_b=transpose_b)
    assert type_of(call) == (expected, "int32")
    work = op.matmul_workload(call)
    assert (work.batch * work.m, work.n, work.k) == (int(np.prod(expected[:-1])), 5, 8)
    assert not work.weight_constant


@pytest.mark.parametrize(
    "attrs, shape",
    [
        (dict(pool_size=(2, 2), strides=(2, 2)), (1, 20, 3, 4)),
        (dict(pool_size=(2, 2), strides=(2, 2), ceil_mode=True), (1, 20, 4, 5)),
        (dict(pool_size=(7, 9)), (1, 20, 1, 1)),
        (dict(pool_size=(3, 3), padding=(1, 0, 1, 2)), (1, 20, 7, 9)),
    ],
)
def test_avg_pool2d_type(attrs: dict, shape: tuple) -> None:
    quantization = dict(zero_point=3, scale=0.5, out_dtype="uint8", out_zero_point=4)
    assert type_of(op.avg_pool2d(var((1, 20, 7, 9)), **attrs, **quantization)) == (shape, "uint8")
    packed = op.avg_pool2d(
        var((1, 2, 7, 9, 16)), layout="NCHW16c", channels=20, **attrs, **quantization
    )
    assert type_of(packed) == ((1, 2, *shape[2:], 16), "uint8")


def test_elementwise_types() -> None:
    out = dict(out_dtype="int8", out_zero_point=-3)
    scales = dict(a_zero_point=1, a_scale=0.5, b_zero_point=2, b_scale=0.25)
    assert type_of(op.add(var((2, 3)), var((2, 3)), **scales, **out)) == ((2, 3), "int8")
    call = op.requantize(var((2, 3), "int32"), zero_point=0, scale=0.5, **out)
    assert type_of(call) == ((2, 3), "int8")


@pytest.mark.parametrize(
    "src, dst, shape, expected",
    [
        ("NCHW", "NCHW16c", (2, 20, 3, 4), (2, 2, 3, 4, 16)),
        ("NHWC", "NCHW4c", (2, 3, 4, 3), (2, 1, 3, 4, 4)),
        ("NCHW16c", "NCHW64c", (2, 5, 3, 4, 16), (2, 2, 3, 4, 64)),
        ("NCHW16c", "NHWC", (2, 2, 3, 4, 16), (2, 3, 4, 20)),
    ],
)
def test_layout_transform_type(src: str, dst: str, shape: tuple, expected: tuple) -> None:
    channels = 70 if "64" in dst else shape[3] if src == "NHWC" else 20
    assert type_of(op.layout_transform(var(shape), src, dst, channels)) == (expected, "uint8")


# ---- attributes


def conv_with_everything() -> relax.Call:
    return op.conv2d(
        var((1, 8, 10, 12)), ones(16, 8, 3, 3), bias=ones(16, dtype="int32"), scale=SCALE16,
        residual=var((1, 16, 10, 12), "int8"), padding=(1, 1, 1, 1), data_zero_point=7,
        weight_zero_point=-2, out_dtype="uint8", out_zero_point=9, clip_min=9, clip_max=200,
        residual_zero_point=-4, residual_scale=0.5, name="layer1",
    )  # fmt: skip


def test_attributes_come_back() -> None:
    call = conv_with_everything()
    attrs = op.attrs_of(call)
    assert attrs["strides"] == (1, 1) and attrs["padding"] == (1, 1, 1, 1)
    assert attrs["name"] == "layer1" and attrs["data_layout"] == attrs["out_layout"] == "NCHW"
    work = op.conv2d_workload(call)
    assert (work.data_zero_point, work.weight_zero_point) == (7, -2)
    assert work.epilogue == Epilogue(
        "uint8", bias=True, scale=True, out_zero_point=9, clip_min=9.0, clip_max=200.0,
        residual_dtype="int8", residual_zero_point=-4, residual_scale=0.5,
    )  # fmt: skip
    assert list(op.operands(call)) == ["data", "weight", "bias", "scale", "residual"]
    assert all(value is not None for value in op.operands(call).values())


@pytest.mark.parametrize("absent", ["bias", "scale", "residual"])
def test_operands_by_name(absent: str) -> None:
    given = dict(
        bias=ones(16, dtype="int32"), scale=SCALE16, residual=var((1, 16, 8, 10), "float32")
    )
    given[absent] = None
    dtype = "float32"
    call = op.conv2d(var((1, 8, 10, 12)), ones(16, 8, 3, 3), out_dtype=dtype, **given)
    named = op.operands(call)
    assert named[absent] is None
    assert all(named[key].same_as(value) for key, value in given.items() if value is not None)


def test_rebuild_changes_and_removes() -> None:
    call = conv_with_everything()
    new = op.rebuild(call, list(call.args), out_zero_point=3, clip_max=None, name=None)
    old, attrs = op.attrs_of(call), op.attrs_of(new)
    assert attrs.pop("out_zero_point") == 3 and old.pop("out_zero_point") == 9
    assert "clip_max" not in attrs and "name" not in attrs
    assert attrs == {k: v for k, v in old.items() if k not in ("clip_max", "name")}


@pytest.mark.parametrize("text", [False, True], ids=["json", "script"])
def test_survives_saving_and_printing(text: bool) -> None:
    bb = relax.BlockBuilder()
    call = conv_with_everything()
    with bb.function("main", [call.args[0], call.args[4]]):
        with bb.dataflow():
            out = bb.emit_output(call)
        bb.emit_func_output(out)
    mod = bb.get()
    relax.analysis.well_formed(mod)  # raises
    if text:
        assert "topi_int8.conv2d" in mod.script() and "layer1" in mod.script()
        return
    again = tvm.ir.load_json(tvm.ir.save_json(mod))
    tvm.ir.assert_structural_equal(again, mod)
    (binding,) = again["main"].body.blocks[0].bindings
    assert op.conv2d_workload(binding.value) == op.conv2d_workload(call)


def test_is_op() -> None:
    call = conv_with_everything()
    assert op.is_op(call, "conv2d") and not op.is_op(call, "matmul")
    assert not op.is_op(var((1,)), "conv2d") and not op.is_op(relax.op.abs(var((1,))), "conv2d")


def test_operators_are_pure_and_removed_when_unused() -> None:
    bb = relax.BlockBuilder()
    call = conv_with_everything()
    with bb.function("main", [call.args[0], call.args[4]]):
        with bb.dataflow():
            bb.emit(call)
            out = bb.emit_output(relax.op.abs(call.args[4]))
        bb.emit_func_output(out)
    mod = relax.transform.DeadCodeElimination()(bb.get())
    assert "topi_int8" not in mod.script(show_meta=False)


# ---- errors


def bad_calls() -> dict[str, tuple[Any, str]]:
    data, weight = var((1, 8, 10, 12)), ones(16, 8, 3, 3)

    def conv(**attrs: Any) -> Any:
        return lambda: type_of(op.conv2d(data, weight, **attrs))

    symbolic = var((tvm.tirx.Var("n", "int64"), 8, 10, 12))
    return {
        "layout": (conv(data_layout="NWHC"), r"layout is 'NWHC'; allowed: NCHW, NHWC"),
        "groups": (conv(groups=3), r"groups is 3; allowed: a divisor"),
        "padding": (conv(padding=(1, 1)), r"padding is \(1, 1\); allowed: \(top, left"),
        "zero_point": (conv(data_zero_point=-1), r"data_zero_point is -1; allowed: .*\[0, 255\]"),
        "needs_scale": (conv(out_dtype="uint8"), r"scale is False; allowed: True"),
        "out_dtype": (conv(out_dtype="int16"), r"out_dtype is 'int16'; allowed: uint8"),
        "kernel": (lambda: type_of(op.conv2d(var((1, 8, 2, 2)), weight)), r"kernel is \(3, 3\)"),
        "channels": (conv(channels=5), r"shape is \(1, 8, 10, 12\); allowed: \(1, 5, 10, 12\)"),
        "symbolic": (lambda: type_of(op.conv2d(symbolic, weight, channels=8)), r"allowed: static"),
        "data_dtype": (
            lambda: type_of(op.conv2d(var((1, 8, 10, 12), "int32"), weight)),
            r"data_dtype is 'int32'; allowed: uint8, int8",
        ),
        "transform": (
            lambda: type_of(op.layout_transform(data, "NCHW", "NCHW0c", 8)),
            r"layout is 'NCHW0c'",
        ),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_errors_name_the_argument(name: str) -> None:
    call, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        call()
