"""A progress bar over long work, in one place: on stderr, gone when the work is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(
    items: Iterable[T], title: str, show: bool = True, total: int | None = None
) -> Iterator[T]:
    """Yield the items, under a progress bar when asked for and `rich` is there to draw it.

    Parameters
    ----------
    items : iterable
    title : str
        What is done to them, e.g. "calibrating".
    show : bool
        False: no bar.
    total : int, optional
        Their number, where ``len`` does not say it; a bar without one only moves.
    """
    if not show:
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        yield from items
        return
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    # stderr: what a program prints stays its own.
    console = Console(stderr=True)
    yield from rich_track(items, title, total=total, transient=True, console=console)
