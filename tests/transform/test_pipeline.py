"""The pipeline through `tvm.compile`: same results by every road, nothing naive, exportable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

import topi_int8
from tests.graphs import sqnr
from tests.transform import interpret
from topi_int8.transform.pipeline import integer_passes
from topi_int8.transform.schedule_rest import unscheduled

NN = relax.op.nn
HOST = topi_int8.host_target(num_cores=1)


class Float:
    """Emits float32 layers of random weights."""

    def __init__(self, bb: relax.BlockBuilder) -> None:
        self.emit, self.rng = bb.emit, np.random.default_rng(4)

    def const(self, *shape: int) -> relax.Expr:
        return relax.const(self.rng.normal(0, shape[-1] ** -0.5, shape).astype("float32"))

    def conv(self, x: Any, oc: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> Any:
        ic = int(x.ty.shape[1])
        weight = self.rng.normal(0, (ic // groups * kernel**2) ** -0.5,
                                 (oc, ic // groups, kernel, kernel)).astype("float32")  # fmt: skip
        y = self.emit(NN.conv2d(x, relax.const(weight), strides=stride, padding=kernel // 2,
                                groups=groups))  # fmt: skip
        bias = self.rng.normal(0, 0.1, (1, oc, 1, 1)).astype("float32")
        return self.emit(relax.op.add(y, relax.const(bias)))

    def relu6(self, x: Any) -> Any:
        return self.emit(relax.op.clip(x, 0, 6))


def inverted_residuals(f: Float, x: Any) -> Any:
    """A small MobileNetV2: stem, two inverted residuals, global pool, classifier."""
    x = f.relu6(f.conv(x, 16, 3, 2))
    for out, stride in ((24, 2), (24, 1)):
        hidden = 6 * int(x.ty.shape[1])
        y = f.relu6(f.conv(x, hidden))
        y = f.relu6(f.conv(y, hidden, 3, stride, hidden))
        y = f.conv(y, out)
        x = f.emit(relax.op.add(x, y)) if stride == 1 else y
    x = f.emit(relax.op.mean(x, [2, 3]))
    y = f.emit(relax.op.matmul(x, f.const(24, 10)))
    return f.emit(relax.op.add(y, f.const(10)))


def transformer_block(f: Float, x: Any) -> Any:
    """Attention with two heads, layer norm, GELU; x is (batch, tokens, 32)."""
    batch, tokens, width = (int(d) for d in x.ty.shape)

    def dense(data: Any, inside: int, out: int) -> Any:
        y = f.emit(relax.op.matmul(data, f.const(inside, out)))
        return f.emit(relax.op.add(y, f.const(out)))

    def norm(data: Any) -> Any:
        ones = relax.const(np.ones(width, "float32"))
        return f.emit(NN.layer_norm(data, ones, f.const(width), axes=[-1]))

    def heads(data: Any) -> Any:
        y = f.emit(relax.op.reshape(data, (batch, tokens, 2, width // 2)))
        return f.emit(relax.op.permute_dims(y, [0, 2, 1, 3]))

    y = norm(x)
    q, k, v = (heads(dense(y, width, width)) for _ in range(3))
    scores = f.emit(relax.op.matmul(q, f.emit(relax.op.permute_dims(k, [0, 1, 3, 2]))))
    scores = f.emit(NN.softmax(f.emit(relax.op.multiply(scores, relax.const(0.25))), axis=-1))
    mixed = f.emit(relax.op.permute_dims(f.emit(relax.op.matmul(scores, v)), [0, 2, 1, 3]))
    mixed = f.emit(relax.op.reshape(mixed, (batch, tokens, width)))
    x = f.emit(relax.op.add(x, dense(mixed, width, width)))
    y = f.emit(NN.gelu(dense(norm(x), width, 4 * width)))
    return f.emit(relax.op.add(x, dense(y, 4 * width, width)))


NETS = {
    "mobilenet": (inverted_residuals, (2, 3, 32, 32)),
    "transformer": (transformer_block, (2, 7, 32)),
}


def float_net(name: str) -> tvm.IRModule:
    build, shape = NETS[name]
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(build(Float(bb), x))
        bb.emit_func_output(out)
    return bb.get()


def image(name: str) -> np.ndarray:
    return np.random.default_rng(8).normal(size=NETS[name][1]).astype("float32")


_QUANTIZED: dict[str, tvm.IRModule] = {}


def quantized_net(name: str) -> tvm.IRModule:
    if name not in _QUANTIZED:
        _QUANTIZED[name] = topi_int8.quantize(float_net(name), [image(name)], progress=False)
    return _QUANTIZED[name]


def run(executable: Any, *inputs: np.ndarray) -> np.ndarray:
    vm = relax.VirtualMachine(executable, tvm.cpu())
    return vm["main"](*map(tvm.runtime.tensor, inputs)).numpy()


def stock(mod: tvm.IRModule, target: tvm.target.Target = HOST) -> Any:
    with topi_int8.disabled():
        return tvm.compile(mod, target)


# ---- roads


@pytest.mark.parametrize("name", NETS)
def test_explicit_pipeline_equals_the_override(name: str) -> None:
    mod, x = quantized_net(name), image(name)
    by_override = run(tvm.compile(mod, HOST), x)
    with topi_int8.disabled():
        executable = tvm.compile(mod, HOST, relax_pipeline=topi_int8.pipeline(HOST))
    np.testing.assert_array_equal(run(executable, x), by_override)


def test_explicit_pipeline_runs_our_kernels_and_the_stock_one_does_not() -> None:
    mod = quantized_net("mobilenet")
    with topi_int8.disabled():
        ours = tvm.compile(mod, HOST, relax_pipeline=topi_int8.pipeline(HOST))
        theirs = tvm.compile(mod, HOST)
    names = "\n".join(m.inspect_source("ll") for m in (ours.mod, *ours.mod.imports)
                      if m.kind == "llvm")  # fmt: skip
    assert "conv2d_nchwc" in names and "depthwise_nchwc" in names and "matmul_" in names
    others = "\n".join(m.inspect_source("ll") for m in (theirs.mod, *theirs.mod.imports)
                       if m.kind == "llvm")  # fmt: skip
    assert "nchwc" not in others


@pytest.mark.parametrize("target", [HOST, str(HOST.kind.name)], ids=["Target", "str"])
def test_target_in_every_form(target: Any) -> None:
    assert isinstance(topi_int8.pipeline(target), tvm.transform.Pass)


@pytest.mark.parametrize("target", ["cuda -arch=sm_80", "c", {"kind": "opencl"}])
def test_other_targets_are_refused(target: Any) -> None:
    target = {"kind": "cuda", "arch": "sm_80"} if str(target).startswith("cuda") else target
    with pytest.raises(ValueError, match="allowed: targets of kind llvm"):
        topi_int8.pipeline(target)


def test_input_module_is_not_changed() -> None:
    mod = quantized_net("mobilenet")
    before = tvm.ir.save_json(mod)
    tvm.compile(mod, HOST)
    assert tvm.ir.save_json(mod) == before


# ---- results


@pytest.mark.parametrize("name", NETS)
def test_float_model_gives_what_stock_tvm_gives(name: str) -> None:
    mod, x = float_net(name), image(name)
    np.testing.assert_allclose(
        run(tvm.compile(mod, HOST), x), run(stock(mod), x), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", NETS)
def test_quantized_model_is_as_close_to_float_as_stock_tvm_s(name: str) -> None:
    x = image(name)
    real = run(stock(float_net(name)), x)
    ours = sqnr(real, run(tvm.compile(quantized_net(name), HOST), x))
    theirs = sqnr(real, run(stock(quantized_net(name)), x))
    assert theirs > 15
    assert ours > theirs - 1.5


@pytest.mark.parametrize("name", NETS)
def test_integer_passes_take_the_quantized_layers(name: str) -> None:
    count = interpret.count(tvm.transform.Sequential(integer_passes(HOST))(quantized_net(name)))
    wanted = {"mobilenet": ("conv2d", 7), "transformer": ("matmul", 8)}[name]
    assert count[f"topi_int8.{wanted[0]}"] == wanted[1]
    assert "relax.nn.conv2d" not in count and "relax.matmul" not in count


# ---- nothing stays naive


@pytest.mark.parametrize("kind", ["float", "quantized"])
@pytest.mark.parametrize("name", NETS)
def test_no_loop_nest_is_left_naive(name: str, kind: str) -> None:
    mod = float_net(name) if kind == "float" else quantized_net(name)
    assert topi_int8.explain(mod, HOST, show=False).naive == ()
    seen: list[tvm.IRModule] = []

    @tvm.instrument.pass_instrument
    class Watch:
        def run_after_pass(self, after: tvm.IRModule, info: Any) -> None:
            if info.name == "topi_int8.ScheduleRest":
                seen.append(after)

    with tvm.transform.PassContext(opt_level=2, instruments=[Watch()]):
        tvm.compile(mod, HOST)
    (scheduled,) = seen
    assert unscheduled(scheduled) == ()
    functions = [f for _, f in scheduled.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    assert functions and all(f.attrs["tirx.is_scheduled"] for f in functions)


# ---- deployment

RUNNER = """
import sys
import numpy as np
import tvm
from tvm import relax

library, source, result = sys.argv[1:]
vm = relax.VirtualMachine(tvm.runtime.load_module(library), tvm.cpu())
np.save(result, vm["main"](tvm.runtime.tensor(np.load(source))).numpy())
assert not [name for name in sys.modules if name.split(".")[0] in ("topi_int8", "intrinsics")]
"""


def run_exported(executable: Any, x: np.ndarray, folder: Path, threads: int = 1) -> np.ndarray:
    """Return what the exported library gives in a process that has only TVM."""
    executable.export_library(str(folder / "net.so"))
    np.save(folder / "x.npy", x)
    names = [str(folder / name) for name in ("net.so", "x.npy", "y.npy")]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *names], cwd=folder, capture_output=True, text=True,
        env={"TVM_NUM_THREADS": str(threads), "PATH": "/usr/bin:/bin"}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return np.load(folder / "y.npy")


def test_exported_library_runs_without_us_on_any_number_of_threads(tmp_path: Path) -> None:
    name = "mobilenet"
    x = image(name)
    executable = tvm.compile(quantized_net(name), topi_int8.host_target(num_cores=2))
    here = run(executable, x)
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        folder.mkdir()
        np.testing.assert_array_equal(run_exported(executable, x, folder, threads), here)


# ---- targets that are not ours


def test_the_gpu_pipeline_is_not_ours() -> None:
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"})
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 8, 8), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(Float(bb).conv(x, 8, 3))
        bb.emit_func_output(out)
    with target:
        enabled = relax.get_default_pipeline(target)(bb.get())
        with topi_int8.disabled():
            theirs = relax.get_default_pipeline(target)(bb.get())
    tvm.ir.assert_structural_equal(enabled, theirs)
    assert not [gvar for gvar in enabled.get_global_vars() if "nchwc" in gvar.name_hint]


@pytest.mark.parametrize(
    ("triple", "kernel"),
    [
        ("aarch64-linux-gnu", "conv2d_nchwc_neon"),
        ("riscv64-unknown-linux-gnu", "conv2d_nchwc_generic"),
    ],
)
def test_kernels_are_compiled_for_what_is_no_x86(triple: str, kernel: str) -> None:
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "num-cores": 1})
    executable = tvm.compile(quantized_net("mobilenet"), target)
    (module,) = [m for m in (executable.mod, *executable.mod.imports) if m.kind == "llvm"]
    assert kernel in module.inspect_source("ll")
