"""An ARM core to predict for: what to compile, whose model to ask, which emulated CPU runs it."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.target import Target

from topi_int8 import target as topi_target
from topi_int8 import target_names

from . import emulated, mca, targets


@dataclass(frozen=True)
class Core:
    """A core.

    Parameters
    ----------
    target : Target
        Kernels are compiled for it. Its mcpu may be another core's, whose scheduling suits better.
    mcpu : str
        The core itself, as LLVM calls it: its model predicts.
    """

    target: Target
    mcpu: str

    def __post_init__(self) -> None:
        if self.arch not in ("aarch64", "arm"):
            raise ValueError(f"target is {self.target}; allowed with --model mca: ARM targets")
        if not self.mcpu:
            raise ValueError(f"target {self.target} has no mcpu; allowed: one that names its core")

    @property
    def arch(self) -> str:
        """Architecture: "aarch64" or "arm"."""
        return topi_target.features(self.target).arch

    @property
    def isa(self) -> str:
        """The fastest of our instruction sets that it has."""
        return targets.isa_of(self.target)

    @property
    def triple(self) -> str:
        """The triple for llvm-mca."""
        return "aarch64" if self.arch == "aarch64" else "armv7a-linux-gnueabihf"

    def peak(self, is_float: bool) -> float:
        """Return MACs a cycle of the best stream of instructions that the core has."""
        kind = "float32" if is_float else {"generic": "neon"}.get(self.isa, self.isa)
        return mca.core_peak(kind, self.mcpu, self.triple)

    @property
    def qemu_cpu(self) -> str:
        """QEMU's CPU that has the target's instructions; ValueError when it is not aarch64."""
        if self.arch != "aarch64":
            raise ValueError("instructions are counted on aarch64 targets only")
        return emulated.cpu_for(self.isa, topi_target.features(self.target).llvm, self.mcpu)


def choose(text: str | None) -> Core:
    """Return the core of ``--target``: a name of `topi_int8.target_names`, or TVM's own text.

    Raises
    ------
    ValueError
        When it is none of those, or no ARM target.
    """
    if text is None:
        raise ValueError("--model mca needs --target, as cortex-a72")
    if text in target_names.TARGETS:
        return Core(topi_target.named(text), target_names.TARGETS[text].mcpu)
    target = targets.parse_target(text)
    return Core(target, str(target.attrs.get("mcpu", "")))
