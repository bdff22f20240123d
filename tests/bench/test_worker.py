"""bench/worker.py: a process asked by JSON lines, stopped between samples, ended."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from bench.worker import Worker, WorkerError, memory_status

SERVER = """
import os
from bench.worker import serve

class Handler:
    def add(self, a, b):
        print("not an answer")
        return a + b

    def variable(self, name):
        return os.environ.get(name)

    def sample(self, key, seconds):
        return [1e6 * seconds]

    def die(self):
        os._exit(3)

serve(Handler())
"""


@pytest.fixture
def worker():
    started = Worker([sys.executable, "-c", SERVER], {"OF_THIS_TEST": "1"})
    yield started
    started.close()


def state(worker: Worker) -> str:
    """Return the state letter of a worker's process: T where it is stopped."""
    stat = Path(f"/proc/{worker._process.pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0]


def test_answers_and_errors(worker):
    assert worker.ask("add", a=1, b=2) == 3
    with pytest.raises(WorkerError, match="TypeError: "):
        worker.ask("add", a=1, b="x")
    with pytest.raises(WorkerError, match=r"AttributeError: .*'divide'"):
        worker.ask("divide")
    # Printing does not disturb the answers, and after an error it goes on.
    assert worker.ask("add", a="x", b="y") == "xy"
    assert worker.ask("variable", name="OF_THIS_TEST") == "1"
    assert worker.ask("variable", name="HOME") == os.environ.get("HOME")


def test_it_is_stopped_between_samples(worker):
    sample = worker.sampler("any")
    assert sample(0.5) == [5e5]
    deadline = time.monotonic() + 10
    while state(worker) != "T":
        assert time.monotonic() < deadline
    assert sample(0.25) == [2.5e5]
    assert worker.ask("add", a=1, b=1) == 2


def test_one_that_ended_is_said(worker):
    with pytest.raises(WorkerError, match="ended with 3"):
        worker.ask("die")
    with pytest.raises(WorkerError):
        worker.ask("add", a=1, b=2)
    worker.stop()


def test_a_stopped_one_is_ended():
    started = Worker([sys.executable, "-c", SERVER])
    started.ask("add", a=1, b=2)
    started.stop()
    started.close()
    assert started._process.returncode is not None


def test_memory_of_this_process():
    assert 1 << 20 < memory_status("VmRSS") <= memory_status("VmHWM")
    with pytest.raises(OSError, match="no VmNothing"):
        memory_status("VmNothing")
