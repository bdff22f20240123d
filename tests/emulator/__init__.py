"""Executing kernels for ISAs that this machine lacks.

Tools, all for correctness only:

* ``install(["amx", "avxvnni"])``: a SIGILL-trap emulator inside this process (``amx_trap.c``),
* ``bochs.py``: a whole emulated machine, for AVX-512 and AVX512-VNNI,
* ``arm.py``, ``bare.py``, ``arm_rpc.py``: ARM kernels under qemu, alone or in TVM's RPC server,
* ``build_runner()``: a C++ program (``runner.cpp``) that runs exported kernels with nothing but the
  TVM runtime, here or inside the emulated machine.

Everything is compiled on demand with the system's gcc into ``build/emulator/``, and again only when
its source or command line changes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD_DIR = HERE.parents[1] / "build" / "emulator"

_FEATURE_BITS = {"amx": 1, "avxvnni": 2}


class EmulatorError(RuntimeError):
    """The emulator cannot be built or installed on this machine."""


def compile_cached(
    compiler: str, source: Path, flags: Sequence[str], suffix: str, env_key: str = ""
) -> Path:
    """Compiles one source file into BUILD_DIR unless the same was already built; returns the path.

    ``env_key`` is anything else that the result depends on (headers, library versions).
    """
    if shutil.which(compiler) is None:
        raise EmulatorError(f"{compiler} is needed to build {source.name} and is not installed")
    key = "\0".join([compiler, *flags, env_key]).encode() + source.read_bytes()
    out = BUILD_DIR / f"{source.stem}-{hashlib.sha256(key).hexdigest()[:16]}{suffix}"
    if out.exists():
        return out
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=BUILD_DIR, suffix=".tmp")
    os.close(handle)
    # flags come last: libraries must follow the source that needs them
    command = [compiler, "-o", temporary, str(source), *flags]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        os.unlink(temporary)
        raise EmulatorError(f"{' '.join(command)} failed:\n{done.stderr}")
    os.chmod(temporary, 0o755)
    os.replace(temporary, out)  # atomic: several test processes may build at once
    return out


def native_features() -> set[str]:
    """Those of the emulated features that this CPU has (and Linux shows in /proc/cpuinfo)."""
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.split(":", 1)[1].split())
            break
    native = set()
    if {"amx_tile", "amx_int8"} <= flags:
        native.add("amx")
    if "avx_vnni" in flags:
        native.add("avxvnni")
    return native


@functools.cache
def _library() -> ctypes.CDLL:
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        raise EmulatorError(
            f"the SIGILL emulator needs x86-64 Linux; this is {platform.machine()} {sys.platform}"
        )
    if " avx2 " not in Path("/proc/cpuinfo").read_text().replace("\n", " "):
        raise EmulatorError("the SIGILL emulator itself is compiled for AVX2, which this CPU lacks")
    flags = ["-std=c11", "-O3", "-mavx2", "-Wall", "-Wextra", "-fPIC", "-shared"]
    lib = ctypes.CDLL(str(compile_cached("gcc", HERE / "amx_trap.c", flags, ".so")), use_errno=True)
    lib.isa_emulator_op_name.restype = ctypes.c_char_p
    lib.isa_emulator_count.restype = ctypes.c_uint64
    lib.isa_emulator_traps.restype = ctypes.c_uint64
    return lib


def install(features: Sequence[str] = ("amx", "avxvnni")) -> None:
    """Lets this process execute the named ISAs.  Idempotent; harmless on a CPU that has them.

    Call it again after anything that installs its own SIGILL handler (``faulthandler.enable()``).
    With ISA_EMULATOR_TRACE=1 in the environment every emulated instruction is named on stderr.
    """
    unknown = [f for f in features if f not in _FEATURE_BITS]
    if unknown:
        raise ValueError(f"unknown features {unknown}; known: {sorted(_FEATURE_BITS)}")
    mask = sum(_FEATURE_BITS[f] for f in set(features))
    if _library().isa_emulator_install(ctypes.c_uint(mask)) != 0:
        raise OSError(ctypes.get_errno(), "sigaction(SIGILL) failed")


def counts() -> dict[str, int]:
    """Instructions emulated since the last reset(), by mnemonic; those never seen are left out.

    Counts nothing where the CPU executed the instruction itself (see native_features()).
    """
    lib = _library()
    all_counts = {
        lib.isa_emulator_op_name(op).decode(): lib.isa_emulator_count(op)
        for op in range(lib.isa_emulator_op_count())
    }
    return {name: n for name, n in all_counts.items() if n}


def traps() -> int:
    """Signals taken since the last reset(): at most sum(counts().values()), as runs of adjacent
    instructions are done at once."""
    return _library().isa_emulator_traps()


def reset() -> None:
    """Sets all counters to zero."""
    _library().isa_emulator_reset()


def _package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # does not import the package
    if spec is None or spec.origin is None:
        raise EmulatorError(f"the Python package {name} is not installed")
    return Path(spec.origin).parent


def runtime_libraries() -> list[Path]:
    """The shared libraries that a program running exported kernels needs."""
    return [
        _package_dir("tvm") / "lib" / "libtvm_runtime.so",
        _package_dir("tvm_ffi") / "lib" / "libtvm_ffi.so",
    ]


def build_runner() -> Path:
    """Builds runner.cpp against the TVM runtime of this environment; returns the program's path."""
    libraries = runtime_libraries()
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra"]
    flags += [f"-isystem{_package_dir('tvm_ffi') / 'include'}"]
    # --no-as-needed: the kernels need libtvm_runtime's symbols although runner.cpp names none
    flags += ["-Wl,--no-as-needed", *map(str, libraries)]
    flags += [f"-Wl,-rpath,{lib.parent}" for lib in libraries]
    key = ",".join(f"{lib.stat().st_size}:{lib.stat().st_mtime_ns}" for lib in libraries)
    return compile_cached("g++", HERE / "runner.cpp", flags, "", key)
