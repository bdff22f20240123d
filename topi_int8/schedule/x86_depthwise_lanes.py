# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""How the rows and columns of a depthwise convolution lie for `x86_depthwise`: the choices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from intrinsics.compat import i32, tir
from intrinsics.x86_rows import LANE

from ..compute.depthwise import PackedDepthwise
from ..workload import INT8_DTYPES, Conv2dWorkload, Epilogue

# Output rows of a block. By the count of operations three or four would be better at times;
# measured on Granite Rapids they are never better by much, and worse by up to half.
ROWS = 2
# Bytes of interleaved rows: they stay in the first-level cache beside weights and output.
STRIP_BYTES = 24 * 1024


@dataclass(frozen=True)
class Rows:
    """Which rows of the image a block of output rows reads, four by four.

    Parameters
    ----------
    work : Conv2dWorkload
    count : int
        Output rows of a block; more than one only without vertical dilation.
    """

    work: Conv2dWorkload
    count: int

    @property
    def unit(self) -> int:
        """Rows of the image from one of the interleaved rows to the next."""
        return self.work.dilation[0] if self.count == 1 else 1

    @property
    def span(self) -> int:
        """Interleaved rows that a block reads."""
        taps = (self.work.kh - 1) * self.work.dilation[0]
        return ((self.count - 1) * self.work.strides[0] + taps) // self.unit + 1

    @property
    def groups(self) -> int:
        """Groups of four rows."""
        return -(-self.span // 4)

    def taps(self, row: int, group: int) -> list[int | None]:
        """Return the vertical tap by which an output row multiplies each row of a group."""
        first = row * self.work.strides[0]
        offsets = [(4 * group + t) * self.unit - first for t in range(4)]
        dilation = self.work.dilation[0]
        taps = [None if offset % dilation else offset // dilation for offset in offsets]
        return [tap if tap is not None and 0 <= tap < self.work.kh else None for tap in taps]

    def reads(self, row: int, group: int) -> bool:
        """Whether an output row has a tap in a group."""
        return any(tap is not None for tap in self.taps(row, group))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(row, group) that are multiplied."""
        rows, groups = range(self.count), range(self.groups)
        return [(row, group) for row in rows for group in groups if self.reads(row, group)]

    @property
    def cost(self) -> float:
        """Vector operations for a pixel of four vectors: interleaving and products."""
        unpacked = 8 * self.groups * min(self.work.strides[1], self.work.kw)
        return (unpacked + 4 * self.work.kw * len(self.pairs)) / self.count


def choose_rows(work: Conv2dWorkload) -> Rows:
    """Return the block of output rows that takes the fewest operations a pixel."""
    most = min(ROWS, work.oh) if work.dilation[0] == 1 else 1
    return min((Rows(work, count) for count in range(1, most + 1)), key=lambda rows: rows.cost)


@dataclass(frozen=True)
class Columns:
    """How the columns of a strip lie: phase by phase of the horizontal stride.

    Parameters
    ----------
    conv : PackedDepthwise
    width : int
        Output columns of a strip; the last strip may overlap the one before.
    vector : int
        Lanes of the widest vector: 4, 2 or 1.
    lanes : int
        Lanes of a pixel: all of a channel block's, or the first 1 or 2 of four, where the others
        are padding.
    """

    conv: PackedDepthwise
    width: int
    vector: int
    lanes: int

    @property
    def dense(self) -> bool:
        """Whether the lanes of a pixel are followed by the next pixel's."""
        return self.lanes * LANE == self.conv.block

    def tap(self, kw: int) -> tuple[int, int]:
        """Return (index of the phase, columns from the output's own) of a horizontal tap."""
        offset, stride = kw * self.conv.work.dilation[1], self.conv.work.strides[1]
        return self.phases.index(offset % stride), offset // stride

    @cached_property
    def phases(self) -> list[int]:
        """The phases that taps read."""
        work = self.conv.work
        return sorted({kw * work.dilation[1] % work.strides[1] for kw in range(work.kw)})

    @property
    def count(self) -> int:
        """Columns of a phase."""
        work = self.conv.work
        return self.width + (work.kw - 1) * work.dilation[1] // work.strides[1]

    @property
    def starts(self) -> list[int]:
        """First output column of each strip."""
        ow = self.conv.work.ow
        return [min(start, ow - self.width) for start in range(0, ow, self.width)]

    def inside(self, start: Any, phase: int) -> tuple[Any, Any]:
        """Return which columns [first, last) of a phase are inside the image, in the strip that
        begins at output column `start`; expressions, constant if `start` is.
        """
        work = self.conv.work
        stride = i32(work.strides[1])
        at = start * stride + (phase - work.padding[1])  # of column 0, in the image
        first = tir.max(i32(0), -tir.floordiv(at, stride))
        last = tir.min(i32(self.count), -tir.floordiv(at - work.iw, stride))
        first = tir.min(first, i32(self.count))
        return first, tir.max(first, last)

    @cached_property
    def ends(self) -> list[tuple[int, int]]:
        """`inside` of each phase of each strip."""
        starts = [i32(start) for start in self.starts]
        found = [self.inside(start, phase) for start in starts for phase in self.phases]
        return [(int(first), int(last)) for first, last in found]

    @property
    def bordered(self) -> bool:
        """Whether any strip has columns outside of the image."""
        return any((first, last) != (0, self.count) for first, last in self.ends)

    @property
    def gathered(self) -> int:
        """Lanes of a vector that is interleaved."""
        counts = [(last - first) * self.lanes for first, last in self.ends if first < last]
        least = min(counts, default=self.vector)
        apart = self.conv.work.strides[1] > 1 or not self.dense

        def fits(vector: int) -> bool:
            whole = self.lanes % vector == 0 or vector % self.lanes == 0
            return vector <= least and (whole or not apart)

        return max(vector for vector in (1, 2, 4) if vector <= self.vector and fits(vector))

    @property
    def computed(self) -> int:
        """Lanes of a vector of sums."""
        most = min(self.vector, self.width * self.lanes)
        return max(vector for vector in (1, 2, 4) if vector <= most)

    @property
    def vectors(self) -> int:
        """Vectors of sums of a strip's row."""
        return -(-self.width * self.lanes // self.computed)

    @property
    def alike(self) -> bool:
        """Whether as wide vectors are interleaved as summed, in each phase of each strip."""
        return self.gathered == self.computed and all(first < last for first, last in self.ends)

    @property
    def ahead(self) -> int:
        """Vectors by which interleaving is ahead of the sums that read what it stores."""
        taps = -(-(self.count - self.width) * self.lanes // self.computed)
        # A load of bytes of two stores waits until both have reached the cache.
        return taps if self.lanes % self.computed == 0 else taps + 1

    @property
    def operand_lanes(self) -> int:
        """Lanes of what there is for each channel: repeated so that any vector finds its own."""
        if self.computed % self.lanes == 0:
            return self.computed
        if self.lanes % self.computed == 0:
            return self.lanes
        return self.lanes + self.computed - 1

    def operand(self, lane: Any) -> Any:
        """Return the lane of the operands at which a vector of sums finds its own."""
        if self.computed % self.lanes == 0:
            return i32(0)
        return tir.floormod(lane, i32(self.lanes))


def choose_columns(conv: PackedDepthwise, rows: Rows, vector: int) -> Columns:
    """Return strips of equal width, as few as `STRIP_BYTES` allows."""
    for strips in range(1, conv.work.ow + 1):
        columns = Columns(conv, -(-conv.work.ow // strips), vector, conv.block // LANE)
        if columns.count * len(columns.phases) * rows.groups * 4 * conv.block <= STRIP_BYTES:
            break
    return columns


def choose_last(columns: Columns) -> Columns:
    """Return the columns of the last channel block: of its first lanes, if the others are padding.

    Only outputs of 8 bits, whose padding is filled up as pixels are stored.
    """
    conv, epilogue = columns.conv, columns.conv.work.epilogue
    lanes = -(-(conv.work.ic - (conv.blocks - 1) * conv.block) // LANE)
    if columns.lanes != 4 or columns.vector != 4 or lanes > 2 or not narrows(epilogue):
        return columns
    return replace(columns, lanes=lanes)


def narrows(epilogue: Epilogue) -> bool:
    """Whether sums become 8-bit outputs by nothing but their scale."""
    return epilogue.out_dtype in INT8_DTYPES and epilogue.residual_dtype is None
