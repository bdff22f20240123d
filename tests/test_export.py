"""What `export_library` wrote runs without us: a net on AMX in a process that knows the TVM runtime
alone and asks Linux for the tiles itself, and single kernels from C++.
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
