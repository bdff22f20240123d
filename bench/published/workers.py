"""The two workers, asked in turn: engines built, sampled alternately, their memory measured."""

from __future__ import annotations

import json
import os
import subprocess
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

from .engine import Engine, Memory

ROOT = Path(__file__).resolve().parents[2]
RELAY_PYTHON = "TOPI_INT8_RELAY_PYTHON"  # the environment's variable
_BUILT_PYTHON = ROOT / "build" / "relay" / "venv" / "bin" / "python"
_MODULES = {"relay": "relay_worker", "relax": "relax_worker", "torch": "relax_worker"}


class WorkerError(RuntimeError):
    """A worker could not do what it was asked, and said why."""


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


class Worker:
    """A worker process."""

    def __init__(self, tvm: str) -> None:
        python = str(relay_python()) if tvm == "relay" else sys.executable
        # Large buffers come and go as pages, so that resident memory says what is in use.
        env = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
        self._process = subprocess.Popen(
            [python, "-m", f"bench.published.{_MODULES[tvm]}"], cwd=ROOT, env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, do: str, **request: Any) -> Any:
        """Return a worker's answer.

        Raises
        ------
        WorkerError
            When it failed, with its words.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError("the worker is gone") from None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"the worker ended with {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


@contextmanager
def opened(kinds: Sequence[str]) -> Iterator[dict[str, Worker]]:
    """Open the workers that engines of these TVMs need; torch shares Relax's."""
    with ExitStack() as stack:
        found: dict[str, Worker] = {}
        for kind in kinds:
            name = _MODULES[kind]
            if name not in found:
                found[name] = Worker(kind)
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
            samplers[engine.key] = _sampler(worker, engine.key)
        say(f"sample {len(samplers)} engines")
        taken = interleave(samplers, rounds, seconds)
    for engine in engines:
        result = taken.get(engine.key)
        if isinstance(result, Timing):
            found[engine] = RivalResult(result)
        elif result is not None:
            found[engine] = RivalResult(None, str(result))
    return found


def _sampler(worker: Worker, key: str) -> Sampler:
    return lambda seconds: worker.ask("sample", key=key, seconds=seconds)


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
