"""What a TVM Target can do: its instruction sets, from LLVM's own feature tables.

A library must never execute an instruction its target did not name, so `features` looks at the
Target alone. Only `host_target` looks at the machine, and what it finds it writes into the Target
as LLVM feature names.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.target import Target, codegen

from . import _host

MAX_ISA_VARIABLE = "TOPI_INT8_MAX_ISA"
GENERIC = "generic"

# The psABI levels as LLVM knows them (-mcpu), each with what it adds to the level before. Used
# rather than a CPU's name: a level promises features and nothing else.
LEVELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("x86-64", ()),
    ("x86-64-v2", ("cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3")),
    ("x86-64-v3", ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave")),
    ("x86-64-v4", ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")),
)

# Features beyond the levels that a kernel, or LLVM on its behalf, may use.
BEYOND_LEVELS = ("avx512vnni", "avx512vbmi", "avx512vbmi2", "avxvnni", "amx-tile", "amx-int8")

# LLVM's name -> the flag in /proc/cpuinfo, where they differ.
KERNEL_FLAG: Mapping[str, str] = {
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "sahf": "lahf_lm",
    "lzcnt": "abm",
    "bmi": "bmi1",
    "avx512vnni": "avx512_vnni",
    "avx512vbmi2": "avx512_vbmi2",
    "avxvnni": "avx_vnni",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
}

# x86-64-v4 tells LLVM to prefer 256-bit vectors: loops it vectorises itself would come out in ymm
# registers. Vectors that a schedule names are left alone either way.
FULL_WIDTH = "-prefer-256-bit"


@dataclass(frozen=True)
class Isa:
    """An instruction set: what a Target must name to have it, and the Target that has just that.

    Parameters
    ----------
    name : str
        Our name for it, as `Features.isas` and `isa_target` use it.
    needs : tuple of frozenset of str
        LLVM features; a Target that has all of any one set has this ISA.
    level : str
        psABI level of the canonical Target.
    adds : tuple of str
        LLVM features of the canonical Target beyond its level.
    host_adds : tuple of str
        Further features `host_target` may name under a cap of this ISA, where the CPU has them.
    """

    name: str
    needs: tuple[frozenset[str], ...]
    level: str
    adds: tuple[str, ...] = ()
    host_adds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.needs or any(not alternative for alternative in self.needs):
            raise ValueError(f"{self.name}: needs is empty; that would hold for every Target")
        if self.level not in dict(LEVELS):
            raise ValueError(f"{self.name}: level is {self.level!r}; allowed: {list(dict(LEVELS))}")
        unknown = set(self.adds + self.host_adds) - set(BEYOND_LEVELS)
        if unknown:
            raise ValueError(f"{self.name}: {sorted(unknown)} are not in BEYOND_LEVELS")

    @property
    def features(self) -> tuple[str, ...]:
        """LLVM features of the canonical Target beyond plain x86-64."""
        return _level_features(self.level) + self.adds


def _level_features(level: str) -> tuple[str, ...]:
    names = [name for name, _ in LEVELS]
    return tuple(feature for _, added in LEVELS[: names.index(level) + 1] for feature in added)


_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
_BYTE_PERMUTES = ("avx512vbmi", "avx512vbmi2")

X86_ISAS: tuple[Isa, ...] = (
    Isa(
        "amx_int8",
        needs=(frozenset({"amx-tile", "amx-int8"}),),
        level="x86-64-v4",
        adds=("avx512vnni", "avxvnni", "amx-tile", "amx-int8"),
        host_adds=_BYTE_PERMUTES,
    ),
    Isa(
        "avx512_vnni",
        needs=(frozenset({*_AVX512, "avx512vnni"}),),
        level="x86-64-v4",
        adds=("avx512vnni",),
        host_adds=("avxvnni", *_BYTE_PERMUTES),
    ),
    Isa(
        # 256-bit vpdpbusd: VEX-encoded, or EVEX-encoded where AVX-512 VNNI has the short vectors.
        "avx_vnni",
        needs=(frozenset({"avx2", "avxvnni"}), frozenset({"avx512vnni", "avx512vl"})),
        level="x86-64-v3",
        adds=("avxvnni",),
    ),
    Isa(
        "avx512_bw",
        needs=(frozenset(_AVX512),),
        level="x86-64-v4",
        host_adds=_BYTE_PERMUTES,
    ),
    Isa("avx2", needs=(frozenset({"avx2"}),), level="x86-64-v3"),
    Isa(GENERIC, needs=(frozenset({"sse2"}),), level="x86-64"),
)

# For tests only: AMX beside AVX2 is no CPU, but an AVX2 one can run it with the tiles emulated.
_TEST_ISAS: tuple[Isa, ...] = (
    Isa(
        "amx_int8_avx2",
        needs=(frozenset({"amx-tile", "amx-int8"}),),
        level="x86-64-v3",
        adds=("amx-tile", "amx-int8"),
    ),
)

# Fastest first. An architecture without a table has the generic strategies alone.
ISAS: Mapping[str, tuple[Isa, ...]] = {"x86_64": X86_ISAS}

_BY_NAME: Mapping[str, Isa] = {isa.name: isa for isa in X86_ISAS}
_CANONICAL: Mapping[str, Isa] = {isa.name: isa for isa in X86_ISAS + _TEST_ISAS}


@dataclass(frozen=True)
class Features:
    """What code compiled for a Target may execute.

    Parameters
    ----------
    arch : str
        Architecture of the LLVM triple (x86_64, aarch64, ...).
    llvm : frozenset of str
        Every feature LLVM enables for the Target, implied ones too, in LLVM's spelling.
    isas : tuple of str
        Our instruction sets, fastest first; the last is always ``"generic"``.
    """

    arch: str
    llvm: frozenset[str]
    isas: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.isas or self.isas[-1] != GENERIC:
            raise ValueError(f"isas is {self.isas!r}; the last must be {GENERIC!r}")

    def has(self, name: str) -> bool:
        """Whether the Target has an instruction set (``"avx_vnni"``) or LLVM feature
        (``"avxvnni"``)."""
        return name in self.isas or name in self.llvm

    @property
    def vector_bits(self) -> int:
        """Width in bits of the widest vector register that integer code may use."""
        widths = (("avx512_bw", 512), ("avx2", 256))
        return next((bits for isa, bits in widths if self.has(isa)), 128)


def _as_target(target: Target | str | Mapping[str, Any]) -> Target:
    if isinstance(target, Target):
        return target
    return Target(dict(target) if isinstance(target, Mapping) else target)


def is_supported(target: Target | str | Mapping[str, Any]) -> bool:
    """Whether our pipeline compiles for `target`: a CPU that TVM reaches through LLVM."""
    target = _as_target(target)
    return target.kind.name == "llvm" and "cpu" in target.keys


def features(target: Target | str | Mapping[str, Any]) -> Features:
    """The features of a Target, as LLVM resolves its mtriple, mcpu and mattr (negative ones too).

    Parameters
    ----------
    target : Target, str or dict
        An LLVM CPU target in any form `tvm.target.Target` takes.

    Raises
    ------
    ValueError
        When the target is not compiled by LLVM for a CPU, or TVM does not know it.
    """
    target = _as_target(target)
    if not is_supported(target):
        raise ValueError(f"target is {target}; allowed: targets of kind llvm with the key cpu")
    # Targets hash by identity, their text does not.
    return _features(str(target))


@functools.lru_cache(maxsize=256)
def _features(text: str) -> Features:
    target = Target(text)
    triple = str(target.attrs.get("mtriple", codegen.llvm_get_system_triple()))
    name = triple.split("-", 1)[0]
    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)
    llvm = frozenset(map(str, codegen.llvm_get_cpu_features(target)))
    table = ISAS.get(arch, ())
    isas = [isa.name for isa in table if any(needs <= llvm for needs in isa.needs)]
    return Features(arch, llvm, tuple(isas) if GENERIC in isas else (*isas, GENERIC))


def _x86_triple() -> str:
    triple = str(codegen.llvm_get_system_triple())
    return triple if triple.startswith("x86_64") else "x86_64-unknown-linux-gnu"


def _x86_target(wanted: frozenset[str], num_cores: int | None = None) -> Target:
    """The Target that names exactly `wanted`: the highest level in it, the rest one by one."""
    level = next(name for name, _ in reversed(LEVELS) if wanted.issuperset(_level_features(name)))
    rest = sorted(wanted.difference(_level_features(level)))
    mattr = [f"+{name}" for name in rest] + ([FULL_WIDTH] if "avx512f" in wanted else [])
    config: dict[str, Any] = {"kind": "llvm", "mtriple": _x86_triple(), "mcpu": level}
    if mattr:
        config["mattr"] = mattr
    if num_cores is not None:
        config["num-cores"] = num_cores
    return Target(config)


def isa_target(isa: str) -> Target:
    """The canonical Target of one x86 instruction set, the same on every machine.

    Parameters
    ----------
    isa : str
        A name of `Features.isas`, or ``"amx_int8_avx2"``: AMX without AVX-512, which no CPU is, for
        tests that emulate the tile instructions on an AVX2 machine.

    Raises
    ------
    ValueError
        When there is no such name.
    """
    return _x86_target(frozenset(_lookup(_CANONICAL, "isa", isa).features))


def _lookup(table: Mapping[str, Isa], argument: str, name: str) -> Isa:
    if name not in table:
        raise ValueError(f"{argument} is {name!r}; allowed: {', '.join(table)}")
    return table[name]


def _host_features(cap: Isa) -> frozenset[str]:
    """LLVM features that this CPU has and `cap` allows."""
    flags = _host.cpu_flags()
    allowed = cap.features + cap.host_adds
    present = {name for name in allowed if KERNEL_FLAG.get(name, name) in flags}
    tiles = {name for name in present if name.startswith("amx-")}
    return frozenset(present - tiles if tiles and not _host.amx_permitted() else present)


def runs_here(isa: str) -> bool:
    """Whether this CPU executes everything that `isa_target(isa)` names.

    Not the same as ``isa in features(host_target()).isas``: a CPU with AVX-512 VNNI has 256-bit
    vpdpbusd in its EVEX encoding, and may lack the VEX one which the canonical avx_vnni target
    uses.
    """
    row = _lookup(_CANONICAL, "isa", isa)
    return _host.machine() == "x86_64" and _host_features(row).issuperset(row.features)


def host_target(max_isa: str | None = None, num_cores: int | None = None) -> Target:
    """The Target of the CPU this process runs on, from its flags.

    Parameters
    ----------
    max_isa : str, optional
        Name nothing beyond this instruction set (one of amx_int8, avx512_vnni, avx_vnni, avx512_bw,
        avx2, generic), as ONEDNN_MAX_CPU_ISA does. Default: the environment variable
        TOPI_INT8_MAX_ISA, or no cap.
    num_cores : int, optional
        The Target's num-cores. Default: the physical cores this process may run on.

    Raises
    ------
    ValueError
        When `max_isa`, the environment variable or `num_cores` is not allowed.

    Notes
    -----
    Where the kernel lists no flags (it is not Linux) the Target is plain x86-64, and off
    x86-64 it is TVM's plain ``llvm``: both get the generic strategies.
    """
    argument = "max_isa"
    if max_isa is None and os.environ.get(MAX_ISA_VARIABLE):
        max_isa, argument = os.environ[MAX_ISA_VARIABLE], MAX_ISA_VARIABLE
    cap = X86_ISAS[0] if max_isa is None else _lookup(_BY_NAME, argument, max_isa)
    if num_cores is not None and num_cores < 1:
        raise ValueError(f"num_cores is {num_cores}; allowed: 1 or more")
    cores = _host.physical_cores() if num_cores is None else num_cores
    if _host.machine() != "x86_64":
        return Target({"kind": "llvm", "num-cores": cores})
    return _x86_target(_host_features(cap), cores)
