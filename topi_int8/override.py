"""Makes TVM's own compile use our pipeline for LLVM CPU targets, and puts TVM back as it was.

TVM 0.27 finds the pipeline of a CPU compile in two places, both looked up at call time:

- ``relax.pipeline.PIPELINE_MAP["default"]``: `tvm.compile`, `relax.build` and
  `relax.get_pipeline("default")`, with a target, under ``with target:``, or with neither (TVM then
  builds for plain ``llvm``);
- ``relax.backend.cpu_generic.get_default_pipeline``: `relax.get_default_pipeline(target)`.

``PIPELINE_MAP["default_build"]`` is left alone: ``relax_pipeline="default_build"`` asks for TVM's
own by name.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm.relax.backend import cpu_generic
from tvm.relax.backend.cpu_generic import pipeline as cpu_generic_pipeline
from tvm.target import Target

from .target import is_supported

Factory = Callable[..., tvm.transform.Pass]


def _ours(target: Target) -> tvm.transform.Pass:
    # Imported late: the pipeline imports every room of the package, and TVM calls us long after.
    from topi_int8.transform.pipeline import pipeline

    return pipeline(target)


def _cpu_target(mod: tvm.IRModule) -> Target | None:
    """The CPU target that `mod` is being compiled for, or None if a part is for another."""
    current = Target.current(allow_none=True)
    # With no target at all TVM builds for plain llvm, whatever the module's virtual devices say.
    target = Target("llvm") if current is None else current
    devices = mod.global_infos.get("vdevice", ())
    attributes = [function.attrs or {} for function in mod.functions.values()]
    named = [device.target for device in devices]
    named += [attrs["target"] for attrs in attributes if "target" in attrs]
    return target if all(map(is_supported, (target, *named))) else None


def _wrap_default(stock: Factory) -> Factory:
    """Replace the factory of the pipeline named default; the target shows when it runs."""

    @functools.wraps(stock)
    def default(*args: Any, **kwargs: Any) -> tvm.transform.Pass:
        stock_pass = stock(*args, **kwargs)

        @tvm.transform.module_pass(opt_level=0, name="topi_int8.default")
        def run(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
            target = _cpu_target(mod) if is_enabled() else None
            return (stock_pass if target is None else _ours(target))(mod)

        return run

    return default


def _wrap_target(stock: Factory) -> Factory:
    """Replace the factory of a given CPU target's pipeline."""

    @functools.wraps(stock)
    def get_default_pipeline(target: Target) -> tvm.transform.Pass:
        if not is_enabled() or not is_supported(target):
            return stock(target)

        @tvm.transform.module_pass(opt_level=0, name="topi_int8.default")
        def run(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
            with target:
                mapped = _cpu_target(mod) if is_enabled() else None
                return (stock(target) if mapped is None else _ours(mapped))(mod)

        return run

    return get_default_pipeline


@dataclass(frozen=True, eq=False)
class _Slot:
    """A place where TVM looks a pipeline factory up: a key of a dict (or of a module's)."""

    names: dict[str, Any]
    key: str
    wrap: Callable[[Factory], Factory]


_SLOTS: tuple[_Slot, ...] = (
    _Slot(relax.pipeline.PIPELINE_MAP, "default", _wrap_default),
    _Slot(vars(cpu_generic), "get_default_pipeline", _wrap_target),
    _Slot(vars(cpu_generic_pipeline), "get_default_pipeline", _wrap_target),
)


@dataclass(eq=False)
class _Block:
    """An open ``with disabled()`` and the state to return to when it closes."""

    resume: bool


_lock = threading.RLock()
_installed: list[tuple[_Slot, Factory, Factory]] = []  # slot, what we found, what we put there
_blocks: list[_Block] = []


def is_enabled() -> bool:
    """Whether TVM's compile goes through our pipeline now."""
    return bool(_installed)


def enable() -> None:
    """Make `tvm.compile` use our pipeline for LLVM CPU targets; does nothing when it is on.

    Inside a ``with disabled():`` block it takes effect at once, and the block's end restores what
    was before it.
    """
    with _lock:
        if _installed:
            return
        for slot in _SLOTS:
            found = slot.names[slot.key]
            replacement = slot.wrap(found)
            slot.names[slot.key] = replacement
            _installed.append((slot, found, replacement))


def disable() -> None:
    """Put back the very objects that `enable` found; does nothing when it is off.

    A place that somebody else has replaced since is left to them.
    """
    with _lock:
        while _installed:
            slot, found, replacement = _installed.pop()
            if slot.names.get(slot.key) is replacement:
                slot.names[slot.key] = found


@contextmanager
def disabled() -> Iterator[None]:
    """Leave TVM as it was found while the block runs, then return to the state before it.

    Blocks may be nested, and may overlap in several threads: the switch is one for the whole
    process, and stays off until the last of the overlapping blocks is closed.
    """
    with _lock:
        block = _Block(resume=is_enabled())
        _blocks.append(block)
        disable()
    try:
        yield
    finally:
        with _lock:
            _close(block)


def _close(block: _Block) -> None:
    position = _blocks.index(block)
    del _blocks[position]
    if position < len(_blocks):
        # Another thread opened its block inside ours and is not done: it returns to our state.
        _blocks[position].resume = block.resume
    elif block.resume:
        enable()
    else:
        disable()
