"""The two workers, asked in turn: engines built, sampled alternately, their memory measured."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.results import RivalResult
from bench.timing import Sampler, Timing, interleave
from bench.worker import ROOT, Worker, WorkerError

from .engine import Engine, Memory

RELAY_PYTHON = "TOPI_INT8_RELAY_PYTHON"  # the environment's variable
_BUILT_PYTHON = ROOT / "build" / "relay" / "venv" / "bin" / "python"
_MODULES = {"relay": "relay_worker", "relax": "relax_worker", "torch": "relax_worker"}


def relay_python() -> Path:
    """Return the interpreter that has Relay's TVM.

    Raises
    ------
    WorkerError
        When there is none.
    """
    path = Path(os.environ.get(RELAY_PYTHON) or _BUILT_PYTHON)
    if not path.exists():
        raise WorkerError(
            f"no TVM with Relay at {path}: run `make test-relay`, or set {RELAY_PYTHON} to a "
            "Python that has one"
        )
    return path


def _start(tvm: str) -> Worker:
    python = str(relay_python()) if tvm == "relay" else sys.executable
    # Large buffers come and go as pages, so that resident memory says what is in use.
    return Worker(
        [python, "-m", f"bench.published.{_MODULES[tvm]}"], {"MALLOC_MMAP_THRESHOLD_": "65536"}
    )


@contextmanager
def opened(kinds: Sequence[str]) -> Iterator[dict[str, Worker]]:
    """Open the workers that engines of these TVMs need; torch shares Relax's."""
    with ExitStack() as stack:
        found: dict[str, Worker] = {}
        for kind in kinds:
            name = _MODULES[kind]
            if name not in found:
                found[name] = _start(kind)
                stack.callback(found[name].close)
        yield {kind: found[_MODULES[kind]] for kind in kinds}


def time_engines(
    engines: Sequence[Engine], weights: Path, rounds: int, seconds: float,
    say: Callable[[str], Any] = lambda _words: None,
) -> dict[Engine, RivalResult]:  # fmt: skip
    """Return each engine's timing, sampled in turn with the others', or why it has none.

    Parameters
    ----------
    say : callable
        Is told what is being done.
    """
    found: dict[Engine, RivalResult] = {}
    with opened(sorted({engine.tvm for engine in engines})) as workers:
        samplers: dict[str, Sampler] = {}
        for engine in engines:
            worker = workers[engine.tvm]
            say(f"build {engine.key}")
            try:
                worker.ask("build", engine=asdict(engine), weights=str(weights))
            except WorkerError as error:
                found[engine] = RivalResult(None, str(error))
                continue
            samplers[engine.key] = worker.sampler(engine.key)
        say(f"sample {len(samplers)} engines")
        taken = interleave(samplers, rounds, seconds)
    for engine in engines:
        result = taken.get(engine.key)
        if isinstance(result, Timing):
            found[engine] = RivalResult(result)
        elif result is not None:
            found[engine] = RivalResult(None, str(result))
    return found


def memory(engine: Engine, weights: Path) -> Memory:
    """Return what a fresh process takes that loads an engine's exported library and runs it once.

    Raises
    ------
    WorkerError
    """
    with tempfile.TemporaryDirectory() as folder:
        with opened([engine.tvm]) as workers:
            workers[engine.tvm].ask("build", engine=asdict(engine), weights=str(weights))
            workers[engine.tvm].ask("export", key=engine.key, folder=folder)
        with opened([engine.tvm]) as workers:
            found = workers[engine.tvm].ask("memory", folder=folder, batch=engine.batch)
    return Memory(**found)


def counts(engine: Engine, weights: Path) -> dict[str, dict[str, int]]:
    """Return what `topi_int8.library_counts` counts in an engine.

    Raises
    ------
    WorkerError
    """
    with opened([engine.tvm]) as workers:
        workers[engine.tvm].ask("build", engine=asdict(engine), weights=str(weights))
        return workers[engine.tvm].ask("counts", key=engine.key)


def save_weights(network: str, folder: Path) -> Path:
    """Write torchvision's network with seeded weights; return the file."""
    from bench import models

    module, _ = models.load(network)
    path = folder / f"{network}.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in module.state_dict().items()})
    return path
