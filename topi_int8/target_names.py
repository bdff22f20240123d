"""CPU cores, boards and machines by name: what to tell LLVM of each.

A name stands for a triple and a core as LLVM knows it; what the core can do is LLVM's word
(`topi_int8.target.features`), not this table's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TRIPLES = {
    "aarch64": "aarch64-linux-gnu",
    "arm": "armv7a-linux-gnueabihf",
    "x86_64": "x86_64-unknown-linux-gnu",
}


@dataclass(frozen=True)
class Named:
    """A name's meaning.

    Parameters
    ----------
    mcpu : str
        The core, in LLVM's spelling.
    arch : str
        "aarch64", "arm" (ARMv7 with NEON, hard floats) or "x86_64".
    cores : int
        Cores of the board; 0 where the name is a core's own.
    tune : str
        The core whose scheduling LLVM should use, if not its own.
    mattr : tuple of str
        LLVM's tuning features to add.
    """

    mcpu: str
    arch: str = "aarch64"
    cores: int = 0
    tune: str = ""
    mattr: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.arch not in _TRIPLES:
            raise ValueError(f"arch is {self.arch!r}; allowed: {', '.join(_TRIPLES)}")
        if self.cores < 0:
            raise ValueError(f"cores is {self.cores}; allowed: 0 or more")

    def config(self) -> dict[str, Any]:
        """Return the Target's dictionary."""
        config: dict[str, Any] = {
            "kind": "llvm", "mtriple": _TRIPLES[self.arch], "mcpu": self.tune or self.mcpu,
        }  # fmt: skip
        mattr = list(self.mattr)
        if self.arch == "arm":
            # LLVM leaves NEON off for ARMv7 cores that may come without it.
            config["mfloat-abi"] = "hard"
            mattr.append("+neon")
        if mattr:
            config["mattr"] = mattr
        if self.cores:
            config["num-cores"] = self.cores
        return config


# LLVM's own schedulers for the small in-order cores start all of a block's long multiplies before
# they add the first, and spill; the generic one (it models an A510) does not. CRC and AES are what
# these cores have beside ARMv8.0.
_A53 = {"tune": "generic", "mattr": ("+neon", "+crc", "+aes")}
# A pair of 128-bit loads holds the A55's load unit for six cycles, two loads for two.
_A55 = {"mattr": ("+slow-paired-128",)}

_CORES = {
    "aarch64": (
        "cortex-a57 cortex-a72 cortex-a73 cortex-a75 cortex-a76 "
        "cortex-a77 cortex-a78 cortex-a510 cortex-a520 cortex-a710 cortex-a715 cortex-a720 "
        "cortex-x1 cortex-x2 cortex-x3 cortex-x4 neoverse-n1 neoverse-n2 neoverse-v1 neoverse-v2 "
        "neoverse-e1 apple-m1 apple-m2 ampere1"
    ),
    "arm": "cortex-a7 cortex-a8 cortex-a9 cortex-a15 cortex-a17",
    "x86_64": "haswell skylake-avx512 cascadelake icelake-server sapphirerapids znver3 znver4",
}

TARGETS: Mapping[str, Named] = {
    **{name: Named(name, arch) for arch, names in _CORES.items() for name in names.split()},
    "cortex-a35": Named("cortex-a35", **_A53),
    "cortex-a53": Named("cortex-a53", **_A53),
    "cortex-a55": Named("cortex-a55", **_A55),
    # boards
    "rpi2": Named("cortex-a7", "arm", 4),
    "rpi3": Named("cortex-a53", cores=4, **_A53),
    "rpi4": Named("cortex-a72", cores=4),
    "rpi4-32": Named("cortex-a72", "arm", 4),
    "rpi5": Named("cortex-a76", cores=4),
    "jetson-nano": Named("cortex-a57", cores=4),
    "jetson-orin-nano": Named("cortex-a78ae", cores=6),
    # big cores of big.LITTLE chips: TVM pins its threads to them
    "rk3399": Named("cortex-a72", cores=2),
    "rk3588": Named("cortex-a76", cores=4),
    # clouds: cores of one machine differ from size to size
    "graviton2": Named("neoverse-n1"),
    "graviton3": Named("neoverse-v1"),
    "graviton4": Named("neoverse-v2"),
    "ampere-altra": Named("neoverse-n1"),
    "cobalt-100": Named("neoverse-n2"),
    "axion": Named("neoverse-v2"),
}
