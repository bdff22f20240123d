# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""What the families of schedules share: the stages they schedule, parallel tasks, plain copies.

A plan schedules its stages wherever they stand: in a function of their own (`schedule_alone`), or
in one that somebody else has put around them (Relay's fused functions).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import te

from intrinsics import compat
from intrinsics.compat import Schedule

_ROLLED = "topi_int8.rolled"


@dataclass(frozen=True)
class Stages:
    """The blocks of a convolution in a schedule.

    Parameters
    ----------
    acc : block
        Of the reduction.
    stored : block
        Of the sums: `acc`, or what adds up its partial sums.
    out : block
        That reads the sums, element by element.
    loops : list of loops
        Of `out`: n, channel block, row, column, channel.
    """

    acc: Any
    stored: Any
    out: Any
    loops: list[Any]


def schedule_alone(plan: Any, tensors: list[Any]) -> Any:
    """Return the scheduled PrimFunc of a computation of `compute/`.

    Parameters
    ----------
    plan : SpatialPack, BlockPlan or DepthwisePlan
    tensors : list of te.Tensor
        Its inputs and output.
    """
    sch = Schedule(te.create_prim_func(tensors))
    names = compat.block_names(sch)
    acc, out = compat.get_block(sch, "conv"), compat.get_block(sch, "out")
    stored = compat.get_block(sch, "sum") if "sum" in names else acc
    plan.apply(sch, Stages(acc, stored, out, sch.get_loops(out)))
    # Borders and crop are plain copies.
    for name in ("pad", "crop"):
        if name in names:
            copy_stage(sch, compat.get_block(sch, name))
    func = roll(sch.mod["main"])
    return compat.scheduled(func)


def divisors(n: int, limit: int) -> list[int]:
    """Return the divisors of n up to limit, ascending."""
    return [d for d in range(1, min(n, limit) + 1) if n % d == 0]


# Parallel tasks of a kernel: four for each of eight cores. A task costs about 0.1 us (its scratch
# buffer, on AMX also its tile configuration), a task a row would cost a 1x1 layer half its time.
TASKS = 32


# Weights up to which none are fetched ahead: they are in the second-level cache soon enough.
PREFETCHED = 32 << 10


def rows_per_task(outer: int, rows: int, tasks: int = TASKS) -> int:
    """Return how many rows a task takes, of `rows` in each of `outer` iterations around them.

    The rows stay serial inside a task as far as at least `tasks` tasks remain.
    """
    return max(d for d in divisors(rows, rows) if d == 1 or outer * rows // d >= tasks)


def parallel_tasks(sch: Any, loops: list[Any], rows: Any) -> None:
    """Run the nest `loops` + `rows` in parallel, in no more tasks than it takes to share it out."""
    outer = math.prod(int(sch.get(loop).extent) for loop in loops)
    whole = rows_per_task(outer, int(sch.get(rows).extent))
    task, _ = sch.split(rows, [None, whole])
    sch.parallel(sch.fuse(*loops, task))


def zero_in_vectors(sch: Any, init: Any, unrolled: int) -> None:
    """Schedule a zeroing block: its innermost loop a vector, `unrolled` loops around it unrolled.
    """
    *_, lanes = loops = sch.get_loops(init)
    for loop in loops[-1 - unrolled : -1]:
        sch.unroll(loop)
    sch.vectorize(lanes)


def copy_stage(sch: Any, block: Any) -> None:
    """Schedule an elementwise stage over NCHW[c]c: rows in parallel, channels in vectors of <= 64.
    """
    *blocks, row, _, channel = sch.get_loops(block)
    width = max(divisors(int(sch.get(channel).extent), 64))
    _, vector = sch.split(channel, [None, width])
    sch.vectorize(vector)
    parallel_tasks(sch, blocks, row)


def vector_stage(sch: Any, block: Any) -> None:
    """Schedule an elementwise stage of any shape: outer loops in parallel, vectors of <= 16."""
    *outer, inner = sch.get_loops(block)
    _, vector = sch.split(inner, [None, max(divisors(int(sch.get(inner).extent), 16))])
    sch.vectorize(vector)
    count, tasks = 0, 1
    while count < len(outer) and tasks < TASKS:
        tasks *= int(sch.get(outer[count]).extent)
        count += 1
    if count:
        sch.parallel(sch.fuse(*outer[:count]) if count > 1 else outer[0])


def keep_rolled(sch: Any, loop: Any) -> None:
    """Mark a loop for `roll`; one of a single pass needs no mark."""
    if int(sch.get(loop).extent) > 1:
        sch.annotate(loop, _ROLLED, 1)


def roll(func: Any) -> Any:
    """Return the function with its marked loops in a form that LLVM cannot unroll."""

    def rolled(loop: Any) -> Any:
        extent = compat.unknown_to_llvm(int(loop.extent))
        dtype = compat.dtype_of(loop.loop_var)  # int64 in some of Relay's functions
        extent = extent if compat.dtype_of(extent) == dtype else extent.astype(dtype)
        return compat.with_body(loop, loop.body, extent)

    return compat.replace_annotated_loops(func, _ROLLED, rolled)
