"""What `export_library` wrote runs without us: a net on AMX in a process that knows the TVM runtime
alone and asks Linux for the tiles itself, and single kernels from C++. And what `export` wrote is
loaded with its weights held once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

import topi_int8
from bench.worker import Worker
from tests import emulator, kernels, reference
from tests.graphs import build
from tests.grid import DEPTHWISE, EPILOGUE_BASES, EPILOGUES, MATMULS, SHAPES
from topi_int8.target import isa_target, runs_here

ROOT = Path(__file__).resolve().parents[1]
AMX = "amx_int8" if runs_here("amx_int8") else "amx_int8_avx2"
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed, it links exported libraries"
)

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from tests import emulator
emulator.install(["amx"])
import numpy as np
import tvm
from tvm import relax

library = tvm.runtime.load_module(sys.argv[2])
machine = relax.VirtualMachine(library, tvm.cpu())
out = machine["main"](tvm.runtime.tensor(np.load(sys.argv[3])))
np.save(sys.argv[4], out.numpy())
ours = [name for name in sys.modules if name.split(".")[0] in ("topi_int8", "intrinsics")]
assert not ours, ours
print(emulator.counts())
"""


def resnet_like(emit: Any, x: relax.Var) -> relax.Expr:
    """A stem, a pool, a residual block with a strided shortcut, a classifier."""
    rng, nn = np.random.default_rng(3), relax.op.nn

    def conv(data: Any, oc: int, kernel: int, stride: int, relu: bool = True) -> Any:
        ic = int(data.ty.shape[1])
        weight = rng.normal(0, (ic * kernel**2) ** -0.5, (oc, ic, kernel, kernel))
        y = emit(nn.conv2d(data, relax.const(weight.astype("float32")), strides=stride,
                           padding=kernel // 2))  # fmt: skip
        bias = rng.normal(0, 0.1, (1, oc, 1, 1)).astype("float32")
        y = emit(relax.op.add(y, relax.const(bias)))
        return emit(nn.relu(y)) if relu else y

    x = conv(x, 16, 7, 2)
    x = emit(nn.max_pool2d(x, (3, 3), strides=2, padding=1))
    y = conv(conv(x, 32, 3, 2), 32, 3, 1, relu=False)
    x = emit(nn.relu(emit(relax.op.add(y, conv(x, 32, 1, 2, relu=False)))))
    x = emit(relax.op.mean(x, [2, 3]))
    classifier = rng.normal(0, 0.2, (32, 10)).astype("float32")
    return emit(relax.op.matmul(x, relax.const(classifier)))


@needs_compiler
def test_amx_library_runs_in_a_process_without_us(tmp_path: Path) -> None:
    kernels.require(AMX)
    rng = np.random.default_rng(6)
    images = [rng.normal(0, 1, (1, 3, 32, 32)).astype("float32") for _ in range(3)]
    mod = topi_int8.quantize(build((1, 3, 32, 32), resnet_like), images)
    executable = tvm.compile(mod, isa_target(AMX))
    here = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(images[0]))

    library, given, out = (str(tmp_path / name) for name in ("net.so", "x.npy", "out.npy"))
    executable.export_library(library)
    np.save(given, images[0])
    flags = ["-shared", "-fPIC", "-O2", "-Wall"]
    spy = emulator.compile_cached("gcc", ROOT / "tests" / "syscall_spy.c", flags, ".so")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(ROOT), library, given, out],
        check=False, capture_output=True, text=True, timeout=300,
        env={**os.environ, "LD_PRELOAD": str(spy)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    # The library, and nobody else in that process, asked for tile state: once for the whole net.
    assert done.stderr.count("arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)") == 1
    if "amx" not in emulator.native_features():
        assert "tdpbusd" in done.stdout
    np.testing.assert_array_equal(np.load(out), here.numpy())


WIDE = 2048  # channels of a matmul whose weight has 4 MiB


def wide_matmuls(emit: Any, x: relax.Var) -> relax.Expr:
    """Four matmuls of as many weights each."""
    rng = np.random.default_rng(5)
    for _ in range(4):
        weight = rng.normal(0, WIDE**-0.5, (WIDE, WIDE)).astype("float32")
        x = emit(relax.op.matmul(x, relax.const(weight)))
    return x


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of one network exported twice, and its int8 module."""
    folder = tmp_path_factory.mktemp("wide")
    x = np.random.default_rng(6).normal(0, 1, (1, WIDE)).astype("float32")
    mod = topi_int8.quantize(build((1, WIDE), wide_matmuls), [x])
    target = topi_int8.host_target()
    np.save(folder / "x.npy", x)
    tvm.compile(mod, target).export_library(str(folder / "one.so"))
    topi_int8.export(mod, target, folder / "net.so", folder / "net.weights")
    return folder, mod


@needs_compiler
def test_weights_apart_give_the_same(wide: tuple[Path, Any]) -> None:
    folder, _ = wide
    x = tvm.runtime.tensor(np.load(folder / "x.npy"))
    tvm.get_global_func("vm.builtin.tensor_cache.load")(str(folder / "net.weights"), 1, 0)
    try:
        libraries = (tvm.runtime.load_module(str(folder / name)) for name in ("one.so", "net.so"))
        one, apart = (relax.VirtualMachine(lib, tvm.cpu())["main"](x).numpy() for lib in libraries)
    finally:
        tvm.get_global_func("vm.builtin.tensor_cache.clear")()
    np.testing.assert_array_equal(apart, one)


@needs_compiler
def test_weights_apart_are_held_once(wide: tuple[Path, Any]) -> None:
    folder, _ = wide
    size = 4 * WIDE**2
    shards = [path.stat().st_size for path in (folder / "net.weights").glob("params_shard_*.bin")]
    # A shard is what loading holds beside the tensors: no more than the largest of them.
    assert sum(shards) >= size and max(shards) == WIDE**2
    assert (folder / "one.so").stat().st_size > size > 10 * (folder / "net.so").stat().st_size

    added = {}
    for name, weights in (("one", ""), ("net", str(folder / "net.weights"))):
        worker = Worker([sys.executable, "-m", "bench.exported_worker"])
        try:
            answer = worker.ask(
                "memory", path=str(folder / f"{name}.so"), data=str(folder / "x.npy"),
                weights=weights,
            )  # fmt: skip
        finally:
            worker.close()
        added[name] = (answer["peak"] - answer["before"]) / size
    assert added["one"] > 3.9 and added["net"] < 1.75, added


@needs_compiler
def test_export_replaces_only_an_export(wide: tuple[Path, Any], tmp_path: Path) -> None:
    _, mod = wide
    (tmp_path / "net.weights").mkdir()
    stale = tmp_path / "net.weights" / "params_shard_99.bin"
    stale.write_bytes(b"old")
    args = mod, topi_int8.host_target(), tmp_path / "net.so", tmp_path / "net.weights"
    with pytest.raises(ValueError, match=r"net.weights'; allowed: a new folder, an empty one"):
        topi_int8.export(*args)
    (tmp_path / "net.weights" / "tensor-cache.json").write_text("{}")
    topi_int8.export(*args)
    assert not stale.exists()


# What the CPU runs natively, best first; the rest of the list is other tests' work.
HOST = next(isa for isa in ("avx512_vnni", "avx512_bw", "avx2", "generic") if runs_here(isa))
CASES: dict[str, kernels.Workload] = {
    "conv": replace(EPILOGUE_BASES["conv"], oc=48).with_epilogue(EPILOGUES["u8_residual_s8"]),
    "stem": SHAPES["stem_7x7"],
    "depthwise": DEPTHWISE["c128"],
    "matmul": MATMULS["u8"],
}


@needs_compiler
def test_kernels_run_from_cpp(tmp_path: Path) -> None:
    for name, work in CASES.items():
        built = kernels.build(work, HOST)
        ops = reference.random_operands(work, seed=7)
        built.library.export_library(str(tmp_path / f"{name}.so"))
        for i, array in enumerate(kernels.inputs(built, ops)):
            np.save(tmp_path / f"{name}.in{i}.npy", np.ascontiguousarray(array))
        want = kernels.pack_output(built, kernels.expected(work, ops))
        np.save(tmp_path / f"{name}.out.npy", np.ascontiguousarray(want))
        (tmp_path / f"{name}.tol").write_text("0" if want.dtype == "int32" else "1")
    done = subprocess.run(
        [emulator.build_runner(), tmp_path], check=False, capture_output=True, text=True, timeout=60
    )
    passed = [f"PASS {name}" for name in sorted(CASES)]
    assert done.stdout.splitlines() == [*passed, f"{len(CASES)} passed, 0 failed"], done.stderr
    assert done.returncode == 0


def test_a_kernel_without_tiles_asks_for_nothing() -> None:
    built = kernels.build(SHAPES["aligned"], "avx512_vnni")
    assert not kernels.Assembly.of(built.library).matching("syscall")
