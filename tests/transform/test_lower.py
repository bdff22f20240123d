"""Lower on small modules: scheduled functions, operands packed at compile time, AMX permission."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import GenericConst

from intrinsics.compat import SCHEDULED_ATTR
from tests import reference
from tests.transform import interpret
from topi_int8 import op
from topi_int8.target import features, isa_target
from topi_int8.transform.convert_layout import ConvertLayout
from topi_int8.transform.lower import Lower, decide

AVX2, AMX = isa_target("avx2"), isa_target("amx_int8")
RNG = np.random.default_rng(11)
U8 = ((1, 16, 8, 9), "uint8")


def weight(*shape: int) -> relax.Expr:
    return relax.const(RNG.integers(-127, 128, shape).astype("int8"))


def conv(emit: Any, data: Any, w: Any, **attrs: Any) -> Any:
    """Emit a requantized 3x3 "same" convolution."""
    oc = op.shape_of(w)[0]
    scale = relax.const(np.full(oc, 1e-3, "float32"))
    return emit(op.conv2d(data, w, scale=scale, padding=(1,) * 4, out_dtype="uint8",
                          out_zero_point=100, data_zero_point=5, **attrs))  # fmt: skip


def module(build: Any, *types: tuple[tuple[int, ...], str]) -> tvm.IRModule:
    bb = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(*t)) for i, t in enumerate(types)]
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(build(bb.emit, *params))
        bb.emit_func_output(out)
    return bb.get()


def lower(mod: tvm.IRModule, target: tvm.target.Target = AVX2) -> tvm.IRModule:
    """Return the lowered module, checked: well formed, input unchanged, nothing of ours left."""
    before = tvm.ir.save_json(mod)
    with target:
        new = Lower(target)(mod)
    assert tvm.ir.save_json(mod) == before, "the input module was changed"
    relax.analysis.well_formed(new)  # raises
    assert not [name for name in interpret.count(new) if name.startswith("topi_int8.")]
    return new


def functions(mod: tvm.IRModule, contains: str = "") -> dict[str, tvm.tirx.PrimFunc]:
    """Return the PrimFuncs whose name holds a text."""
    return {
        gvar.name_hint: func
        for gvar, func in mod.functions_items()
        if isinstance(func, tvm.tirx.PrimFunc) and contains in gvar.name_hint
    }


def calls(mod: tvm.IRModule, contains: str = "") -> list[tuple[str, list[Any]]]:
    """Return (function, arguments) of the call_tirs of ``main`` in order."""
    found = []
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.call_tir":
                name, args = value.args[0].name_hint, list(value.args[1])
                if contains in name:
                    found.append((name, args))
    return found


def run(mod: tvm.IRModule, target: tvm.target.Target, *inputs: np.ndarray) -> np.ndarray:
    """Run a lowered module through TVM's own build."""
    built = tvm.compile(mod, target, relax_pipeline=relax.get_pipeline("default_build"))
    out = relax.VirtualMachine(built, tvm.cpu())["main"](*map(tvm.runtime.tensor, inputs))
    return out.numpy()


# ---- everything is lowered


def table() -> relax.Expr:
    return relax.const(RNG.permutation(256).astype("uint8"))


def every_operator(emit: Any, x: Any) -> Any:
    a, b = conv(emit, x, weight(16, 16, 3, 3)), conv(emit, x, weight(16, 1, 3, 3), groups=16)
    y = emit(op.add(a, b, a_zero_point=100, a_scale=0.5, b_zero_point=100, b_scale=0.5,
                    out_dtype="uint8", out_zero_point=90))  # fmt: skip
    y = emit(op.multiply(y, emit(op.lookup(b, table())), a_zero_point=90, b_zero_point=0,
                         scale=0.01, out_dtype="uint8", out_zero_point=90))  # fmt: skip
    vector = relax.const(np.full((1, 16, 1, 1), 1.5, "float32"))
    y = emit(op.affine(y, vector, vector, zero_point=90, out_dtype="uint8", out_zero_point=90))
    y = emit(relax.op.concat([y, a], 1))
    y = conv(emit, y, weight(16, 32, 3, 3))
    y = emit(op.requantize(y, zero_point=90, scale=2.0, out_dtype="int8", out_zero_point=-3))
    y = emit(op.avg_pool2d(y, pool_size=(8, 9), zero_point=-3, scale=4.0, out_dtype="int8",
                           out_zero_point=2))  # fmt: skip
    return emit(op.matmul(emit(relax.op.reshape(y, (1, 16))), weight(10, 16)))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512_bw", "avx512_vnni", "amx_int8"])
def test_every_operator_is_lowered(isa: str) -> None:
    new = lower(module(every_operator, U8), isa_target(isa))
    kernels = {**functions(new, "nchwc"), **functions(new, "matmul")}
    kernels |= {**functions(new, "lookup"), **functions(new, "concat")}
    assert len(kernels) == 6  # a dense layer, three convolutions, a lookup and a concat
    assert all(func.attrs[SCHEDULED_ATTR] for func in kernels.values())


def test_alone_on_convolutions_without_layouts() -> None:
    w = RNG.integers(-127, 128, (20, 16, 3, 3)).astype("int8")
    mod = module(lambda emit, x: emit(op.conv2d(x, relax.const(w), padding=(1,) * 4)), U8)
    work = op.conv2d_workload(op.conv2d(relax.Var("x", relax.TensorType(*U8)), relax.const(w),
                                        padding=(1,) * 4))  # fmt: skip
    data = RNG.integers(0, 256, U8[0]).astype("uint8")
    got = run(lower(mod), AVX2, data)
    np.testing.assert_array_equal(got, reference.conv2d(work, data, w))


def test_after_convert_layout_gives_the_same_module() -> None:
    mod = module(every_operator, U8)
    tvm.ir.assert_structural_equal(lower(ConvertLayout(AVX2)(mod)), lower(mod), map_free_vars=True)


# ---- operands


def test_constants_are_packed_at_compile_time() -> None:
    mod = module(lambda emit, x: conv(emit, x, weight(32, 16, 3, 3)), U8)
    new = lower(mod, isa_target("avx512_vnni"))
    assert not functions(new, "pack")
    ((_, (data, *operands)),) = calls(new, "conv2d")
    assert isinstance(data, relax.Var)
    assert all(isinstance(arg, GenericConst) for arg in operands)
    # The zero point's compensation makes a bias, though the operator has none.
    assert [np.prod(op.shape_of(arg)) for arg in operands] == [32 * 16 * 9, 32, 32]
    assert [str(arg.ty.dtype) for arg in operands] == ["int8", "int32", "float32"]
    compensation = -5 * mod_weight(mod).astype("int32").sum((1, 2, 3))
    np.testing.assert_array_equal(operands[1].value.numpy().reshape(-1), compensation)


def mod_weight(mod: tvm.IRModule) -> np.ndarray:
    """Return the weight of the only convolution of a module that was not lowered."""
    (call,) = interpret.calls(mod, "conv2d")
    return call.args[1].value.numpy()


def test_parameters_are_packed_by_functions() -> None:
    def build(emit: Any, x: Any, w: Any) -> Any:
        return conv(emit, x, w)

    types = (U8, ((32, 16, 3, 3), "int8"))
    vnni = lower(module(build, *types), isa_target("avx512_vnni"))
    # VNNI folds the zero point's compensation into a bias.
    assert len(functions(vnni, "pack_weight")) == len(functions(vnni, "pack_bias")) == 1
    ((_, args),) = calls(vnni, "conv2d")
    assert all(isinstance(arg, relax.Var) for arg in args[:3])
    assert isinstance(args[3], GenericConst)


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "parameter"])
def test_constant_weight_with_a_bias(constant: bool) -> None:
    w = RNG.integers(-127, 128, (20, 16, 3, 3)).astype("int8")
    bias = RNG.integers(-5000, 5000, 20).astype("int32")

    def build(emit: Any, x: Any, *b: Any) -> Any:
        given = relax.const(bias) if constant else b[0]
        return emit(op.conv2d(x, relax.const(w), bias=given, data_zero_point=5))

    types = [U8] if constant else [U8, ((20,), "int32")]
    data = RNG.integers(0, 256, U8[0]).astype("uint8")
    got = run(lower(module(build, *types)), AVX2, data, *([] if constant else [bias]))
    work = op.conv2d_workload(
        op.conv2d(relax.Var("x", relax.TensorType(*U8)), relax.const(w), bias=relax.const(bias),
                  data_zero_point=5)
    )  # fmt: skip
    np.testing.assert_array_equal(got, reference.conv2d(work, data, w, bias))


def test_scale_must_be_constant() -> None:
    def build(emit: Any, x: Any, scale: Any) -> Any:
        return emit(op.conv2d(x, weight(16, 16, 3, 3), scale=scale, out_dtype="float32"))

    mod = module(build, U8, ((16,), "float32"))
    with pytest.raises(ValueError, match=r"scale of topi_int8.conv2d is .*; allowed: a constant"):
        Lower(AVX2)(mod)


def test_bias_dtype_is_checked() -> None:
    def build(emit: Any, x: Any, bias: Any) -> Any:
        return emit(op.conv2d(x, weight(16, 16, 3, 3), bias=bias))

    with pytest.raises(ValueError, match="bias dtype is int16; allowed: int32, float32"):
        Lower(AVX2)(module(build, U8, ((16,), "int16")))


def test_packed_relax_convolutions_of_floats_are_refused() -> None:
    mod = module(
        lambda emit, x: emit(relax.op.nn.conv2d(
            x, relax.const(np.ones((1, 16, 1, 1, 16), "float32")), data_layout="NCHW16c",
            kernel_layout="OIHW16o")),
        ((1, 1, 8, 8, 16), "float32"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"relax.nn.conv2d in NCHW16c .* allowed in packed"):
        Lower(AVX2)(mod)


# ---- sharing


def repeated(emit: Any, x: Any) -> Any:
    for _ in range(4):
        x = conv(emit, x, weight(16, 16, 3, 3))
    return x


def test_equal_layers_share_a_function() -> None:
    new = lower(module(repeated, U8))
    assert len(calls(new, "conv2d")) == 4
    assert len(functions(new, "conv2d")) == 1


def test_layers_that_differ_in_shape_do_not() -> None:
    def build(emit: Any, x: Any) -> Any:
        return conv(emit, repeated(emit, x), weight(32, 16, 3, 3))

    assert len(functions(lower(module(build, U8)), "conv2d")) == 2


# ---- AMX permission


def asks(func: tvm.tirx.PrimFunc) -> bool:
    """Return whether a function asks Linux for tile state (a syscall)."""
    return "syscall" in func.script(show_meta=False)


def test_permission_is_asked_once() -> None:
    new = lower(module(repeated, U8), AMX)
    kernels = functions(new, "amx")
    assert len(kernels) == 2  # the first layer's asks, the three others share one that does not
    order = [name for name, _ in calls(new, "amx")]
    assert len(order) == 4 and [asks(kernels[name]) for name in order] == [True] + [False] * 3


def test_permission_is_asked_by_each_function_that_may_be_called() -> None:
    bb = relax.BlockBuilder()
    for name in ("main", "other"):
        x = relax.Var("x", relax.TensorType(*U8))
        with bb.function(name, [x]):
            with bb.dataflow():
                out = bb.emit_output(repeated(bb.emit, x))
            bb.emit_func_output(out)
    new = lower(bb.get(), AMX)
    kernels = functions(new, "amx")
    for name in ("main", "other"):
        first = new[name].body.blocks[0].bindings
        names = [b.value.args[0].name_hint for b in first
                 if getattr(getattr(b.value, "op", None), "name", "") == "relax.call_tir"
                 and "amx" in b.value.args[0].name_hint]  # fmt: skip
        assert [asks(kernels[n]) for n in names] == [True] + [False] * 3


def test_permission_is_asked_in_each_branch() -> None:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(*U8))
    pick = relax.Var("pick", relax.TensorType((), "bool"))
    branches = []
    for _ in range(2):
        bb._begin_binding_block()
        result = repeated(bb.emit, x)
        branches.append(relax.SeqExpr([bb._end_block()], result))
    with bb.function("main", [x, pick]):
        bb.emit_func_output(bb.emit(relax.If(pick, *branches)))
    new = lower(bb.get(), AMX)
    kernels = functions(new, "amx")
    found: list[list[bool]] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.If):
            for branch in (expr.true_branch, expr.false_branch):
                values = [b.value for block in branch.blocks for b in block.bindings]
                called = [v for v in values if getattr(getattr(v, "op", None), "name", "")
                          == "relax.call_tir"]  # fmt: skip
                names = [v.args[0].name_hint for v in called]
                found.append([asks(kernels[n]) for n in names if n in kernels])

    relax.analysis.post_order_visit(new["main"], visit)
    assert found == [[True, False, False, False]] * 2


def test_other_targets_never_ask() -> None:
    new = lower(module(repeated, U8), isa_target("avx512_vnni"))
    assert not any(map(asks, functions(new).values()))


# ---- decisions


def test_decision_knows_the_range_of_constant_weights() -> None:
    x = relax.Var("x", relax.TensorType(*U8))

    def names(size: int) -> list[str]:
        shape = (16, 16, size, size)
        weights = [relax.const(np.full(shape, value, "int8")) for value in (64, 65)]
        weights.append(relax.Var("w", relax.TensorType(shape, "int8")))
        return [decide(op.conv2d(x, w), features(AVX2)).strategy for w in weights]

    proven, plain = "conv2d_nchwc_avx2_7bit", "conv2d_nchwc_avx2"
    assert names(1) == [proven, plain, plain]
    # 7-bit weights make so small an image as fast by the direct sum.
    assert names(3) == [proven, "conv2d_nchwc_winograd_avx2", plain]


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("given", ["constants", "inputs"])
@pytest.mark.parametrize("vector", [False, True])
def test_quantize_by_tensors_rounds_half_to_even(dtype: str, given: str, vector: bool) -> None:
    low, high = {"uint8": (0, 255), "int8": (-128, 127)}[dtype]
    scale = np.array([0.25, 0.5, 2.0] if vector else 0.5, "float32")
    zero_point = np.array([3, 0, 7] if vector else 3, dtype)
    steps = np.array([-1000, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 40.2, 1000], "float32")
    along = (3, 1) if vector else (1, 1)
    x = steps * np.broadcast_to(scale.reshape(-1, 1), (3, 1))

    def build(emit: Any, data: Any, *params: Any) -> Any:
        params = params or (relax.const(scale), relax.const(zero_point))
        return relax.op.quantize(data, *params, axis=0, out_dtype=dtype)

    types = [(scale.shape, "float32"), (scale.shape, dtype)] if given == "inputs" else []
    new = lower(module(build, (x.shape, "float32"), *types))
    assert "relax.quantize" not in interpret.count(new)
    inputs = (x, scale, zero_point) if types else (x,)
    want = np.clip(np.rint(steps) + zero_point.reshape(along).astype(int), low, high)
    np.testing.assert_array_equal(interpret.run(new, *inputs)[0], np.broadcast_to(want, x.shape))
