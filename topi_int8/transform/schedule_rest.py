"""ScheduleRest: a plain CPU schedule (inline, parallel, vectorize) for every loop nest left naive.

What Lower schedules with care is marked ``tirx.is_scheduled``; everything else (softmax, pooling,
resize, float leftovers) arrives here as TVM legalized it: serial scalar loops. `schedule.rest` has
the steps.

A block that no step understands keeps its loops; the function says so in its attribute
``topi_int8.unscheduled``, which `unscheduled` reads.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.target import Target

from intrinsics import compat

from ..schedule import rest

SCHEDULED = "tirx.is_scheduled"
OURS = "topi_int8.scheduled"
UNSCHEDULED = "topi_int8.unscheduled"


@tvm.transform.module_pass(opt_level=0, name="topi_int8.ScheduleRest")
class ScheduleRest:
    """Schedule every PrimFunc that no earlier pass scheduled.

    Parameters
    ----------
    target : tvm.target.Target
        Only CPU (``llvm``, ``c``) targets are scheduled; for another the module is returned as is.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return a module with the scheduled functions; the input module is not changed."""
        if str(self.target.kind.name) not in ("llvm", "c"):
            return mod
        done = {}
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and not _is_scheduled(func):
                done[gvar] = schedule(func)
        new_mod = mod.clone()
        for gvar, func in done.items():
            new_mod.update_func(gvar, func)
        return new_mod


def unscheduled(mod: tvm.IRModule) -> tuple[tuple[str, str], ...]:
    """Return (function, reason) for each function that has a loop nest left naive."""
    return tuple(
        (str(gvar.name_hint), str(func.attrs[UNSCHEDULED]))
        for gvar, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc) and func.attrs and UNSCHEDULED in func.attrs
    )


def _is_scheduled(func: tirx.PrimFunc) -> bool:
    return bool(func.attrs) and any(func.attrs.get(key) for key in (SCHEDULED, OURS))


def schedule(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return the scheduled function, marked so; the blocks left naive are named in an attribute."""
    reasons: list[str] = []
    new_func = func
    try:
        sch = compat.Schedule(func)
        rest.inline(sch)
        for block in compat.child_blocks(sch):
            rest.schedule_block(sch, block, reasons)
        new_func = sch.mod["main"].with_attr(SCHEDULED, True)
    except Exception as error:  # an optimisation must never cost a compile
        reasons.append(rest.first_line(error))
    return new_func.with_attr(UNSCHEDULED, "; ".join(reasons)) if reasons else new_func
