"""Activation layouts: NCHW, NHWC and NCHW[c]c, their shapes, index maps and numpy packers.

A packed layout ``NCHW16c`` is a tensor (N, ceil(C/16), H, W, 16); the channels that fill the last
block up are padding. NHWC is, to the kernels, the packed layout with one block of all channels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np


def round_up(value: int, step: int) -> int:
    """Return the smallest multiple of step that is no less than value."""
    return -(-value // step) * step


@dataclass(frozen=True)
class Layout:
    """An activation layout. ``name`` is "NCHW", "NHWC" or "NCHW{block}c"."""

    name: str
    block: int = 0

    def __post_init__(self) -> None:
        packed = re.fullmatch(r"NCHW([1-9]\d*)c", self.name)
        ok = self.name in ("NCHW", "NHWC") if self.block == 0 else packed is not None
        if not ok or (packed and int(packed.group(1)) != self.block):
            raise ValueError(f"layout is {self.name!r}; allowed: NCHW, NHWC, NCHW<block>c")

    @staticmethod
    def parse(name: str) -> Layout:
        """Return the layout of that name; ValueError for any other text."""
        packed = re.fullmatch(r"NCHW([1-9]\d*)c", name)
        return Layout(name, int(packed.group(1)) if packed else 0)

    @staticmethod
    def packed(block: int) -> Layout:
        """Return NCHW{block}c."""
        return Layout(f"NCHW{block}c", block)

    @property
    def is_packed(self) -> bool:
        """Whether this is NCHW[c]c."""
        return self.block > 0

    @property
    def channel_axis(self) -> int:
        """Axis of the (outer) channels."""
        return 3 if self.name == "NHWC" else 1

    def shape(self, n: int, c: int, h: int, w: int) -> tuple[int, ...]:
        """Return the tensor's shape for logical dimensions."""
        if self.is_packed:
            return (n, -(-c // self.block), h, w, self.block)
        return (n, h, w, c) if self.name == "NHWC" else (n, c, h, w)

    def logical(self, shape: tuple[int, ...], channels: int) -> tuple[int, int, int, int]:
        """Return (n, c, h, w) of a tensor of that shape holding `channels` logical channels."""
        n, h, w = (shape[0], *(shape[1:3] if self.name == "NHWC" else shape[2:4]))
        if tuple(shape) != self.shape(n, channels, h, w):
            raise ValueError(
                f"shape is {shape}; allowed: {self.shape(n, channels, h, w)} "
                f"({self.name}, {channels} channels)"
            )
        return n, channels, h, w

    def pack(self, nchw: np.ndarray, pad_value: float = 0) -> np.ndarray:
        """Return an NCHW array in this layout."""
        if self.name == "NCHW":
            return nchw
        if self.name == "NHWC":
            return np.ascontiguousarray(nchw.transpose(0, 2, 3, 1))
        n, c, h, w = nchw.shape
        blocks = -(-c // self.block)
        full = np.full((n, blocks * self.block, h, w), pad_value, nchw.dtype)
        full[:, :c] = nchw
        split = full.reshape(n, blocks, self.block, h, w)
        return np.ascontiguousarray(split.transpose(0, 1, 3, 4, 2))

    def unpack(self, array: np.ndarray, channels: int) -> np.ndarray:
        """Return an array of this layout as NCHW with its logical channels."""
        if self.name == "NCHW":
            return array
        if self.name == "NHWC":
            return np.ascontiguousarray(array.transpose(0, 3, 1, 2))
        n, blocks, h, w, block = array.shape
        flat = array.transpose(0, 1, 4, 2, 3).reshape(n, blocks * block, h, w)
        return np.ascontiguousarray(flat[:, :channels])
