# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""Which pixels of the output a tile of AMX has.

With stride 1 the (padded) image is one row of virtual pixels: output (y, x) is number
``y * width + x``, a tap is a constant offset, and tiles start anywhere. The columns between two
rows mix them: what they store is overwritten by the next row's own first pixels, which come later.
With other strides, and where finding places costs more, a tile is pixels of one output row. The
last tile of a band ends with it and repeats some pixels of the tile before, so that no tail is ever
short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intrinsics.compat import i32, tir

from ..compute.conv2d import PackedConv2d

# Pixels of a tile of 16 that are worth its cost.
NEARLY_FULL = 12


@dataclass(frozen=True)
class Bands:
    """How a band's pixels become tiles.

    Parameters
    ----------
    conv : PackedConv2d
    m_tiles : int
        Tiles of pixels in a block.
    bands : int
        Bands of output rows, of equal height; the last ones may overlap.
    """

    conv: PackedConv2d
    m_tiles: int
    bands: int

    @property
    def height(self) -> int:
        """Output rows of a band."""
        return -(-self.conv.work.oh // self.bands)

    @property
    def virtual(self) -> bool:
        """Whether tiles run over the ends of rows.

        What lies between two rows must not reach beyond the second. Where the tensors that are
        written and added have rows of that length, too, a pixel's place in them is known; elsewhere
        finding it costs more than tiles of single rows do, if those are nearly full.
        """
        conv, work = self.conv, self.conv.work
        dense = conv.phases or work.strides == (1, 1)
        if not dense or conv.window or self._row > 2 * work.ow:
            return False
        lengths = {work.stored[1]}
        if work.epilogue.residual_dtype is not None:
            lengths.add(work.residual_shape[1])
        return lengths == {self._row} or -(-work.ow // -(-work.ow // 16)) < NEARLY_FULL

    @property
    def _row(self) -> int:
        """Pixels of a row of what tiles are loaded from."""
        return self.conv.phase_shape[3] if self.conv.phases else self.conv.padded_width

    @property
    def width(self) -> int:
        """Pixels from one output row to the next, as tiles count them."""
        return self._row if self.virtual else self.conv.work.ow

    @property
    def pixels(self) -> int:
        """Pixels of a band, those between its rows included."""
        return (self.height - 1) * self.width + self.conv.work.ow

    @property
    def _run(self) -> int:
        """Pixels that a tile may cover in one piece."""
        return self.pixels if self.virtual else self.conv.work.ow

    @property
    def rows(self) -> int:
        """Pixels of a tile: of as many tiles as there must be, the shortest."""
        tiles = -(-self._run // 16)
        if self.virtual:
            tiles = -(-tiles // self.m_tiles) * self.m_tiles
        return -(-self._run // tiles)

    @property
    def tiles(self) -> int:
        """Tiles of a band."""
        a_run = -(-self._run // self.rows)
        return a_run if self.virtual else a_run * self.height

    @property
    def blocks(self) -> int:
        """Blocks of a band."""
        return -(-self.tiles // self.m_tiles)

    def first(self, tile: Any) -> tuple[Any, Any]:
        """Return (row, column) of a tile's first pixel, in the band."""
        last = self._run - self.rows
        if self.virtual:
            return i32(0), tir.min(tile * self.rows, i32(last))
        a_row = -(-self._run // self.rows)
        y = tir.min(tir.floordiv(tile, a_row), i32(self.height - 1))
        return y, tir.min(tir.floormod(tile, a_row) * self.rows, i32(last))

    def origin(self, row: Any, column: Any, width: int) -> tuple[Any, Any]:
        """Return a tile's first pixel, counted in rows of `width`, and its pixels in that row."""
        if not self.virtual:
            return row * width + column, i32(self.rows)
        line = tir.floordiv(column, i32(self.width))
        return column + line * (width - self.width), (line + 1) * self.width - column

    def pixel(self, first: Any, left: Any, offset: int, width: int) -> Any:
        """Return a tile's pixel, counted in rows of `width`, by its `origin`."""
        pixel = first + offset
        if self.virtual and self.width != width and self.height > 1:
            # Where a division for every pixel would cost as much as making its outputs.
            for rows in range(-(-offset // self.width)):
                over = tir.Select(offset >= left + rows * self.width, i32(1), i32(0))
                pixel += over * (width - self.width)
        return pixel
