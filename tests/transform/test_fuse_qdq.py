"""FuseQDQ on small graphs: which operators appear, their attributes, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.transform import interpret
from topi_int8 import op
from topi_int8.transform.fuse_qdq import FuseQDQ

NN = relax.op.nn
INT8_RANGE = {"uint8": (0, 256), "int8": (-128, 128)}


class Net:
    """Builds a Relax function step by step; every step is bound to a variable."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.params: list[relax.Var] = []
        self.bb = relax.BlockBuilder()

    def input(self, shape: tuple, dtype: str = "uint8") -> relax.Var:
        var = relax.Var(f"x{len(self.params)}", relax.TensorType(shape, dtype))
        self.params.append(var)
        return var

    def const(self, value, dtype: str = "float32") -> relax.Expr:
        return relax.const(np.asarray(value, dtype), dtype)

    def emit(self, expr: relax.Expr) -> relax.Var:
        return self.bb.emit(expr)

    def dq(self, x, scale=0.02, zero_point=120, axis=-1) -> relax.Var:
        dtype = str(x.ty.dtype)
        scale, zero_point = self.const(scale), self.const(zero_point, dtype)
        return self.emit(relax.op.dequantize(x, scale, zero_point, axis))

    def q(self, x, scale=0.05, zero_point=0, dtype="uint8") -> relax.Var:
        scale, zero_point = self.const(scale), self.const(zero_point, dtype)
        return self.emit(relax.op.quantize(x, scale, zero_point, out_dtype=dtype))

    def weight(self, shape: tuple, axis: int | None = 0, dtype="int8", zero_point=0) -> relax.Var:
        low, high = INT8_RANGE[dtype]
        array = self.rng.integers(low + 1, high, shape).astype(dtype)
        if axis is None:
            return self.dq(relax.const(array), 0.008, zero_point)
        scale = self.rng.uniform(0.002, 0.01, shape[axis])
        return self.dq(relax.const(array), scale, np.full(shape[axis], zero_point), axis)

    def bias(self, shape: tuple) -> relax.Expr:
        return self.const(self.rng.normal(size=shape))


def module(
    build: Callable[..., object], *inputs: tuple[tuple, str], dataflow: bool = True, seed: int = 0
) -> tvm.IRModule:
    """Return a module whose `main` takes `inputs` (shape, dtype) and returns what `build` does."""
    net = Net(seed)
    params = [net.input(shape, dtype) for shape, dtype in inputs]
    with net.bb.function("main", params):
        if dataflow:
            with net.bb.dataflow():
                out = net.bb.emit_output(_tuple(build(net, *params)))
        else:
            out = net.emit(_tuple(build(net, *params)))
        net.bb.emit_func_output(out)
    return net.bb.get()


def _tuple(out: object) -> relax.Expr:
    return relax.Tuple(list(out)) if isinstance(out, list | tuple) else out


def random_inputs(mod: tvm.IRModule, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = []
    for param in mod["main"].params:
        shape, dtype = op.shape_of(param), str(param.ty.dtype)
        if dtype == "float32":
            arrays.append(rng.normal(size=shape).astype(dtype))
        else:
            arrays.append(rng.integers(*INT8_RANGE[dtype], shape).astype(dtype))
    return arrays


def check(mod: tvm.IRModule, expected: dict[str, int], float_tolerance: float = 1e-4):
    """Rewrite; the new module holds exactly `expected` operators and computes the same."""
    before = tvm.ir.save_json(mod)
    new = FuseQDQ()(mod)
    assert tvm.ir.save_json(mod) == before, "the input module was changed"
    relax.analysis.well_formed(new)  # raises
    found = {k.removeprefix("relax."): v for k, v in interpret.count(new).items()}
    assert found == expected
    inputs = random_inputs(mod)
    for want, got in zip(interpret.run(mod, *inputs), interpret.run(new, *inputs), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        if want.dtype == np.float32:
            np.testing.assert_allclose(got, want, atol=float_tolerance * np.abs(want).max())
        elif want.dtype == np.int32:
            np.testing.assert_array_equal(got, want)
        else:
            assert np.unique(want).size > 1, "a constant output proves nothing"
            error = np.abs(got.astype(int) - want.astype(int))
            # Half a step falls either way; it must be rare.
            assert error.max() <= 1 and (error != 0).sum() <= 1 + 0.03 * error.size
    return new


X = ((2, 8, 9, 10), "uint8")

# ---------------------------------------------------------------- convolution


@pytest.mark.parametrize("out_dtype", ["uint8", "int8"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "clip", "maximum"])
def test_conv_bias_activation_quantize(out_dtype: str, per_channel: bool, activation: str) -> None:
    zero_point = {"uint8": 30, "int8": -5}[out_dtype]

    def build(net: Net, x: relax.Var) -> object:
        conv = net.emit(NN.conv2d(net.dq(x), net.weight((16, 8, 3, 3), 0 if per_channel else None),
                                  strides=2, padding=(1, 0, 1, 2)))  # fmt: skip
        out = net.emit(relax.op.add(conv, net.bias((1, 16, 1, 1))))
        make = {
            "none": None,
            "relu": NN.relu,
            "relu6": NN.relu6,
            "clip": lambda v: relax.op.clip(v, -0.52, 1.3),
            "maximum": lambda v: relax.op.maximum(v, net.const(-0.3)),
        }[activation]
        return net.q(net.emit(make(out)) if make else out, 0.02, zero_point, out_dtype)

    new = check(module(build, X), {"topi_int8.conv2d": 1})
    (call,) = interpret.calls(new, "conv2d")
    epi = op.epilogue_of(call)
    assert (epi.out_dtype, epi.out_zero_point) == (out_dtype, zero_point)
    top = {"uint8": 255, "int8": 127}[out_dtype]
    clips = {
        "none": (None, None),
        "relu": (zero_point, None),
        "relu6": (zero_point, min(zero_point + 300, top)),
        "clip": (zero_point - 26, zero_point + 65),
        "maximum": (zero_point - 15, None),
    }
    assert (epi.clip_min, epi.clip_max) == clips[activation]
    operands = op.operands(call)
    assert operands["bias"].value.numpy().dtype == np.int32
    assert operands["scale"].value.numpy().shape == (16,)
    attrs = op.attrs_of(call)
    assert attrs["padding"] == (1, 0, 1, 2) and attrs["strides"] == (2, 2)
    assert attrs["data_zero_point"] == 120 and attrs["name"]


@pytest.mark.parametrize(
    "layout, kernel, weight, groups, x",
    [
        ("NCHW", "OIHW", (16, 8, 3, 3), 1, (2, 8, 9, 10)),
        ("NCHW", "OIHW", (16, 2, 3, 3), 4, (2, 8, 9, 10)),
        ("NCHW", "OIHW", (8, 1, 3, 3), 8, (2, 8, 9, 10)),
        ("NHWC", "HWIO", (3, 3, 8, 16), 1, (2, 9, 10, 8)),
        ("NHWC", "OHWI", (16, 3, 3, 8), 1, (2, 9, 10, 8)),
        ("NHWC", "OIHW", (16, 8, 3, 3), 1, (2, 9, 10, 8)),
    ],
)  # fmt: skip
def test_conv_layouts_groups_dilation(layout, kernel, weight, groups, x) -> None:
    def build(net: Net, x: relax.Var) -> object:
        w = net.weight(weight, kernel.index("O"))
        conv = NN.conv2d(net.dq(x), w, padding=2, dilation=2, groups=groups,
                         data_layout=layout, kernel_layout=kernel)  # fmt: skip
        out = net.emit(conv)
        oc = weight[kernel.index("O")]
        bias = net.bias((1, oc, 1, 1) if layout == "NCHW" else (oc,))
        return net.q(net.emit(relax.op.add(bias, out)), 0.03, 100)

    new = check(module(build, (x, "uint8")), {"topi_int8.conv2d": 1})
    work = op.conv2d_workload(interpret.calls(new, "conv2d")[0])
    assert (work.groups, work.kh, work.kw, work.dilation) == (groups, 3, 3, (2, 2))
    assert work.epilogue.bias


def test_conv_without_quantize_stores_float_and_clips_in_real_units() -> None:
    def build(net: Net, x: relax.Var) -> object:
        conv = net.emit(NN.conv2d(net.dq(x), net.weight((4, 8, 1, 1))))
        return net.emit(relax.op.clip(conv, -0.25, 0.5))

    new = check(module(build, X), {"topi_int8.conv2d": 1})
    epi = op.epilogue_of(interpret.calls(new, "conv2d")[0])
    assert (epi.out_dtype, epi.clip_min, epi.clip_max) == ("float32", -0.25, 0.5)


@pytest.mark.parametrize("dtype, zero_point", [("uint8", 131), ("int8", 7)])
def test_conv_asymmetric_weight(dtype: str, zero_point: int) -> None:
    def build(net: Net, x: relax.Var) -> object:
        w = net.weight((4, 8, 3, 3), None, dtype, zero_point)
        return net.q(net.emit(NN.conv2d(net.dq(x), w, padding=1)), 0.05, 100)

    new = check(module(build, X), {"topi_int8.conv2d": 1})
    work = op.conv2d_workload(interpret.calls(new, "conv2d")[0])
    assert (work.weight_zero_point, work.weight_dtype) == (zero_point, dtype)


def test_conv_bias_given_as_dequantized_int32_and_reshaped() -> None:
    def build(net: Net, x: relax.Var) -> object:
        conv = net.emit(NN.conv2d(net.dq(x, 0.02), net.weight((4, 8, 3, 3), None)))
        bias = net.dq(
            net.const([100, -2000, 3, 0], "int32"), np.float32(0.02) * np.float32(0.008), 0
        )
        bias = net.emit(relax.op.reshape(bias, (1, 4, 1, 1)))
        return net.q(net.emit(relax.op.add(conv, bias)), 0.05, 100)

    new = check(module(build, X), {"topi_int8.conv2d": 1})
    bias = op.operands(interpret.calls(new, "conv2d")[0])["bias"].value.numpy()
    assert bias.tolist() == [100, -2000, 3, 0]


def test_weight_given_in_float_and_quantized_in_the_graph() -> None:
    def build(net: Net, x: relax.Var) -> object:
        w = net.bias((4, 8, 3, 3))
        scale, zero = net.const(np.full(4, 0.02)), net.const(np.zeros(4), "int8")
        w = net.emit(relax.op.quantize(w, scale, zero, axis=0))
        w = net.emit(relax.op.dequantize(w, scale, zero, axis=0))
        return net.q(net.emit(NN.conv2d(net.dq(x), w)), 0.2, 100)

    new = check(module(build, X), {"topi_int8.conv2d": 1})
    assert interpret.calls(new, "conv2d")[0].args[1].value.numpy().dtype == np.int8


def test_bias_that_would_overflow_stays_in_float() -> None:
    def build(net: Net, x: relax.Var) -> object:
        conv = net.emit(NN.conv2d(net.dq(x), net.weight((4, 8, 1, 1), None)))
        return net.emit(relax.op.add(conv, net.const(np.full((1, 4, 1, 1), 1e6))))

    check(module(build, X), {"topi_int8.conv2d": 1, "add": 1})


def test_constant_that_is_no_bias_is_not_folded() -> None:
    def build(net: Net, x: relax.Var) -> object:
        conv = net.emit(NN.conv2d(net.dq(x), net.weight((4, 8, 1, 1), None)))
        return net.emit(relax.op.add(conv, net.bias((1, 1, 9, 1))))

    check(module(build, X), {"topi_int8.conv2d": 1, "add": 1})


@pytest.mark.parametrize("residual", ["quantized", "float"])
@pytest.mark.parametrize("stored", [True, False])
def test_residual_is_fused(residual: str, stored: bool) -> None:
    def build(net: Net, x: relax.Var, y: relax.Var) -> object:
        other = net.dq(y, 0.04, 3) if residual == "quantized" else y
        conv = net.emit(NN.conv2d(net.dq(x), net.weight((8, 8, 3, 3)), padding=1))
        conv = net.emit(relax.op.add(conv, net.bias((1, 8, 1, 1))))
        out = net.emit(NN.relu(net.emit(relax.op.add(other, conv))))
        return net.q(out) if stored else out

    y = (X[0], "int8" if residual == "quantized" else "float32")
    new = check(module(build, X, y), {"topi_int8.conv2d": 1})
    epi = op.epilogue_of(interpret.calls(new, "conv2d")[0])
    assert epi.residual_dtype == y[1]
    assert epi.residual_zero_point == (3 if residual == "quantized" else 0)
    unit = 0.05 if stored else 1.0
    assert np.isclose(epi.residual_scale, (0.04 if residual == "quantized" else 1.0) / unit)


def test_two_convolutions_added_one_takes_the_other_as_residual() -> None:
    def build(net: Net, x: relax.Var) -> object:
        real = net.dq(x)
        a, b = (net.emit(NN.conv2d(real, net.weight((8, 8, 1, 1)))) for _ in range(2))
        return net.q(net.emit(relax.op.add(a, b)), 0.05, 100)

    new = check(module(build, X), {"topi_int8.conv2d": 2})
    epilogues = [op.epilogue_of(call) for call in interpret.calls(new, "conv2d")]
    assert sorted(e.out_dtype for e in epilogues) == ["float32", "uint8"]
    assert [e.residual_dtype for e in epilogues if e.out_dtype == "uint8"] == ["float32"]


def test_quantized_before_the_residual_gives_an_integer_add() -> None:
    def build(net: Net, x: relax.Var) -> object:
        real = net.dq(x, 0.02, 120)
        conv = net.emit(NN.conv2d(real, net.weight((8, 8, 3, 3)), padding=1))
        conv = net.dq(net.q(conv, 0.04, 110), 0.04, 110)
        out = net.emit(NN.relu(net.emit(relax.op.add(conv, real))))
        return net.q(out, 0.05, 0)

    new = check(module(build, X), {"topi_int8.conv2d": 1, "topi_int8.add": 1})
    (add,) = interpret.calls(new, "add")
    assert op.attrs_of(add)["clip_min"] == 0


def test_second_use_stops_the_chain() -> None:
    def build(net: Net, x: relax.Var) -> object:
        conv = net.emit(NN.conv2d(net.dq(x), net.weight((4, 8, 3, 3))))
        return [net.q(net.emit(NN.relu(conv))), conv]

    check(module(build, X), {"topi_int8.conv2d": 1, "nn.relu": 1, "quantize": 1})


def test_equal_quantizes_of_one_tensor_are_one_use() -> None:
    def build(net: Net, x: relax.Var) -> object:
        conv = net.emit(NN.conv2d(net.dq(x), net.weight((8, 8, 3, 3))))
        first, second = (net.dq(net.q(conv, 0.05, 90), 0.05, 90) for _ in range(2))
        a = net.emit(NN.conv2d(first, net.weight((4, 8, 1, 1))))
        b = net.emit(NN.conv2d(second, net.weight((4, 8, 1, 1))))
        return [net.q(a, 0.1, 100), net.q(b, 0.1, 100)]

    check(module(build, X), {"topi_int8.conv2d": 3})


def test_two_layers_outside_of_dataflow() -> None:
    def build(net: Net, x: relax.Var) -> object:
        a = net.emit(NN.relu(net.emit(NN.conv2d(net.dq(x), net.weight((8, 8, 3, 3))))))
        a = net.dq(net.q(a, 0.03, 0), 0.03, 0)
        return net.q(net.emit(NN.conv2d(a, net.weight((4, 8, 1, 1)))), 0.05, 100)

    check(module(build, X, dataflow=False), {"topi_int8.conv2d": 2})


def test_float_border_stays() -> None:
    def build(net: Net, x: relax.Var) -> object:
        real = net.dq(net.q(x, 0.02, 120), 0.02, 120)
        conv = net.emit(NN.conv2d(real, net.weight((4, 8, 3, 3))))
        return net.emit(NN.softmax(net.dq(net.q(conv, 0.05, 100), 0.05, 100), 1))

    expected = {"quantize": 1, "topi_int8.conv2d": 1, "dequantize": 1, "nn.softmax": 1}
    check(module(build, (X[0], "float32")), expected, 0.1)


# ---------------------------------------------------------------- matmul


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("lead", [(5,), (2, 3, 5), (1,)])
@pytest.mark.parametrize("stored", [True, False])
def test_dense(transposed: bool, lead: tuple, stored: bool) -> None:
    def build(net: Net, x: relax.Var) -> object:
        w = net.weight((24, 16), 0) if transposed else net.weight((16, 24), 1)
        w = net.emit(relax.op.permute_dims(w)) if transposed else w
        out = net.emit(relax.op.matmul(net.dq(x), w))
        out = net.emit(relax.op.add(out, net.bias((24,))))
        return net.q(net.emit(NN.relu(out)), 0.03, 0) if stored else out

    new = check(module(build, ((*lead, 16), "uint8")), {"topi_int8.matmul": 1})
    (call,) = interpret.calls(new, "matmul")
    assert op.shape_of(call.args[1]) == (24, 16) and op.attrs_of(call)["transpose_b"]
    assert op.matmul_workload(call).weight_constant


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_matmul_of_two_activations(transposed: bool, batch: tuple) -> None:
    def build(net: Net, a: relax.Var, b: relax.Var) -> object:
        right = net.dq(b, 0.03, 2)
        if transposed:
            order = [*range(len(batch)), len(batch) + 1, len(batch)]
            right = net.emit(relax.op.permute_dims(right, order))
        return net.q(net.emit(relax.op.matmul(net.dq(a), right)), 0.2, 100)

    b = (*batch, 6, 16) if transposed else (*batch, 16, 6)
    new = check(module(build, ((*batch, 5, 16), "uint8"), (b, "int8")), {"topi_int8.matmul": 1})
    work = op.matmul_workload(interpret.calls(new, "matmul")[0])
    assert work.transpose_b == transposed and not work.weight_constant
    assert work.batch == (6 if batch else 1)


def test_matmul_broadcasting_matrices_is_left() -> None:
    def build(net: Net, a: relax.Var, b: relax.Var) -> object:
        return net.q(net.emit(relax.op.matmul(net.dq(a), net.dq(b))), 0.2, 100)

    expected = {"dequantize": 2, "matmul": 1, "quantize": 1}
    check(module(build, ((2, 3, 5, 8), "uint8"), ((3, 8, 6), "uint8")), expected)


# ---------------------------------------------------------------- pooling, moves, elementwise


@pytest.mark.parametrize("rescaled", [False, True])
def test_max_pool(rescaled: bool) -> None:
    def build(net: Net, x: relax.Var) -> object:
        pool = net.emit(NN.max_pool2d(net.dq(x), (3, 3), 2, 1))
        return net.q(pool, 0.03 if rescaled else 0.02, 120)

    requantize = {"topi_int8.requantize": 1} if rescaled else {}
    check(module(build, X), {"nn.max_pool2d": 1, **requantize})


_AVERAGES = {
    "avg": lambda x: NN.avg_pool2d(x, (3, 2), 2, 1, count_include_pad=True),
    "avg excluding pad": lambda x: NN.avg_pool2d(x, (3, 3), 2, 1, count_include_pad=False),
    "adaptive": lambda x: NN.adaptive_avg_pool2d(x, (1, 1)),
    "adaptive 3x5": lambda x: NN.adaptive_avg_pool2d(x, (3, 5)),
    "mean": lambda x: relax.op.mean(x, [2, 3], keepdims=True),
    "mean nhwc": lambda x: relax.op.mean(x, [1, 2], keepdims=True),
}


@pytest.mark.parametrize("average", _AVERAGES)
def test_average(average: str) -> None:
    def build(net: Net, x: relax.Var) -> object:
        pool = net.emit(_AVERAGES[average](net.dq(x)))
        return net.q(net.emit(NN.relu(pool)), 0.004, 10)

    new = check(module(build, X), {"topi_int8.avg_pool2d": 1})
    assert op.attrs_of(interpret.calls(new, "avg_pool2d")[0])["clip_min"] == 10


def test_mean_without_keepdims_is_reshaped_and_feeds_the_classifier() -> None:
    def build(net: Net, x: relax.Var) -> object:
        mean = net.emit(relax.op.mean(net.dq(x), [2, 3]))
        real = net.dq(net.q(mean, 0.004, 128), 0.004, 128)
        w = net.emit(relax.op.permute_dims(net.weight((10, 8))))
        return net.emit(relax.op.matmul(real, w))

    # A quantized mean one step off moves the logits by that step.
    expected = {"topi_int8.avg_pool2d": 1, "reshape": 1, "topi_int8.matmul": 1}
    check(module(build, X), expected, 0.02)


def test_adaptive_pool_of_uneven_windows_is_left() -> None:
    def build(net: Net, x: relax.Var) -> object:
        return net.q(net.emit(NN.adaptive_avg_pool2d(net.dq(x), (4, 4))), 0.01, 120)

    expected = {"dequantize": 1, "nn.adaptive_avg_pool2d": 1, "quantize": 1}
    check(module(build, X), expected)


_MOVES = {
    "reshape": (lambda x: relax.op.reshape(x, (2, 720)), {"reshape": 1}),
    "flatten": (lambda x: relax.op.flatten(x), {"flatten": 1}),
    "permute": (lambda x: relax.op.permute_dims(x, [0, 2, 3, 1]), {"permute_dims": 1}),
    "expand": (lambda x: relax.op.expand_dims(x, 1), {"expand_dims": 1}),
    "slice": (lambda x: relax.op.strided_slice(x, [1, 2], [1, 0], [7, 9], [2, 2]),
              {"strided_slice": 1}),
    "pad": (lambda x: NN.pad(x, (0, 0, 0, 0, 1, 2, 3, 0)), {"nn.pad": 1}),
    "relu": (lambda x: NN.relu(x), {"topi_int8.requantize": 1}),
    "clip": (lambda x: relax.op.clip(x, -0.513, 1.0), {"topi_int8.requantize": 1}),
}  # fmt: skip


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("move", _MOVES)
def test_move_between_dequantize_and_quantize(move: str, rescaled: bool) -> None:
    make, expected = _MOVES[move]

    def build(net: Net, x: relax.Var) -> object:
        return net.q(net.emit(make(net.dq(x))), 0.03 if rescaled else 0.02, 120)

    requantize = {"topi_int8.requantize": 1} if rescaled else {}
    check(module(build, X), {**expected, **requantize})


def test_pad_that_has_no_exact_integer_is_rounded_as_quantize_does() -> None:
    def build(net: Net, x: relax.Var) -> object:
        padded = net.emit(NN.pad(net.dq(x), (0, 0, 0, 0, 1, 1, 1, 1), pad_value=0.513))
        return net.q(padded, 0.02, 120)

    check(module(build, X), {"nn.pad": 1})


def test_moves_before_a_convolution_are_done_on_integers() -> None:
    def build(net: Net, x: relax.Var) -> object:
        real = net.emit(relax.op.permute_dims(net.dq(x), [0, 3, 1, 2]))
        real = net.emit(NN.relu(net.emit(NN.pad(real, (0, 0, 0, 0, 1, 1, 1, 1)))))
        return net.q(net.emit(NN.conv2d(real, net.weight((4, 8, 3, 3)))), 0.05, 60)

    expected = {"permute_dims": 1, "nn.pad": 1, "topi_int8.requantize": 1, "topi_int8.conv2d": 1}
    check(module(build, ((2, 9, 10, 8), "uint8")), expected)


@pytest.mark.parametrize("same", [True, False])
def test_concat(same: bool) -> None:
    def build(net: Net, x: relax.Var, y: relax.Var) -> object:
        parts = [net.dq(x, 0.02, 120), net.dq(y, *((0.02, 120) if same else (0.05, 7)))]
        return net.q(net.emit(relax.op.concat(parts, 1)), 0.02, 120)

    requantize = {} if same else {"topi_int8.requantize": 1}
    check(module(build, X, ((2, 3, 9, 10), "uint8")), {"concat": 1, **requantize})


def test_concat_of_convolutions_is_quantized_branch_by_branch() -> None:
    def build(net: Net, x: relax.Var) -> object:
        real = net.dq(x)
        a = net.emit(NN.relu(net.emit(NN.conv2d(real, net.weight((4, 8, 1, 1))))))
        b = net.emit(NN.conv2d(real, net.weight((6, 8, 3, 3)), padding=1))
        c = net.emit(NN.max_pool2d(real, (3, 3), 1, 1))
        return net.q(net.emit(relax.op.concat([a, b, c], 1)), 0.03, 90)

    expected = {
        "topi_int8.conv2d": 2,
        "nn.max_pool2d": 1,
        "topi_int8.requantize": 1,
        "concat": 1,
    }
    check(module(build, X), expected)


def test_split_and_shuffle() -> None:
    def build(net: Net, x: relax.Var) -> object:
        parts = net.emit(relax.op.split(net.dq(x), 2, axis=1))
        left, right = (net.emit(relax.TupleGetItem(parts, i)) for i in range(2))
        conv = net.emit(NN.conv2d(left, net.weight((4, 4, 1, 1))))
        conv = net.dq(net.q(conv, 0.02, 120), 0.02, 120)
        both = net.emit(relax.op.concat([conv, right], 1))
        both = net.emit(relax.op.reshape(both, (2, 2, 4, 9, 10)))
        both = net.emit(relax.op.permute_dims(both, [0, 2, 1, 3, 4]))
        return net.q(net.emit(relax.op.reshape(both, X[0])), 0.02, 120)

    expected = {"split": 1, "topi_int8.conv2d": 1, "concat": 1, "reshape": 2, "permute_dims": 1}
    check(module(build, X), expected)


@pytest.mark.parametrize(
    "params, expected",
    [((0.02, 120), {}), ((0.03, 120), {"topi_int8.requantize": 1}),
     ((0.02, 0), {"topi_int8.requantize": 1})],
)  # fmt: skip
def test_dequantize_quantize(params: tuple, expected: dict) -> None:
    check(module(lambda net, x: net.q(net.dq(x, 0.02, 120), *params), X), expected)


def test_add_of_two_quantized_with_clip() -> None:
    def build(net: Net, x: relax.Var, y: relax.Var) -> object:
        out = net.emit(relax.op.add(net.dq(x, 0.02, 120), net.dq(y, 0.03, -4)))
        return net.q(net.emit(NN.relu6(out)), 0.03, 5)

    new = check(module(build, X, (X[0], "int8")), {"topi_int8.add": 1})
    attrs = op.attrs_of(interpret.calls(new, "add")[0])
    assert (attrs["clip_min"], attrs["clip_max"]) == (5, 205)


def test_broadcasting_add_is_left() -> None:
    def build(net: Net, x: relax.Var, y: relax.Var) -> object:
        return net.q(net.emit(relax.op.add(net.dq(x), net.dq(y))), 0.05, 120)

    expected = {"dequantize": 2, "add": 1, "quantize": 1}
    check(module(build, X, ((2, 8, 1, 1), "uint8")), expected)


def test_unmatched_operator_keeps_its_float_world() -> None:
    def build(net: Net, x: relax.Var) -> object:
        return net.q(net.emit(relax.op.sigmoid(net.dq(x))), 0.005, 0)

    check(module(build, X), {"dequantize": 1, "sigmoid": 1, "quantize": 1})


# ---------------------------------------------------------------- raw integers


@pytest.mark.parametrize("weights", ["constant", "parameter"])
@pytest.mark.parametrize("dtypes", [("uint8", "int8"), ("int8", "int8"), ("int8", "uint8")])
def test_raw_conv2d(weights: str, dtypes: tuple[str, str]) -> None:
    shape = (4, 8, 3, 3)

    def build(net: Net, x: relax.Var, *w: relax.Var) -> object:
        low, high = INT8_RANGE[dtypes[1]]
        kernel = w[0] if w else relax.const(net.rng.integers(low, high, shape).astype(dtypes[1]))
        conv = net.emit(NN.conv2d(x, kernel, padding=1, out_dtype="int32"))
        bias = net.const(net.rng.integers(-9999, 9999, (1, 4, 1, 1)), "int32")
        return net.emit(relax.op.add(conv, bias))

    inputs = [(X[0], dtypes[0])] + ([(shape, dtypes[1])] if weights == "parameter" else [])
    new = check(module(build, *inputs), {"topi_int8.conv2d": 1})
    epi = op.epilogue_of(interpret.calls(new, "conv2d")[0])
    assert epi.out_dtype == "int32" and epi.bias and not epi.scale


def test_raw_conv2d_nhwc() -> None:
    def build(net: Net, x: relax.Var, w: relax.Var) -> object:
        return net.emit(NN.conv2d(x, w, data_layout="NHWC", kernel_layout="HWIO",
                                  out_dtype="int32"))  # fmt: skip

    inputs = [((1, 6, 7, 8), "uint8"), ((3, 3, 8, 4), "int8")]
    check(module(build, *inputs), {"topi_int8.conv2d": 1, "permute_dims": 1})


def _unpack_activation(a: np.ndarray) -> np.ndarray:
    n, c, h, w, b = a.shape
    return a.transpose(0, 1, 4, 2, 3).reshape(n, c * b, h, w).astype("int64")


@pytest.mark.parametrize(
    "kernel, shape", [("OIHW16o", (2, 32, 3, 3, 16)), ("OIHW16i16o", (2, 2, 3, 3, 16, 16))]
)
@pytest.mark.parametrize("constant", [True, False])
def test_raw_conv2d_packed(kernel: str, shape: tuple, constant: bool) -> None:
    # Stock TVM cannot lower packed layouts: numpy is the judge.
    fixed = np.random.default_rng(5).integers(-128, 128, shape).astype("int8")

    def build(net: Net, x: relax.Var, *w: relax.Var) -> object:
        weight = w[0] if w else relax.const(fixed)
        return net.emit(NN.conv2d(x, weight, padding=1, data_layout="NCHW16c",
                                  kernel_layout=kernel, out_dtype="int32"))  # fmt: skip

    extra = [] if constant else [(shape, "int8")]
    mod = module(build, ((1, 2, 5, 6, 16), "uint8"), *extra)
    new = FuseQDQ()(mod)
    found = interpret.count(new)
    assert found.pop("topi_int8.conv2d") == 1
    assert found == ({} if constant else {"relax.permute_dims": 1, "relax.reshape": 1})
    inputs = random_inputs(mod)
    w = fixed if constant else inputs[1]
    oihw = w.transpose(0, 4, 1, 2, 3) if w.ndim == 5 else w.transpose(0, 5, 1, 4, 2, 3)
    oihw = oihw.reshape(32, 32, 3, 3).astype("int64")
    x = np.pad(_unpack_activation(inputs[0]), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
    want = np.einsum("nchwyx,ocyx->nohw", windows, oihw)
    np.testing.assert_array_equal(_unpack_activation(interpret.run(new, *inputs)[0]), want)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_raw_matmul(constant: bool, batch: tuple) -> None:
    def build(net: Net, x: relax.Var, *w: relax.Var) -> object:
        weight = net.rng.integers(-128, 128, (*batch, 16, 6)).astype("int8")
        return net.emit(relax.op.matmul(x, w[0] if w else relax.const(weight), out_dtype="int32"))

    extra = [] if constant else [((*batch, 16, 6), "int8")]
    new = check(module(build, ((*batch, 5, 16), "uint8"), *extra), {"topi_int8.matmul": 1})
    assert op.matmul_workload(interpret.calls(new, "matmul")[0]).transpose_b == constant


def test_raw_conv2d_dequantized_per_channel_becomes_the_scale() -> None:
    def build(net: Net, x: relax.Var) -> object:
        w = relax.const(net.rng.integers(-128, 128, (4, 8, 3, 3)).astype("int8"))
        conv = net.emit(NN.conv2d(x, w, out_dtype="int32"))
        real = net.dq(conv, net.rng.uniform(1e-4, 2e-4, 4), np.zeros(4), axis=1)
        return net.q(net.emit(NN.relu(real)), 0.05, 0)

    check(module(build, (X[0], "int8")), {"topi_int8.conv2d": 1})


# ---------------------------------------------------------------- as TFLite's importer writes it


@pytest.mark.parametrize("name", ["conv2d", "add", "avg_pool2d", "requantize"])
def test_clip_of_integers_is_the_operators_own(name: str) -> None:
    makes = {
        "conv2d": lambda net, x: NN.conv2d(net.dq(x), net.weight((16, 8, 3, 3))),
        "add": lambda net, x: relax.op.add(net.dq(x), net.dq(x, 0.031, 7)),
        "avg_pool2d": lambda net, x: NN.avg_pool2d(net.dq(x), 3),
        "requantize": lambda net, x: NN.relu(net.dq(x)),
    }

    def build(net: Net, x: relax.Var) -> object:
        stored = net.q(net.emit(makes[name](net, x)), 0.02, 40)
        return net.emit(relax.op.clip(net.emit(relax.op.clip(stored, 35.0, 255.0)), 10.0, 200.0))

    new = check(module(build, X), {f"topi_int8.{name}": 1})
    attrs = op.attrs_of(interpret.calls(new, name)[0])
    # relu's bound is the zero point, and stays
    assert (attrs["clip_min"], attrs["clip_max"]) == (40 if name == "requantize" else 35, 200)


def test_clip_of_a_table_is_in_its_entries() -> None:
    def build(net: Net, x: relax.Var) -> object:
        table = relax.const(net.rng.integers(0, 256, 256).astype("uint8"))
        return net.emit(relax.op.clip(net.emit(op.lookup(x, table)), 20.0, 130.0))

    check(module(build, X), {"topi_int8.lookup": 1})


def test_clip_of_integers_that_others_read_stays() -> None:
    def build(net: Net, x: relax.Var) -> object:
        stored = net.q(net.emit(NN.avg_pool2d(net.dq(x), 3)), 0.02, 40)
        return net.emit(relax.op.clip(stored, 45.0, 200.0)), stored

    check(module(build, X), {"topi_int8.avg_pool2d": 1, "clip": 1})


@pytest.mark.parametrize("multiplier", [1, 2])
def test_reshape_of_a_weight_keeps_its_axis(multiplier: int) -> None:
    channels = 8 * multiplier

    def build(net: Net, x: relax.Var) -> object:
        weight = net.weight((1, 3, 3, channels), 3)
        weight = net.emit(relax.op.reshape(weight, (3, 3, channels, 1)))
        conv = NN.conv2d(net.dq(x), weight, groups=8, data_layout="NHWC", kernel_layout="HWOI")
        return net.q(net.emit(conv))

    check(module(build, ((2, 9, 10, 8), "uint8")), {"topi_int8.conv2d": 1})


def test_reshape_that_splits_the_axis_of_a_scale_stays_float() -> None:
    def build(net: Net, x: relax.Var) -> object:
        weight = net.emit(relax.op.reshape(net.weight((4, 8, 3, 3), 0), (2, 16, 3, 3)))
        return net.q(net.emit(NN.conv2d(net.dq(x), weight, groups=1)))

    shape = ((2, 16, 9, 10), "uint8")
    new = FuseQDQ()(module(build, shape))
    assert interpret.calls(new, "conv2d") == []


@pytest.mark.parametrize("flipped", [False, True])
def test_difference_of_two_quantized(flipped: bool) -> None:
    def build(net: Net, x: relax.Var, y: relax.Var) -> object:
        sides = [net.dq(x), net.dq(y, 0.03, 7)]
        return net.q(net.emit(relax.op.subtract(*(sides[::-1] if flipped else sides))), 0.06, 130)

    check(module(build, X, (X[0], "int8")), {"topi_int8.add": 1})


# ---------------------------------------------------------------- what must not break


def test_symbolic_batch_is_left_as_it_is() -> None:
    n = tvm.tirx.Var("n", "int64")

    def build(net: Net, x: relax.Var) -> object:
        conv = net.emit(NN.conv2d(net.dq(x), net.weight((4, 8, 3, 3))))
        return net.q(net.emit(NN.relu(conv)))

    mod = module(build, ((n, 8, 9, 10), "uint8"))
    new = FuseQDQ()(mod)
    assert interpret.count(new) == interpret.count(mod)


def test_float_module_is_unchanged() -> None:
    def build(net: Net, x: relax.Var) -> object:
        conv = net.emit(NN.conv2d(x, net.bias((4, 8, 3, 3))))
        return net.emit(NN.relu(net.emit(relax.op.add(conv, net.bias((1, 4, 1, 1))))))

    mod = module(build, (X[0], "float32"))
    tvm.ir.assert_structural_equal(FuseQDQ()(mod), relax.transform.CanonicalizeBindings()(mod))


def test_pass_is_a_tvm_pass_and_idempotent() -> None:
    def build(net: Net, x: relax.Var) -> object:
        conv = net.emit(NN.conv2d(net.dq(x), net.weight((4, 8, 3, 3))))
        return net.q(net.emit(NN.relu(conv)))

    fuse = FuseQDQ()
    assert isinstance(fuse, tvm.transform.Pass) and fuse.info.name == "topi_int8.FuseQDQ"
    once = tvm.transform.Sequential([fuse])(module(build, X))
    tvm.ir.assert_structural_equal(fuse(once), once)
