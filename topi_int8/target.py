"""What a TVM Target can do: its instruction sets, from LLVM's own feature tables.

A library must never execute an instruction its target did not name, so `features` looks at the
Target alone. Only `host_target` looks at the machine, and what it finds it writes into the Target
as LLVM feature names.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.target import Target, codegen

from . import _host, target_names

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
BEYOND_LEVELS = (
    "avx512vnni", "avx512vbmi", "avx512vbmi2", "avxvnni", "gfni", "amx-tile", "amx-int8",
)  # fmt: skip
ARM_FEATURES = ("neon", "dotprod", "i8mm")

# LLVM's name -> the flag in /proc/cpuinfo, where they differ.
KERNEL_FLAG: Mapping[str, str] = {
    "dotprod": "asimddp",
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

# LLVM before 12 does not know the levels: their features are named one by one.
_LLVM_WITH_LEVELS = 12

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
        psABI level of the canonical Target; empty off x86-64.
    adds : tuple of str
        LLVM features of the canonical Target beyond its level.
    host_adds : tuple of str
        Further features `host_target` may name under a cap of this ISA, where the CPU has them.
    arch : str
        Architecture of the canonical Target.
    """

    name: str
    needs: tuple[frozenset[str], ...]
    level: str
    adds: tuple[str, ...] = ()
    host_adds: tuple[str, ...] = ()
    arch: str = "x86_64"

    def __post_init__(self) -> None:
        if not self.needs or any(not alternative for alternative in self.needs):
            raise ValueError(f"{self.name}: needs is empty; that would hold for every Target")
        levels = list(dict(LEVELS)) if self.arch == "x86_64" else [""]
        if self.level not in levels:
            raise ValueError(f"{self.name}: level is {self.level!r}; allowed: {levels}")
        allowed = BEYOND_LEVELS if self.arch == "x86_64" else ARM_FEATURES
        unknown = set(self.adds + self.host_adds) - set(allowed)
        if unknown:
            raise ValueError(f"{self.name}: {sorted(unknown)} are not in {allowed}")

    @property
    def features(self) -> tuple[str, ...]:
        """LLVM features of the canonical Target beyond the plainest one of its architecture."""
        return (_level_features(self.level) if self.level else ()) + self.adds


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
        host_adds=(*_BYTE_PERMUTES, "gfni"),
    ),
    Isa(
        "avx512_vnni",
        needs=(frozenset({*_AVX512, "avx512vnni"}),),
        level="x86-64-v4",
        adds=("avx512vnni",),
        host_adds=("avxvnni", *_BYTE_PERMUTES, "gfni"),
    ),
    Isa(
        # 256-bit vpdpbusd: VEX-encoded, or EVEX-encoded where AVX-512 VNNI has the short vectors.
        "avx_vnni",
        needs=(frozenset({"avx2", "avxvnni"}), frozenset({"avx512vnni", "avx512vl"})),
        level="x86-64-v3",
        adds=("avxvnni",),
        host_adds=("gfni",),
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


def _arm_isas(arch: str, *rows: tuple[str, tuple[str, ...]]) -> tuple[Isa, ...]:
    return tuple(
        Isa(name, needs=(frozenset(features),), level="", adds=features, arch=arch)
        for name, features in rows
    )


# Matrix multiply is never without dot product: the kernels of one layer may use both.
AARCH64_ISAS = _arm_isas(
    "aarch64",
    ("neon_i8mm", ("neon", "dotprod", "i8mm")),
    ("neon_dotprod", ("neon", "dotprod")),
    ("neon", ("neon",)),
)
ARM_ISAS = _arm_isas("arm", ("armv7_neon", ("neon",)))

# Fastest first. An architecture without a table has the generic strategies alone.
ISAS: Mapping[str, tuple[Isa, ...]] = {
    "x86_64": X86_ISAS, "aarch64": AARCH64_ISAS, "arm": ARM_ISAS,
}  # fmt: skip

# What `isa_target` and `host_target` compile for, off x86-64. 32-bit: hard floats, as distributions
# have them.
_ARM_CONFIG: Mapping[str, Mapping[str, Any]] = {
    "aarch64": {"kind": "llvm", "mtriple": "aarch64-linux-gnu"},
    "arm": {"kind": "llvm", "mtriple": "armv7a-linux-gnueabihf", "mfloat-abi": "hard"},
}

_CANONICAL: Mapping[str, Isa] = {
    isa.name: isa for isa in X86_ISAS + _TEST_ISAS + AARCH64_ISAS + ARM_ISAS
}


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
    arch = _arch_of(triple)
    llvm = frozenset(map(str, codegen.llvm_get_cpu_features(target)))
    table = ISAS.get(arch, ())
    isas = [isa.name for isa in table if any(needs <= llvm for needs in isa.needs)]
    return Features(arch, llvm, tuple(isas) if GENERIC in isas else (*isas, GENERIC))


def _arch_of(triple: str) -> str:
    """Return the architecture of a triple in our spelling."""
    return _host.architecture(triple.split("-", 1)[0])


def _x86_triple() -> str:
    triple = str(codegen.llvm_get_system_triple())
    return triple if triple.startswith("x86_64") else "x86_64-unknown-linux-gnu"


def _x86_target(wanted: frozenset[str], num_cores: int | None = None) -> Target:
    """The Target that names exactly `wanted`: the highest level in it, the rest one by one."""
    levels = LEVELS if codegen.llvm_version_major() >= _LLVM_WITH_LEVELS else LEVELS[:1]
    level = next(name for name, _ in reversed(levels) if wanted.issuperset(_level_features(name)))
    rest = sorted(wanted.difference(_level_features(level)))
    mattr = [f"+{name}" for name in rest] + ([FULL_WIDTH] if "avx512f" in wanted else [])
    config: dict[str, Any] = {"kind": "llvm", "mtriple": _x86_triple(), "mcpu": level}
    if mattr:
        config["mattr"] = mattr
    if num_cores is not None:
        config["num-cores"] = num_cores
    return Target(config)


def _arm_target(arch: str, wanted: frozenset[str], num_cores: int | None = None) -> Target:
    """The Target of an ARM architecture that names exactly `wanted`; the host's if it has cores."""
    config = dict(_ARM_CONFIG[arch])
    system = str(codegen.llvm_get_system_triple())
    if num_cores is not None and _arch_of(system) == arch:
        config["mtriple"] = system  # the host's own: it need not be Linux
    config["mattr"] = [f"+{name}" for name in ARM_FEATURES if name in wanted]
    if num_cores is not None:
        config["num-cores"] = num_cores
    return Target(config)


def isa_target(isa: str) -> Target:
    """The canonical Target of one instruction set, the same on every machine.

    Parameters
    ----------
    isa : str
        A name of `Features.isas` ("generic" is x86-64's), or ``"amx_int8_avx2"``: AMX without
        AVX-512, which no CPU is, for tests that emulate the tile instructions on an AVX2 machine.

    Raises
    ------
    ValueError
        When there is no such name.
    """
    row = _lookup(_CANONICAL, "isa", isa)
    wanted = frozenset(row.features)
    return _x86_target(wanted) if row.arch == "x86_64" else _arm_target(row.arch, wanted)


def _lookup(table: Mapping[str, Any], argument: str, name: str) -> Any:
    if name not in table:
        raise ValueError(f"{argument} is {name!r}; allowed: {', '.join(table)}")
    return table[name]


def _host_features(cap: Isa) -> frozenset[str]:
    """LLVM features that this CPU has and `cap` allows."""
    flags = _host.cpu_flags()
    if "asimd" in flags:
        flags |= {"neon"}  # as 32-bit kernels, and LLVM, call it
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
    return _host.machine() == row.arch and _host_features(row).issuperset(row.features)


def host_target(max_isa: str | None = None, num_cores: int | None = None) -> Target:
    """The Target of the CPU this process runs on, from its flags.

    Parameters
    ----------
    max_isa : str, optional
        Name nothing beyond this instruction set (on x86-64 one of amx_int8, avx512_vnni, avx_vnni,
        avx512_bw, avx2, generic; on ARM neon_i8mm, neon_dotprod, neon, or armv7_neon), as
        ONEDNN_MAX_CPU_ISA does. Default: the environment variable TOPI_INT8_MAX_ISA, or no cap.
    num_cores : int, optional
        The Target's num-cores. Default: the physical cores this process may run on.

    Raises
    ------
    ValueError
        When `max_isa`, the environment variable or `num_cores` is not allowed.

    Notes
    -----
    Where the kernel lists no flags (it is not Linux) the Target is plain x86-64, or AArch64 with
    NEON, which all of them have; on other architectures it is TVM's plain ``llvm``, which gets the
    generic strategies.
    """
    argument = "max_isa"
    if max_isa is None and os.environ.get(MAX_ISA_VARIABLE):
        max_isa, argument = os.environ[MAX_ISA_VARIABLE], MAX_ISA_VARIABLE
    arch = _host.machine()
    table = {isa.name: isa for isa in ISAS.get(arch, X86_ISAS)}
    cap = next(iter(table.values())) if max_isa is None else _lookup(table, argument, max_isa)
    if num_cores is not None and num_cores < 1:
        raise ValueError(f"num_cores is {num_cores}; allowed: 1 or more")
    cores = _host.physical_cores() if num_cores is None else num_cores
    if arch == "x86_64":
        return _x86_target(_host_features(cap), cores)
    if arch in _ARM_CONFIG:
        baseline = {"neon"} if arch == "aarch64" else set()
        return _arm_target(arch, _host_features(cap) | baseline, cores)
    return Target({"kind": "llvm", "num-cores": cores})


def named(name: str, num_cores: int | None = None) -> Target:
    """The Target of a CPU core, a board or a cloud's machine, by name.

    Parameters
    ----------
    name : str
        As "cortex-a72", "neoverse-n1", "rpi4", "graviton3": see `topi_int8.target_names`.
    num_cores : int, optional
        The Target's num-cores. Default: the board's; TVM's own default for a bare core.

    Raises
    ------
    ValueError
        For a name that is not in the table, or a `num_cores` below 1.

    Examples
    --------
    >>> topi_int8.target("cortex-a72")     # the module is callable: the same function
    """
    core = _lookup(target_names.TARGETS, "name", name)
    if num_cores is not None and num_cores < 1:
        raise ValueError(f"num_cores is {num_cores}; allowed: 1 or more")
    config = core.config()
    if num_cores is not None:
        config["num-cores"] = num_cores
    return Target(config)


class _CallableModule(types.ModuleType):
    """Lets ``topi_int8.target("rpi4")`` and ``from topi_int8.target import features`` be both."""

    def __call__(self, name: str, num_cores: int | None = None) -> Target:
        return named(name, num_cores)


sys.modules[__name__].__class__ = _CallableModule
