"""Weights on their way into a packed convolution: windows, groups, several in a byte."""

from __future__ import annotations

import numpy as np

from intrinsics import x86_unpack


def window_taps(kw: int, block: int, k: int) -> int:
    """Return the taps, kw or more, whose channels are a whole number of rows of k."""
    return next(taps for taps in range(kw, kw + k) if taps * block % k == 0)


def merge_groups(weight: np.ndarray, groups: int, super_groups: int) -> np.ndarray:
    """Return an OIHW weight of `groups` as one of `super_groups`, block-diagonal."""
    (oc, icg, kh, kw), per_super = weight.shape, groups // super_groups
    merged = np.zeros((oc, per_super * icg, kh, kw), weight.dtype)
    for group in range(groups):
        rows = slice(group * oc // groups, (group + 1) * oc // groups)
        at = (group % per_super) * icg
        merged[rows, at : at + icg] = weight[rows]
    return merged


def in_windows(weight: np.ndarray, taps_h: int, rows: int, taps: int) -> np.ndarray:
    """Return a weight (oc, i, kh, kw) as windows read it: (oc, taps * rows * i, taps_h, 1).

    Taps of zero weight fill up `rows` rows of each of `taps_h` windows, and `taps` columns.
    """
    oc, channels, kh, kw = weight.shape
    full = np.pad(weight, ((0, 0), (0, 0), (0, taps_h * rows - kh), (0, taps - kw)))
    split = full.reshape(oc, channels, taps_h, rows, taps)
    return split.transpose(0, 4, 3, 1, 2).reshape(oc, taps * rows * channels, taps_h, 1)


def with_wider_blocks(weight: np.ndarray, block: int, wider: int) -> np.ndarray:
    """Return a weight (oc, blocks * block, kh, kw) with each block filled up by zeros."""
    oc, channels, kh, kw = weight.shape
    split = weight.reshape(oc, channels // block, block, kh, kw)
    split = np.pad(split, ((0, 0), (0, 0), (0, wider - block), (0, 0), (0, 0)))
    return split.reshape(oc, -1, kh, kw)


def packed_steps(weight: np.ndarray, bits: int) -> np.ndarray:
    """Return (.., steps, lanes, k) int8 weights, neighbouring steps in a byte: `x86_unpack.packed`.
    """
    first = np.ascontiguousarray(np.moveaxis(weight, -3, 0))
    return np.ascontiguousarray(np.moveaxis(x86_unpack.packed(first, bits), 0, -3))
