"""Whether a CPU executes what a library was compiled for: words, where it would end in SIGILL.

What a library needs is `needed` of its Target, when it is compiled; what a machine has are the
flags that its kernel lists. Neither compares CPUs' names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from . import _host
from . import target as targets

# LLVM features that code generation may turn into instructions, beyond those topi_int8 names. On
# ARM each with its flag in /proc/cpuinfo (Linux, Documentation/arch/arm64/elf_hwcaps.rst).
_FURTHER_X86 = tuple(
    "amx-bf16 amx-fp16 avx512bf16 avx512bitalg avx512fp16 avx512ifma avx512vp2intersect "
    "avx512vpopcntdq avxifma avxneconvert avxvnniint16 avxvnniint8".split()
)
_FURTHER_ARM: Mapping[str, str] = {
    "fullfp16": "asimdhp", "lse": "atomics", "rdm": "asimdrdm", "sve": "sve", "sve2": "sve2",
    "bf16": "bf16",
}  # fmt: skip
_X86 = tuple(feature for _, added in targets.LEVELS for feature in added)
_KNOWN: Mapping[str, tuple[str, ...]] = {
    "x86_64": (*_X86, *targets.BEYOND_LEVELS, *_FURTHER_X86),
    "aarch64": (*targets.ARM_FEATURES, *_FURTHER_ARM),
    "arm": (*targets.ARM_FEATURES, *_FURTHER_ARM),
}
_FLAG = {**targets.KERNEL_FLAG, **_FURTHER_ARM}
TILES_REFUSED = "amx-tile (the kernel refuses its tile state)"


class WrongMachineError(ValueError):
    """A library or Target names instructions that this CPU lacks."""


def needed(features: targets.Features) -> tuple[str, ...]:
    """Return the LLVM features of a Target that not every CPU of its architecture has."""
    return tuple(name for name in _KNOWN.get(features.arch, ()) if name in features.llvm)


def lacking(names: Iterable[str], flags: Iterable[str]) -> list[str]:
    """Return those of the LLVM features that a CPU lacks.

    Parameters
    ----------
    names : iterable of str
        Of `needed`.
    flags : iterable of str
        The CPU's, as the ``flags`` or ``Features`` of /proc/cpuinfo list them.
    """
    # Spellings differ in separators only (avx512vnni, avx512_vnni) where the tables say nothing.
    have = {_joined(flag) for flag in flags}
    if "asimd" in have:
        have.add("neon")  # as 32-bit kernels, and LLVM, call it
    return [name for name in names if _joined(_FLAG.get(name, name)) not in have]


def lacking_here(names: Iterable[str]) -> list[str]:
    """Return those of the LLVM features that this machine lacks, or its kernel does not grant."""
    names = list(names)
    missing = lacking(names, _host.cpu_flags())
    if "amx-tile" in names and "amx-tile" not in missing and not _host.amx_permitted():
        missing.append(TILES_REFUSED)
    return missing


def flags_are_told() -> bool:
    """Return whether this machine says what its CPU can do.

    Other kernels than Linux do not; and under qemu a process of another architecture reads the file
    of the machine below it.
    """
    own = {"x86_64": "sse2", "aarch64": "asimd", "arm": "half"}.get(_host.machine(), "")
    return own in _host.cpu_flags()


def _joined(flag: str) -> str:
    return flag.replace("-", "").replace("_", "")
