# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""A function whose output is made by statements, rather than by a computation that is scheduled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te

from intrinsics import compat
from intrinsics.compat import i32, tir

from ..compute.conv2d import PackedConv2d
from ..compute.epilogue import Operands
from .stages import copy_stage

Statement = Callable[[Any, Any, Any, Any, Any, Any], Any]


def stated(
    data: Any, weight: Any, operands: Operands, source: Any, shape: tuple[int, ...],
    stored: tuple[int, ...], statement: Statement, copies: list[str],
) -> Any:  # fmt: skip
    """Return the PrimFunc (data, weight, [bias], [scale], [residual], out).

    Parameters
    ----------
    data, weight : te.Tensor
        Placeholders.
    operands : Operands
        What the epilogue reads.
    source : te.Tensor
        What statements read for the data: that itself, or a stage that copies it.
    shape, stored : tuple of int
        Of what statements write, and of the output; less of the last dimension is a stage "crop".
    statement : callable
        (source, weight, bias, scale, residual, out) -> the statement, of buffers; absent ones None.
    copies : list of str
        Names of stages that are plain copies.
    """

    def emit(ins: list[Any], outs: list[Any]) -> Any:
        present = iter(ins[2:])
        given = (operands.bias, operands.scale, operands.residual)
        optional = (None if tensor is None else next(present) for tensor in given)
        return statement(ins[0], ins[1], *optional, outs[0])

    inputs, dtype = [source, weight, *operands.present], operands.epilogue.out_dtype
    full = te.extern(shape, inputs, emit, name="out", dtype=dtype)
    out = full
    if shape != stored:
        out = te.compute(stored, lambda *at: full[at], name="crop")
        copies = [*copies, "crop"]
    func = te.create_prim_func([data, weight, *operands.present, out])
    if copies:
        sch = compat.Schedule(func)
        for name in copies:
            copy_stage(sch, compat.get_block(sch, name))
        func = sch.mod["main"]
    return compat.scheduled(func)


def task_loop(task: Any, count: int, body: list[Any], buffers: list[Any]) -> Any:
    """Return the parallel loop over tasks, each with buffers of its own."""
    block = compat.Block([], [], [], "task", compat.sequence(body), None, buffers, [], {})
    inner = [compat.BlockRealize([], True, block)]
    return compat.loop(task, count, inner, parallel=count > 1)


def bordered(conv: PackedConv2d, out: Any) -> list[Any]:
    """Return the statement that writes the border of the output; none where it has no border.

    A border of the output (n, blocks, rows, columns, out_block) is written as runs of pixels that
    lie together in memory: the right of a row and the left of the next.
    """
    top, left, _, right = conv.work.out_border
    rows, width = conv.work.stored
    if not any(conv.work.out_border):
        return []
    epi = conv.work.epilogue
    value = tir.Broadcast(tir.const(epi.out_zero_point, epi.out_dtype), conv.out_block)
    n, ob, y = (tir.Var(name, "int32") for name in ("n", "ob", "y"))

    def run(first: Any, count: int) -> list[Any]:
        x = tir.Var("x", "int32")
        at = [n, ob, i32(0), first + x, compat.ramp(i32(0), conv.out_block)]
        return [compat.loop(x, count, [tir.BufferStore(out, value, at)])] if count else []

    inner, end = top * width + left, (top + conv.work.oh - 1) * width + left + conv.work.ow
    between = run((top + y) * width + left + conv.work.ow, left + right)
    body = [
        *run(i32(0), inner),
        *([compat.loop(y, conv.work.oh - 1, between)] if between and conv.work.oh > 1 else []),
        *run(i32(end), rows * width - end),
    ]
    return [compat.loop(n, conv.work.n, [compat.loop(ob, conv.out_blocks, body)])]
