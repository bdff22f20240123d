"""FoldPad: which pads become an operator's own padding, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.transform import interpret
from topi_int8 import op
from topi_int8.transform.fold_pad import FoldPad

NN = relax.op.nn
ROWS_AND_COLUMNS = {"NCHW": (0, 0, 0, 0, 1, 2, 0, 3), "NHWC": (0, 0, 1, 2, 0, 3, 0, 0)}
SHAPES = {"NCHW": (2, 5, 8, 9), "NHWC": (2, 8, 9, 5)}
Build = Callable[[Callable, relax.Var], Any]


def module(build: Build, shape: tuple[int, ...], dtype: str) -> tvm.IRModule:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(build(bb.emit, x))
        bb.emit_func_output(out)
    return bb.get()


def check(build: Build, shape: tuple[int, ...], dtype: str = "int8", folds: bool = True) -> Any:
    """Fold; the pads are gone, or all still there; return the last operator's call."""
    mod = module(build, shape, dtype)
    before = tvm.ir.save_json(mod)
    new = FoldPad()(mod)
    assert tvm.ir.save_json(mod) == before, "the input module was changed"
    relax.analysis.well_formed(new)  # raises
    pads = interpret.count(mod)["relax.nn.pad"]
    assert interpret.count(new).get("relax.nn.pad", 0) == (0 if folds else pads)
    rng = np.random.default_rng(1)
    if dtype == "float32":
        x = rng.normal(size=shape).astype(dtype)
    else:
        x = rng.integers(-128, 128, shape).astype(dtype)
    for want, got in zip(interpret.run(mod, x), interpret.run(new, x), strict=True):
        assert np.unique(want).size > 2 and want.dtype == got.dtype
        np.testing.assert_array_equal(got, want)
    found: list[relax.Call] = []
    relax.analysis.post_order_visit(
        new["main"], lambda e: found.append(e) if isinstance(e, relax.Call) else None
    )
    return found[-1]


def conv(emit: Callable, x: Any, layout: str, zero_point: int = -7, **attrs: Any) -> Any:
    weight = np.random.default_rng(0).integers(-127, 128, (4, 5, 3, 3)).astype("int8")
    return emit(
        op.conv2d(
            x, relax.const(weight), data_layout=layout, data_zero_point=zero_point,
            scale=relax.const(np.full(4, 0.002, "float32")), out_dtype="int8", **attrs,
        )
    )  # fmt: skip


def average(emit: Callable, x: Any, layout: str, **attrs: Any) -> Any:
    return emit(
        op.avg_pool2d(
            x, pool_size=(3, 2), strides=(2, 1), layout=layout, zero_point=-7, scale=1.0,
            out_dtype="int8", out_zero_point=-7, **attrs,
        )
    )  # fmt: skip


@pytest.mark.parametrize("layout", ROWS_AND_COLUMNS)
def test_convolution(layout: str) -> None:
    def build(emit: Callable, x: Any) -> Any:
        padded = emit(NN.pad(x, ROWS_AND_COLUMNS[layout], "constant", -7.0))
        return conv(emit, padded, layout, padding=(1, 0, 0, 1), strides=(2, 2))

    assert op.attrs_of(check(build, SHAPES[layout]))["padding"] == (2, 0, 2, 4)


def test_float_convolution() -> None:
    def build(emit: Callable, x: Any) -> Any:
        padded = emit(NN.pad(x, ROWS_AND_COLUMNS["NCHW"]))
        weight = relax.const(np.random.default_rng(0).normal(size=(4, 5, 3, 3)).astype("float32"))
        return emit(op.conv2d(padded, weight, out_dtype="float32"))

    assert op.attrs_of(check(build, SHAPES["NCHW"], "float32"))["padding"] == (1, 0, 2, 3)


@pytest.mark.parametrize("layout", ROWS_AND_COLUMNS)
def test_average_pool_counts_what_was_padded(layout: str) -> None:
    def build(emit: Callable, x: Any) -> Any:
        return average(emit, emit(NN.pad(x, ROWS_AND_COLUMNS[layout], "constant", -7.0)), layout)

    attrs = op.attrs_of(check(build, SHAPES[layout]))
    assert attrs["padding"] == (1, 0, 2, 3) and attrs["count_include_pad"]


@pytest.mark.parametrize("layout", ROWS_AND_COLUMNS)
def test_maximum_of_what_no_maximum_picks(layout: str) -> None:
    def build(emit: Callable, x: Any) -> Any:
        padded = emit(NN.pad(x, ROWS_AND_COLUMNS[layout], "constant", -128.0))
        return emit(NN.max_pool2d(padded, (3, 3), (2, 2), (1, 1, 0, 0), layout=layout))

    call = check(build, SHAPES[layout])
    assert [int(p) for p in call.attrs.padding] == [2, 1, 2, 3]


def test_a_pad_that_two_read_folds_into_both() -> None:
    def build(emit: Callable, x: Any) -> Any:
        padded = emit(NN.pad(x, ROWS_AND_COLUMNS["NCHW"], "constant", -7.0))
        return emit(relax.Tuple([conv(emit, padded, "NCHW"), average(emit, padded, "NCHW")]))

    check(build, SHAPES["NCHW"])


CHANNELS = (0, 0, 0, 1, 1, 1, 0, 0)
STAY: dict[str, Build] = {
    "another_value": lambda emit, x: conv(
        emit, emit(NN.pad(x, ROWS_AND_COLUMNS["NCHW"], "constant", 0.0)), "NCHW"
    ),
    "reflected": lambda emit, x: conv(
        emit, emit(NN.pad(x, ROWS_AND_COLUMNS["NCHW"], "reflect", -7.0)), "NCHW"
    ),
    "average_with_its_own": lambda emit, x: average(
        emit, emit(NN.pad(x, ROWS_AND_COLUMNS["NCHW"], "constant", -7.0)), "NCHW",
        padding=(1, 1, 1, 1),
    ),
    "maximum_of_the_zero_point": lambda emit, x: emit(
        NN.max_pool2d(emit(NN.pad(x, ROWS_AND_COLUMNS["NCHW"], "constant", -7.0)), (3, 3), (2, 2))
    ),
    "channels": lambda emit, x: average(
        emit, emit(NN.pad(x, CHANNELS, "constant", -7.0)), "NCHW"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_what_stays(name: str) -> None:
    check(STAY[name], SHAPES["NCHW"], folds=False)
