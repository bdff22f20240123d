"""Depthwise convolution over packed activations (NCHW[c]c), as TE: pad, accumulate, epilogue.

Each channel meets its own filter, so the channel block is the vector and no dot product helps::

    acc[n, cb, y, x, c] = sum over kh, kw of
                          xp[n, cb, y*sh + kh*dh, x*sw + kw*dw, c] * weight[cb, kh, kw, c]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te

from ..layout import Layout
from ..workload import Conv2dWorkload
from .conv2d import PackedConv2d, pad_stage
from .epilogue import Operands


@dataclass(frozen=True)
class PackedDepthwise:
    """A depthwise convolution with its channel block. Weights and epilogue operands share it.

    Zero points are folded as in `conv2d`: data stays in its own 8-bit type, borders are padded with
    the zero point, and the compensation goes to the bias.
    """

    work: Conv2dWorkload
    block: int

    def __post_init__(self) -> None:
        if not self.work.is_depthwise:
            raise ValueError(f"groups is {self.work.groups}; allowed: ic == oc == {self.work.ic}")

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
        """Packed weight: the zero point is subtracted, which takes int16."""
        if self.work.is_float:
            return "float32"
        return (
            "int16" if self.work.weight_zero_point or self.work.weight_dtype == "uint8" else "int8"
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Packed weight: (blocks, kh, kw, block)."""
        return (self.blocks, self.work.kh, self.work.kw, self.block)

    @property
    def padded(self) -> PackedConv2d:
        """The packing whose pad stage this one shares."""
        dtype = self.work.data_dtype
        return PackedConv2d(self.work, self.block, self.block, 1, 1, dtype, self.weight_dtype)

    @property
    def folds_bias(self) -> bool:
        """Whether the kernel adds a bias: the workload's own, or the zero point's compensation."""
        folded = not self.work.is_float and self.work.data_zero_point != 0
        return self.work.epilogue.bias or folded

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        """Pack an OIHW weight (c, 1, kh, kw) into `weight_shape`."""
        w = self.work
        full = np.zeros((self.blocks * self.block, w.kh, w.kw), self.weight_dtype)
        wide = weight[:, 0] if w.is_float else weight[:, 0].astype("int16") - w.weight_zero_point
        full[: w.ic] = wide
        split = full.reshape(self.blocks, self.block, w.kh, w.kw)
        return np.ascontiguousarray(split.transpose(0, 2, 3, 1))

    def pack_bias(self, bias: np.ndarray | None, weight: np.ndarray) -> np.ndarray:
        """Return the bias (blocks, block) with the zero point's compensation folded in."""
        return self.padded.pack_bias(bias, weight)

    def pack_scale(self, scale: np.ndarray) -> np.ndarray:
        """Return the float32 multiplier (blocks, block); padding channels get 0."""
        return self.padded.pack_scale(scale)


def depthwise(conv: PackedDepthwise) -> list[Any]:
    """Return the TE tensors [data, weight, (bias), (scale), (residual), out]."""
    w, epi = conv.work, conv.work.epilogue
    acc_dtype = "float32" if w.is_float else "int32"
    data = te.placeholder((w.n, conv.blocks, w.ih, w.iw, conv.block), w.data_dtype, "data")
    weight = te.placeholder(conv.weight_shape, conv.weight_dtype, "weight")
    out_shape = (w.n, conv.blocks, w.oh, w.ow, conv.block)
    channels = (conv.blocks, conv.block)
    operands = Operands.declare(epi, conv.folds_bias, acc_dtype, channels, out_shape)
    source = pad_stage(conv.padded, data) if any(w.padding) else data
    kh, kw = te.reduce_axis((0, w.kh), "kh"), te.reduce_axis((0, w.kw), "kw")

    def product(n: Any, cb: Any, y: Any, x: Any, c: Any) -> Any:
        row, column = y * w.strides[0] + kh * w.dilation[0], x * w.strides[1] + kw * w.dilation[1]
        a, b = source[n, cb, row, column, c], weight[cb, kh, kw, c]
        return te.sum(a.astype(acc_dtype) * b.astype(acc_dtype), axis=[kh, kw])

    acc = te.compute(out_shape, product, name="conv")

    def store(n: Any, cb: Any, y: Any, x: Any, c: Any) -> Any:
        return operands.apply(acc[n, cb, y, x, c], (cb, c), (n, cb, y, x, c))

    return [data, weight, *operands.present, te.compute(out_shape, store, name="out")]
