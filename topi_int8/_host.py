"""What the CPU under this process can do: asked of the kernel, not guessed from a name."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) on x86-64: Linux grants AMX tile state on
# request only (Documentation/arch/x86/xstate.rst).
SYS_ARCH_PRCTL = 158
ARCH_REQ_XCOMP_PERM = 0x1023
XFEATURE_XTILEDATA = 18


def _processors() -> Iterator[dict[str, str]]:
    """The blocks of /proc/cpuinfo, one a logical CPU; none where there is no such file."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for block in text.split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        entry = {key.strip(): value.strip() for key, _, value in pairs}
        if "processor" in entry:
            yield entry


def architecture(name: str) -> str:
    """Our spelling (x86_64, aarch64, arm, ...) of what a kernel or an LLVM triple calls it.

    32-bit ARM has one name; a 32-bit process under a 64-bit kernel says armv8l.
    """
    if name.startswith(("armv", "thumbv")) or name == "thumb":
        return "arm"
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def machine() -> str:
    """The architecture of this process, in our spelling."""
    return architecture(platform.machine().lower())


def cpu_flags() -> frozenset[str]:
    """Flags that every core reports, in the kernel's spelling; empty where it does not tell.

    Linux drops a flag whose register state it does not save, so a flag here is usable in user space
    (AMX tiles excepted, see `amx_permitted`). The intersection is taken because cores of one CPU
    may differ.
    """
    cores = [
        frozenset(entry.get("flags", entry.get("Features", "")).split()) for entry in _processors()
    ]
    return frozenset.intersection(*cores) if cores else frozenset()


def physical_cores() -> int:
    """Number of physical cores this process may run on (hyper-threads count once)."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if allowed is None:
        return os.cpu_count() or 1
    cores = {
        (entry.get("physical id"), entry.get("core id", entry["processor"]))
        for entry in _processors()
        if int(entry["processor"]) in allowed
    }
    return len(cores) or len(allowed)


def amx_permitted() -> bool:
    """Ask the kernel for AMX tile state for this process; True when it is granted.

    The grant holds for the process's life and for threads started later; asking twice is harmless.
    """
    if platform.system() != "Linux" or machine() != "x86_64":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    arguments = (SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return libc.syscall(*map(ctypes.c_long, arguments)) == 0
