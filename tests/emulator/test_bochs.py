"""Kernels compiled by TVM, run by the C++ runner: natively, and with AVX-512 in a virtual machine.

The emulated machine needs Debian's bochs and a kernel image, which setup_bochs.sh installs.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm

from intrinsics import compat

from . import build_runner, runtime_libraries
from .bochs import problem, run

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed, it links kernels and the runner"
)

# out[i] = sum over k of a[k] * b[k / 4, i, k % 4], 16 output channels, 256 input channels
KERNEL = """
{PF}
def main(
    A: T.Buffer((256,), "uint8"), B: T.Buffer((64, 16, 4), "int8"), C: T.Buffer((16,), "int32")
) -> None:
    T.func_attr({"global_symbol": "main"})
    with {block}("root"):
        C[T.ramp(T.int32(0), 1, 16)] = T.Broadcast(T.int32(0), 16)
        for k in T.serial(0, 64):
            C[T.ramp(T.int32(0), 1, 16)] = {dot}
"""


def vnni_kernel() -> object:
    """KERNEL with one 512-bit vpdpbusd per step."""
    word = 'T.Broadcast(T.reinterpret("int32", A.vload([k * 4], "uint8x4")), 16)'
    weights = 'B.vload([k, 0, 0], "int8x64")'
    if compat.llvm_major() >= 22:  # the intrinsic took vectors of int32 before
        word = f'T.reinterpret("int8x64", {word})'
    else:
        weights = f'T.reinterpret("int32x16", {weights})'
    name = 'T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.512")'
    sums = 'C.vload([0], "int32x16")'
    dot = f'T.call_llvm_pure_intrin({name}, {{NSIG:3}} {sums}, {word}, {weights}, dtype="int32x16")'
    return compat.parse_prim_func(KERNEL.replace("{dot}", dot))


def plain_kernel() -> object:
    """The same result from plain loops, for any CPU."""
    text = KERNEL.split("    with {block}")[0] + (
        '    with {block}("root"):\n'
        "        for i in T.serial(0, 16):\n"
        "            C[i] = 0\n"
        "            for k in T.serial(0, 256):\n"
        '                product = T.Cast("int32", A[k]) * T.Cast("int32", B[k // 4, i, k % 4])\n'
        "                C[i] = C[i] + product\n"
    )
    return compat.parse_prim_func(text)


def export_case(folder: Path, name: str, kernel: object, mcpu: str, error: int = 0) -> None:
    """Writes one case of the runner; the expected output is off by error."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, 256, dtype=np.uint8)
    b = rng.integers(-128, 128, (64, 16, 4), dtype=np.int8)
    out = np.einsum("kj,kij->i", a.reshape(64, 4).astype(np.int32), b.astype(np.int32))
    target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu})
    tvm.compile(tvm.IRModule({"main": kernel}), target=target).export_library(
        str(folder / f"{name}.so")
    )
    np.save(folder / f"{name}.in0.npy", a)
    np.save(folder / f"{name}.in1.npy", b)
    np.save(folder / f"{name}.out.npy", out.astype(np.int32) + np.int32(error))


@needs_compiler
def test_runner_natively(tmp_path: Path) -> None:
    export_case(tmp_path, "good", plain_kernel(), "x86-64")
    export_case(tmp_path, "near", plain_kernel(), "x86-64", error=3)
    (tmp_path / "near.tol").write_text("3\n")
    done = subprocess.run(
        [build_runner(), tmp_path], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == ["PASS good", "PASS near", "2 passed, 0 failed"]
    assert done.returncode == 0


@needs_compiler
def test_runner_reports_failures(tmp_path: Path) -> None:
    export_case(tmp_path, "bad", plain_kernel(), "x86-64", error=3)
    (tmp_path / "bad.tol").write_text("2")
    done = subprocess.run(
        [build_runner(), tmp_path], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == [
        "FAIL bad maxdiff 3 (allowed 2), 16 of 16 elements",
        "0 passed, 1 failed",
    ]
    assert done.returncode == 1


@needs_compiler
def test_runner_needs_no_python_and_no_compiler() -> None:
    """The runner's libraries are the TVM runtime and the C and C++ ones."""
    done = subprocess.run(
        ["ldd", build_runner()], check=True, capture_output=True, text=True, timeout=60
    )
    names = {line.split()[0].split(".so")[0] for line in done.stdout.splitlines()}
    runtime = {lib.name.split(".so")[0] for lib in runtime_libraries()}
    assert runtime <= names
    assert not any("python" in name or "compiler" in name for name in names)


@needs_compiler
@pytest.mark.slow_emulator
def test_avx512_vnni_in_bochs(tmp_path: Path) -> None:
    reason = problem()
    if reason:
        pytest.skip(reason)
    export_case(tmp_path, "plain", plain_kernel(), "icelake-client")
    export_case(tmp_path, "vnni", vnni_kernel(), "icelake-client")
    export_case(tmp_path, "wrong", vnni_kernel(), "icelake-client", error=1)
    if shutil.which("objdump"):
        library = str(tmp_path / "vnni.so")
        assembly = subprocess.run(["objdump", "-d", library], check=True, capture_output=True)
        assert any(b"vpdpbusd" in line and b"zmm" in line for line in assembly.stdout.splitlines())
    files = {f"/data/{path.name}": path for path in tmp_path.iterdir()}
    result = run(build_runner(), ["/data"], files, model="corei7_icelake_u")
    print(f"{result.seconds:.0f} s in Bochs\n{result.output}")
    lines = [line for line in result.output.splitlines() if not line.startswith("running ")]
    assert lines == [
        "PASS plain",
        "PASS vnni",
        "FAIL wrong maxdiff 1 (allowed 0), 16 of 16 elements",
        "2 passed, 1 failed",
    ]
    assert result.exit_code == 1
