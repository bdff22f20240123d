"""database(): relay.build schedules our kernels in TIR, by the very schedules that Relax uses.

TVM can ask a database for the schedule of each fused function's TIR; `ScheduleFnDatabase` makes it
on the spot. Convolutions and matmuls of ours follow their plans, the plain rest (pooling, layout
changes, elementwise) `schedule.rest`. What neither knows (a float convolution, say) keeps the TE
schedule of its strategy, and TVM warns "Cannot find workload" of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import tvm
from tvm import relay
from tvm.meta_schedule.database import ScheduleFnDatabase
from tvm.relay import build_module
from tvm.relay.backend import te_compiler, vm
from tvm.relay.op.strategy import arm_cpu, x86

from ..schedule.stages import roll
from ..switch import DictSlot
from ..target import is_supported
from . import tir_schedule
from .build import context_with, single_target
from .wide_indices import MARK, lower_pass

_open: ContextVar[bool] = ContextVar("topi_int8.relay.database", default=False)

_CONFIG = {
    "relay.backend.use_meta_schedule": True,
    "relay.backend.tir_converter": "default",
}
# It asks for all schedules a first time, to lay weights out as they want them: ours lie so.
_SURPLUS = "MetaScheduleLayoutRewrite"


@contextmanager
def database() -> Iterator[None]:
    """Make builds inside the block (and thread) schedule in TIR.

    `relay.build`, `relay.vm.compile` and what calls them take the PassContext that is current then,
    with its opt_level: it may be entered before this block or inside. Blocks may be nested. Builds
    for another target than one LLVM CPU are left as they are.

    Raises
    ------
    ValueError
        When topi_int8 is disabled: the kernels then are not in Relay's strategies.

    Examples
    --------
    >>> with topi_int8.relay.database(), tvm.transform.PassContext(opt_level=3):
    ...     lib = relay.build(mod, target="llvm -mcpu=cascadelake", params=params)
    """
    from . import is_enabled  # the switch is made of this module's slots, among others

    if not is_enabled():
        raise ValueError("topi_int8 is disabled; allowed: database() after topi_int8.enable()")
    token = _open.set(True)
    try:
        yield
    finally:
        _open.reset(token)


@tvm.transform.module_pass(opt_level=0, name="topi_int8.Scheduled")
def _scheduled(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Give the loops that our schedules marked their form: TVM keeps a schedule's steps only.

    Whatever is scheduled in TIR here is marked as ours.
    """
    for name, func in mod.functions_items():
        if isinstance(func.body, tvm.tir.BlockRealize):
            mod.update_func(name, roll(func).with_attr(MARK, True))
    return mod


def _context() -> tvm.transform.PassContext:
    """Return the current PassContext with the database's settings."""
    return context_with({**_CONFIG, **lower_pass(0, _scheduled)}, [_SURPLUS])


def _dispatched(build: Callable[..., Any]) -> Callable[..., Any]:
    """Return a build function that asks our database inside `database()`."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        target = single_target(signature.bind(*args, **kwargs).arguments.get("target"))
        # TVM tells a schedule function of no target: there must be one for all functions.
        if not _open.get() or target is None or not is_supported(target):
            return build(*args, **kwargs)
        with ScheduleFnDatabase(tir_schedule.schedule), _context():
            return build(*args, **kwargs)

    return wrapper


def _unless_open(is_meta_schedule_enabled: Callable[[], bool]) -> Callable[[], bool]:
    """Return what upstream's strategies ask: with a tuner's records they would offer no schedules.
    """
    return lambda: is_meta_schedule_enabled() and not _open.get()


SLOTS: tuple[DictSlot, ...] = (
    DictSlot(vars(relay), "build", _dispatched),
    DictSlot(vars(build_module), "build", _dispatched),
    DictSlot(vars(vm), "compile", _dispatched),
    *(
        DictSlot(vars(module), "is_meta_schedule_enabled", _unless_open)
        for module in (x86, arm_cpu, te_compiler)
    ),
)
