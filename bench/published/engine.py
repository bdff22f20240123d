"""What is timed: a network, how it is made integer, and which TVM builds it for which executor.

Known to both workers and to who asks them, so it imports neither TVM.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ALLOWED: dict[str, tuple[Any, ...]] = {
    "tvm": ("relay", "relax", "torch"),
    "network": ("resnet18", "resnet50"),
    "precision": ("float32", "int8"),
    "layout": ("NCHW", "NHWC"),
    "executor": ("graph", "vm", "aot"),
    "level": (0, 1, 2, 3, 4),
    "activation": ("int8", "int16", "int32"),
}


@dataclass(frozen=True)
class Engine:
    """A network, built one way.

    Parameters
    ----------
    tvm : str
        "relay" (TVM 0.17), "relax" (0.27), or "torch": eager PyTorch.
    network : str
    precision : str
        "float32", or "int8": by relay.quantize there, by topi_int8.quantize here.
    ours : bool
        Whether topi_int8 is enabled.
    layout : str
        In which the network is written.
    executor : str
        Of Relay.
    level : int
        Relay's opt_level.
    batch : int
    activation : str
        relay.quantize's `dtype_activation`: int32 is its default.
    stem : bool
        Whether relay.quantize takes the first convolution too; its default leaves it in float32.
    kept : bool
        Whether convolutions stay in the layout that they are written in.
    cpu : str
        LLVM's name of the target's CPU; "" is this machine's.
    """

    tvm: str = "relay"
    network: str = "resnet18"
    precision: str = "int8"
    ours: bool = True
    layout: str = "NCHW"
    executor: str = "graph"
    level: int = 3
    batch: int = 1
    activation: str = "int32"
    stem: bool = False
    kept: bool = False
    cpu: str = ""

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; allowed: 1 or more")

    @property
    def key(self) -> str:
        """A name that no other engine has."""
        return "-".join(str(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Memory:
    """Memory of a process that loaded a built network and ran it once, MiB.

    Attributes
    ----------
    peak : float
        Of the whole process: Python, TVM, weights, activations.
    activations : float
        What the first run added: intermediate tensors and workspaces.
    """

    peak: float
    activations: float
