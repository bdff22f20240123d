"""A board on this machine: TVM's tracker and RPC server, by the commands that a user types."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tvm import rpc

try:
    from tests.emulator import arm

    QEMU_PYTHON, NO_QEMU = str(arm.PYTHON), arm.problem("neon", rpc=True)
except ImportError as error:
    QEMU_PYTHON, NO_QEMU = "", f"no emulator of ARM in this checkout: {error}"

HOST = "127.0.0.1"
_START_SECONDS = 120  # a few on an idle machine, also under qemu


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def local_board(
    key: str,
    folder: Path,
    python: str | Path = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Yield the tracker's address while a server, run by `python`, is registered under the key.

    Raises
    ------
    RuntimeError
        When it does not come up; with the server's log.
    """
    tracker, server = free_port(), free_port()
    address = f"{HOST}:{tracker}"
    commands = {
        "tracker": _command(sys.executable, "tracker", tracker),
        "server": [*_command(python, "server", server), "--key", key, "--tracker", address],
    }
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            own = dict(environment or {}) if name == "server" else {}
            stack.enter_context(_process(command, folder, folder / f"{name}.log", own))
            _wait(tracker, key if name == "server" else "", folder / f"{name}.log")
        yield address


def _command(python: str | Path, name: str, port: int) -> list[str]:
    """Return the command of TVM's tracker or server on one port."""
    ports = ["--port", str(port), "--port-end", str(port + 1)]
    return [str(python), "-m", f"tvm.exec.rpc_{name}", "--host", HOST, *ports]


@contextlib.contextmanager
def _process(
    command: list[str], folder: Path, log: Path, environment: Mapping[str, str]
) -> Iterator[None]:
    """Run a command; with the block, or this process, it and what it started ends."""
    if shutil.which("setpriv"):
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=folder,
            env={**os.environ, "TMPDIR": str(folder), **environment}, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(port: int, key: str, log: Path) -> None:
    """Wait for the tracker, or for the key at it."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection((HOST, port), 1).close()
            if not key:
                return
            keys = [
                server["key"] for server in rpc.connect_tracker(HOST, port).summary()["server_info"]
            ]
            if f"server:{key}" in keys:
                return
        time.sleep(0.2)
    raise RuntimeError(
        f"nothing came up in {_START_SECONDS} s; {log.name}:\n{log.read_text()[-2000:]}"
    )
