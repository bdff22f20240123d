"""Where kernels run: in this process, or at another place that takes tensors and libraries.

`bench.board` has the other place: a board behind TVM's RPC.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import tvm
from tvm import relax

from .timing import Sampler, evaluator_sampler


def first_line(error: BaseException) -> str:
    """Return what an error says, on one line; TVM's carry a stack below it, RPC's a line above."""
    lines = [line for line in str(error).strip().splitlines() if "caught from RPC call" not in line]
    return lines[0].strip() if lines else ""


class Place(Protocol):
    """What runs kernels."""

    device: Any
    remote: bool

    def load(self, executable: Any) -> Any:
        """Return the runtime module, at this place, of what `tvm.compile` built."""
        ...

    def tensor(self, array: np.ndarray) -> Any:
        """Return a tensor there with the array's values."""
        ...

    def lost(self) -> str:
        """Return why nothing can run there any more; empty while it can."""
        ...


class Here:
    """This process."""

    device = tvm.cpu()
    remote = False

    def load(self, executable: Any) -> Any:
        """See `Place`."""
        return executable.jit()

    def tensor(self, array: np.ndarray) -> Any:
        """See `Place`."""
        return tvm.runtime.tensor(array)

    def lost(self) -> str:
        """See `Place`."""
        return ""


HERE = Here()


class Graph:
    """A compiled network, loaded at a place.

    Parameters
    ----------
    executable : tvm.runtime.Executable
        What `tvm.compile` made of a Relax module with a function "main" of one output.
    place : Place
    """

    def __init__(self, executable: Any, place: Place = HERE) -> None:
        self._place = place
        self._machine = relax.VirtualMachine(place.load(executable), place.device)

    def _set_input(self, arrays: tuple[np.ndarray, ...]) -> None:
        self._machine.set_input("main", *(self._place.tensor(array) for array in arrays))

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Return the output for these inputs."""
        # Inputs are set and outputs fetched apart from the run: over RPC a call cannot return them.
        self._set_input(arrays)
        self._machine.invoke_stateful("main")
        return self._machine.get_outputs("main").numpy()

    def evaluate(self, number: int, repeat: int, *arrays: np.ndarray) -> list[float]:
        """Return `repeat` means over `number` runs, in seconds, after one run that is not timed.

        Without arrays the inputs of the last call stand.
        """
        if arrays:
            self._set_input(arrays)
        timer = self._machine.time_evaluator(
            "invoke_stateful", self._place.device, number=number, repeat=repeat
        )
        return list(timer("main").results)

    def sampler(self, *arrays: np.ndarray) -> Sampler:
        """Return the sampler of runs on these inputs."""
        self._set_input(arrays)
        return evaluator_sampler(self.evaluate)
