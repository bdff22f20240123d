"""The machine a number belongs to: its description, and the cores a run is pinned to."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from topi_int8 import _host

# What decides a kernel's speed; a full flag list drowns it.
_TELLING_FLAGS = ("avx2", "fma", "avx512", "avx_vnni", "avxvnni", "amx_")

_PACKAGES = ("topi_int8", "apache-tvm", "apache-tvm-ffi", "numpy")


def model_name() -> str:
    """Return the CPU's model name as the kernel gives it."""
    for entry in _host._processors():
        if "model name" in entry:
            return entry["model name"]
    return platform.processor() or _host.machine()


def now() -> str:
    """Return the time as numbers carry it: ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str:
    """Return the commit of this checkout, "+changes" when files differ; "unknown" outside git."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    except OSError:
        return "unknown"
    return (head + ("+changes" if changed else "")) if head else "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe() -> dict[str, object]:
    """Return what a table of numbers must say of its machine, as JSON values."""
    flags = sorted(f for f in _host.cpu_flags() if f.startswith(_TELLING_FLAGS))
    return {
        "cpu": model_name(),
        "flags": flags,
        "cores": _host.physical_cores(),
        "kernel": platform.release(),
        "date": now(),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {p: _version(p) for p in _PACKAGES},
    }


@contextlib.contextmanager
def pinned(threads: int, cpus: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Pin this process, and what it starts, to as many cores as it has threads.

    Must be entered before TVM's first parallel launch: its pool reads the variables set here once.

    Parameters
    ----------
    threads : int
        Threads of every kernel and rival.
    cpus : tuple of int
        The cores; empty means the last `threads` this process may run on (the first serve
        interrupts).

    Yields
    ------
    tuple of int
        The cores.

    Raises
    ------
    ValueError
        When there are not that many cores.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}; allowed: 1 or more")
    allowed = sorted(os.sched_getaffinity(0))
    chosen = tuple(cpus) or tuple(allowed[-threads:])
    if not set(chosen) <= set(allowed):
        raise ValueError(f"cpu is {','.join(map(str, chosen))}; allowed: {allowed}")
    if len(chosen) < threads:
        raise ValueError(f"threads is {threads}; allowed: at most {len(chosen)} on cores {chosen}")
    settings = {
        "TVM_NUM_THREADS": str(threads),
        # TVM would unpin the main thread and spread over every core.
        "TVM_BIND_THREADS": "0",
        "OMP_NUM_THREADS": str(threads),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, allowed)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
