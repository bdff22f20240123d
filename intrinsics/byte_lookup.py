# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""A vector of bytes looked up in a table of 256 bytes, by byte shuffles.

One row of `BYTE_LOOKUPS` an instruction set. No shuffle indexes 256 bytes, so each puts several
together:

- AVX512-VBMI: `vpermi2b` indexes 128 bytes by 7 bits; two of them, and the index's sign chooses.
- `vpshufb` indexes 16 bytes by 4 bits and gives 0 where the index is negative. For an index of 0 to
  127 the table's rows are stored as differences (row h xor row h - 1): the index less 16 h stays
  non-negative for every row up to its own, and the xor of those differences is its row. The other
  half of the table does the same with the sign flipped. A saturating subtraction keeps what is
  negative so.
- NEON: `tbl` indexes 64 bytes and gives 0 beyond them, `tbx` leaves the result as it was.

Where there is none of them a lookup is a load a byte: 32-bit NEON, whose `vtbl` has 32 bytes for 8
results, would need eight of them and every register.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from .compat import pure_call, tir

TABLE = 256  # bytes, indexed by a byte's bits: int8 -1 is entry 255
_HALF, _ROW = 128, 16


@dataclass(frozen=True)
class ByteLookup:
    """How one instruction set looks bytes up.

    Parameters
    ----------
    name : str
    arch : str
        Architecture of the target.
    needs : frozenset of str
        LLVM features.
    lanes : int
        Bytes looked up together.
    pack : callable
        The table, uint8 (256,), as the rows of vectors that `look` takes: uint8 (rows, lanes).
    look : callable
        (rows, index): int8 vectors of `lanes` -> the int8 vector of the bytes found.
    """

    name: str
    arch: str
    needs: frozenset[str]
    lanes: int
    pack: Callable[[np.ndarray], np.ndarray]
    look: Callable[[list[Any], Any], Any]

    def __post_init__(self) -> None:
        if self.lanes not in (16, 32, 64):
            raise ValueError(f"{self.name}: lanes is {self.lanes}; allowed: 16, 32, 64")
        if not self.needs:
            raise ValueError(f"{self.name}: needs is empty; that would hold for every target")


def best(arch: str, llvm_features: Collection[str]) -> ByteLookup | None:
    """Return the fastest lookup that a target has; None where a load a byte is no slower."""
    for row in BYTE_LOOKUPS:
        if row.arch == arch and row.needs <= set(llvm_features):
            return row
    return None


def _many(value: int, lanes: int) -> Any:
    return tir.Broadcast(tir.const(value, "int8"), lanes)


# ---------------------------------------------------------------- AVX512-VBMI


def _pack_plain(lanes: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda table: table.reshape(-1, lanes)


def _look_vpermi2b(rows: list[Any], index: Any) -> Any:
    name, dtype = "llvm.x86.avx512.vpermi2var.qi.512", "int8x64"
    low = pure_call(name, dtype, rows[0], index, rows[1])
    high = pure_call(name, dtype, rows[2], index, rows[3])
    return tir.Select(index < _many(0, 64), high, low)


# ---------------------------------------------------------------- vpshufb


def _pack_differences(lanes: int) -> Callable[[np.ndarray], np.ndarray]:
    def pack(table: np.ndarray) -> np.ndarray:
        rows = table.reshape(2, _HALF // _ROW, _ROW).copy()
        rows[:, 1:] ^= rows[:, :-1].copy()
        return np.tile(rows.reshape(-1, _ROW), (1, lanes // _ROW))

    return pack


def _look_vpshufb(lanes: int, shuffle: str) -> Callable[[list[Any], Any], Any]:
    dtype, subtract = f"int8x{lanes}", f"llvm.ssub.sat.v{lanes}i8"

    def look(rows: list[Any], index: Any) -> Any:
        found = None
        for half, at in enumerate((index, index ^ _many(-_HALF, lanes))):
            for h in range(_HALF // _ROW):
                at = pure_call(subtract, dtype, at, _many(_ROW, lanes)) if h else at
                step = pure_call(shuffle, dtype, rows[half * (_HALF // _ROW) + h], at)
                found = step if found is None else found ^ step
        return found

    return look


# ---------------------------------------------------------------- NEON


def _look_tbl(rows: list[Any], index: Any) -> Any:
    found = pure_call("llvm.aarch64.neon.tbl4.v16i8", "int8x16", *rows[:4], index)
    for first in (4, 8, 12):
        # Modulo 256, as an unsigned index: entries before these lie beyond 192.
        moved = index - _many((_ROW * first + _HALF) % 256 - _HALF, 16)
        quarter = rows[first : first + 4]
        found = pure_call("llvm.aarch64.neon.tbx4.v16i8", "int8x16", found, *quarter, moved)
    return found


# Fastest first.
BYTE_LOOKUPS: tuple[ByteLookup, ...] = (
    ByteLookup(
        "vpermi2b", "x86_64", frozenset({"avx512f", "avx512bw", "avx512vbmi"}), 64,
        _pack_plain(64), _look_vpermi2b,
    ),
    ByteLookup(
        "vpshufb_512", "x86_64", frozenset({"avx512f", "avx512bw"}), 64,
        _pack_differences(64), _look_vpshufb(64, "llvm.x86.avx512.pshuf.b.512"),
    ),
    ByteLookup(
        "vpshufb_256", "x86_64", frozenset({"avx2"}), 32,
        _pack_differences(32), _look_vpshufb(32, "llvm.x86.avx2.pshuf.b"),
    ),
    ByteLookup("tbl", "aarch64", frozenset({"neon"}), 16, _pack_plain(16), _look_tbl),
)  # fmt: skip
