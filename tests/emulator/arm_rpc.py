"""TVM's own RPC server on an aarch64 Python under qemu: the commands that a board's owner types.

One server for each CPU model lives as long as this process, and one session on it, because the
server serves one at a time. A kernel that crashes takes the server with it; the next `session`
starts another.
"""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import rpc

from tests.rpc_process import HOST, RpcProcess

from . import EmulatorError
from .arm import PYTHON, export


class Server:
    """A running RPC server and the one session on it.

    Parameters
    ----------
    cpu : str
        qemu's CPU model.

    Raises
    ------
    EmulatorError
        When it does not come up; with the server's log.
    """

    def __init__(self, cpu: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="arm-rpc-"))
        self._uploads = 0
        # qemu is a child of the script that PYTHON is, so it asks by itself to end with this one.
        launcher = "setpriv --pdeathsig KILL" if shutil.which("setpriv") else ""
        environment = {"QEMU_CPU": cpu, "QEMU_LAUNCHER": launcher}
        try:
            self._process = RpcProcess("server", self.folder, PYTHON, environment=environment)
        except RuntimeError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise EmulatorError(str(error)) from error
        try:
            self.remote = self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> rpc.RPCSession:
        for _ in range(100):
            with contextlib.suppress(RuntimeError):  # it has bound its port, and listens soon
                return rpc.connect(HOST, self._process.port)
            time.sleep(0.1)
        raise EmulatorError(f"the RPC server does not answer; its log:\n{self.log}")

    @property
    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._process.alive

    @property
    def log(self) -> str:
        """The end of what the server printed."""
        return self._process.log

    def load(self, executable: tvm.runtime.Executable, isa: str) -> Any:
        """Link, upload and load what `tvm.compile` built; return the remote module."""
        self._uploads += 1
        name = f"library{self._uploads}.so"
        path = export(executable, self.folder / name, isa)
        self.remote.upload(str(path), name)
        return self.remote.load_module(name)

    def close(self) -> None:
        """End the server and everything it started, and remove what it stored."""
        self._process.close()
        shutil.rmtree(self.folder, ignore_errors=True)


_servers: dict[str, Server] = {}


@contextlib.contextmanager
def session(cpu: str) -> Iterator[Server]:
    """Give the server of a CPU model, starting it if there is none.

    Raises
    ------
    EmulatorError
        When the server cannot start, or anything but an assertion fails while it is used: it has
        most likely died, and its log is in the message. The server is ended then.
    """
    server = _servers.get(cpu)
    if server is None or not server.alive:
        server = _servers[cpu] = Server(cpu)
    try:
        yield server
    except (RuntimeError, OSError) as error:  # what a lost connection raises, on either side of TVM
        log = server.log
        _servers.pop(cpu).close()
        raise EmulatorError(f"on {cpu}: {error}\nthe server's log:\n{log}") from error


@atexit.register
def close_all() -> None:
    """End all servers."""
    while _servers:
        _servers.popitem()[1].close()


def runner(server: Server, module: Any) -> Callable[[str, Sequence[np.ndarray]], list[np.ndarray]]:
    """Return a function that runs a kernel of a remote module by name, and returns all arrays."""

    def run(name: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        device = server.remote.cpu()
        tensors = [tvm.runtime.tensor(array, device) for array in arrays]
        module[name](*tensors)
        return [tensor.numpy() for tensor in tensors]

    return run
