# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Weights of 4 or 2 bits for AMX, whose tiles are loaded from memory: unpacked beside products.

The first block of a group unpacks each step's weights into a buffer two steps before, by vector
instructions between tile instructions; the group's other blocks find them there. Where a group has
one block, each is read once, and the buffer is a ring of a few steps.
"""

from __future__ import annotations

from typing import Any

from intrinsics.compat import i32, loop, ramp, tir, unknown_to_llvm
from intrinsics.x86_unpack import unpacked

ROW = 64  # bytes of a row of a tile of weights
# Steps from unpacking to loading: a store reaches the cache when the products before it are done.
AHEAD = 2
# Steps of a ring: those on their way, and the one that is read.
RING = 4


class Unpacker:
    """The buffer of a task's unpacked weights, and what fills it.

    Parameters
    ----------
    plan : Pipeline
        Whose `conv.weight_bits` is less than 8.
    weight : Buffer
        The packed ones.
    """

    def __init__(self, plan: Any, weight: Any) -> None:
        self.plan, self.weight = plan, weight
        self.steps = plan.depth if plan.blocks > 1 else min(plan.depth, RING)
        shape = (plan.n_tiles, self.steps, plan.step // 4, ROW)
        self.buffer = tir.decl_buffer(shape, "int8", "unpacked")

    def _slot(self, step: Any) -> Any:
        return step if self.steps == self.plan.depth else tir.floormod(step, i32(self.steps))

    def first(self, n: int, step: Any) -> Any:
        """Return the first element of the n-th tile of a step."""
        return tir.BufferLoad(self.buffer, [i32(n), self._slot(step), i32(0), i32(0)])

    def fill(self, step: Any, origin: list[list[Any]]) -> list[Any]:
        """Return the statements that unpack a step's tiles, a loop over rows for each.

        LLVM takes seconds for the thousands of instructions that these loops would be unrolled.

        Parameters
        ----------
        step : PrimExpr or int
            Its number.
        origin : list
            Indices of each tile's first row of packed weights.
        """
        conv, slot, loops = self.plan.conv, self._slot(step), []
        lanes = ramp(i32(0), ROW)
        for n, (*outer, first, _, _) in enumerate(origin):
            row, packed = tir.Var("row", "int32"), tir.Var("packed", f"int8x{ROW}")
            load = tir.BufferLoad(self.weight, [*outer, first + row, i32(0), lanes])
            body = [tir.Bind(packed, load)]
            for part in range(conv.packed):
                value = unpacked(packed, conv.weight_bits, part)
                at = [i32(n), slot, row * conv.packed + part, lanes]
                body.append(tir.BufferStore(self.buffer, value, at))
            rows = unknown_to_llvm(self.plan.step // (4 * conv.packed))
            loops.append(loop(row, rows, body))
        return loops
