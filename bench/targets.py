"""Which Target a run compiles for, and a refusal in words where this CPU would stop at SIGILL."""

from __future__ import annotations

import json

from tvm.target import Target

from topi_int8 import _host, target_names
from topi_int8 import target as targets

# The names of the command line; "amx" is what oneDNN and everyone else call it.
ISA_ALIASES = {"amx": "amx_int8"}
ISAS = ("host", "amx", "avx512_vnni", "avx_vnni", "avx512_bw", "avx2", "generic")

# LLVM features that code generation may turn into instructions, beyond those topi_int8 names.
_FURTHER_FEATURES = (
    "amx-bf16 amx-fp16 avx512bf16 avx512bitalg avx512fp16 avx512ifma avx512vp2intersect "
    "avx512vpopcntdq avxifma avxneconvert avxvnniint16 avxvnniint8 gfni"
).split()


class WrongMachineError(ValueError):
    """The Target names instructions that this CPU lacks."""


def missing_features(target: Target) -> list[str]:
    """Return the LLVM features that `target` names and this CPU lacks."""
    named = targets.features(target).llvm
    known = [feature for _, added in targets.LEVELS for feature in added]
    known += [*targets.BEYOND_LEVELS, *_FURTHER_FEATURES]
    # Spellings differ in separators only (avx512vnni, avx512_vnni) where KERNEL_FLAG says nothing.
    flags = {flag.replace("_", "") for flag in _host.cpu_flags()}
    missing = []
    for feature in known:
        flag = targets.KERNEL_FLAG.get(feature, feature)
        if feature in named and flag.replace("-", "").replace("_", "") not in flags:
            missing.append(feature)
    if "amx-tile" in named and "amx-tile" not in missing and not _host.amx_permitted():
        missing.append("amx-tile (the kernel refuses its tile state)")
    return missing


def parse_target(text: str) -> Target:
    """Return the Target of a command line: our name, TVM's own string, or a JSON dictionary.

    Raises
    ------
    ValueError
        When TVM does not know it, or it is no CPU target of LLVM.
    """
    try:
        if text in target_names.TARGETS:
            return targets.named(text)
        target = Target(json.loads(text) if text.lstrip().startswith("{") else text)
    except Exception as error:
        raise ValueError(
            f"target is {text!r}; allowed: a name of topi_int8.target_names, or what "
            f"tvm.target.Target takes: {error}"
        ) from None
    targets.features(target)
    return target


def choose(isa: str = "host", target: str | None = None, threads: int = 1) -> Target:
    """Return the Target to compile for; a `target` beats an `isa`.

    Raises
    ------
    ValueError
        For an unknown name.
    WrongMachineError
        When this CPU cannot execute it, with the features it lacks.
    """
    if target is not None:
        chosen = parse_target(target)
    elif isa == "host":
        chosen = targets.host_target(num_cores=threads)
    elif isa in ISAS:
        config = dict(targets.isa_target(ISA_ALIASES.get(isa, isa)).export())
        chosen = Target(
            {key: config[key] for key in config if key != "tag"} | {"num-cores": threads}
        )
    else:
        raise ValueError(f"isa is {isa!r}; allowed: {', '.join(ISAS)}")
    arch, here = targets.features(chosen).arch, _host.machine()
    if arch != here:
        raise WrongMachineError(f"target is for {arch}; this machine is {here}: it cannot run here")
    if missing := missing_features(chosen):
        asked = f"--target {target}" if target else f"--isa {isa}"
        raise WrongMachineError(f"{asked}: this CPU lacks {', '.join(missing)}; it cannot run here")
    return chosen


def isa_of(target: Target) -> str:
    """Return the fastest of our instruction sets that `target` has."""
    return targets.features(target).isas[0]
