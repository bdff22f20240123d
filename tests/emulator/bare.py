"""Kernels run alone under qemu: linked statically with ``bare_runner.cpp``, one process a call.

Arrays and workspaces lie between unreadable pages, so that an access outside of them is named. No
TVM is needed on the other side: so it serves 32-bit ARM too, and a call takes milliseconds.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tvm

from . import HERE, EmulatorError, _package_dir, compile_cached
from .arm import MACHINES, Machine, export_objects, link

_CODES = {"i": 0, "u": 1, "f": 2}  # numpy's kind -> DLPack's type code
_TIMEOUT = 300  # seconds of one kernel: the grid's take far less than one


class KernelFault(EmulatorError):
    """A kernel touched memory outside its arrays, executed what the CPU lacks, or failed."""


@dataclass(frozen=True)
class BareProgram:
    """Kernels linked with the runner, and the machine that they were compiled for."""

    path: Path
    machine: Machine

    def call(self, name: str, arrays: Sequence[np.ndarray], cpu: str | None = None) -> list:
        """Return all arrays as the kernel leaves them.

        Parameters
        ----------
        name : str
            The kernel.
        arrays : sequence of numpy.ndarray
            Its arguments in order, the output as well.
        cpu : str, optional
            Another model than the machine's own.

        Raises
        ------
        KernelFault
            With what the runner or qemu said.
        """
        command = [self.machine.qemu, "-cpu", cpu or self.machine.cpu, str(self.path), name]
        done = subprocess.run(
            command, input=_packed(arrays), check=False, capture_output=True, timeout=_TIMEOUT
        )
        if done.returncode != 0:
            words = done.stderr.decode(errors="replace").strip()
            raise KernelFault(f"{' '.join(command)} ended with {done.returncode}: {words}")
        return _unpacked(done.stdout, arrays)


def build_program(
    executable: tvm.runtime.Executable, names: Sequence[str], isa: str, folder: Path
) -> BareProgram:
    """Link the named kernels of one compiled module into a program for the ISA's machine."""
    machine = MACHINES[isa]
    include = f"-isystem{_package_dir('tvm_ffi') / 'include'}"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", include, "-c"]
    runner = compile_cached(machine.compiler, HERE / "bare_runner.cpp", flags, ".o")
    objects = export_objects(executable, folder)
    table = folder / "table.cpp"
    table.write_text(_table(names))
    arguments = ["-std=c++17", include, "-static", str(table), str(runner), *map(str, objects)]
    return BareProgram(link(machine.compiler, folder / "program", [*arguments, "-lm"]), machine)


def _table(names: Sequence[str]) -> str:
    """The names and functions of the kernels, as bare_runner.cpp declares them."""
    declare = "int __tvm_ffi_{0}(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);"
    lines = ["#include <tvm/ffi/c_api.h>", 'extern "C" {']
    lines += [declare.format(name) for name in names]
    lines += ["}", "struct Kernel { const char* name; TVMFFISafeCallType function; };"]
    lines += ["extern const Kernel kKernels[] = {"]
    lines += [f'  {{"{name}", __tvm_ffi_{name}}},' for name in names]
    lines += ["};", f"extern const int kKernelCount = {len(names)};", ""]
    return "\n".join(lines)


def _packed(arrays: Sequence[np.ndarray]) -> bytes:
    """The runner's standard input. All machines here are little-endian."""
    parts = [struct.pack("<i", len(arrays))]
    for array in arrays:
        code, bits = _CODES[array.dtype.kind], 8 * array.dtype.itemsize
        parts.append(struct.pack(f"<3i{array.ndim}q", code, bits, array.ndim, *array.shape))
        parts.append(np.ascontiguousarray(array).tobytes())
    return b"".join(parts)


def _unpacked(data: bytes, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    if len(data) != sum(array.nbytes for array in like):
        raise EmulatorError(f"the runner wrote {len(data)} bytes")
    arrays, at = [], 0
    for array in like:
        flat = np.frombuffer(data, array.dtype, array.size, at)
        arrays.append(flat.reshape(array.shape))
        at += array.nbytes
    return arrays
