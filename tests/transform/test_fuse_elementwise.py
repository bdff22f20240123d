"""FuseElementwise: which integer operator each float chain becomes, its table bit for bit, and why
others stay float."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax

import topi_int8
from tests import graphs
from tests.kernels import off_by_one_rarely, require
from tests.transform import interpret
from topi_int8 import op
from topi_int8.qparams import QParams, all_integers
from topi_int8.target import isa_target
from topi_int8.transform.fuse_concat import FuseConcat
from topi_int8.transform.fuse_elementwise import FuseElementwise, declined

R, NN = relax.op, relax.op.nn
SHAPE = (1, 20, 5, 6)
IN, OUT = QParams(0.05, 131, "uint8"), QParams(0.021, 9, "uint8")
F32 = np.float32
erf = np.vectorize(math.erf, otypes=["float64"])


def f(value: float) -> relax.Expr:
    return relax.const(value, "float32")


def pair(params: QParams) -> tuple[relax.Expr, relax.Expr]:
    return relax.const(F32(params.scale)), relax.const(params.zero_point, params.dtype)


def module(body: Callable[..., Any], *inputs: tuple, out: QParams = OUT) -> tvm.IRModule:
    """Return ``quantize(body(emit, dequantize(x0), ...))`` of inputs (shape, QParams)."""
    bb = relax.BlockBuilder()
    params = [
        relax.Var(f"x{i}", relax.TensorType(shape, q.dtype)) for i, (shape, q) in enumerate(inputs)
    ]
    with bb.function("main", params):
        with bb.dataflow():
            reals = [
                bb.emit(R.dequantize(x, *pair(q)))
                for x, (_, q) in zip(params, inputs, strict=True)
            ]
            y = body(bb.emit, *reals)
            y = bb.emit_output(R.quantize(y, *pair(out), out_dtype=out.dtype))
        bb.emit_func_output(y)
    return bb.get()


def fuse(mod: tvm.IRModule, expected: dict[str, int]) -> tvm.IRModule:
    before = tvm.ir.save_json(mod)
    new = FuseElementwise()(mod)
    assert tvm.ir.save_json(mod) == before, "the input module was changed"
    relax.analysis.well_formed(new)  # raises
    assert interpret.count(new) == {f"topi_int8.{k}": v for k, v in expected.items()}
    return new


def inputs_of(mod: tvm.IRModule, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 256, op.shape_of(p)).astype("uint8").view(str(p.ty.dtype))
        for p in mod["main"].params
    ]


def compiled(mod: tvm.IRModule, target: tvm.target.Target, *inputs: np.ndarray) -> np.ndarray:
    built = tvm.compile(mod, target, relax_pipeline=topi_int8.pipeline(target))
    out = relax.VirtualMachine(built, tvm.cpu())["main"](*map(tvm.runtime.tensor, inputs))
    return out.numpy()


# ---- functions of one tensor


def silu(emit, x):
    return emit(R.multiply(x, emit(R.sigmoid(x))))


def hard_sigmoid(emit, x):
    return emit(R.divide(emit(R.clip(emit(R.add(x, f(3.0))), 0, 6)), f(6.0)))


def one(operator: Callable, *args: Any) -> Callable:
    return lambda emit, x: emit(operator(x, *args))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# Name -> (the graph, the function in float64).
FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "silu": (silu, lambda x: x * sigmoid(x)),
    "silu_op": (one(NN.silu), lambda x: x * sigmoid(x)),
    "sigmoid": (one(R.sigmoid), sigmoid),
    "tanh": (one(R.tanh), np.tanh),
    "hard_sigmoid": (hard_sigmoid, lambda x: np.clip(x + 3, 0, 6) / 6),
    "hard_swish": (
        lambda emit, x: emit(R.multiply(hard_sigmoid(emit, x), x)),
        lambda x: x * np.clip(x + 3, 0, 6) / 6,
    ),
    "gelu": (one(NN.gelu), lambda x: x * (1 + erf(x / 2**0.5)) / 2),
    "gelu_tanh": (
        one(NN.gelu_tanh),
        lambda x: x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    ),
    "leaky_relu": (one(NN.leakyrelu, 0.1), lambda x: np.where(x > 0, x, 0.1 * x)),
    "exp": (one(R.exp), np.exp),
    "log_of_square": (
        lambda emit, x: emit(R.log(emit(R.add(emit(R.square(x)), f(1.0))))),
        lambda x: np.log(x * x + 1),
    ),
    "root_of_absolute": (lambda emit, x: emit(R.sqrt(emit(R.abs(x)))), lambda x: abs(x) ** 0.5),
    "erf": (one(R.erf), erf),
    "rsqrt": (
        lambda emit, x: emit(R.rsqrt(emit(R.add(emit(R.abs(x)), f(0.5))))),
        lambda x: 1 / np.sqrt(abs(x) + 0.5),
    ),
    "scalars": (
        lambda emit, x: emit(R.subtract(f(1.5), emit(R.negative(emit(R.multiply(x, f(0.3))))))),
        lambda x: 1.5 + 0.3 * x,
    ),
    "power": (one(R.power, f(2.0)), lambda x: x * x),
    "bounds": (
        lambda emit, x: emit(
            R.tanh(emit(R.maximum(emit(R.minimum(emit(NN.relu6(x)), f(2.0))), f(0.5))))
        ),
        lambda x: np.tanh(np.clip(x, 0.5, 2)),
    ),
    "relu_of_tanh": (lambda emit, x: emit(NN.relu(emit(R.tanh(x)))), lambda x: np.tanh(x.clip(0))),
}


def table_of(mod: tvm.IRModule) -> np.ndarray:
    (call,) = interpret.calls(mod, "lookup")
    return call.args[1].value.numpy()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtypes", [("uint8", "uint8"), ("int8", "int8"), ("uint8", "int8")])
def test_functions(name: str, dtypes: tuple[str, str]) -> None:
    body, exact = FUNCTIONS[name]
    source = QParams(0.05, 131 if dtypes[0] == "uint8" else 3, dtypes[0])
    out = QParams(0.021, 9, dtypes[1])
    mod = module(body, (SHAPE, source), out=out)
    new = fuse(mod, {"lookup": 1})
    # In float64, rounded once: off where float32 steps round across a tie, by 1.
    real = (all_integers(source.dtype).astype("float64") - source.zero_point) * F32(0.05)
    off_by_one_rarely(table_of(new), out.quantize(exact(real)))
    # Bit for bit, through Lower's kernel.
    (x,) = inputs_of(mod)
    got = compiled(mod, isa_target("generic"), x)
    np.testing.assert_array_equal(got, interpret.run(new, x)[0])


def test_a_table_is_the_very_chain_in_float32() -> None:
    mod = module(silu, (SHAPE, IN))
    x = ((np.arange(256) - IN.zero_point).astype("float32") * F32(IN.scale)).astype("float64")
    gate = F32(sigmoid(x))
    product = F32(x * gate.astype("float64"))
    want = np.clip(np.rint(product / F32(OUT.scale)) + OUT.zero_point, 0, 255).astype("uint8")
    np.testing.assert_array_equal(table_of(fuse(mod, {"lookup": 1})), want)


@given(
    scale=st.floats(1e-4, 10), zero_point=st.integers(0, 255), out_scale=st.floats(1e-4, 10),
    name=st.sampled_from(sorted(FUNCTIONS)),
)  # fmt: skip
def test_any_parameters(scale: float, zero_point: int, out_scale: float, name: str) -> None:
    source, out = QParams(scale, zero_point, "uint8"), QParams(out_scale, 100, "int8")
    body, exact = FUNCTIONS[name]
    new = fuse(module(body, ((1, 3), source), out=out), {"lookup": 1})
    with np.errstate(over="ignore"):
        real = source.dequantize(all_integers("uint8")).astype("float64")
        wanted = exact(real) / F32(out_scale) + 100
    # Within float32's own rounding of a value, saturated, and one step.
    slack = 0.5 + 1e-5 * np.abs(np.clip(wanted, -1e6, 1e6))
    table = table_of(new).astype("float64")
    inside = (table > -128) & (table < 127)
    assert (np.abs(table - wanted)[inside] <= slack[inside] + 1e-3).all()
    assert (wanted[table == 127] >= 126.4).all() and (wanted[table == -128] <= -127.4).all()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512_vnni", "amx_int8"])
def test_on_every_isa(isa: str) -> None:
    require(isa)
    mod = module(silu, (SHAPE, IN))
    (x,) = inputs_of(mod)
    np.testing.assert_array_equal(
        compiled(mod, isa_target(isa), x), interpret.run(FuseElementwise()(mod), x)[0]
    )


def test_a_value_that_another_reader_wants_in_float() -> None:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(SHAPE, "uint8"))
    with bb.function("main", [x]):
        with bb.dataflow():
            gate = bb.emit(R.sigmoid(bb.emit(R.dequantize(x, *pair(IN)))))
            q = bb.emit_output(R.quantize(gate, *pair(OUT), out_dtype="uint8"))
            total = bb.emit_output(R.sum(gate))
        bb.emit_func_output(relax.Tuple([q, total]))
    new = FuseElementwise()(bb.get())
    assert interpret.count(new) == {
        "topi_int8.lookup": 1, "relax.dequantize": 1, "relax.sigmoid": 1, "relax.sum": 1,
    }  # fmt: skip


# ---- a scale and a shift a channel


def vector(*shape: int, seed: int = 1) -> relax.Expr:
    return relax.const(np.random.default_rng(seed).uniform(0.5, 2, shape).astype("float32"))


def batch_norm(emit, x):
    scaled = emit(R.multiply(x, vector(1, 20, 1, 1)))
    return emit(NN.relu(emit(R.add(scaled, vector(20, 1, 1, seed=2)))))


def by_integers(emit, x):
    """A constant that is integers with a scale a channel, as QDQ graphs may have them."""
    factor = relax.const(np.random.default_rng(3).integers(1, 128, (1, 20, 1, 1)).astype("int8"))
    scales = relax.const(np.random.default_rng(4).uniform(0.01, 0.02, 20).astype("float32"))
    zeros = relax.const(np.zeros(20, "int8"))
    return emit(R.multiply(x, emit(R.dequantize(factor, scales, zeros, axis=1))))


AFFINES: dict[str, tuple[Callable, tuple]] = {
    "batch_norm": (batch_norm, SHAPE),
    "subtract_divide": (
        lambda e, x: e(R.divide(e(R.subtract(x, vector(1, 20, 1, 1))), vector(1, 20, 1, 1))),
        SHAPE,
    ),
    "constant_first": (lambda e, x: e(R.add(vector(20, 1, 1), x)), SHAPE),
    "nhwc": (
        lambda e, x: e(R.add(e(R.multiply(x, vector(20))), vector(20, seed=2))), (1, 5, 6, 20),
    ),
    "rows": (lambda e, x: e(R.multiply(x, vector(1, 1, 5, 1))), SHAPE),
    "by_integers": (by_integers, SHAPE),
    "clipped_twice": (
        lambda e, x: e(R.clip(e(NN.relu(e(R.multiply(x, vector(20, 1, 1))))), 0.5, 2)), SHAPE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512_vnni"])
def test_affine(name: str, isa: str) -> None:
    require(isa)
    body, shape = AFFINES[name]
    mod = module(body, (shape, IN))
    new = fuse(mod, {"affine": 1})
    (x,) = inputs_of(mod)
    want = interpret.run(new, x)[0]
    off_by_one_rarely(want, interpret.run(mod, x)[0])  # what stock TVM makes of the float graph
    off_by_one_rarely(compiled(mod, isa_target(isa), x), want)


# ---- products


def times(emit, x, y):
    return emit(R.multiply(x, y))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512_vnni"])
@pytest.mark.parametrize("body, shapes", [
    (times, (SHAPE, (1, 20, 1, 1))), (times, ((1, 20, 1, 1), SHAPE)), (times, (SHAPE, SHAPE)),
    (lambda e, x, y: e(NN.relu(times(e, x, y))), (SHAPE, SHAPE)),
])  # fmt: skip
def test_product(body: Callable, shapes: tuple, isa: str) -> None:
    require(isa)
    gate = QParams(1 / 256, 0, "uint8")
    mod = module(body, (shapes[0], IN), (shapes[1], gate))
    new = fuse(mod, {"multiply": 1})
    inputs = inputs_of(mod)
    want = interpret.run(new, *inputs)[0]
    off_by_one_rarely(want, interpret.run(mod, *inputs)[0])
    off_by_one_rarely(compiled(mod, isa_target(isa), *inputs), want)


# ---- what stays as it is, and why


def stays(mod: tvm.IRModule) -> set[str]:
    """Return the reasons for a module that the pass does not change."""
    new = FuseElementwise()(mod)
    assert not [name for name in interpret.count(new) if name.startswith("topi_int8")]
    return {reason for _, reason in declined(new)}


def test_clips_alone_are_left_to_fuse_qdq() -> None:
    assert stays(module(one(NN.relu), (SHAPE, IN))) == {"a clip"}


def test_reasons() -> None:
    third = (SHAPE, IN)
    both = lambda e, x, y: e(R.tanh(e(R.add(x, y))))  # noqa: E731
    assert stays(module(both, third, third)) == {"it reads 2 tensors"}
    curved = lambda e, x: e(R.tanh(e(R.multiply(x, vector(20, 1, 1)))))  # noqa: E731
    (reason,) = stays(module(curved, third))
    assert reason == "relax.multiply has a constant of more than one value"
    assert stays(module(one(R.log), third)) == {"it has no value for some integers"}


def test_a_shift_a_pixel_is_no_affine() -> None:
    mod = module(lambda e, x: e(R.add(x, vector(5, 6))), (SHAPE, IN))
    assert stays(mod) == {"relax.add has a constant of more than one value"}


def test_a_scale_a_channel_is_no_table() -> None:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(SHAPE, "uint8"))
    many = vector(20), relax.const(np.zeros(20, "uint8"))
    with bb.function("main", [x]):
        with bb.dataflow():
            real = bb.emit(R.tanh(bb.emit(R.dequantize(x, *many, axis=1), "real")))
            q = bb.emit_output(R.quantize(real, *pair(OUT), out_dtype="uint8"))
        bb.emit_func_output(q)
    assert stays(bb.get()) == {"real is not 8-bit integers of one scale"}


def test_symbolic_shapes_and_results_in_float() -> None:
    n = tvm.tirx.Var("n", "int64")
    assert stays(module(one(R.tanh), ((n, 4), IN))) == {"symbolic shape"}
    mod = graphs.build((3, 4), lambda emit, x: emit(R.tanh(x)))
    assert stays(mod) == {"a float operator reads it, or it is a result"}


def test_what_the_pass_would_have_taken() -> None:
    third = (SHAPE, IN)
    for mod in (module(silu, third), module(batch_norm, third), module(times, third, third)):
        assert {reason for _, reason in declined(mod)} == {"FuseElementwise was not run"}


def test_constants_bound_to_variables() -> None:
    def body(emit, x):
        scale, shift = emit(vector(1, 20, 1, 1)), emit(f(0.5))
        return emit(R.add(emit(R.multiply(x, scale)), shift))

    fuse(module(body, (SHAPE, IN)), {"affine": 1})


def test_explain_says_why() -> None:
    body = lambda e, x: e(R.tanh(e(R.multiply(x, vector(20, 1, 1)))))  # noqa: E731
    found = topi_int8.explain(module(body, (SHAPE, IN)), isa_target("avx2"), show=False)
    notes = {other.op: other.note for other in found.others}
    for name in ("relax.tanh", "relax.multiply"):
        assert "in float: relax.multiply has a constant of more than one value" in notes[name]
    assert [other.count for other in found.others if other.op == "relax.tanh"] == [1]


@pytest.mark.parametrize("isa, how", [("avx2", "vpshufb_256"), ("generic", "a load a byte")])
def test_explain_says_how_a_table_is_read(isa: str, how: str) -> None:
    found = topi_int8.explain(module(silu, (SHAPE, IN)), isa_target(isa), show=False)
    assert [(other.op, other.note) for other in found.others] == [
        ("topi_int8.lookup", f"table of 256: {how}")
    ]


# ---- whole blocks


class Float:
    """Builds fp32 layers over random weights."""

    def __init__(self, emit: Callable) -> None:
        self.emit, self.rng = emit, np.random.default_rng(3)

    def conv(self, x: Any, oc: int, k: int = 1, groups: int = 1) -> Any:
        ic = op.shape_of(x)[1] // groups
        weight = self.rng.normal(0, (k * k * ic) ** -0.5, (oc, ic, k, k)).astype("float32")
        out = self.emit(NN.conv2d(x, relax.const(weight), padding=k // 2, groups=groups))
        bias = self.rng.normal(0, 0.1, (1, oc, 1, 1)).astype("float32")
        return self.emit(R.add(out, relax.const(bias)))


def inverted_residual(emit: Callable, x: Any) -> Any:
    """An EfficientNet block: expand, depthwise, squeeze and excite, project, add."""
    net = Float(emit)
    x = net.conv(x, 32)
    wide = silu(emit, net.conv(silu(emit, net.conv(x, 64)), 64, 3, groups=64))
    pooled = emit(R.mean(wide, axis=[2, 3], keepdims=True))
    gate = emit(R.sigmoid(net.conv(silu(emit, net.conv(pooled, 16)), 64)))
    return emit(R.add(net.conv(emit(R.multiply(gate, wide)), 32), x))


def dense_block(emit: Callable, x: Any) -> Any:
    """Three DenseNet layers."""
    net = Float(emit)
    features = [emit(NN.relu(net.conv(x, 64)))]
    for layer in range(3):
        x = emit(R.concat(features, 1)) if layer else features[0]
        c = op.shape_of(x)[1]
        scaled = emit(R.multiply(x, vector(1, c, 1, 1, seed=layer)))
        y = emit(NN.relu(emit(R.subtract(scaled, vector(1, c, 1, 1, seed=layer + 9)))))
        features.append(net.conv(net.conv(y, 64), 32, 3))
    return net.conv(emit(R.concat(features, 1)), 16)


@pytest.mark.parametrize("isa", ["avx2", "avx512_vnni", "amx_int8"])
@pytest.mark.parametrize("body, wanted", [
    (inverted_residual, {"lookup": 4, "multiply": 1, "avg_pool2d": 1}),
    (dense_block, {"concat": 3, "affine": 1}),
])  # fmt: skip
def test_blocks_are_integers_from_end_to_end(body: Callable, wanted: dict, isa: str) -> None:
    require(isa)
    mod, rng = graphs.build((1, 16, 9, 10), body), np.random.default_rng(8)
    images = [rng.normal(size=(1, 16, 9, 10)).astype("float32") for _ in range(4)]
    qdq, target = topi_int8.quantize(mod, images, progress=False), isa_target(isa)
    found = topi_int8.explain(qdq, target, show=False)
    left = {other.op: other.count for other in found.others}
    assert {k: v for k, v in left.items() if k.startswith("topi") and "layout" not in k} == {
        f"topi_int8.{name}": count for name, count in wanted.items()
    }
    assert not set(left) & {"relax.sigmoid", "relax.multiply", "relax.concat", "relax.subtract"}
    assert left.get("topi_int8.layout_transform", 0) <= 2  # the network's input and output
    with target:
        integer = tvm.transform.Sequential(
            topi_int8.transform.pipeline.integer_passes(isa_target("generic"))[:-2]
        )(qdq)
    got = compiled(qdq, target, images[0])
    assert graphs.sqnr(interpret.run(integer, images[0])[0], got) > 35  # roundings at ties
    assert graphs.sqnr(interpret.run(mod, images[0])[0], got) > 18


def test_a_concat_with_another_reader_is_kept() -> None:
    def body(emit, x):
        net = Float(emit)
        both = emit(R.concat([emit(NN.relu(net.conv(x, 16))), emit(NN.relu(net.conv(x, 16)))], 1))
        y = emit(NN.relu(emit(R.multiply(both, vector(1, 32, 1, 1)))))
        return emit(R.add(net.conv(y, 16), net.conv(both, 16)))

    mod, rng = graphs.build((1, 16, 4, 4), body), np.random.default_rng(8)
    qdq = topi_int8.quantize(mod, [rng.normal(size=(1, 16, 4, 4))], progress=False)
    target = isa_target("avx2")
    with target:
        new = tvm.transform.Sequential(
            topi_int8.transform.pipeline.integer_passes(target)[:-1]
        )(qdq)
        tvm.ir.assert_structural_equal(FuseConcat()(new), new, map_free_vars=True)
    assert interpret.count(new)["topi_int8.concat"] == interpret.count(new)["topi_int8.affine"] == 1
