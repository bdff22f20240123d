"""A board behind TVM's own RPC tracker and server: libraries are built here and run there."""

from __future__ import annotations

import socket
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import rpc
from tvm.target import Target

from topi_int8 import cross, target_names
from topi_int8 import target as targets
from topi_int8.target_text import parse_target

TRACKER_COMMAND = "python -m tvm.exec.rpc_tracker --port 9190"
SERVER_COMMAND = "python -m tvm.exec.rpc_server --tracker HOST:9190 --key {key}"
_REACH_SECONDS = 5
_BIG_CORES = 1  # tvm::runtime::threading::ThreadGroup::kBig


def parse_address(text: str) -> tuple[str, int]:
    """Return the host and port of ``HOST:PORT``.

    Raises
    ------
    ValueError
        When the text is something else.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            f"rpc is {text!r}; allowed: HOST:PORT of TVM's tracker, as 192.168.0.2:9190"
        )
    return host, int(port)


def choose_target(key: str, text: str | None, threads: int = 1) -> Target:
    """Return the Target to build for: the one named, or the one that the key names.

    Parameters
    ----------
    key : str
        The tracker's key of the board; boards are usually registered under their kind, as "rpi4".
    text : str, optional
        A name of `topi_int8.target_names`, TVM's own string, or a JSON dictionary.

    Raises
    ------
    ValueError
        When neither names a Target.
    """
    if text is None and key not in target_names.TARGETS:
        known = ", ".join(target_names.TARGETS)
        raise ValueError(
            f"key is {key!r}, which names no target: give --target; allowed: TVM's own, or {known}"
        )
    name = key if text is None else text
    if name in target_names.TARGETS:
        return targets.named(name, threads)
    return parse_target(name)


class Board:
    """A session on a board; a `bench.place.Place`.

    Parameters
    ----------
    session : tvm.rpc.RPCSession
    command : tuple of str
        What links for it, see `topi_int8.cross.find`.
    name : str
        For messages: the key.
    """

    remote = True

    def __init__(self, session: rpc.RPCSession, command: tuple[str, ...], name: str) -> None:
        self.session = session
        self.device = session.cpu()
        self.name = name
        self._command = command
        self._numbers = count()

    def load(self, executable: Any) -> Any:
        """Link, upload and load; see `bench.place.Place`.

        Raises
        ------
        topi_int8.cross.LinkError
            When it cannot be linked.
        RuntimeError
            When the board cannot load it.
        """
        # A name of its own: the dynamic linker takes a file of a known name for the one it has.
        name = f"topi_int8_{next(self._numbers)}.so"
        with tempfile.TemporaryDirectory() as folder:
            self.session.upload(str(cross.link(executable, Path(folder) / name, self._command)))
        module = self.session.load_module(name)
        self.session.remove(name)  # mapped by now; a whole network's would fill a small board
        return module

    def tensor(self, array: np.ndarray) -> Any:
        """See `bench.place.Place`."""
        return tvm.runtime.tensor(np.ascontiguousarray(array), self.device)

    def use_threads(self, threads: int) -> None:
        """Let kernels run on that many of the board's cores, the big ones of big.LITTLE."""
        self.session.get_function("runtime.config_threadpool")(_BIG_CORES, threads)

    def lost(self) -> str:
        """See `bench.place.Place`: a kernel that crashes takes TVM's RPC server with it."""
        try:
            self.session.get_function("tvm.rpc.server.workpath")("")
        except (RuntimeError, OSError):
            return (
                f"the RPC server of {self.name} is gone (its log says why; a crash ends it): "
                f"start it again with {SERVER_COMMAND.format(key=self.name)}"
            )
        return ""


def connect(address: str, key: str, target: Target, cc: str = "") -> Board:
    """Return a session on a board that the tracker has; waits while others use it.

    Raises
    ------
    ValueError
        When the address is no tracker's, no server is registered under the key, or nothing here
        links for the target.
    """
    host, port = parse_address(address)
    if not key:
        raise ValueError("key is ''; allowed: the --key that the board's RPC server was given")
    command = cross.find(target, cc)
    try:
        # TVM itself would try for a minute.
        socket.create_connection((host, port), _REACH_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"rpc is {address!r}: nothing answers there ({error}); start a tracker with "
            f"{TRACKER_COMMAND}"
        ) from None
    try:
        tracker = rpc.connect_tracker(host, port)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"rpc is {address!r}: no tracker of TVM's ({error})") from None
    keys = sorted({server["key"].split(":", 1)[1] for server in tracker.summary()["server_info"]})
    if key not in keys:
        there = ", ".join(keys) or "none"
        raise ValueError(
            f"key is {key!r}; allowed: those at the tracker ({there}). On the board: "
            f"{SERVER_COMMAND.format(key=key)}"
        )
    return Board(tracker.request(key), command, key)
