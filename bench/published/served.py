"""A worker's side of the conversation: one JSON request a line, one JSON answer a line.

Requests are {"do": name, ...}. Whatever else TVM prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

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
        before = _status("VmRSS")
        run()
        peak = _status("VmHWM")
        return {"peak": peak / _MIB, "activations": max(0, peak - before) / _MIB}


def _status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def serve(build: Build, load: Load) -> None:
    """Answer requests until the input ends."""
    # Answers alone go where standard output went; libraries print to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = _Worker(build, load)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:  # said to who asked; the next engine may do better
            words = [word for word in str(error).strip().splitlines() if word.strip()]
            answer = {"error": f"{type(error).__name__}: {words[-1].strip() if words else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
