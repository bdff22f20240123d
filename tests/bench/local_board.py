"""A board on this machine: TVM's tracker and RPC server, by the commands that a user types."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tvm import rpc

from tests.rpc_process import HOST, RpcProcess

try:
    from tests.emulator import arm

    QEMU_PYTHON, NO_QEMU = str(arm.PYTHON), arm.problem("neon", rpc=True)
except ImportError as error:
    QEMU_PYTHON, NO_QEMU = "", f"no emulator of ARM in this checkout: {error}"

_REGISTER_SECONDS = 60


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
        When one of them does not come up; with its log.
    """
    with RpcProcess("tracker", folder, sys.executable) as tracker:
        options = ["--key", key, "--tracker", f"{HOST}:{tracker.port}"]
        with RpcProcess("server", folder, python, options, environment) as server:
            _wait_registered(tracker.port, key, server)
            yield f"{HOST}:{tracker.port}"


def _wait_registered(port: int, key: str, server: RpcProcess) -> None:
    """Wait until the tracker knows the key."""
    deadline = time.monotonic() + _REGISTER_SECONDS
    while time.monotonic() < deadline and server.alive:
        known = rpc.connect_tracker(HOST, port).summary()["server_info"]
        if any(one["key"] == f"server:{key}" for one in known):
            return
        time.sleep(0.2)
    raise RuntimeError(f"no {key} after {_REGISTER_SECONDS} s; the server's log:\n{server.log}")
