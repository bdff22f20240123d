# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Depthwise convolution: channels in vectors, a strip of pixels in registers over all taps."""

from __future__ import annotations

from typing import Any

from tvm import te

from intrinsics import compat
from intrinsics.compat import Schedule

from ..compute.depthwise import PackedDepthwise, depthwise
from .spatial_pack import copy_stage, divisors, finish, parallel_tasks, zero_in_vectors


def schedule(conv: PackedDepthwise, lanes: int, registers: int) -> Any:
    """Return the scheduled PrimFunc.

    Parameters
    ----------
    conv : PackedDepthwise
    lanes : int
        Lanes of 32 bits in a vector.
    registers : int
        Vector registers; half of them hold the strip, the rest what widening takes.
    """
    sch = Schedule(te.create_prim_func(depthwise(conv)))
    names = compat.block_names(sch)
    acc, out = compat.get_block(sch, "conv"), compat.get_block(sch, "out")
    lanes = max(divisors(conv.block, lanes))
    # 1. Channels in vectors; strips of columns.
    n, cb, oh, ow, c = sch.get_loops(out)
    strip = max(divisors(conv.work.ow, registers // 2))
    owo, owi = sch.split(ow, [None, strip])
    co, ci = sch.split(c, [None, lanes])
    sch.reorder(n, cb, oh, co, owo, owi, ci)
    # 2. Threads share out batch, blocks and rows.
    parallel_tasks(sch, [n, cb], oh)
    # 3. The strip's accumulators live over all taps.
    sch.compute_at(acc, owo, preserve_unit_loops=True)
    an, acb, ay, ax, ac, kh, kw = sch.get_loops(acc)[-7:]
    sch.reorder(an, acb, ay, kh, kw, ax, ac)
    for loop in (kw, ax):
        sch.unroll(loop)
    sch.vectorize(ac)
    zero_in_vectors(sch, sch.decompose_reduction(acc, kh), 1)
    sch.unroll(owi)
    sch.vectorize(ci)
    # 4. Borders are a plain copy.
    if "pad" in names:
        copy_stage(sch, compat.get_block(sch, "pad"))
    return finish(sch)
