"""ARM without a board: which instruction set runs where under qemu, and how libraries get there.

``setup_arm.sh`` installs what is needed. Two ways of running kernels stand on this module:
``bare.py`` runs them alone between unreadable pages, ``arm_rpc.py`` in TVM's own RPC server on an
aarch64 Python. A CPU model is chosen that has as little as possible beyond the instruction set, so
that an instruction from beyond it ends the program.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tvm

from . import BUILD_DIR, HERE, EmulatorError

ARM_DIR = BUILD_DIR / "arm"
PYTHON = ARM_DIR / "python"
RECIPE = "tests/emulator/setup_arm.sh (as root) installs it"


@dataclass(frozen=True)
class Machine:
    """What executes an instruction set here.

    Parameters
    ----------
    qemu : str
        The emulator of the architecture.
    cpus : tuple of str
        CPU models of it, the one with the least beyond the instruction set first. qemu 7.2 has none
        with i8mm but ``max``, which has everything.
    compiler : str
        The C++ compiler that links for it.
    """

    qemu: str
    cpus: tuple[str, ...]
    compiler: str

    def __post_init__(self) -> None:
        if not self.cpus:
            raise ValueError(f"{self.qemu}: cpus is empty")

    @property
    def cpu(self) -> str:
        """The first of the models that the installed qemu has."""
        return next((cpu for cpu in self.cpus if cpu in _models(self.qemu)), self.cpus[-1])


def _aarch64(*cpus: str) -> Machine:
    return Machine("qemu-aarch64", cpus, "aarch64-linux-gnu-g++")


MACHINES: dict[str, Machine] = {
    "neon": _aarch64("cortex-a72"),
    "neon_dotprod": _aarch64("neoverse-n1", "max"),
    "neon_i8mm": _aarch64("max"),
    "armv7_neon": Machine("qemu-arm", ("cortex-a8",), "arm-linux-gnueabihf-g++"),
}


@functools.cache
def _models(qemu: str) -> frozenset[str]:
    command = [qemu, "-cpu", "help"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    return frozenset(done.stdout.split())


def problem(isa: str, rpc: bool = False) -> str | None:
    """Why kernels for this instruction set cannot be run here, or None if they can.

    With ``rpc``, the aarch64 Python of TVM's RPC server is asked for too.
    """
    machine = MACHINES[isa]
    for tool in (machine.qemu, machine.compiler):
        if shutil.which(tool) is None:
            return f"{tool} is not installed; {RECIPE}"
    if not _models(machine.qemu).intersection(machine.cpus):
        return f"{machine.qemu} has none of the CPU models {', '.join(machine.cpus)}"
    if rpc and _installed_key() != _wanted_key():
        return f"no aarch64 Python of these pins is in {ARM_DIR}; {RECIPE}"
    return None


def _installed_key() -> str:
    stamp = ARM_DIR / ".installed"
    return stamp.read_text().strip() if stamp.exists() else ""


def _wanted_key() -> str:
    """As setup_arm.sh computes it."""
    sources = (HERE / "setup_arm.sh", HERE.parents[1] / "topi_int8" / "_requirements.py")
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def link(compiler: str, output: Path, arguments: Sequence[str]) -> Path:
    """Run a cross compiler; raise `EmulatorError` with its words when it fails."""
    command = [compiler, "-o", str(output), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise EmulatorError(f"{' '.join(command)} failed:\n{done.stderr}")
    return output


def export(executable: tvm.runtime.Executable, path: Path, isa: str) -> Path:
    """Write a library that TVM on the instruction set's machine loads."""

    def shared(output: str, objects: Sequence[str], *_: object, **__: object) -> None:
        link(MACHINES[isa].compiler, Path(output), ["-shared", "-fPIC", *objects])

    executable.export_library(str(path), fcompile=shared)
    return path


def export_objects(executable: tvm.runtime.Executable, folder: Path) -> list[Path]:
    """Write the object files of compiled kernels into a folder; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    kept: list[Path] = []

    def keep(output: str, objects: Sequence[str], *_: object, **__: object) -> None:
        for item in objects:
            kept.append(Path(shutil.copy(item, folder)))
        Path(output).touch()

    executable.export_library(str(folder / "unused.so"), fcompile=keep)
    return kept
