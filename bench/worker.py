"""A process that is asked: one JSON request a line on its input, one JSON answer a line back.

`Worker` asks, `serve` answers. Requests are {"do": name, ...}, answers {"value": ...} or
{"error": words}. Knows the standard library alone: any interpreter can be at the other end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .timing import Sampler

ROOT = Path(__file__).resolve().parents[1]

# What threads of our own need to fall asleep after a parallel region (TVM's and OpenMP's spin for
# some milliseconds), before another process is timed on the same cores.
_SETTLE_SECONDS = 0.02


class WorkerError(RuntimeError):
    """A worker could not do what it was asked, and said why."""


class Worker:
    """A worker process, started at the root of this checkout.

    Parameters
    ----------
    command : sequence of str
        The interpreter and its arguments.
    env : mapping of str to str
        Variables beside this process's own.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            list(command), cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(env or {}),
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._stopped = False

    def ask(self, do: str, **request: Any) -> Any:
        """Return a worker's answer.

        Raises
        ------
        WorkerError
            When it failed, with its words.
        """
        assert self._process.stdin and self._process.stdout
        if self._process.stdin.closed:
            raise WorkerError("the worker is gone")
        if self._stopped:
            self._process.send_signal(signal.SIGCONT)
            self._stopped = False
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

    def sampler(self, key: str) -> Sampler:
        """Return the sampler of what the worker knows by a key; between samples it is stopped.

        Thread pools spin when their work is done; a process that is stopped takes nothing from the
        others that are timed on its cores.
        """

        def sample(seconds: float) -> list[float]:
            time.sleep(_SETTLE_SECONDS)
            try:
                return self.ask("sample", key=key, seconds=seconds)
            finally:
                self.stop()

        return sample

    def stop(self) -> None:
        """Stop the process until it is asked again."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)
            self._stopped = True

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # a request that it did not live to read
                pass


def serve(handler: object) -> None:
    """Answer requests by the handler's methods of their names, until the input ends."""
    # Answers alone go where standard output went; libraries print to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(handler, request.pop("do"))(**request)}
        except Exception as error:  # said to who asked; the next request may do better
            words = [word for word in str(error).strip().splitlines() if word.strip()]
            answer = {"error": f"{type(error).__name__}: {words[-1].strip() if words else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def memory_status(field: str) -> int:
    """Return a field of /proc/self/status, as VmRSS or VmHWM, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
