"""ScheduleRest: the same numbers as the unscheduled functions; vectors and threads are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.script import tirx as T

from topi_int8.schedule import rest
from topi_int8.transform.schedule_rest import ScheduleRest, unscheduled

OPS, NN = relax.op, relax.op.nn
TARGET = tvm.target.Target({"kind": "llvm", "mcpu": "haswell"})
N = 5  # what a symbolic dimension is when run


def _const(*shape: int) -> relax.Expr:
    return relax.const(np.random.default_rng(7).random(shape).astype("float32"))


@dataclass(frozen=True)
class Case:
    """A Relax graph; whether the schedule must hold explicit vectors, and parallel loops."""

    build: Callable[..., relax.Expr]
    inputs: tuple[tuple[tuple, str], ...]
    vectors: bool = True
    parallel: bool = False


def case(build: Callable, *inputs: tuple, vectors: bool = True, parallel: bool = False) -> Case:
    # An input is a float32 shape, or (shape, dtype).
    return Case(build, tuple((s, "float32") if not isinstance(s[0], tuple) else s
                             for s in inputs), vectors, parallel)  # fmt: skip


BIG = (2, 8, 32, 64)
CASES = {
    "softmax": case(lambda e, x: NN.softmax(x), BIG, parallel=True),
    "softmax over an outer axis": case(lambda e, x: NN.softmax(x, 1), BIG, parallel=True),
    "layer_norm": case(
        lambda e, x: NN.layer_norm(x, _const(96), _const(96), [-1]), (1, 200, 96), parallel=True
    ),
    # libm calls have no vector code: the loop stays LLVM's
    "gelu": case(lambda e, x: NN.gelu(x), (4, 64, 77), vectors=False, parallel=True),
    "relu": case(lambda e, x: NN.relu(x), BIG, parallel=True),
    "odd length": case(lambda e, x: NN.relu(x), (1, 7, 1001), vectors=False),
    "rows of 14": case(lambda e, x: OPS.add(x, x), (1, 128, 14, 14), vectors=False, parallel=True),
    "mean of the image": case(lambda e, x: OPS.mean(x, [2, 3]), (2, 64, 14, 14), parallel=True),
    "mean of nhwc": case(lambda e, x: OPS.mean(x, [1, 2]), (2, 14, 14, 64), parallel=True),
    "sum of everything": case(lambda e, x: OPS.sum(x), (8, 16, 16)),
    "sum over batch": case(lambda e, x: OPS.sum(x, [0]), (8, 16, 16)),
    "max": case(lambda e, x: OPS.max(x, -1), (40, 64)),
    "argmax": case(lambda e, x: OPS.argmax(x, 1), (8, 100)),
    "max_pool2d": case(
        lambda e, x: NN.max_pool2d(x, (3, 3), 1, 1), ((1, 16, 48, 32), "uint8"), parallel=True
    ),
    "max_pool2d stride 2": case(
        lambda e, x: NN.max_pool2d(x, (3, 3), 2, 1),
        ((1, 16, 28, 28), "uint8"), vectors=False, parallel=True,
    ),
    "max_pool2d packed": case(
        lambda e, x: NN.max_pool2d(x, (3, 3), 2, 1, layout="NCHW16c"),
        ((1, 2, 40, 40, 16), "uint8"),
        parallel=True,
    ),
    "avg_pool2d": case(
        lambda e, x: NN.avg_pool2d(x, (3, 3), 1, 1), (1, 8, 16, 16), parallel=True
    ),
    "concat": case(
        lambda e, x, y: OPS.concat([x, y], 1), ((2, 8, 9, 64), "uint8"), ((2, 4, 9, 64), "uint8")
    ),
    "pad": case(lambda e, x: NN.pad(x, (0, 0, 0, 0, 1, 1, 2, 2)), (2, 8, 14, 14), vectors=False),
    "pad nhwc": case(lambda e, x: NN.pad(x, (0, 0, 1, 1, 2, 2, 0, 0)), (2, 14, 14, 16)),
    "resize2d": case(
        lambda e, x: OPS.image.resize2d(x, (28, 28), method="linear"), (1, 8, 14, 14), vectors=False
    ),
    "transpose": case(lambda e, x: OPS.permute_dims(x, [0, 2, 3, 1]), (2, 16, 14, 14)),
    "take": case(lambda e, x, i: OPS.take(x, i, axis=0), (30, 64), ((20,), "int32")),
    "gather_elements": case(
        lambda e, x, i: OPS.gather_elements(x, i, 1), (8, 32), ((8, 16), "int32"), vectors=False
    ),
    "quantize": case(
        lambda e, x: OPS.quantize(x, relax.const(np.float32(0.1)), relax.const(np.int8(3)),
                                  out_dtype="int8"),
        BIG, parallel=True,
    ),
    "dequantize and scale": case(
        lambda e, x: OPS.multiply(
            e(OPS.dequantize(x, relax.const(np.float32(0.1)), relax.const(np.uint8(3)))),
            _const(8, 1, 1),
        ),
        (BIG, "uint8"), parallel=True,
    ),
    "matmul": case(lambda e, x, y: OPS.matmul(x, y), (2, 30, 32), (2, 32, 24), parallel=True),
    "matmul transposed": case(
        lambda e, x, y: OPS.matmul(x, e(OPS.permute_dims(y, [0, 2, 1]))),
        (2, 30, 32), (2, 24, 32), parallel=True,
    ),
    "conv2d_transpose": case(
        lambda e, x: NN.conv2d_transpose(x, _const(8, 4, 3, 3), strides=2, padding=1,
                                         output_padding=1),
        (1, 8, 16, 16), parallel=True,
    ),
    "conv2d_transpose to width 31": case(
        lambda e, x: NN.conv2d_transpose(x, _const(8, 4, 3, 3), strides=2, padding=1),
        (1, 8, 16, 16), vectors=False, parallel=True,
    ),
    "conv1d": case(
        lambda e, x: NN.conv1d(x, _const(8, 16, 3), padding=1), (1, 16, 64), parallel=True
    ),
    "conv3d": case(
        lambda e, x: NN.conv3d(x, _const(4, 3, 3, 3, 3), padding=1), (1, 3, 4, 8, 8), parallel=True
    ),
    "int32 conv2d": case(
        lambda e, x, w: NN.conv2d(x, w, out_dtype="int32"),
        ((1, 4, 10, 10), "uint8"), ((8, 4, 3, 3), "int8"), parallel=True,
    ),
    "group_norm": case(
        lambda e, x: NN.group_norm(x, _const(16), _const(16), 4, 1, [2, 3]), (2, 16, 8, 8),
        vectors=False,  # a pair of sums, and reshapes that TVM leaves as divisions
    ),
    "symbolic elementwise": case(
        lambda e, x: NN.relu(e(OPS.add(x, x))), ("n", 64, 8, 8), parallel=True
    ),
    "symbolic rows": case(lambda e, x: NN.relu(x), (64, "n"), vectors=False),
    "symbolic softmax": case(lambda e, x: NN.softmax(x), ("n", 64)),
    "symbolic matmul": case(lambda e, x, y: OPS.matmul(x, y), ("n", 64), (64, 32), parallel=True),
}  # fmt: skip


def lowered(spec: Case) -> tvm.IRModule:
    """Return the module as it reaches ScheduleRest: fused, unscheduled PrimFuncs."""
    n = tirx.Var("n", "int64")
    bb = relax.BlockBuilder()
    params = [
        relax.Var(f"x{i}", relax.TensorType([n if d == "n" else d for d in shape], dtype))
        for i, (shape, dtype) in enumerate(spec.inputs)
    ]
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(spec.build(bb.emit, *params))
        bb.emit_func_output(out)
    passes = relax.transform
    return tvm.transform.Sequential(
        [passes.LegalizeOps(), passes.AnnotateTIROpPattern(), passes.FoldConstant(),
         passes.FuseOps(), passes.FuseTIR(), passes.DeadCodeElimination()]
    )(bb.get())  # fmt: skip


def run(mod: tvm.IRModule, inputs: list[np.ndarray]) -> np.ndarray:
    built = tvm.compile(mod, TARGET, relax_pipeline=relax.get_pipeline("default_build"))
    vm = relax.VirtualMachine(built, tvm.cpu())
    return vm["main"](*(tvm.runtime.tensor(x) for x in inputs)).numpy()


def inputs_of(spec: Case) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = []
    for shape, dtype in spec.inputs:
        shape = [N if d == "n" else d for d in shape]
        drawn = rng.normal(size=shape) if dtype == "float32" else rng.integers(0, 16, shape)
        arrays.append(drawn.astype(dtype))
    return arrays


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_vectorized_and_parallel(name: str) -> None:
    spec = CASES[name]
    mod = lowered(spec)
    before = tvm.ir.save_json(mod)
    new = ScheduleRest(TARGET)(mod)
    assert tvm.ir.save_json(mod) == before, "the input module was changed"
    assert unscheduled(new) == ()
    text = new.script()
    assert ("T.vectorized" in text) == spec.vectors
    assert ("T.parallel" in text) == spec.parallel
    inputs = inputs_of(spec)
    want, got = run(mod, inputs), run(new, inputs)
    assert got.dtype == want.dtype
    if want.dtype == np.float32:
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    else:
        np.testing.assert_array_equal(got, want)


def _llvm_ir(name: str) -> str:
    new = ScheduleRest(TARGET)(lowered(CASES[name]))
    funcs = [func for _, func in new.functions_items() if isinstance(func, tirx.PrimFunc)]
    built = tvm.compile(tvm.IRModule({"f": funcs[0].with_attr("global_symbol", "f")}), TARGET)
    built = getattr(built, "mod", built)
    return built.inspect_source("ll")


@pytest.mark.parametrize(
    "name", ["rows of 14", "odd length", "symbolic rows", "conv2d_transpose to width 31"]
)
def test_rows_left_to_llvm_become_vectors(name: str) -> None:
    assert "<8 x float>" in _llvm_ir(name)


def test_small_work_pays_for_no_threads() -> None:
    text = ScheduleRest(TARGET)(lowered(case(lambda e, x: NN.relu(x), (1, 16, 16)))).script()
    assert "T.vectorized" in text and "T.parallel" not in text


def test_matmul_accumulates_in_a_register_tile() -> None:
    text = ScheduleRest(TARGET)(lowered(CASES["matmul"])).script()
    assert 'scope="local"' in text and "T.unroll" in text


@T.prim_func(private=True, s_tir=True)
def _opaque(a: T.Buffer((16,), "float32"), b: T.Buffer((16,), "float32")):
    for i in range(16):
        with T.sblock("loop_inside"):
            v = T.axis.opaque(16, i)
            b[v] = a[v] + T.float32(1)


def _as_module(func: tirx.PrimFunc) -> tvm.IRModule:
    return tvm.IRModule({"f": func})


def test_block_that_is_not_understood_is_reported_and_kept() -> None:
    new = ScheduleRest(TARGET)(_as_module(_opaque))
    ((name, reason),) = unscheduled(new)
    assert name == "f" and "loop_inside" in reason
    tvm.ir.assert_structural_equal(new["f"].body, _opaque.body)


def test_failure_falls_back_to_the_unscheduled_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError("as if TVM had refused")

    monkeypatch.setattr(rest, "_elementwise", broken)
    mod = lowered(CASES["relu"])
    new = ScheduleRest(TARGET)(mod)
    ((_, reason),) = unscheduled(new)
    assert reason == "RuntimeError: as if TVM had refused"
    inputs = inputs_of(CASES["relu"])
    np.testing.assert_array_equal(run(new, inputs), np.maximum(inputs[0], 0))


@pytest.mark.parametrize("mark", ["tirx.is_scheduled", "topi_int8.scheduled"])
def test_scheduled_functions_are_left(mark: str) -> None:
    mod = lowered(CASES["relu"])
    (gvar,) = [g for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]
    mod.update_func(gvar, mod[gvar].with_attr(mark, True))
    tvm.ir.assert_structural_equal(ScheduleRest(TARGET)(mod), mod)


def test_scheduling_twice_is_scheduling_once() -> None:
    once = ScheduleRest(TARGET)(lowered(CASES["softmax"]))
    tvm.ir.assert_structural_equal(ScheduleRest(TARGET)(once), once)


def test_other_targets_are_left() -> None:
    mod = lowered(CASES["relu"])
    tvm.ir.assert_structural_equal(ScheduleRest(tvm.target.Target("cuda"))(mod), mod)
