"""Depthwise convolution over packed activations (NCHW[c]c), as TE: pad, accumulate, epilogue.

Each channel meets its own filter, so the channel block is the vector::

    acc[n, cb, y, x, c] = sum over kh, kw of
                          xp[n, cb, y*sh + kh*dh, x*sw + kw*dw, c] * weight[cb, kh, kw, c]

Taps are summed in one of three ways (`how`):

- "plain": each product in int32 (or float32).
- "pairs": two products in int16, where their sum fits, and that sum into int32: half the widening.
  "row_pairs" pairs the taps of each row, so that rows can be a loop.
- "dot": four rows at a time by a dot product. Stage "gather" brings the four rows of a column
  together, a column for all horizontal taps. It exists once for each strip of S output columns (s),
  so that strips do not share any of it::

      gather[n, cb, y, g, s, i, c, t] = xp[n, cb, y*sh + (4g + t)*dh, s*S*sw + i, c]
      acc[n, cb, y, x, c] = sum over g, kw, t of
          gather[n, cb, y, g, x / S, (x % S)*sw + kw*dw, c, t] * weight[cb, g, kw, c, t]

- "rows": by a kernel that is no TE (`schedule/x86_depthwise.py`), from data without borders and
  weights as in "plain".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te

from intrinsics.compat import tir
from intrinsics.long_product import long_product

from ..layout import Layout
from ..workload import Conv2dWorkload
from .conv2d import PackedConv2d, pad_stage, reduce_axis
from .epilogue import Operands

Attrs = dict[str, str] | None


@dataclass(frozen=True)
class PackedDepthwise:
    """A depthwise convolution with its channel block. Weights and epilogue operands share it.

    Zero points are folded as in `conv2d`: borders are padded with the zero point, and the
    compensation goes to the bias.

    Parameters
    ----------
    work : Conv2dWorkload
    block : int
        Channels per block of data, output and weight.
    how : str
        "plain", "pairs", "row_pairs", "dot" or "rows": see the module's docstring.
    data_dtype : str
        What the inner loop reads; empty: the data's own dtype.
    strip : int
        Output columns of a strip ("dot"); divides ow.
    arch : str
        Whose long multiply makes pairs: "aarch64" or "arm".
    """

    work: Conv2dWorkload
    block: int
    how: str = "plain"
    data_dtype: str = ""
    strip: int = 1
    arch: str = "aarch64"

    def __post_init__(self) -> None:
        if not self.work.is_depthwise:
            raise ValueError(f"groups is {self.work.groups}; allowed: ic == oc == {self.work.ic}")
        if self.how not in (*_SUMS, "rows"):
            raise ValueError(f"how is {self.how!r}; allowed: {', '.join(_SUMS)}, rows")
        if self.how in ("dot", "rows") and self.block % 16:
            raise ValueError(f"block is {self.block}; allowed with {self.how}: multiples of 16")
        if self.work.ow % self.strip:
            raise ValueError(f"strip is {self.strip}; allowed: divisors of {self.work.ow}")
        if not self.data_dtype:
            object.__setattr__(self, "data_dtype", self.work.data_dtype)

    @property
    def data_layout(self) -> Layout:
        """Layout of data, residual and output."""
        return Layout.packed(self.block)

    out_layout = data_layout

    @property
    def blocks(self) -> int:
        """Channel blocks."""
        return -(-self.work.ic // self.block)

    @property
    def weight_dtype(self) -> str:
        """Packed weight: less its zero point, which takes int16 unless it is proven not to."""
        if self.work.is_float:
            return "float32"
        if self.how == "dot":
            return "uint8" if self.data_dtype == self.work.weight_dtype == "uint8" else "int8"
        plain = self.work.weight_dtype == "int8" and not self.work.weight_zero_point
        return "int8" if plain or self.how != "plain" else "int16"

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Packed output."""
        w = self.work
        return (w.n, self.blocks, w.oh, w.ow, self.block)

    @property
    def row_groups(self) -> int:
        """Groups of four rows of taps ("dot")."""
        return -(-self.work.kh // 4)

    @property
    def strip_columns(self) -> int:
        """Columns of data that a strip reads."""
        taps = (self.work.kw - 1) * self.work.dilation[1] + 1
        return (self.strip - 1) * self.work.strides[1] + taps

    @property
    def taps(self) -> int:
        """Taps of the filter."""
        return self.work.kh * self.work.kw

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Packed weight: (blocks, kh, kw, block); with "dot" (blocks, kh / 4, kw, block, 4)."""
        if self.how == "dot":
            return (self.blocks, self.row_groups, self.work.kw, self.block, 4)
        return (self.blocks, self.work.kh, self.work.kw, self.block)

    @property
    def padded(self) -> PackedConv2d:
        """The packing whose pad stage this one shares."""
        dtypes = self.data_dtype, self.weight_dtype
        return PackedConv2d(self.work, self.block, self.block, 1, 1, *dtypes)

    @property
    def extra_rows(self) -> int:
        """Rows below the padded image that taps of zero weight read ("dot")."""
        w = self.work
        if self.how != "dot":
            return 0
        needed = (w.oh - 1) * w.strides[0] + (4 * self.row_groups - 1) * w.dilation[0] + 1
        return max(0, needed - (w.ih + w.padding[0] + w.padding[2]))

    @property
    def needs_pad(self) -> bool:
        """Whether the taps cannot read the data where it lies."""
        converts = self.data_dtype != self.work.data_dtype
        return bool(any(self.work.padding) or converts or self.extra_rows)

    @property
    def folds_bias(self) -> bool:
        """Whether the kernel adds a bias: the workload's own, or the zero point's compensation."""
        return self.padded.folds_bias

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        """Pack an OIHW weight (c, 1, kh, kw) into `weight_shape`."""
        w = self.work
        full = np.zeros((self.blocks * self.block, w.kh, w.kw), self.weight_dtype)
        wide = weight[:, 0] if w.is_float else weight[:, 0].astype("int16") - w.weight_zero_point
        full[: w.ic] = wide
        if not np.array_equal(full[: w.ic], wide):
            raise ValueError(
                f"weight minus weight_zero_point={w.weight_zero_point} spans [{wide.min()}, "
                f"{wide.max()}]; allowed: the range of {self.weight_dtype}"
            )
        if self.how == "dot":
            rows = 4 * self.row_groups
            full = np.pad(full, ((0, 0), (0, rows - w.kh), (0, 0)))
            split = full.reshape(self.blocks, self.block, self.row_groups, 4, w.kw)
            return np.ascontiguousarray(split.transpose(0, 2, 4, 1, 3))
        split = full.reshape(self.blocks, self.block, w.kh, w.kw)
        return np.ascontiguousarray(split.transpose(0, 2, 3, 1))

    def pack_bias(self, bias: np.ndarray | None, weight: np.ndarray) -> np.ndarray:
        """Return the bias (blocks, block) with the zero point's compensation folded in."""
        return self.padded.pack_bias(bias, weight)

    def pack_scale(self, scale: np.ndarray) -> np.ndarray:
        """Return the float32 multiplier (blocks, block); padding channels get 0."""
        return self.padded.pack_scale(scale)


def _plain(conv: PackedDepthwise, source: Any, weight: Any, attrs: Attrs, _rolled: str) -> Any:
    w = conv.work
    acc_dtype = "float32" if w.is_float else "int32"
    kh, kw = te.reduce_axis((0, w.kh), "kh"), te.reduce_axis((0, w.kw), "kw")

    def product(n: Any, cb: Any, y: Any, x: Any, c: Any) -> Any:
        row, column = y * w.strides[0] + kh * w.dilation[0], x * w.strides[1] + kw * w.dilation[1]
        a, b = source[n, cb, row, column, c], weight[cb, kh, kw, c]
        return te.sum(a.astype(acc_dtype) * b.astype(acc_dtype), axis=[kh, kw])

    return te.compute(conv.out_shape, product, name="conv", attrs=attrs)


def _pairs(conv: PackedDepthwise, source: Any, weight: Any, attrs: Attrs, rolled: str) -> Any:
    w = conv.work
    rows, taps = (w.kh, w.kw) if conv.how == "row_pairs" else (1, conv.taps)
    row_axis = reduce_axis("row", rows, rolled)
    pair = te.reduce_axis((0, -(-taps // 2)), "pair")

    def product(n: Any, cb: Any, y: Any, x: Any, c: Any) -> Any:
        def tap(t: Any) -> Any:
            t = row_axis * taps + t
            kh, kw = tir.floordiv(t, w.kw), tir.floormod(t, w.kw)
            row = y * w.strides[0] + kh * w.dilation[0]
            column = x * w.strides[1] + kw * w.dilation[1]
            a, b = source[n, cb, row, column, c], weight[cb, kh, kw, c]
            return long_product(a, b, conv.arch)

        second = pair * 2 + 1
        both = tap(pair * 2)
        if taps > 1:
            # The last tap of an odd number has no partner.
            other = tap(tir.min(second, taps - 1))
            if taps % 2:
                other = tir.Select(second < taps, other, tir.const(0, "int16"))
            both = both + other
        return te.sum(both.astype("int32"), axis=[row_axis, pair])

    return te.compute(conv.out_shape, product, name="conv", attrs=attrs)


def _dot(conv: PackedDepthwise, source: Any, weight: Any, attrs: Attrs, _rolled: str) -> Any:
    w = conv.work
    sh, sw = w.strides
    shape = (
        w.n, conv.blocks, w.oh, conv.row_groups, w.ow // conv.strip, conv.strip_columns,
        conv.block, 4,
    )  # fmt: skip

    def rows(n: Any, cb: Any, y: Any, g: Any, strip: Any, x: Any, c: Any, t: Any) -> Any:
        row = y * sh + (g * 4 + t) * w.dilation[0]
        return source[n, cb, row, strip * (conv.strip * sw) + x, c]

    gathered = te.compute(shape, rows, name="gather")
    g, kw = te.reduce_axis((0, conv.row_groups), "g"), te.reduce_axis((0, w.kw), "kw")
    t = te.reduce_axis((0, 4), "t")

    def product(n: Any, cb: Any, y: Any, x: Any, c: Any) -> Any:
        strip, within = tir.floordiv(x, conv.strip), tir.floormod(x, conv.strip)
        a = gathered[n, cb, y, g, strip, within * sw + kw * w.dilation[1], c, t]
        return te.sum(a.astype("int32") * weight[cb, g, kw, c, t].astype("int32"), axis=[g, kw, t])

    return te.compute(conv.out_shape, product, name="conv", attrs=attrs)


_SUMS = {"plain": _plain, "pairs": _pairs, "row_pairs": _pairs, "dot": _dot}


def accumulate(
    conv: PackedDepthwise, data: Any, weight: Any, attrs: Attrs = None, rolled: str = ""
) -> Any:
    """Return the sums (n, blocks, oh, ow, block) of packed data: stages "pad", ("gather",) "conv".

    `attrs` are attributes of stage "conv"; LLVM is not to know the extent of its axis `rolled`:
    "row" (of "row_pairs"), or none.
    """
    source = data
    if conv.needs_pad:
        source = pad_stage(conv.padded, data, conv.extra_rows)
    return _SUMS[conv.how](conv, source, weight, attrs, rolled)


def declare(conv: PackedDepthwise) -> tuple[Any, Any, Operands]:
    """Return placeholders: data, weight, and what the epilogue reads."""
    w = conv.work
    acc_dtype = "float32" if w.is_float else "int32"
    data = te.placeholder((w.n, conv.blocks, w.ih, w.iw, conv.block), w.data_dtype, "data")
    weight = te.placeholder(conv.weight_shape, conv.weight_dtype, "weight")
    channels = (conv.blocks, conv.block)
    operands = Operands.declare(w.epilogue, conv.folds_bias, acc_dtype, channels, conv.out_shape)
    return data, weight, operands


def depthwise(conv: PackedDepthwise) -> list[Any]:
    """Return the TE tensors [data, weight, (bias), (scale), (residual), out]."""
    data, weight, operands = declare(conv)
    acc = accumulate(conv, data, weight)

    def store(n: Any, cb: Any, y: Any, x: Any, c: Any) -> Any:
        return operands.apply(acc[n, cb, y, x, c], (cb, c), (n, cb, y, x, c))

    return [data, weight, *operands.present, te.compute(conv.out_shape, store, name="out")]
