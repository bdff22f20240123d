"""The ways of running ARM code here do catch faults: accesses outside arrays, instructions that the
CPU model lacks, a server that dies.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm

from intrinsics import compat
from topi_int8.target import isa_target

from . import HERE, EmulatorError, arm, arm_rpc
from .bare import BareProgram, KernelFault, build_program

pytestmark = pytest.mark.arm

HEAD = """
{PF}
def main(A: T.Buffer((100,), "uint8"), B: T.Buffer((100,), "uint8")) -> None:
    T.func_attr({"global_symbol": "NAME"})
    with {block}("root"):
"""
LOOP = "        for i in T.serial(0, 100):\n            B[i] = "

# Name -> what stands in the block, and what the runner has to say.
KERNELS = {
    "copy": (LOOP + "A[i]\n", ""),
    "reads_behind": (LOOP + "A[i + 29]\n", "touched 28 bytes behind argument 0"),
    "reads_before": (LOOP + "A[i - 4096]\n", "bytes before argument 0"),
    "writes_behind": (LOOP + "A[i]\n        B[100] = A[0]\n", "wrote 0 bytes behind argument 1"),
    "writes_before": (LOOP + "A[i]\n        B[-3] = A[0]\n", "wrote 3 bytes before argument 1"),
    "workspace": (
        "        W = T.alloc_buffer((2000,), 'uint8')\n"
        "        for i in T.serial(0, 2010):\n            W[i] = A[i % 100]\n"
        "        for i in T.serial(0, 100):\n            B[i] = W[i]\n",
        "wrote 0 bytes behind a workspace of 2000 bytes",
    ),
    "far_away": (LOOP + "A[i]\n        B[123456789] = A[0]\n", "SIGSEGV far from every array"),
}
SDOT = """
{PF}
def main(A: T.Buffer((16,), "int8"), B: T.Buffer((4,), "int32")) -> None:
    T.func_attr({"global_symbol": "sdot"})
    with {block}("root"):
        B[T.ramp(T.int32(0), 1, 4)] = T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.sdot.v4i32.v16i8"), {NSIG:3}
            T.Broadcast(T.int32(0), 4), A.vload([0], "int8x16"), A.vload([0], "int8x16"),
            dtype="int32x4"
        )
"""


def needs(isa: str, rpc: bool = False) -> None:
    """Skip the running test, with the reason, unless kernels for this ISA run here."""
    reason = arm.problem(isa, rpc)
    if reason:
        pytest.skip(reason)


def _compiled(isa: str) -> tvm.runtime.Executable:
    functions = {
        name: compat.parse_prim_func(HEAD.replace("NAME", name) + body)
        for name, (body, _) in KERNELS.items()
    }
    return tvm.compile(tvm.IRModule(functions), target=isa_target(isa))


def _arrays() -> list[np.ndarray]:
    return [np.arange(100, dtype="uint8"), np.zeros(100, "uint8")]


@pytest.mark.parametrize("isa", ["neon", "armv7_neon"])
def test_an_access_outside_of_the_arrays_is_named(isa: str, tmp_path: Path) -> None:
    needs(isa)
    program = build_program(_compiled(isa), list(KERNELS), isa, tmp_path)
    for name, (_, words) in KERNELS.items():
        if not words:
            given, stored = program.call(name, _arrays())
            assert np.array_equal(given, _arrays()[0]) and np.array_equal(stored, given)
            continue
        with pytest.raises(KernelFault) as caught:
            program.call(name, _arrays())
        assert words in str(caught.value), name


def test_a_wrong_argument_is_refused_by_the_kernel(tmp_path: Path) -> None:
    needs("neon")
    program = build_program(_compiled("neon"), ["copy"], "neon", tmp_path)
    with pytest.raises(KernelFault, match="the kernel failed"):
        program.call("copy", [np.zeros(100, "int8"), np.zeros(100, "uint8")])
    with pytest.raises(KernelFault, match="usage"):
        program.call("no_such_kernel", _arrays())


@pytest.fixture
def sdot_program(tmp_path: Path) -> BareProgram:
    needs("neon_dotprod")
    module = tvm.IRModule({"sdot": compat.parse_prim_func(SDOT)})
    executable = tvm.compile(module, target=isa_target("neon_dotprod"))
    return build_program(executable, ["sdot"], "neon_dotprod", tmp_path)


def test_a_cpu_model_refuses_what_it_lacks(sdot_program: BareProgram) -> None:
    arrays = [np.arange(16, dtype="int8"), np.zeros(4, "int32")]
    want = (np.arange(16).reshape(4, 4) ** 2).sum(1)
    assert np.array_equal(sdot_program.call("sdot", arrays)[1], want)
    with pytest.raises(KernelFault, match="signal 4"):
        sdot_program.call("sdot", arrays, cpu="cortex-a72")


def test_a_dead_server_is_reported_and_replaced() -> None:
    needs("neon", rpc=True)
    cpu = arm.MACHINES["neon"].cpu
    executable = _compiled("neon")
    with pytest.raises(EmulatorError, match="the server's log"), arm_rpc.session(cpu) as server:
        module = server.load(executable, "neon")
        arm_rpc.runner(server, module)("far_away", _arrays())
    assert not server.alive and not server.folder.exists()
    with arm_rpc.session(cpu) as server:
        module = server.load(executable, "neon")
        given, stored = arm_rpc.runner(server, module)("copy", _arrays())
        assert np.array_equal(stored, given)


def test_setup_does_nothing_the_second_time() -> None:
    needs("neon", rpc=True)
    command = [HERE / "setup_arm.sh"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "as it was" in done.stdout
