#!/usr/bin/env python3
"""Set up a TVM that has Relay (0.17.dev0, LLVM 10, CPU use) for `make test-relay`.

usage: setup_relay_tvm.py DEST          -> DEST/venv/bin/python -c "from tvm import relay"

PyPI has no TVM with Relay for this Python, but the wheel of bitblas 0.1.0.post1
carries one (0.17.dev0). Only that TVM is unpacked; neither bitblas nor anything of NVIDIA's is
installed. The library was linked against CUDA, so three libraries of stubs answer the dynamic
linker: their functions report an error, and no test calls them.

Exit status: 0 when DEST is ready (at once, on a second run), 3 when this platform cannot have it,
the reason printed, and 1 when setting up failed.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import platform
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

UNSUPPORTED = 3  # the exit status

WHEEL = "bitblas==0.1.0.post1"
WHEEL_SHA256 = "5beaf38899671dc35da63ff31b8d7bea4d98a2c929a102fe40d2f3004cec391b"
_IN_WHEEL = "bitblas/3rdparty/tvm/"
_UNPACKED = ("python/", "build/libtvm.so", "LICENSE", "version.py")

# What TVM imports (0.17 predates NumPy 2), what topi_int8 does, and what the tests need.
PACKAGES = (
    "numpy<2", "attrs", "cloudpickle", "decorator", "psutil", "scipy", "tornado",
    "typing_extensions", "rich", "hypothesis", "pytest", "pytest-xdist",
)  # fmt: skip

GLIBC = (2, 34)  # the newest version that libtvm.so names
_PYTHONS = ((3, 11), (3, 12))  # topi_int8 needs 3.11, NumPy before 2 has wheels up to 3.12
_LIBSTDCXX = "_ZSt21__glibcxx_assert_failPKciS0_S0_"  # came with GLIBCXX_3.4.30, which it names
_LIBRARIES = ("libtinfo.so.6", "libz.so.1", "libstdc++.so.6")


@dataclass(frozen=True)
class Stub:
    """A library that libtvm.so wants to be there.

    Parameters
    ----------
    name : str
        Its SONAME.
    version : str or None
        Symbol version of its functions.
    functions : str
        Their names, separated by blanks.
    """

    name: str
    version: str | None
    functions: str

    def source(self) -> str:
        """Return its C code."""
        return "\n".join(map(_stub_function, self.functions.split())) + "\n"


def _stub_function(name: str) -> str:
    if name.endswith("GetErrorString"):
        return f'const char* {name}(int error) {{ return "stub: there is no CUDA here"; }}'
    if name == "cudaGetDeviceCount":
        return f"int {name}(int* count) {{ if (count) *count = 0; return 100; }}"
    return f"int {name}(void) {{ return 100; }}"  # cudaErrorNoDevice


STUBS = (
    Stub(
        "libcuda.so.1", None,
        "cuDeviceGetName cuFuncSetAttribute cuGetErrorName cuLaunchKernel cuMemsetD32_v2 "
        "cuModuleGetFunction cuModuleGetGlobal_v2 cuModuleLoadData cuModuleUnload",
    ),
    Stub(
        "libcudart.so.12", "libcudart.so.12",
        "cudaDeviceGetAttribute cudaEventCreate cudaEventDestroy cudaEventElapsedTime "
        "cudaEventRecord cudaEventSynchronize cudaFree cudaFreeHost cudaGetDevice "
        "cudaGetDeviceCount cudaGetDeviceProperties_v2 cudaGetErrorString cudaGraphDestroy "
        "cudaGraphExecDestroy cudaGraphInstantiate cudaGraphLaunch cudaMalloc cudaMallocHost "
        "cudaMemGetInfo cudaMemcpyAsync cudaMemcpyPeerAsync cudaMemsetAsync cudaSetDevice "
        "cudaStreamBeginCapture cudaStreamCreate cudaStreamCreateWithFlags cudaStreamDestroy "
        "cudaStreamEndCapture cudaStreamSynchronize cudaStreamWaitEvent",
    ),
    Stub(
        "libnvrtc.so.12", "libnvrtc.so.12",
        "nvrtcCompileProgram nvrtcCreateProgram nvrtcDestroyProgram nvrtcGetErrorString "
        "nvrtcGetPTX nvrtcGetPTXSize nvrtcGetProgramLog nvrtcGetProgramLogSize",
    ),
)  # fmt: skip

# Libraries loaded by hand satisfy those that libtvm.so names, in subprocesses too, and without
# LD_LIBRARY_PATH. TOPHUB: TVM would download tuning logs.
_BOOT = """\
import ctypes
import os

os.environ.setdefault("TOPHUB_LOCATION", "NONE")
for path in {paths!r}:
    ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
"""


# ---------------------------------------------------------------- what the platform must have


@dataclass(frozen=True)
class Platform:
    """What of this machine decides whether the wheel's TVM runs on it."""

    system: str
    machine: str
    libc: tuple[str, str]
    python: tuple[int, int]
    compiler: str | None
    missing: tuple[str, ...]

    @staticmethod
    def here() -> Platform:
        """Return this machine's."""
        return Platform(
            platform.system(), platform.machine(), platform.libc_ver(), sys.version_info[:2],
            next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None),
            tuple(filter(_is_missing, _LIBRARIES)),
        )  # fmt: skip

    def reason(self) -> str | None:
        """Return why it does not, or None if it does."""
        return next((text for holds, text in _REASONS if not holds(self)), None)


def _is_missing(library: str) -> bool:
    try:
        found = ctypes.CDLL(library)
    except OSError:
        return True
    return library.startswith("libstdc++") and not hasattr(found, _LIBSTDCXX)


def _has_glibc(here: Platform) -> bool:
    name, version = here.libc
    return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= GLIBC


_REASONS: tuple[tuple[Callable[[Platform], bool], str], ...] = (
    (
        lambda here: (here.system, here.machine) == ("Linux", "x86_64"),
        "its TVM with Relay is built for Linux on x86-64",
    ),
    (_has_glibc, f"its TVM with Relay needs glibc {'.'.join(map(str, GLIBC))} or later"),
    (
        lambda here: here.python in _PYTHONS,
        "NumPy before 2, which TVM 0.17 needs, has wheels for Python 3.11 and 3.12 only",
    ),
    (lambda here: here.compiler is not None, "there is no C compiler (gcc, cc or clang)"),
    (
        lambda here: not here.missing,
        f"one of {', '.join(_LIBRARIES)} (GLIBCXX_3.4.30) is missing or too old",
    ),
)


# ---------------------------------------------------------------- setting up


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


def download(folder: Path) -> Path:
    """Return the wheel in a folder, downloaded unless it is there.

    Raises
    ------
    ValueError
        When it is not the one we know.
    """
    pattern = f"{WHEEL.replace('==', '-')}-*.whl"
    if not list(folder.glob(pattern)):
        _run(
            sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps",
            "--disable-pip-version-check", "--only-binary=:all:", "--dest", folder, WHEEL,
        )  # fmt: skip
    (wheel,) = folder.glob(pattern)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(f"{wheel} has SHA-256 {found}, not {WHEEL_SHA256}; delete it")
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack the TVM of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inner = name.removeprefix(_IN_WHEEL)
            if name == inner or name.endswith("/") or not inner.startswith(_UNPACKED):
                continue
            path = folder / inner
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))


def build_stub(stub: Stub, compiler: str, folder: Path) -> Path:
    """Return a stub's library, built in a folder."""
    library, source = folder / stub.name, folder / f"{stub.name}.c"
    source.write_text(stub.source())
    flags = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{stub.name}"]
    if stub.version is not None:
        script = folder / f"{stub.name}.map"
        script.write_text(f"{stub.version} {{ global: *; }};\n")
        flags.append(f"-Wl,--version-script={script}")
    _run(compiler, *flags, "-o", library, source)
    return library


def make_venv(folder: Path, tvm: Path, stubs: Sequence[Path]) -> Path:
    """Return the interpreter of a virtual environment that imports that TVM."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    _run(
        python, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check",
        *PACKAGES,
    )  # fmt: skip
    (site,) = folder.glob("lib/python3.*/site-packages")
    (site / "_relay_tvm_boot.py").write_text(_BOOT.format(paths=list(map(str, stubs))))
    (site / "relay_tvm.pth").write_text(f"{tvm / 'python'}\nimport _relay_tvm_boot\n")
    return python


def state() -> str:
    """Return what a finished DEST was set up from: this file, and the interpreter."""
    text = Path(__file__).read_bytes()
    return f"{hashlib.sha256(text).hexdigest()} python {sys.version_info[:3]}\n"


def set_up(folder: Path, compiler: str) -> None:
    """Set everything up; does nothing where that is done."""
    stamp = folder / ".installed"
    if stamp.is_file() and stamp.read_text() == state():
        return
    print(f"== setting up TVM 0.17 with Relay in {folder}: once, about 130 MB of downloads")
    sys.stdout.flush()
    parts: Mapping[str, Path] = {name: folder / name for name in ("tvm", "stub", "venv")}
    for path in (stamp, *parts.values()):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    parts["stub"].mkdir(parents=True)
    unpack(download(folder), parts["tvm"])
    stubs = [build_stub(stub, compiler, parts["stub"]) for stub in STUBS]
    python = make_venv(parts["venv"], parts["tvm"], stubs)
    _run(python, "-c", "import tvm; from tvm import relay; print('== TVM', tvm.__version__)")
    stamp.write_text(state())


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dest", type=Path)
    folder = parser.parse_args().dest.resolve()
    here = Platform.here()
    reason = here.reason()
    if reason is not None:
        print(f"no TVM with Relay: {reason} (this is {here.system} {here.machine}, "
              f"{' '.join(here.libc)}, Python {'.'.join(map(str, here.python))})")  # fmt: skip
        return UNSUPPORTED
    set_up(folder, here.compiler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
