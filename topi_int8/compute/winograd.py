"""3x3 convolution by Winograd's F(2x2, 3x3) in int16 and int32, bit-exact, as TE.

Each 2x2 tile of output takes 16 products an input and output channel where the direct sum takes 36.
Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2015)::

    Y = A' [ (G w G') * (B' d B) ] A            d: the 4x4 of input under a tile, w: the 3x3 weight

Here G is doubled, so that it is of integers, and Y is 4 times the convolution::

    B' = [1  0 -1  0]     2G = [ 2  0  0]      A' = [1  1  1  0]
         [0  1  1  0]          [ 1  1  1]           [0  1 -1 -1]
         [0  1 -1  0]          [-1  1 -1]
         [0  1  0 -1]          [ 0  0  2]

Nothing is rounded. With d = x - zero_point within +-255 and w within +-255, B'dB is within +-1020
and 4 G w G' within +-2295: both fit int16, which vpmaddwd multiplies exactly. Sums of int32 may
wrap on the way: addition and multiplication modulo 2**32 still give 4 times the convolution, and
where that fits int32 (`overflows`) an arithmetic shift by 2 gives the convolution itself.

Stages, for tiles (ty, tx) and the 16 points (a, b) of a tile::

    xp[n, cb, y, x, i]           = x - zero_point, 0 outside               (stage "pad")
    V[n, a, b, cb, ty, tx, i]    = B' xp B                                 (stage "transform")
    M[n, ob, a, b, ty, tx, o]    = sum over cb, i of V * weight            (stage "conv")
    acc[n, ob, y, x, o]          = (A' M A) / 4                            (stage "sum")
    out[n, ob, y, x, o]          = epilogue(acc)                           (stage "out")
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tvm import te

from intrinsics.compat import tir

from ..layout import Layout
from ..workload import DTYPE_RANGE, Conv2dWorkload
from .conv2d import PackedConv2d, pad_stage
from .epilogue import Operands

POINTS = 4  # a tile of input is 4x4
_TWICE_G = np.array([[2, 0, 0], [1, 1, 1], [-1, 1, -1], [0, 0, 2]])


def applies(work: Conv2dWorkload) -> bool:
    """Whether this is a convolution that F(2x2, 3x3) computes: 3x3, stride 1, one group."""
    shape = (work.kh, work.kw, *work.strides, *work.dilation, work.groups)
    return shape == (3, 3, 1, 1, 1, 1, 1) and not work.is_float


def overflows(work: Conv2dWorkload) -> bool:
    """Whether 4 times a sum of this convolution may not fit int32."""

    def reach(bounds: tuple[int, int], zero_point: int) -> int:
        return max(zero_point - bounds[0], bounds[1] - zero_point)

    data = reach(DTYPE_RANGE[work.data_dtype], work.data_zero_point)
    weights = work.weight_range or DTYPE_RANGE[work.weight_dtype]
    return 4 * 9 * work.ic * data * reach(weights, work.weight_zero_point) >= 2**31


@dataclass(frozen=True)
class PackedWinograd:
    """A 3x3 convolution with its packing.

    Parameters
    ----------
    work : Conv2dWorkload
        One that `applies`. With a weight's actual range no sum of it `overflows`.
    in_block, out_block : int
        Channels per block of data and output (``NCHW{block}c``).
    lanes : int
        Output channels in the weight's inner vector; divides out_block.
    tiles_w : int
        Tiles along a row, at least as many as cover it; the surplus is cropped. 0: just as many.
    """

    work: Conv2dWorkload
    in_block: int
    out_block: int
    lanes: int
    tiles_w: int = 0

    def __post_init__(self) -> None:
        if not applies(self.work):
            raise ValueError(
                f"work is {self.work}; allowed: 3x3, strides, dilation and groups of 1, integers"
            )
        covering = -(-self.work.ow // 2)
        if self.tiles_w == 0:
            object.__setattr__(self, "tiles_w", covering)
        if self.tiles_w < covering:
            raise ValueError(f"tiles_w is {self.tiles_w}; allowed: {covering} or more")

    @cached_property
    def padded(self) -> PackedConv2d:
        """The same convolution by the direct sum, whose pad stage and packers this one shares."""
        return PackedConv2d(
            self.work, self.in_block, self.out_block, self.lanes, 2, "int16", "int16",
            ow_padded=2 * self.tiles_w,
        )  # fmt: skip

    @property
    def data_layout(self) -> Layout:
        """Layout of the data."""
        return Layout.packed(self.in_block)

    @property
    def out_layout(self) -> Layout:
        """Layout of the output and of the residual."""
        return Layout.packed(self.out_block)

    @property
    def tiles_h(self) -> int:
        """Tiles along a column."""
        return -(-self.work.oh // 2)

    @property
    def crops(self) -> bool:
        """Whether tiles reach beyond the output, so that a last pass copies what is wanted."""
        return (2 * self.tiles_h, 2 * self.tiles_w) != (self.work.oh, self.work.ow)

    @property
    def partial(self) -> bool:
        """Whether stage "sum" adds up what the reduction leaves, as in `PackedConv2d`."""
        return True

    @property
    def weight_dtype(self) -> str:
        """Dtype of the packed weight."""
        return "int16"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Packed weight: (oc / lanes, 4, 4, blocks of ic, block / 2, lanes, 2)."""
        conv = self.padded
        vectors = conv.out_blocks * self.out_block // self.lanes
        return (vectors, POINTS, POINTS, conv.in_blocks, self.in_block // 2, self.lanes, 2)

    @property
    def folds_bias(self) -> bool:
        """Whether the kernel adds a bias: the workload's own, zero points being subtracted."""
        return self.padded.folds_bias

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        """Transform and pack an OIHW weight (oc, ic, 3, 3) into `weight_shape`."""
        w, conv = self.work, self.padded
        full = np.zeros(
            (conv.out_blocks * self.out_block, conv.in_blocks * self.in_block, 3, 3), "int32"
        )
        full[: w.oc, : w.ic] = weight.astype("int32") - w.weight_zero_point
        points = np.einsum("ah,oihw,bw->oiab", _TWICE_G, full, _TWICE_G)
        vectors, _, _, blocks, pairs, lanes, _ = self.weight_shape
        split = points.reshape(vectors, lanes, blocks, pairs, 2, POINTS, POINTS)
        return np.ascontiguousarray(split.transpose(0, 5, 6, 2, 3, 1, 4).astype("int16"))

    def pack_bias(self, bias: np.ndarray | None, weight: np.ndarray) -> np.ndarray:
        """Return the bias (out_blocks, out_block)."""
        return self.padded.pack_bias(bias, weight)

    def pack_scale(self, scale: np.ndarray) -> np.ndarray:
        """Return the float32 multiplier (out_blocks, out_block); padding channels get 0."""
        return self.padded.pack_scale(scale)


def _transformed(source: Any, a: Any, b: Any, at: Any) -> Any:
    """Return element (a, b) of B' d B, where ``at(source, row, column)`` reads d.

    Row a of B' is ``d[min(a, 1)] + sign * d[2 + a / 3]``, its sign positive for a = 1 alone.
    """

    def sign(point: Any) -> Any:
        return tir.Select(point == 1, tir.const(1, "int16"), tir.const(-1, "int16"))

    def column(x: Any) -> Any:
        first, second = at(source, tir.min(a, 1), x), at(source, 2 + tir.floordiv(a, 3), x)
        return first + sign(a) * second

    return column(tir.min(b, 1)) + sign(b) * column(2 + tir.floordiv(b, 3))


def _gathered(sums: Any, y: Any, x: Any) -> Any:
    """Return element (y, x) of A' M A, where ``sums(a, b)`` reads M.

    Row y of A' is ``m[y] + sign * (m[y + 1] + m[y + 2])``, its sign negative for y = 1.
    """

    def sign(of: Any) -> Any:
        return tir.Select(of == 0, tir.const(1, "int32"), tir.const(-1, "int32"))

    def column(b: Any) -> Any:
        return sums(y, b) + sign(y) * (sums(y + 1, b) + sums(y + 2, b))

    return column(x) + sign(x) * (column(x + 1) + column(x + 2))


def accumulate(
    conv: PackedWinograd, data: Any, weight: Any, attrs: dict[str, str] | None = None,
    _rolled: str = "",
) -> Any:  # fmt: skip
    """Return the sums (n, out_blocks, 2 * tiles_h, 2 * tiles_w, out_block) of packed data: stages
    "pad", "transform", "conv", "sum". `attrs` are attributes of stage "conv".
    """
    w, padded = conv.work, conv.padded
    blocks, tiles = padded.in_blocks, (conv.tiles_h, conv.tiles_w)
    rows = 2 * conv.tiles_h + 2
    source = pad_stage(padded, data, max(0, rows - (w.ih + w.padding[0] + w.padding[2])))

    def transform(n: Any, a: Any, b: Any, cb: Any, ty: Any, tx: Any, i: Any) -> Any:
        return _transformed(
            source, a, b, lambda xp, row, column: xp[n, cb, ty * 2 + row, tx * 2 + column, i]
        )

    shape = (w.n, POINTS, POINTS, blocks, *tiles, conv.in_block)
    points = te.compute(shape, transform, name="transform")
    cb, ik = te.reduce_axis((0, blocks), "cb"), te.reduce_axis((0, conv.in_block // 2), "ik")
    kk = te.reduce_axis((0, 2), "kk")
    vectors = conv.out_block // conv.lanes

    def product(n: Any, ob: Any, a: Any, b: Any, ty: Any, tx: Any, o: Any) -> Any:
        vec, lane = tir.floordiv(o, conv.lanes), tir.floormod(o, conv.lanes)
        left = points[n, a, b, cb, ty, tx, ik * 2 + kk]
        right = weight[ob * vectors + vec, a, b, cb, ik, lane, kk]
        return te.sum(left.astype("int32") * right.astype("int32"), axis=[cb, ik, kk])

    shape = (w.n, padded.out_blocks, POINTS, POINTS, *tiles, conv.out_block)
    sums = te.compute(shape, product, name="conv", attrs=attrs)

    def put_together(n: Any, ob: Any, y: Any, x: Any, o: Any) -> Any:
        ty, tx = tir.floordiv(y, 2), tir.floordiv(x, 2)
        four = _gathered(
            lambda a, b: sums[n, ob, a, b, ty, tx, o], tir.floormod(y, 2), tir.floormod(x, 2)
        )
        return tir.shift_right(four, tir.const(2, "int32"))

    shape = (w.n, padded.out_blocks, 2 * tiles[0], 2 * tiles[1], conv.out_block)
    return te.compute(shape, put_together, name="sum")


def winograd(conv: PackedWinograd) -> list[Any]:
    """Return the TE tensors [data, weight, (bias), (scale), (residual), out] of the convolution."""
    w, padded, epi = conv.work, conv.padded, conv.work.epilogue
    shape = (w.n, padded.in_blocks, w.ih, w.iw, conv.in_block)
    data = te.placeholder(shape, w.data_dtype, "data")
    weight = te.placeholder(conv.weight_shape, conv.weight_dtype, "weight")
    channels = (padded.out_blocks, conv.out_block)
    stored = (w.n, padded.out_blocks, w.oh, w.ow, conv.out_block)
    operands = Operands.declare(epi, conv.folds_bias, "int32", channels, stored)
    sums = accumulate(conv, data, weight)

    def store(n: Any, ob: Any, y: Any, x: Any, o: Any) -> Any:
        # What is cropped away reads the last real residual.
        ry, rx = (tir.min(y, w.oh - 1), tir.min(x, w.ow - 1)) if conv.crops else (y, x)
        return operands.apply(sums[n, ob, y, x, o], (ob, o), (n, ob, ry, rx, o))

    out = te.compute(sums.shape, store, name="out")
    if conv.crops:
        whole = out
        out = te.compute(stored, lambda *at: whole[at], name="crop")
    return [data, weight, *operands.present, out]
