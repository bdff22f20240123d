"""Which Target a run compiles for, and a refusal in words where this CPU would stop at SIGILL."""

from __future__ import annotations

from tvm.target import Target

from topi_int8 import _host, isa_check
from topi_int8 import target as targets
from topi_int8.isa_check import WrongMachineError
from topi_int8.target_text import parse_target

__all__ = ["WrongMachineError", "choose", "isa_of", "missing_features", "parse_target"]

# The names of the command line; "amx" is what oneDNN and everyone else call it.
ISA_ALIASES = {"amx": "amx_int8"}
ISAS = ("host", "amx", "avx512_vnni", "avx_vnni", "avx512_bw", "avx2", "generic")

def missing_features(target: Target) -> list[str]:
    """Return the LLVM features that `target` names and this CPU lacks."""
    return isa_check.lacking_here(isa_check.needed(targets.features(target)))


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
