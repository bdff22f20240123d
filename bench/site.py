"""Where a run takes place: this machine's cores, pinned, or a board over RPC; and its Target."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm.target import Target

from . import board, board_cpu, machine, targets
from .place import HERE, Place

FORMAT = 1  # of the JSON files; bench/README.md states their fields


@dataclass(frozen=True)
class Site:
    """A place to run at, ready.

    Attributes
    ----------
    place : Place
    target : Target
        What to build for.
    about : dict
        The machine that numbers belong to, as JSON values.
    where : str
        For titles: the cores, or the board and which target it was built for.
    cores : tuple of int
        The cores pinned to; none on a board.
    """

    place: Place
    target: Target
    about: dict[str, Any]
    where: str
    cores: tuple[int, ...] = ()

    @property
    def caveat(self) -> str:
        """What a reader of the numbers must be told first; empty on this machine."""
        if not self.place.remote:
            return ""
        if self.about["emulated_on"]:
            return "The board is an emulator: its times say nothing about any core."
        return "Built here, timed on the board."

    def record(self, command: str, note: str) -> dict[str, Any]:
        """Return how a JSON file begins: the machine, and with a board the one that built, too."""
        host = {"host": machine.describe()} if self.place.remote else {}
        return {
            "format": FORMAT, "command": command, "machine": self.about, **host, "note": note,
        }  # fmt: skip


@dataclass(frozen=True)
class Request:
    """Where a run is asked to take place: the command line's options of these names."""

    rpc: str = ""
    key: str = ""
    cc: str = ""
    isa: str = "host"
    target: str | None = None
    threads: int = 1
    cpu: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; allowed: 1 or more")
        for name in () if self.rpc else ("key", "cc"):
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed only with --rpc")
        if self.rpc and self.isa != "host":
            raise ValueError(f"isa is {self.isa!r}; allowed with --rpc: --target, or a known --key")
        if self.rpc and self.cpu:
            raise ValueError(f"cpu is {self.cpu}; allowed only without --rpc")


@contextlib.contextmanager
def opened(request: Request) -> Iterator[Site]:
    """Yield the site of a request.

    Raises
    ------
    ValueError
        When there is no such target, tracker or board, or the machine lacks what the target names.
    """
    if not request.rpc:
        with machine.pinned(request.threads, request.cpu) as cores:
            target = targets.choose(request.isa, request.target, request.threads)
            cores_text = ",".join(map(str, cores))
            yield Site(HERE, target, machine.describe(), f"on {cores_text}", cores)
        return
    target = board.choose_target(request.key, request.target, request.threads)
    there = board.connect(request.rpc, request.key, target, request.cc)
    about = {**board_cpu.describe(there, target), "date": machine.now()}
    if missing := board_cpu.lacking(about, target):
        asked = f"target is {request.target!r}" if request.target else f"key is {request.key!r}"
        raise ValueError(f"{asked}: the board lacks {', '.join(missing)}; it cannot run there")
    there.use_threads(request.threads)
    name = f"{request.key} (the key's)" if request.target is None else request.target
    yield Site(there, target, about, f"over RPC, key {request.key}, target {name}")
