"""ConvertLayout on small modules: where the transforms are, and that the numbers stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

import topi_int8
from tests import emulator
from tests.transform import interpret
from topi_int8 import op
from topi_int8.layout import Layout
from topi_int8.target import isa_target
from topi_int8.transform.convert_layout import ConvertLayout
from topi_int8.transform.fuse_float import FuseFloat
from topi_int8.transform.fuse_qdq import FuseQDQ

NN = relax.op.nn
AVX2 = isa_target("avx2")
AMX = isa_target("amx_int8_avx2")
TRANSFORM = "topi_int8.layout_transform"
Build = Callable[..., Any]


class Net:
    """Builds one function of topi_int8 operators over random weights."""

    def __init__(self) -> None:
        self.bb = relax.BlockBuilder()
        self.rng = np.random.default_rng(7)

    def __call__(self, expr: Any) -> Any:
        """Emit an expression."""
        return self.bb.emit(expr)

    def conv(
        self, data: Any, oc: int, kernel: int = 3, layout: str = "NCHW", groups: int = 1,
        out_dtype: str = "uint8", residual: Any = None, **attrs: Any,
    ) -> Any:  # fmt: skip
        """Emit a "same" convolution that keeps uint8 values spread over their range."""
        ic = op.shape_of(data)[Layout.parse(layout).channel_axis] // groups
        return self(
            op.conv2d(
                data, relax.const(self.rng.integers(-127, 128, (oc, ic, kernel, kernel), "int8")),
                bias=relax.const(self.rng.integers(-4000, 4000, oc, "int32")),
                scale=None if out_dtype == "int32" else self.scale(oc, ic * kernel * kernel),
                residual=residual, residual_scale=0.5, groups=groups, data_layout=layout,
                padding=(kernel // 2,) * 4, data_zero_point=3, out_dtype=out_dtype,
                out_zero_point=120 if out_dtype == "uint8" else 0, **attrs,
            )
        )  # fmt: skip

    def scale(self, oc: int, depth: int) -> relax.Expr:
        """Return a multiplier per channel that brings an accumulator to a spread of about 40."""
        spread = 150.0 * 73.0 * depth**0.5
        return relax.const((40 / spread * self.rng.uniform(0.5, 1.5, oc)).astype("float32"))

    def float_conv(self, data: Any, oc: int, layout: str = "NCHW", **attrs: Any) -> Any:
        """Emit a float32 3x3 "same" convolution."""
        ic = op.shape_of(data)[Layout.parse(layout).channel_axis] // attrs.get("groups", 1)
        weight = self.rng.normal(0, (9 * ic) ** -0.5, (oc, ic, 3, 3)).astype("float32")
        return self(
            op.conv2d(data, relax.const(weight), padding=(1,) * 4, data_layout=layout,
                      out_dtype="float32", **attrs)
        )  # fmt: skip


def module(build: Build, *types: tuple[tuple[int, ...], str]) -> tvm.IRModule:
    """Return a module whose ``main`` is ``build(net, *params)``."""
    net = Net()
    params = [relax.Var(f"x{i}", relax.TensorType(*t)) for i, t in enumerate(types)]
    with net.bb.function("main", params):
        with net.bb.dataflow():
            out = net.bb.emit_output(build(net, *params))
        net.bb.emit_func_output(out)
    return net.bb.get()


def convert(mod: tvm.IRModule, target: tvm.target.Target = AVX2) -> tvm.IRModule:
    """Return the converted module, checked: well formed, the input unchanged, idempotent."""
    before = tvm.ir.save_json(mod)
    new = ConvertLayout(target)(mod)
    assert tvm.ir.save_json(mod) == before, "the input module was changed"
    relax.analysis.well_formed(new)  # raises
    tvm.ir.assert_structural_equal(ConvertLayout(target)(new), new, map_free_vars=True)
    return new


def same_numbers(mod: tvm.IRModule, target: tvm.target.Target = AVX2) -> None:
    """Check that the compiled module gives what numpy and stock TVM give for the plain one.

    Requantized integers may differ by one where float32 sums round apart; what follows sees that.
    """
    if target is AMX:
        emulator.install(["amx"])
    rng = np.random.default_rng(3)
    inputs = []
    for param in mod["main"].params:
        shape, dtype = op.shape_of(param), str(param.ty.dtype)
        integers = rng.integers(0, 256, shape).astype(dtype)
        inputs.append(rng.normal(size=shape).astype(dtype) if "float" in dtype else integers)
    wanted = interpret.run(mod, *inputs)
    built = tvm.compile(mod, target, relax_pipeline=topi_int8.pipeline(target))
    vm = relax.VirtualMachine(built, tvm.cpu())
    out = vm["main"](*(tvm.runtime.tensor(x) for x in inputs))
    results = [out] if isinstance(out, tvm.runtime.Tensor) else list(out)
    assert len(results) == len(wanted)
    for result, want in zip(results, wanted, strict=True):
        got = result.numpy()
        assert got.shape == want.shape and got.dtype == want.dtype
        assert want.std() > 0, "a constant output shows nothing"
        if got.dtype.kind == "f":
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-2 * np.abs(want).max())
            assert np.mean(np.abs(got - want)) < 2e-3 * np.abs(want).max()
        else:
            wrong = np.abs(got.astype("int64") - want.astype("int64"))
            assert wrong.max() <= 2 and (wrong > 0).mean() < 0.05


def check(
    build: Build, *types: tuple, transforms: int, target: tvm.target.Target = AVX2
) -> tvm.IRModule:
    """Check how many transforms go in, that all convolutions are packed, and the numbers."""
    mod = module(build, *types)
    new = convert(mod, target)
    assert interpret.count(new).get(TRANSFORM, 0) == transforms, new.script(show_meta=False)
    for call in interpret.calls(new, "conv2d"):
        attrs = op.attrs_of(call)
        assert all(Layout.parse(attrs[key]).is_packed for key in ("data_layout", "out_layout"))
    same_numbers(mod, target)
    return new


def layouts(mod: tvm.IRModule) -> list[tuple[str, str]]:
    """Return (data, output) layouts of the convolutions, in order."""
    attrs = [op.attrs_of(call) for call in interpret.calls(mod, "conv2d")]
    return [(a["data_layout"], a["out_layout"]) for a in attrs]


U8 = ((1, 16, 8, 9), "uint8")
IMAGE = ((1, 3, 14, 14), "uint8")

# ---- chains


def test_chain_against_the_module_written_by_hand() -> None:
    weights = [np.ones((32, 3, 3, 3), "int8"), np.ones((20, 32, 1, 1), "int8")]

    def before(emit: Net, x: Any) -> Any:
        y = emit(op.conv2d(x, relax.const(weights[0]), scale=relax.const(np.ones(32, "float32")),
                           padding=(1, 1, 1, 1), out_dtype="uint8", name="a"))  # fmt: skip
        return emit(op.conv2d(y, relax.const(weights[1]), name="b"))

    def after(emit: Net, x: Any) -> Any:
        packed = emit(op.layout_transform(x, "NCHW", "NCHW4c", 3))
        y = emit(op.conv2d(packed, relax.const(weights[0]), padding=(1, 1, 1, 1),
                           scale=relax.const(np.ones(32, "float32")), data_layout="NCHW4c",
                           out_layout="NCHW16c", channels=3, out_dtype="uint8",
                           name="a"))  # fmt: skip
        z = emit(
            op.conv2d(y, relax.const(weights[1]), data_layout="NCHW16c", channels=32, name="b")
        )
        return emit(op.layout_transform(z, "NCHW16c", "NCHW", 20))

    new = convert(module(before, IMAGE))
    expected = relax.transform.CanonicalizeBindings()(module(after, IMAGE))
    tvm.ir.assert_structural_equal(relax.transform.CanonicalizeBindings()(new), expected)


@pytest.mark.parametrize("target", [AVX2, AMX], ids=["avx2", "amx"])
def test_chain_is_transformed_at_entry_and_exit_only(target: tvm.target.Target) -> None:
    def build(net: Net, x: Any) -> Any:
        y = net.conv(x, 40)
        y = net.conv(y, 70, 1)
        return net.conv(y, 17, strides=(2, 2))

    new = check(build, IMAGE, transforms=2, target=target)
    out = {AVX2: (16, 16, 16), AMX: (64, 64, 32)}[target]
    assert layouts(new)[0] == ("NCHW4c", f"NCHW{out[0]}c")
    assert layouts(new)[1:] == [
        (f"NCHW{out[0]}c", f"NCHW{out[1]}c"), (f"NCHW{out[1]}c", f"NCHW{out[2]}c")
    ]  # fmt: skip


def test_residual_block() -> None:
    def build(net: Net, x: Any) -> Any:
        x = net.conv(x, 24)
        y = net.conv(net.conv(x, 24), 24, residual=x)
        return net.conv(y, 24, residual=net.conv(y, 24, 1))

    check(build, U8, transforms=2)


def test_elementwise_between_convolutions_follows() -> None:
    def build(net: Net, x: Any) -> Any:
        a, b = net.conv(x, 20), net.conv(x, 20, 1)
        y = net(op.add(a, b, a_zero_point=120, a_scale=0.6, b_zero_point=120, b_scale=0.7,
                       out_dtype="uint8", out_zero_point=110))  # fmt: skip
        y = net(op.requantize(y, zero_point=110, scale=0.9, out_dtype="uint8",
                              out_zero_point=100, clip_min=90.0))  # fmt: skip
        return net.conv(y, 16)

    check(build, U8, transforms=2)


def test_one_operand_that_is_not_packed_is_brought_in() -> None:
    def build(net: Net, x: Any, other: Any) -> Any:
        y = net(op.add(other, net.conv(x, 20), a_zero_point=0, a_scale=0.3, b_zero_point=120,
                       b_scale=0.7, out_dtype="uint8", out_zero_point=60))  # fmt: skip
        return net.conv(y, 16)

    check(build, U8, ((1, 20, 8, 9), "uint8"), transforms=3)


# ---- pooling


def test_pools_follow() -> None:
    def build(net: Net, x: Any) -> Any:
        y = net.conv(x, 20)
        y = net(NN.max_pool2d(y, (3, 3), (2, 2), (1, 1, 1, 1)))
        y = net(op.avg_pool2d(y, pool_size=(2, 2), strides=(1, 1), padding=(1, 0, 0, 1),
                              zero_point=120, scale=1.3, out_dtype="uint8",
                              out_zero_point=100))  # fmt: skip
        return net.conv(y, 32, 1)

    check(build, U8, transforms=2)


@pytest.mark.parametrize("channels", [32, 20])
def test_global_pool_of_channels_that_fill_a_block_and_that_do_not(channels: int) -> None:
    def build(net: Net, x: Any) -> Any:
        y = net.conv(x, channels)
        y = net(op.avg_pool2d(y, pool_size=(8, 9), zero_point=120, scale=3.0, out_dtype="uint8",
                              out_zero_point=100))  # fmt: skip
        return net(relax.op.reshape(y, (1, channels)))

    # Single pixels of whole blocks lie in memory as NCHW does: a reshape is enough.
    check(build, U8, transforms=1 if channels == 32 else 2)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_pad_of_rows_and_columns_follows(layout: str) -> None:
    widths = {"NCHW": (0, 0, 0, 0, 1, 2, 0, 3), "NHWC": (0, 0, 1, 2, 0, 3, 0, 0)}[layout]
    shape = {"NCHW": (2, 20, 6, 7), "NHWC": (2, 6, 7, 20)}[layout]

    def build(net: Net, x: Any) -> Any:
        y = net(NN.pad(net.conv(x, 24, layout=layout), widths, "constant", 9.0))
        return net.conv(net(NN.max_pool2d(y, (2, 2), layout=layout)), 16, layout=layout)

    check(build, (shape, "uint8"), transforms=2)


def test_pad_of_channels_is_done_in_plain_layout() -> None:
    def build(net: Net, x: Any) -> Any:
        return net.conv(net(NN.pad(net.conv(x, 24), (0, 0, 2, 6, 0, 0, 0, 0))), 16)

    check(build, ((2, 20, 6, 7), "uint8"), transforms=4)


def test_float_average_pool_follows() -> None:
    def build(net: Net, x: Any) -> Any:
        y = net(NN.relu(net.float_conv(x, 20)))
        y = net(NN.avg_pool2d(y, (3, 3), (2, 2), (1, 1, 1, 1), count_include_pad=True))
        return net.float_conv(y, 8)

    check(build, ((1, 5, 9, 9), "float32"), transforms=2)


# ---- concat


def concat_of(channels: tuple[int, ...], axis: int = 1) -> Build:
    def build(net: Net, x: Any) -> Any:
        y = net(relax.op.concat([net.conv(x, oc) for oc in channels], axis=axis))
        return net.conv(y, 16, 1)

    return build


@pytest.mark.parametrize("channels", [(32, 16), (32, 20), (16, 16, 5)])
def test_concat_of_whole_blocks_stays_packed(channels: tuple[int, ...]) -> None:
    new = check(concat_of(channels), U8, transforms=2)
    (call,) = [v for v in _values(new) if _is(v, "topi_int8.concat")]
    assert op.attrs_of(call)["channels"] == channels


@pytest.mark.parametrize("channels, block", [((64, 32), 64), ((16, 16), 32), ((32, 64, 7), 64)])
def test_concat_of_different_blocks_takes_the_targets(channels: tuple, block: int) -> None:
    new = check(concat_of(channels), U8, transforms=2, target=AMX)
    (call,) = [v for v in _values(new) if _is(v, "topi_int8.concat")]
    assert op.attrs_of(call)["out_block"] == block


def test_concat_in_float_stays_packed() -> None:
    def build(net: Net, x: Any) -> Any:
        y = net(relax.op.concat([net.float_conv(x, 32), net.float_conv(x, 16)], axis=1))
        return net.float_conv(y, 16)

    new = check(build, ((1, 5, 9, 9), "float32"), transforms=2)
    (call,) = [v for v in _values(new) if _is(v, "relax.concat")]
    assert len(op.shape_of(call)) == 5


def test_concat_inside_a_block_is_done_in_plain_layout() -> None:
    check(concat_of((20, 16)), U8, transforms=5)


def test_concat_along_rows_is_done_in_plain_layout() -> None:
    check(concat_of((16, 16), axis=2), U8, transforms=5)


def _values(mod: tvm.IRModule) -> list[Any]:
    return [b.value for block in mod["main"].body.blocks for b in block.bindings]


def _is(value: Any, name: str) -> bool:
    return isinstance(value, relax.Call) and getattr(value.op, "name", "") == name


# ---- NHWC


def test_nhwc_graph() -> None:
    def build(net: Net, x: Any) -> Any:
        y = net.conv(x, 32, layout="NHWC")
        y = net(NN.max_pool2d(y, (2, 2), (2, 2), layout="NHWC"))
        z = net.conv(y, 16, 1, layout="NHWC")
        y = net(relax.op.concat([z, net.conv(y, 20, layout="NHWC")], axis=3))
        return net.conv(y, 18, layout="NHWC")

    new = check(build, ((2, 8, 10, 3), "uint8"), transforms=2)
    assert op.attrs_of(interpret.calls(new, "layout_transform")[0])["src_layout"] == "NHWC"


def test_pool_of_another_layout_does_not_follow() -> None:
    def build(net: Net, x: Any) -> Any:
        y = net.conv(x, 16)
        return net(NN.max_pool2d(y, (2, 2), layout="NHWC"))

    check(build, U8, transforms=2)


# ---- operators that do not follow, several readers, several outputs


def test_tensor_read_packed_and_plain() -> None:
    def build(net: Net, x: Any) -> Any:
        y = net.conv(x, 20)
        plain = net(relax.op.strided_slice(y, [1], [0], [7]))
        return net(relax.Tuple([net.conv(y, 16), plain, net(relax.op.sum(net(
            relax.op.astype(y, "int32")), [1]))]))  # fmt: skip

    # In; out of y for the slice; out of astype(y) for the sum; out of the result.
    check(build, U8, transforms=4)


def test_output_that_is_read_again_is_transformed_once() -> None:
    def build(net: Net, x: Any) -> Any:
        y = net.conv(x, 32)
        z = net.conv(y, 32)
        return net(relax.Tuple([y, z, net.conv(z, 16)]))

    check(build, U8, transforms=4)


def test_dataflow_outputs_stay_packed_inside_their_block() -> None:
    net = Net()
    x = relax.Var("x0", relax.TensorType(*U8))
    with net.bb.function("main", [x]):
        with net.bb.dataflow():
            a = net.bb.emit_output(net.conv(x, 32))
            b = net.bb.emit_output(net.conv(a, 32))
            c = net.bb.emit_output(net.conv(b, 32, residual=a))
        net.bb.emit_func_output(relax.Tuple([a, b, c]))
    mod = net.bb.get()
    assert interpret.count(convert(mod))[TRANSFORM] == 4  # one in, three out
    same_numbers(mod)


def test_convolution_that_is_the_functions_result() -> None:
    check(lambda net, x: net.conv(x, 5, out_dtype="int32"), U8, transforms=2)


def test_parameter_read_by_two_convolutions_is_packed_once() -> None:
    def build(net: Net, x: Any) -> Any:
        return net(relax.Tuple([net.conv(x, 16), net.conv(x, 16, 1)]))

    check(build, U8, transforms=3)


def test_split_after_a_convolution() -> None:
    def build(net: Net, x: Any) -> Any:
        parts = net(relax.op.split(net.conv(x, 24), [8], axis=1))
        first, second = net(relax.TupleGetItem(parts, 0)), net(relax.TupleGetItem(parts, 1))
        return net(relax.Tuple([net.conv(first, 16), net.conv(second, 16)]))

    # In; out for the split; in and out for each half.
    check(build, U8, transforms=6)


@pytest.mark.parametrize(
    "reduce",
    [
        lambda net, y: net(NN.softmax(y, axis=1)),
        lambda net, y: net(relax.op.mean(y, [1])),
        lambda net, y: net(relax.op.max(y, [1, 2])),
        lambda net, y: net(relax.op.permute_dims(y, [0, 2, 3, 1])),
        lambda net, y: net(relax.op.divide(y, net(relax.op.add(y, relax.const(9.0))))),
    ],
    ids=["softmax", "mean", "max", "permute", "divide"],
)
def test_padding_channels_never_reach_a_reduction(reduce: Callable[[Net, Any], Any]) -> None:
    def build(net: Net, x: Any) -> Any:
        y = net(relax.op.sigmoid(net.float_conv(x, 20)))  # padding channels hold 0.5
        return reduce(net, y)

    new = convert(module(build, ((1, 5, 6, 6), "float32")))
    assert interpret.count(new)[TRANSFORM] >= 2
    same_numbers(module(build, ((1, 5, 6, 6), "float32")))


# ---- one value a channel


@pytest.mark.parametrize("shape", [(1, 20, 1, 1), (20, 1, 1), (1, 1, 1, 1), ()])
def test_constant_per_channel_is_packed(shape: tuple[int, ...]) -> None:
    def build(net: Net, x: Any) -> Any:
        y = net(relax.op.multiply(net.float_conv(x, 20), relax.const(
            net.rng.normal(size=shape).astype("float32"))))  # fmt: skip
        return net.float_conv(y, 16)

    check(build, ((1, 5, 6, 6), "float32"), transforms=2)


def test_constant_per_channel_in_nhwc_is_packed() -> None:
    def build(net: Net, x: Any) -> Any:
        scale = relax.const(net.rng.normal(size=20).astype("float32"))
        y = net(relax.op.multiply(net.float_conv(x, 20, "NHWC"), scale))
        return net.float_conv(y, 16, "NHWC")

    check(build, ((1, 6, 6, 5), "float32"), transforms=2)


@pytest.mark.parametrize("shape", [(9,), (8, 1), (1, 1, 8, 9), (20, 8, 9)])
def test_constants_along_rows_and_columns(shape: tuple[int, ...]) -> None:
    def build(net: Net, x: Any) -> Any:
        y = net(relax.op.add(net.float_conv(x, 20), relax.const(
            net.rng.normal(size=shape).astype("float32"))))  # fmt: skip
        return net.float_conv(y, 16)

    # One value a channel (and more) can be packed; one for all channels has no packed form.
    check(build, ((1, 5, 8, 9), "float32"), transforms=2 if shape[0] == 20 else 4)


def test_squeeze_and_excitation_stays_packed() -> None:
    def build(net: Net, x: Any) -> Any:
        y = net.float_conv(x, 20)
        gate = net(NN.avg_pool2d(y, (6, 6)))
        gate = net(relax.op.sigmoid(net.float_conv(gate, 20)))
        return net.float_conv(net(relax.op.multiply(gate, y)), 16)

    check(build, ((2, 5, 6, 6), "float32"), transforms=2)


# ---- quantize and dequantize


def test_per_tensor_quantize_and_dequantize_follow() -> None:
    def build(net: Net, x: Any) -> Any:
        scale, zero = relax.const(np.float32(0.04)), relax.const(np.uint8(120))
        y = net(NN.silu(net(relax.op.dequantize(net.conv(x, 20), scale, zero, axis=1))))
        return net.conv(net(relax.op.quantize(y, scale, zero, axis=1, out_dtype="uint8")), 16)

    check(build, U8, transforms=2)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_per_channel_dequantize_does_not_follow(layout: str) -> None:
    axis = Layout.parse(layout).channel_axis

    def build(net: Net, x: Any) -> Any:
        scale = relax.const(net.rng.uniform(0.01, 0.1, 16).astype("float32"))
        zero = relax.const(np.full(16, 120, "uint8"))
        y = net(relax.op.dequantize(net.conv(x, 16, layout=layout), scale, zero, axis=axis))
        return net.float_conv(net(NN.relu(y)), 16, layout)

    check(build, (Layout.parse(layout).shape(1, 16, 8, 9), "uint8"), transforms=4)


# ---- mixed blocks


def mixed(channels: int, groups: int) -> Build:
    def build(net: Net, x: Any) -> Any:
        scale, zero = relax.const(np.float32(0.04)), relax.const(np.uint8(120))
        y = net.float_conv(x, channels)
        y = net(relax.op.quantize(y, scale, zero, axis=1, out_dtype="uint8"))
        y = net.conv(y, channels, groups=groups)
        z = net.conv(y, channels, 1, residual=y)
        z = net(relax.op.dequantize(z, scale, zero, axis=1))
        return net.float_conv(z, 24)

    return build


@pytest.mark.parametrize("grouping", ["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("target", [AVX2, AMX], ids=["avx2", "amx"])
def test_float_and_integer_blocks_meet(target: tvm.target.Target, grouping: str) -> None:
    channels = 72
    groups = {"dense": 1, "grouped": 4, "depthwise": channels}[grouping]
    mod = module(mixed(channels, groups), ((1, 3, 5, 5), "float32"))
    new = convert(mod, target)
    assert {layout for pair in layouts(new) for layout in pair} == (
        {"NCHW4c", "NCHW16c"} if target is AVX2 else {"NCHW4c", "NCHW16c", "NCHW64c"}
    )
    same_numbers(mod, target)


def test_depthwise_keeps_one_block() -> None:
    def build(net: Net, x: Any) -> Any:
        first = net.conv(x, 3, groups=3)  # the network's input, three channels
        return net(relax.Tuple([net.conv(x, 24), net.conv(first, 8)]))

    new = check(build, IMAGE, transforms=3)
    assert layouts(new)[0][0] == layouts(new)[0][1]


def test_entry_read_by_dense_and_depthwise() -> None:
    def build(net: Net, x: Any) -> Any:
        y = net.conv(x, 16)  # packs x in groups of four
        return net(relax.Tuple([y, net.conv(x, 3, groups=3)]))

    check(build, IMAGE, transforms=4)


# ---- control flow and scopes


def weight_const(*shape: int) -> relax.Expr:
    return relax.const(np.random.default_rng(1).normal(0, 0.1, shape).astype("float32"))


def branches() -> tvm.IRModule:
    @I.ir_module
    class Branches:
        @R.function
        def main(x: R.Tensor((1, 16, 8, 8), "float32"), pick: R.Tensor((), "bool")) -> R.Tensor(
            (1, 16, 8, 8), "float32"
        ):
            if pick:
                a = R.nn.conv2d(x, weight_const(16, 16, 3, 3), padding=1)
                y = R.nn.conv2d(a, weight_const(16, 16, 1, 1))
            else:
                b = R.nn.conv2d(x, weight_const(16, 16, 5, 5), padding=2)
                y = R.nn.relu(b)
            z = R.nn.conv2d(y, weight_const(16, 16, 3, 3), padding=1)
            return z

    return Branches


def test_branches_do_not_share_what_they_packed() -> None:
    mod = tvm.transform.Sequential([FuseQDQ(), FuseFloat()])(branches())
    new = convert(mod)
    assert interpret.count(new)["topi_int8.conv2d"] == 4
    assert interpret.count(new)[TRANSFORM] == 6  # in and out of each branch and of the rest
    # TVM 0.27's memory planner reuses, in one branch, storage that the other one allocates, and
    # the second branch segfaults (its stock pipeline too).
    with tvm.transform.PassContext(opt_level=2, disabled_pass=["StaticPlanBlockMemory"]):
        built = tvm.compile(branches(), AVX2, relax_pipeline=topi_int8.pipeline(AVX2))
        stock = tvm.compile(branches(), AVX2, relax_pipeline=relax.get_pipeline("default_build"))
    x = tvm.runtime.tensor(np.random.default_rng(0).normal(size=(1, 16, 8, 8)).astype("float32"))
    for pick in (True, False):
        got, want = (
            relax.VirtualMachine(ex, tvm.cpu())["main"](x, tvm.runtime.tensor(np.array(pick)))
            for ex in (built, stock)
        )
        np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-4, atol=1e-4)


def test_without_dataflow_blocks() -> None:
    net = Net()
    x = relax.Var("x0", relax.TensorType(*U8))
    with net.bb.function("main", [x]):
        y = net.conv(net.conv(x, 20), 24)
        alias = net(y)
        net.bb.emit_func_output(relax.Tuple([net.conv(alias, 16), y]))
    mod = net.bb.get()
    assert interpret.count(convert(mod))[TRANSFORM] == 3
    same_numbers(mod)


def test_block_of_opaque_code_between_dataflow_blocks() -> None:
    net = Net()
    x = relax.Var("x0", relax.TensorType(*U8))
    with net.bb.function("main", [x]):
        with net.bb.dataflow():
            a = net.bb.emit_output(net.conv(x, 32))
        printed = net.bb.emit(relax.op.call_pure_packed("vm.builtin.copy", a, ty_args=a.ty))
        with net.bb.dataflow():
            out = net.bb.emit_output(net.conv(a, 16, residual=net.conv(printed, 16)))
        again = net.bb.emit(relax.op.call_pure_packed("vm.builtin.copy", out, ty_args=out.ty))
        net.bb.emit_func_output(again)
    same_numbers_without_interpreter = convert(net.bb.get())
    assert interpret.count(same_numbers_without_interpreter)["topi_int8.conv2d"] == 3


def test_functions_that_call_each_other() -> None:
    @I.ir_module
    class Calls:
        @R.function
        def helper(x: R.Tensor((1, 16, 8, 8), "float32")) -> R.Tensor((1, 16, 8, 8), "float32"):
            with R.dataflow():
                y = R.nn.conv2d(x, weight_const(16, 16, 3, 3), padding=1)
                R.output(y)
            return y

        @R.function
        def main(x: R.Tensor((1, 16, 8, 8), "float32")) -> R.Tensor((1, 16, 8, 8), "float32"):
            cls = Calls
            with R.dataflow():
                a = R.nn.conv2d(x, weight_const(16, 16, 1, 1))
                b = cls.helper(a)
                c = R.nn.conv2d(b, weight_const(16, 16, 1, 1))
                R.output(c)
            return c

    new = convert(FuseFloat()(Calls))
    assert interpret.count(new)["topi_int8.conv2d"] == 3
    assert interpret.count(new)[TRANSFORM] == 6


def test_symbolic_convolutions_are_left() -> None:
    mod = module(lambda net, x: net(NN.relu(x)), ((tvm.tirx.Var("n", "int64"), 4, 5, 6), "float32"))
    tvm.ir.assert_structural_equal(convert(mod), mod)


def test_attention_shaped_tensors_are_not_packed() -> None:
    def build(net: Net, x: Any, scores: Any) -> Any:
        y = net.float_conv(x, 16)
        tokens = net(relax.op.reshape(y, (1, 4, 24, 12)))
        product = net(relax.op.matmul(tokens, scores))
        return net(relax.op.add(net(NN.softmax(product, axis=-1)), product))

    new = check(build, ((1, 3, 8, 9), "float32"), ((1, 4, 12, 12), "float32"), transforms=2)
    assert all(len(op.shape_of(v)) == 4 for v in _values(new) if _is(v, "relax.add"))


# ---- whole networks


@pytest.mark.model
@pytest.mark.parametrize("name, convs, target", [
    ("resnet18", 20, AVX2), ("resnet18", 20, AMX), ("resnet50", 53, AVX2), ("resnet50", 53, AMX),
])  # fmt: skip
def test_resnet_has_one_transform_at_its_entry(
    name: str, convs: int, target: tvm.target.Target
) -> None:
    mod = _quantized_resnet(name)
    new = ConvertLayout(target)(FuseQDQ()(mod))
    counts = interpret.count(new)
    assert counts["topi_int8.conv2d"] == convs
    assert counts[TRANSFORM] == 1
    assert not counts.keys() & {"relax.permute_dims", "relax.layout_transform", "relax.nn.conv2d"}
    calls = [v for v in _values(new) if isinstance(v, relax.Call)]
    kinds = [getattr(v.op, "name", "") for v in calls]
    assert kinds.index(TRANSFORM) < kinds.index("topi_int8.conv2d")
    assert op.attrs_of(calls[kinds.index(TRANSFORM)])["channels"] == 3


_RESNETS: dict[str, tvm.IRModule] = {}


def _quantized_resnet(name: str) -> tvm.IRModule:
    """Return a QDQ ResNet of seeded weights; the layouts do not depend on the image's size."""
    if name not in _RESNETS:
        pytest.importorskip("torch", reason="torch is not installed: no ResNet to import")
        from bench import models
        from topi_int8.frontend.torch import from_torch

        net, image = models.load(name, image=64)
        mod = from_torch(net, (image,))
        _RESNETS[name] = topi_int8.quantize(mod, [image.numpy()], progress=False)
    return _RESNETS[name]
