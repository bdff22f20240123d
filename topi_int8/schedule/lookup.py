# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Bytes looked up in a table: whole tensors, whatever their layout, as one row of memory.

The kernel is written as statements (`te.extern`): a byte shuffle takes vectors, and no loop that a
schedule could tensorize says "the entry at this index" to TVM's matcher. A row that is no whole
number of vectors ends in one that overlaps the one before, and so does the last of several tasks:
equal bytes are written twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te

from intrinsics import compat
from intrinsics.byte_lookup import TABLE, ByteLookup
from intrinsics.compat import i32, ramp, tir

from ..workload import INT8_DTYPES

# A task is some microseconds of lookups; launching it costs about one.
_TASK_BYTES, _MOST_TASKS = 32768, 32


@dataclass(frozen=True)
class Lookup:
    """``out[i] = table[bits of data[i]]`` for a row of bytes.

    Parameters
    ----------
    size : int
        Bytes of the row.
    data_dtype, out_dtype : str
        "uint8" or "int8".
    shuffle : ByteLookup or None
        How vectors are looked up; None, or a row shorter than a vector: a load a byte.
    """

    size: int
    data_dtype: str
    out_dtype: str
    shuffle: ByteLookup | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; allowed: 1 or more")
        for name in ("data_dtype", "out_dtype"):
            if getattr(self, name) not in INT8_DTYPES:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(INT8_DTYPES)}"
                )

    @property
    def vectors(self) -> ByteLookup | None:
        """The shuffle that is used."""
        return self.shuffle if self.shuffle and self.size >= self.shuffle.lanes else None

    @property
    def table_shape(self) -> tuple[int, ...]:
        """Shape of the packed table, which is of the output's dtype."""
        return self.pack_table(np.zeros(TABLE, self.out_dtype)).shape

    def pack_table(self, table: np.ndarray) -> np.ndarray:
        """Return the 256 entries as the kernel reads them."""
        if self.vectors is None:
            return table
        return self.vectors.pack(table.view("uint8")).view(self.out_dtype)

    def schedule(self) -> Any:
        """Return the scheduled PrimFunc of (data, packed table, out), data and out of one axis."""
        data = te.placeholder((self.size,), self.data_dtype, "data")
        table = te.placeholder(self.table_shape, self.out_dtype, "table")
        emit = self._bytes if self.vectors is None else self._vectors
        out = te.extern(
            (self.size,), [data, table], lambda ins, outs: emit(*ins, outs[0]),
            name="lookup", dtype=self.out_dtype,
        )  # fmt: skip
        func = te.create_prim_func([data, table, out])
        return compat.scheduled(func)

    def _tasks(self, steps: int) -> int:
        return max(1, min(self.size // _TASK_BYTES, _MOST_TASKS, steps))

    def _rows(self, step: Any, steps: int, lanes: int) -> Any:
        """Return ``step(first byte)`` over the row, in parallel tasks where it is long."""
        tasks = self._tasks(steps)
        each = -(-steps // tasks)
        at = tir.Var("i", "int32")
        if tasks == 1:
            return compat.loop(at, steps, [step(at * lanes)])
        task = tir.Var("task", "int32")
        first = tir.min(task * each, i32(steps - each))
        return compat.loop(
            task, tasks, [compat.loop(at, each, [step((first + at) * lanes)])], parallel=True
        )

    def _bytes(self, data: Any, table: Any, out: Any) -> Any:
        def step(at: Any) -> Any:
            index = tir.BufferLoad(data, [at]).astype("uint8").astype("int32")
            return tir.BufferStore(out, tir.BufferLoad(table, [index]), [at])

        return self._rows(step, self.size, 1)

    def _vectors(self, data: Any, table: Any, out: Any) -> Any:
        shuffle = self.vectors
        lanes, signed = shuffle.lanes, f"int8x{shuffle.lanes}"

        # LLVM keeps the rows in registers as far as there are some: they do not change.
        rows = [
            tir.BufferLoad(table, [i32(row), ramp(i32(0), lanes)]).astype(signed)
            for row in range(self.table_shape[0])
        ]

        def step(at: Any) -> Any:
            where = [ramp(at, lanes)]
            found = shuffle.look(rows, tir.BufferLoad(data, where).astype(signed))
            return tir.BufferStore(out, found.astype(f"{self.out_dtype}x{lanes}"), where)

        body = [self._rows(step, self.size // lanes, lanes)]
        if self.size % lanes:
            body.append(step(i32(self.size - lanes)))
        return compat.sequence(body)
