"""Links a compiled module into a library for another machine: finds the compiler that can."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tvm.target import Target

from . import _host
from . import target as targets

# Architecture -> the GNU triple that its cross compiler is named after on Debian, and the package.
GNU = {
    "aarch64": ("aarch64-linux-gnu", "gcc-aarch64-linux-gnu"),
    "arm": ("arm-linux-gnueabihf", "gcc-arm-linux-gnueabihf"),
    "x86_64": ("x86_64-linux-gnu", "gcc-x86-64-linux-gnu"),
}
_NATIVE = ("gcc", "cc", "clang")


class LinkError(RuntimeError):
    """The linking failed; the message has the command and its words."""


def find(target: Target, cc: str = "") -> tuple[str, ...]:
    """Return the command, a C compiler's, that links for a Target.

    Parameters
    ----------
    cc : str
        The command to use, with arguments, as ``clang --target=aarch64-linux-gnu -fuse-ld=lld``.
        Empty: the GNU cross compiler, clang with lld, or (for this machine) the native one.

    Raises
    ------
    ValueError
        When there is none; with the Debian package that has one.
    """
    if cc:
        command = tuple(shlex.split(cc))
        if not command or shutil.which(command[0]) is None:
            raise ValueError(f"cc is {cc!r}; allowed: a C compiler on the PATH, with arguments")
        return command
    arch = targets.features(target).arch
    triple, package = GNU.get(arch, (f"{arch}-linux-gnu", f"gcc-{arch}-linux-gnu"))
    gnu = f"{triple}-gcc"
    for name in (*(_NATIVE if arch == _host.machine() else ()), gnu):
        if shutil.which(name):
            return (name,)
    if shutil.which("clang") and shutil.which("ld.lld"):
        # No C library of the target is needed: what the code calls of it is in the process already.
        return ("clang", f"--target={triple}", "-fuse-ld=lld", "-nostdlib")
    raise ValueError(
        f"no compiler here links for {arch}: install Debian's {package} ({gnu}), or clang and lld, "
        "or name one with --cc"
    )


def linker(command: tuple[str, ...]) -> Callable[..., None]:
    """Return the command as the ``fcompile`` that TVM's export_library takes."""

    def fcompile(output: str, objects: list[str], options: Any = None, **_: Any) -> None:
        line = [*command, "-shared", "-fPIC", "-o", output, *objects, *(options or [])]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LinkError(f"{shlex.join(command)}: {done.stderr.strip()[-500:]}")

    return fcompile


def link(executable: Any, path: Path, command: tuple[str, ...]) -> Path:
    """Write what `tvm.compile` built as a shared library; return its path.

    Raises
    ------
    LinkError
        With the linker's words.
    """
    executable.export_library(str(path), fcompile=linker(command))
    return path
