"""What a worker of the published tables can be asked: engines built, sampled, exported, weighed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench import worker as processes
from bench.timing import evaluator_sampler

from .engine import Engine

_MIB = 2**20


class Running(Protocol):
    """A built network on this machine."""

    def evaluate(self, number: int, repeat: int) -> list[float]:
        """Return `repeat` means over `number` runs, in seconds."""
        ...

    def output(self, data: np.ndarray) -> np.ndarray:
        """Return the logits of NCHW images."""
        ...

    def export(self, folder: Path) -> None:
        """Write what `load` of this worker reads."""
        ...

    def counts(self) -> dict[str, dict[str, int]]:
        """Return what `topi_int8.library_counts` counts, as JSON values."""
        ...


Build = Callable[[Engine, Mapping[str, np.ndarray]], Running]
Load = Callable[[Path, int], Callable[[], None]]  # folder, batch -> one run


class _Worker:
    """Engines by their keys, and what may be asked of them."""

    def __init__(self, build: Build, load: Load) -> None:
        self._build, self._load = build, load
        self._running: dict[str, Running] = {}

    def build(self, engine: dict[str, Any], weights: str) -> None:
        made = Engine(**engine)
        with np.load(weights) as arrays:
            self._running[made.key] = self._build(made, dict(arrays))

    def drop(self, key: str) -> None:
        self._running.pop(key, None)

    def sample(self, key: str, seconds: float) -> list[float]:
        return evaluator_sampler(self._running[key].evaluate)(seconds)

    def output(self, key: str, images: str) -> list:
        return self._running[key].output(np.load(images)).tolist()

    def export(self, key: str, folder: str) -> None:
        self._running[key].export(Path(folder))

    def counts(self, key: str) -> dict[str, dict[str, int]]:
        return self._running[key].counts()

    def memory(self, folder: str, batch: int) -> dict[str, float]:
        """Run what was exported once; of a fresh process this says what a network takes."""
        run = self._load(Path(folder), batch)
        before = processes.memory_status("VmRSS")
        run()
        peak = processes.memory_status("VmHWM")
        return {"peak": peak / _MIB, "activations": max(0, peak - before) / _MIB}


def serve(build: Build, load: Load) -> None:
    """Answer requests until the input ends."""
    processes.serve(_Worker(build, load))
