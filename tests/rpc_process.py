"""TVM's RPC server or tracker in a process of its own, by the command that a user types."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

HOST = "127.0.0.1"
_START_SECONDS = 120  # a few on an idle machine, also under qemu
# The process binds the first free port of a range and says which: a port that a test finds free and
# hands over can be another's by then. Below Linux's ephemeral ports, and where no other process of
# this test run begins: both would bind one port, and fail only as they listen.
_FIRST_PORT, _RANGES, _RANGE = 12000, 200, 100


class RpcProcess:
    """`python -m tvm.exec.rpc_{name}` on a free port; ends with this process in any case.

    Parameters
    ----------
    name : str
        "server" or "tracker".
    folder : pathlib.Path
        Its working and temporary folder; the log is `{name}.log` there.
    python : str or pathlib.Path
        The interpreter.
    options : sequence of str
        Further words of the command.
    environment : mapping of str to str, optional
        What it gets beside this process's own.

    Attributes
    ----------
    port : int
        Where it listens.

    Raises
    ------
    RuntimeError
        When it does not come up; with its log.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        python: str | Path,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = folder / f"{name}.log"
        first = _FIRST_PORT + os.getpid() % _RANGES * _RANGE
        ports = ["--port", str(first), "--port-end", str(first + _RANGE)]
        command = [str(python), "-m", f"tvm.exec.rpc_{name}", "--host", HOST, *ports, *options]
        if shutil.which("setpriv"):
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=folder,
                env={**os.environ, "TMPDIR": str(folder), **(environment or {})},
                start_new_session=True,
            )  # fmt: skip
        try:
            self.port = self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> int:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.alive:
            # It says that it has bound a port; asking the port itself would only fill its log.
            if said := re.search(rf"bind to {HOST}:(\d+)$", self.log, re.MULTILINE):
                return int(said[1])
            time.sleep(0.1)
        raise RuntimeError(f"not up in {_START_SECONDS} s; {self._log.name}:\n{self.log}")

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def log(self) -> str:
        """The end of what it printed."""
        return self._log.read_text(errors="replace")[-4000:]

    def close(self) -> None:
        """End it and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> RpcProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
