"""One switch for all places where TVM is made to use this package: on, off, off for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol


class Slot(Protocol):
    """A place in TVM that looks something up at call time."""

    def install(self) -> Callable[[], None]:
        """Put ours there, and return what puts back what was found."""
        ...


@dataclass(frozen=True, eq=False)
class DictSlot:
    """A key of a dict (or of a module's names) whose value is wrapped."""

    names: dict[str, Any]
    key: str
    wrap: Callable[[Any], Any]

    def install(self) -> Callable[[], None]:
        """Put ours there; return what puts the very object back that was found.

        A place that somebody else has replaced since is left to them.
        """
        found = self.names[self.key]
        replacement = self.wrap(found)
        self.names[self.key] = replacement

        def restore() -> None:
            if self.names.get(self.key) is replacement:
                self.names[self.key] = found

        return restore


@dataclass(eq=False)
class _Block:
    """An open ``with disabled()`` and the state to return to when it closes."""

    resume: bool


class Switch:
    """Installs and restores a set of slots; one switch serves the whole process."""

    def __init__(self, *slots: Slot) -> None:
        self._slots = slots
        self._lock = threading.RLock()
        self._restore: list[Callable[[], None]] = []
        self._blocks: list[_Block] = []

    def is_enabled(self) -> bool:
        """Whether TVM's compile uses this package now."""
        return bool(self._restore)

    def enable(self) -> None:
        """Make TVM's compile use this package for LLVM CPU targets; does nothing when it is on.

        Inside a ``with disabled():`` block it takes effect at once, and the block's end restores
        what was before it.
        """
        with self._lock:
            if not self._restore:
                self._restore = [slot.install() for slot in self._slots]

    def disable(self) -> None:
        """Put back what `enable` found; does nothing when it is off.

        A place that somebody else has replaced since is left to them.
        """
        with self._lock:
            while self._restore:
                self._restore.pop()()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Leave TVM as it was found while the block runs, then return to the state before it.

        Blocks may be nested, and may overlap in several threads: the switch is one for the whole
        process, and stays off until the last of the overlapping blocks is closed.
        """
        with self._lock:
            block = _Block(resume=self.is_enabled())
            self._blocks.append(block)
            self.disable()
        try:
            yield
        finally:
            with self._lock:
                self._close(block)

    def _close(self, block: _Block) -> None:
        position = self._blocks.index(block)
        del self._blocks[position]
        if position < len(self._blocks):
            # Another thread opened its block inside ours and is not done: it returns to our state.
            self._blocks[position].resume = block.resume
        elif block.resume:
            self.enable()
        else:
            self.disable()
