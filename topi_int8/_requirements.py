"""Refuses a TVM this package was not built for, before that TVM is imported.

Imports the standard library only: a wrong pair of wheels can crash the process inside TVM, and
setup.py runs this file on its own to read the pins.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

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
    wanted = " or ".join(" with ".join(pair.pins()) for pair in SUPPORTED)
    fix = " ".join(f"'{pin}'" for pin in SUPPORTED[0].pins())
    raise ImportError(
        f"topi_int8 needs {wanted}, but this environment has {TVM} {tvm or '(not installed)'} with "
        f"{FFI} {ffi or '(not installed)'}, a pair it cannot use (some crash inside the compiler); "
        f"mend it with: python -m pip install {fix}"
    )
