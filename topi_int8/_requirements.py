"""Refuses a TVM this package was not built for, before that TVM is imported.

Imports the standard library only: a wrong pair of wheels can crash the process inside TVM, and
setup.py runs this file on its own to read the pins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

TVM = "apache-tvm"
FFI = "apache-tvm-ffi"


@dataclass(frozen=True)
class Pair:
    """One TVM release and the FFI release it works with.

    Parameters
    ----------
    tvm : str
        Exact version of the ``apache-tvm`` distribution.
    ffi : str or None
        Exact version of ``apache-tvm-ffi``; None for a TVM that has no such distribution (Relay's).
    """

    tvm: str
    ffi: str | None

    def __post_init__(self) -> None:
        if not self.tvm or self.ffi == "":
            raise ValueError(f"a version is empty in {self!r}; name the exact release")

    def pins(self) -> list[str]:
        """The pip requirements of this pair."""
        return [f"{TVM}=={self.tvm}"] + ([] if self.ffi is None else [f"{FFI}=={self.ffi}"])


# The first row is what setup.py pins. apache-tvm 0.27.0.post1 sets no upper bound on its FFI, and
# with 0.1.15 the compiler's ABI differs: Schedule.tensorize and ConvertLayout end in a segmentation
# fault.
SUPPORTED: tuple[Pair, ...] = (Pair(tvm="0.27.0.post1", ffi="0.1.14.post1"),)


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


# TVM with Relay, as far as it is known to work: it is mostly built from source, so that no
# distribution tells its version.
RELAY_VERSIONS = ((0, 17), (0, 20))  # from, and below


def relay_version() -> str | None:
    """Return the version of a TVM that has Relay, or None; without importing TVM."""
    spec = util.find_spec("tvm")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    stated = folder / "_ffi" / "libinfo.py"
    if not (folder / "relay").is_dir() or not stated.is_file():
        return None
    found = re.search(r'^__version__ = "([^"]+)"', stated.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else None


def _is_supported_relay(version: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    low, high = RELAY_VERSIONS
    return numbers is not None and low <= (int(numbers[1]), int(numbers[2])) < high


def check() -> Pair:
    """Return the supported pair that is installed, without importing TVM.

    Raises
    ------
    ImportError
        When the installed versions are no row of `SUPPORTED`; the message holds the pip command
        that mends it.
    """
    tvm, ffi = _installed(TVM), _installed(FFI)
    for pair in SUPPORTED:
        if (pair.tvm, pair.ffi) == (tvm, ffi):
            return pair
    if ffi is None and (relay := relay_version()) is not None:
        if _is_supported_relay(relay):
            return Pair(tvm=relay, ffi=None)
        tvm = tvm or relay
    low, high = (".".join(map(str, numbers)) for numbers in RELAY_VERSIONS)
    wanted = " or ".join(" with ".join(pair.pins()) for pair in SUPPORTED)
    wanted += f" (or, for Relay, a TVM from {low} on and before {high})"
    fix = " ".join(f"'{pin}'" for pin in SUPPORTED[0].pins())
    raise ImportError(
        f"topi_int8 needs {wanted}, but this environment has {TVM} {tvm or '(not installed)'} with "
        f"{FFI} {ffi or '(not installed)'}, a pair it cannot use (some crash inside the compiler); "
        f"mend it with: python -m pip install {fix}"
    )
