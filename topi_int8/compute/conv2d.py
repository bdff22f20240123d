"""Convolution over packed activations (NCHW[c]c), as TE: pad, accumulate, epilogue, crop.

One algorithm serves every instruction set; what differs is the packing, held by `PackedConv2d`::

    xp[n, cb, y, x, i]         = data inside, the zero point outside        (stage "pad", if needed)
    acc[n, ob, y, x, o]        = sum over cb, kh, kw, i of xp * weight       (stages "conv", "sum")
    out[n, ob, y, x, o]        = epilogue(acc)                               (stage "out")

Zero points. sum (x - zx) * w = sum x*w - zx * sum w; the second term is constant per output channel
and folded into the bias, and borders are padded with zx so that it holds everywhere. Signed data on
an instruction that wants unsigned is read as x + 128 with zero point zx + 128: the same formula.
Where the kernel widens to int16 first, x - zx and w - zw are formed exactly and nothing is folded.

Small images. Rows of 7 pixels make short tiles that read every weight seven times. With `flat` the
padded image (stride 1) is one long row of virtual pixels: output (y, x) is number
``y * width + x``, a tap is a constant offset, and the last columns of each row, which mix two rows,
are computed and cropped. Source: oneDNN's "virtual padding" does the same for its brgemm
convolutions.

Strides. With `phases` the data is copied so that every sh-th row and sw-th column lie side by side:
a strided convolution becomes one of stride 1 whose taps read different copies, and its output is a
long row of virtual pixels too. Source: the polyphase decomposition of filter banks (Vaidyanathan,
"Multirate Systems and Filter Banks", 1993, chapter 4.3).

Groups. A group whose channels do not fill whole blocks is merged with its neighbours into the
smallest super-group that does (all groups at the most), its weight block-diagonal: the channel
blocks then line up and the inner loops never gather.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tvm import te

from intrinsics import x86_unpack
from intrinsics.compat import dtype_of, tir, unknown_to_llvm
from intrinsics.x86_narrow import PACK_ORDER, ROUND_BITS

from ..layout import Layout
from ..workload import Conv2dWorkload
from .epilogue import Operands
from .weights import in_windows, merge_groups, packed_steps, window_taps, with_wider_blocks

PARTIALS = 4  # lanes of 32 bits in ARM's vectors


@dataclass(frozen=True)
class PackedConv2d:
    """A convolution with its packing.

    Parameters
    ----------
    work : Conv2dWorkload
    in_block, out_block : int
        Channels per block of data and output (``NCHW{block}c``).
    lanes : int
        Output channels in the weight's inner vector; divides out_block.
    k : int
        Neighbouring input channels that the dot product reduces at once; divides in_block.
    data_dtype, weight_dtype : str
        What the inner loop reads: uint8/int8 with folded zero points, int16 with zero points
        subtracted, or float32.
    ow_padded : int
        Output columns computed (>= work.ow): whole tiles. The surplus is cropped.
    widened : int
        Not 0: channels of a data block as the inner loop reads it, where in_block itself is no
        whole number of steps. The pad stage fills the difference with zeros.
    window : bool
        For inputs so narrow that a tap fills a step badly (a network's stem): one step reads the kw
        taps at once (and more, of zero weight, up to whole rows of k), neighbouring bytes of a row;
        windows of neighbouring output columns overlap in memory. One block of data, dilation 1.
    window_rows : int
        Rows of taps that such a step reads: the rows of the data are woven together, a column of
        so many rows after the other.
    out_store : int
        Channels of each output block that are stored (0: all of them). Less than out_block where
        the output is a plain matrix whose width is no whole number of vectors.
    flat : bool
        Compute the image as one row of virtual pixels (stride 1, no window).
    phases : bool
        Split the data into the phases of the strides (no window).
    kw_inside : bool
        Order of the reduction and of the weight in memory: kh, blocks, kw (True) or kh, kw, blocks.
        LLVM unrolls a kw loop; where products are added by an instruction of their own (vpmaddwd,
        vpmaddubsw) it then reassociates the sums over its steps and spills them.
    partial : bool
        Keep each output as `PARTIALS` sums over a part of its channels each, added up at the end
        (stage "sum"), as a long multiply and a pairwise add leave them. k is a multiple of 8.
    float_sums : bool
        Count sums from the bits of 1.5 * 2**23, which are a float32 then (`Epilogue.small_sums`),
        and keep weights, bias and multiplier of each 64 channels in the order in which four vectors
        of 16 are narrowed to them (`x86_narrow.PACK_ORDER`).
    weight_bits : int
        8; or 4 or 2, and steps that are neighbours of one vector of weights lie in one byte
        (`x86_unpack.packed`). Statements unpack them; the computation in TE does not.
    """

    work: Conv2dWorkload
    in_block: int
    out_block: int
    lanes: int
    k: int
    data_dtype: str
    weight_dtype: str
    ow_padded: int = 0
    widened: int = 0
    window: bool = False
    window_rows: int = 1
    out_store: int = 0
    flat: bool = False
    phases: bool = False
    kw_inside: bool = False
    partial: bool = False
    float_sums: bool = False
    weight_bits: int = 8

    def __post_init__(self) -> None:
        if self.weight_bits not in (8, *x86_unpack.BITS):
            raise ValueError(f"weight_bits is {self.weight_bits}; allowed: 8, 4, 2")
        if self.weight_bits < 8 and self.weight_dtype != "int8":
            raise ValueError(f"weight_dtype is {self.weight_dtype}; allowed in fewer bits: int8")
        if self.out_block % self.lanes:
            raise ValueError(f"lanes is {self.lanes}; allowed: a divisor of {self.out_block}")
        if self.step_block % (self.k * self.packed):
            several = f", {self.packed} weights in a byte" if self.packed > 1 else ""
            raise ValueError(
                f"k is {self.k}{several}; allowed: a divisor of {self.step_block}"
            )
        if self.widened and (self.widened < self.in_block or self.window):
            raise ValueError(f"widened is {self.widened}; allowed: >= {self.in_block}, no window")
        if self.window and (self.in_blocks != 1 or self.work.dilation[1] != 1):
            raise ValueError("window with several data blocks or dilation; allowed: one block, 1")
        if self.window_rows > 1 and (not self.window or self.work.dilation[0] != 1):
            raise ValueError(f"window_rows is {self.window_rows} without window, or with dilation")
        if self.flat and (self.work.strides != (1, 1) or self.window):
            raise ValueError(f"flat with strides {self.work.strides}; allowed: (1, 1), no window")
        if self.phases and (self.flat or self.window):
            raise ValueError("phases with flat or window; allowed: neither")
        if self.partial and (self.k % 8 or self.work.is_float):
            raise ValueError(f"partial with k {self.k}; allowed: multiples of 8, integers")
        if self.float_sums and not (self.out_block % 64 == 0 and self.work.epilogue.small_sums):
            raise ValueError(
                f"float_sums with blocks of {self.out_block}; allowed: multiples of 64, small sums"
            )
        if self.ow_padded == 0:
            object.__setattr__(self, "ow_padded", self.columns)
        if self.out_store == 0:
            object.__setattr__(self, "out_store", self.out_block)
        if self.out_store > self.out_block:
            raise ValueError(f"out_store is {self.out_store}; allowed: <= {self.out_block}")
        if self.ow_padded < self.columns:
            raise ValueError(f"ow_padded is {self.ow_padded}; allowed: >= {self.columns}")

    # ------------------------------------------------------------ shapes

    @property
    def data_layout(self) -> Layout:
        """Layout of the data."""
        return Layout.packed(self.in_block)

    @property
    def out_layout(self) -> Layout:
        """Layout of the output and of the residual."""
        return Layout.packed(self.out_block)

    @cached_property
    def super_groups(self) -> int:
        """Groups after merging, each a whole number of blocks of input and output channels."""
        w = self.work
        icg, ocg = w.ic // w.groups, w.oc // w.groups
        for merged in range(1, w.groups):
            whole = (merged * icg) % self.in_block == 0 and (merged * ocg) % self.out_block == 0
            if w.groups % merged == 0 and whole:
                return w.groups // merged
        return 1

    @property
    def in_blocks(self) -> int:
        """Blocks of input channels."""
        return -(-self.work.ic // self.in_block)

    @property
    def out_blocks(self) -> int:
        """Blocks of output channels."""
        return -(-self.work.oc // self.out_block)

    @property
    def step_block(self) -> int:
        """Channels (with a window, channels of all its taps) that the inner loop reads together."""
        if self.window:
            return self.in_block * self.window_rows * self.window_taps
        return self.widened or self.in_block

    @property
    def packed(self) -> int:
        """Weights in a byte."""
        return 8 // self.weight_bits

    @property
    def window_taps(self) -> int:
        """Taps that a window reads: kw, and further ones of zero weight up to whole rows of k."""
        return window_taps(self.work.kw, self.in_block * self.window_rows, self.k)

    @property
    def window_grain(self) -> int:
        """Rows of the data between two rows of what windows read: from it all steps can start."""
        if self.window_rows == 1:
            return 1
        sh = self.work.strides[0]
        return sh if self.taps_h == 1 else math.gcd(sh, self.window_rows)

    @property
    def taps_h(self) -> int:
        """Vertical taps of the inner loop."""
        return -(-self.work.kh // self.window_rows)

    @property
    def taps_w(self) -> int:
        """Horizontal taps of the inner loop."""
        return 1 if self.window else self.work.kw

    @property
    def padded_width(self) -> int:
        """Columns of the image with its borders."""
        return self.work.iw + self.work.padding[1] + self.work.padding[3]

    @property
    def phase_shape(self) -> tuple[int, int, int, int]:
        """Phases and pixels of one: (phases of rows, of columns, rows, columns)."""
        w = self.work
        reach = [(taps - 1) * step for taps, step in zip((w.kh, w.kw), w.dilation, strict=True)]
        ph, pw = (min(by, far + 1) for by, far in zip(w.strides, reach, strict=True))
        rows, columns = (far // by for far, by in zip(reach, w.strides, strict=True))
        return ph, pw, w.oh + rows, w.ow + columns

    @property
    def rows(self) -> int:
        """Output rows of the inner loop."""
        return 1 if self.flat else self.work.oh

    @property
    def columns(self) -> int:
        """Output columns of the inner loop that hold results."""
        return (self.work.oh - 1) * self.padded_width + self.work.ow if self.flat else self.work.ow

    @property
    def in_blocks_per_group(self) -> int:
        """Blocks of input channels that one output channel sums over."""
        return self.in_blocks // self.super_groups

    def first_in_block(self, ob: Any) -> Any:
        """Return the first block of input channels that a block of output channels sums over."""
        if self.super_groups == 1:
            return 0
        per_group = self.out_blocks // self.super_groups
        return tir.floordiv(ob, per_group) * self.in_blocks_per_group

    def ordered(self, kw: Any, blocks: Any) -> tuple[Any, Any]:
        """Return what belongs to kw and to the blocks of ic in the order of the reduction."""
        return (blocks, kw) if self.kw_inside else (kw, blocks)

    def steps(self, channels: int) -> dict[str, int]:
        """Return the loops of the reduction, outermost first, of steps of so many channels."""
        taps = self.ordered(("kw", self.taps_w), ("cb", self.in_blocks_per_group))
        return dict((("kh", self.taps_h), *taps, ("ik", self.step_block // channels)))

    @property
    def image_size(self) -> int:
        """Elements of one image's data, as steps read it."""
        return self.in_blocks * self.step_block * self.work.ih * self.work.iw

    @property
    def weight_size(self) -> int:
        """Elements of the packed weight, or bytes of several."""
        return math.prod(self.weight_shape)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Packed weight, in the order the inner loop reads it.

        (oc / lanes, kh, kw, blocks of ic, block / k, lanes, k); `kw_inside` swaps kw and blocks.
        The fifth is fewer where several weights lie in a byte.
        """
        taps = self.ordered(self.taps_w, self.in_blocks_per_group)
        return (
            self.out_blocks * self.out_block // self.lanes,
            self.taps_h, *taps, self.step_block // (self.k * self.packed), self.lanes, self.k,
        )  # fmt: skip

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output (n, blocks, rows, columns, stored channels), its border included."""
        return (self.work.n, self.out_blocks, *self.work.stored, self.out_store)

    @property
    def data_zero_point(self) -> int:
        """The zero point of the data as the dot product reads it."""
        shift = {("int8", "uint8"): 128, ("uint8", "int8"): -128}
        return self.work.data_zero_point + shift.get((self.work.data_dtype, self.data_dtype), 0)

    @property
    def widens(self) -> bool:
        """Whether data is widened to int16, zero points subtracted, before the inner loop."""
        return self.data_dtype == "int16"

    @property
    def needs_pad(self) -> bool:
        """Whether the inner loop cannot read the data where it lies."""
        w = self.work
        converts = self.data_dtype != w.data_dtype
        reshapes = self.window or self.widened or self.phases or self.ow_padded != w.ow
        return bool(any(w.padding) or reshapes or converts)

    @property
    def crops(self) -> bool:
        """Whether more is computed than stored, so that a last pass copies what is wanted."""
        exact = self.ow_padded == self.work.ow and self.out_store == self.out_block
        return self.flat or not exact

    # ------------------------------------------------------------ numpy packers

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        """Pack an OIHW weight (oc, ic/groups, kh, kw) into `weight_shape`.

        Raises
        ------
        ValueError
            If a weight zero point cannot be subtracted within the packed dtype, or bits.
        """
        w = self.work
        wide = weight if w.is_float else weight.astype("int32") - w.weight_zero_point
        blocks, oc = self.in_blocks_per_group, self.out_blocks * self.out_block
        merged = merge_groups(wide, w.groups, self.super_groups)
        dense = np.zeros((oc, blocks * self.in_block, w.kh, w.kw), wide.dtype)
        dense[: w.oc, : merged.shape[1]] = merged
        if self.window:
            dense = in_windows(dense, self.taps_h, self.window_rows, self.window_taps)
        elif self.widened:
            dense = with_wider_blocks(dense, self.in_block, self.widened)
        narrow = dense.astype(self.weight_dtype)
        if not np.array_equal(narrow, dense):
            raise ValueError(
                f"weight minus weight_zero_point={w.weight_zero_point} spans "
                f"[{dense.min()}, {dense.max()}]; allowed: the range of {self.weight_dtype}"
            )
        o, i = narrow.shape[0] // self.lanes, self.step_block // self.k
        narrow = self._in_kernel_order(narrow)
        split = narrow.reshape(o, self.lanes, blocks, i, self.k, self.taps_h, self.taps_w)
        ordered = np.ascontiguousarray(split.transpose(0, 5, *self.ordered(6, 2), 3, 1, 4))
        return ordered if self.weight_bits == 8 else packed_steps(ordered, self.weight_bits)

    def pack_bias(self, bias: np.ndarray | None, weight: np.ndarray) -> np.ndarray:
        """Return the bias (out_blocks, out_block) with the zero point's compensation folded in.

        int32 arithmetic wraps like the kernel's own; float32 for float workloads.
        """
        w = self.work
        full = np.zeros(self.out_blocks * self.out_block, "float32" if w.is_float else "int64")
        if bias is not None:
            full[: w.oc] = bias
        if not w.is_float and not self.widens:
            sums = (weight.astype("int64") - w.weight_zero_point).reshape(w.oc, -1).sum(1)
            full[: w.oc] -= self.data_zero_point * sums
        if self.float_sums:
            full += ROUND_BITS
        if not w.is_float:
            full = full.astype("int32")
        full = self._in_kernel_order(full)
        return full.reshape(self.out_blocks, self.out_block)

    def pack_scale(self, scale: np.ndarray) -> np.ndarray:
        """Return the float32 multiplier (out_blocks, out_block); padding channels get 0."""
        full = np.zeros(self.out_blocks * self.out_block, "float32")
        full[: self.work.oc] = scale
        full = self._in_kernel_order(full)
        return full.reshape(self.out_blocks, self.out_block)

    def _in_kernel_order(self, channels: np.ndarray) -> np.ndarray:
        """Return an array of output channels, the first dimension, in the kernel's order."""
        if not self.float_sums:
            return channels
        blocks = channels.reshape(-1, len(PACK_ORDER), *channels.shape[1:])
        return blocks[:, PACK_ORDER].reshape(channels.shape)

    @property
    def folds_bias(self) -> bool:
        """Whether there is a bias: the workload's, a zero point's, or what sums start from."""
        folded = not self.work.is_float and not self.widens and self.data_zero_point != 0
        return self.work.epilogue.bias or folded or self.float_sums


def _convert(conv: PackedConv2d, value: Any) -> Any:
    """Return one element of the data as the inner loop reads it."""
    if conv.widens:
        wide = value.astype("int16")
        zero_point = conv.work.data_zero_point
        return wide - tir.const(zero_point, "int16") if zero_point else wide
    if dtype_of(value) != conv.data_dtype:
        # x + 128 modulo 256 is x with the sign bit flipped.
        flipped = tir.reinterpret("uint8", value) if dtype_of(value) == "int8" else value
        flipped = flipped ^ tir.const(128, "uint8")
        return flipped if conv.data_dtype == "uint8" else tir.reinterpret("int8", flipped)
    return value


def reduce_axis(name: str, extent: int, rolled: str) -> Any:
    """Return an axis of a reduction; LLVM does not know the extent of the one called `rolled`."""
    return te.reduce_axis((0, unknown_to_llvm(extent) if name == rolled else extent), name)


def accumulate(
    conv: PackedConv2d, data: Any, weight: Any, attrs: dict[str, str] | None = None,
    rolled: str = "",
) -> Any:  # fmt: skip
    """Return the sums (n, out_blocks, rows, ow_padded, out_block): stages "pad", "conv", "sum".

    Parameters
    ----------
    conv : PackedConv2d
    data : te.Tensor
        (n, in_blocks, ih, iw, in_block).
    weight : te.Tensor
        `conv.weight_shape`.
    attrs : dict, optional
        Attributes of stage "conv".
    rolled : str
        Axis of the reduction whose extent LLVM is not to know: "kh", "kw", "cb", "ik", or empty.
    """
    if conv.weight_bits != 8:
        raise ValueError(f"weight_bits is {conv.weight_bits}; allowed in TE: 8")
    w = conv.work
    acc_dtype = "float32" if w.is_float else "int32"
    source = pad_stage(conv, data) if conv.needs_pad else data
    sh, sw = w.strides
    dh, dw = w.dilation
    cb = reduce_axis("cb", conv.in_blocks_per_group, rolled)
    kh, kw = reduce_axis("kh", conv.taps_h, rolled), reduce_axis("kw", conv.taps_w, rolled)
    ik = reduce_axis("ik", conv.step_block // conv.k, rolled)
    kk = te.reduce_axis((0, conv.k // (PARTIALS if conv.partial else 1)), "kk")
    vectors = conv.out_block // conv.lanes

    def product(n: Any, ob: Any, y: Any, x: Any, o: Any, *part: Any) -> Any:
        row, column = y * sh + kh * dh, x * sw + kw * dw
        if conv.flat:
            row, column = y, x + kh * (dh * conv.padded_width) + kw * dw
        within = kk
        if part:
            # What a long multiply and a pairwise add bring together: lanes 2l and 2l + 1 of eight.
            within = tir.floordiv(kk, 2) * 8 + part[0] * 2 + tir.floormod(kk, 2)
        channel = ik * conv.k + within
        if conv.window:
            a = source[n, cb, row, x * (sw * conv.in_block) + channel]
        else:
            a = source[n, conv.first_in_block(ob) + cb, row, column, channel]
        vec, lane = tir.floordiv(o, conv.lanes), tir.floormod(o, conv.lanes)
        taps = conv.ordered(kw, cb)
        b = weight[(ob * vectors + vec, kh, *taps, ik, lane, within)]
        return te.sum(a.astype(acc_dtype) * b.astype(acc_dtype), axis=[kh, *taps, ik, kk])

    acc_shape = (w.n, conv.out_blocks, conv.rows, conv.ow_padded, conv.out_block)
    if not conv.partial:
        return te.compute(acc_shape, product, name="conv", attrs=attrs)
    parts = te.compute((*acc_shape, PARTIALS), product, name="conv", attrs=attrs)
    return te.compute(
        acc_shape,
        lambda *at: parts[(*at, 0)] + parts[(*at, 1)] + parts[(*at, 2)] + parts[(*at, 3)],
        name="sum",
    )


def declare(conv: PackedConv2d) -> tuple[Any, Any, Operands]:
    """Return placeholders: data, weight, and what the epilogue reads."""
    w = conv.work
    data = te.placeholder((w.n, conv.in_blocks, w.ih, w.iw, conv.in_block), w.data_dtype, "data")
    weight = te.placeholder(conv.weight_shape, conv.weight_dtype, "weight")
    operands = Operands.declare(
        w.epilogue, conv.folds_bias, "float32" if w.is_float else "int32",
        (conv.out_blocks, conv.out_block),
        (w.n, conv.out_blocks, *w.residual_shape, conv.out_store),
    )  # fmt: skip
    return data, weight, operands


def conv2d(conv: PackedConv2d) -> list[Any]:
    """Return the TE tensors [data, weight, (bias), (scale), (residual), out] of the convolution."""
    w = conv.work
    data, weight, operands = declare(conv)
    acc = accumulate(conv, data, weight)

    def store(n: Any, ob: Any, y: Any, x: Any, o: Any) -> Any:
        # In a padded column the residual is read at the last real one: the value is cropped away.
        ry, rx = y, x
        if conv.flat:
            ry, rx = tir.floordiv(x, conv.padded_width), tir.floormod(x, conv.padded_width)
            ry = tir.min(ry, w.oh - 1)
        if conv.flat or conv.ow_padded != w.ow:
            rx = tir.min(rx, w.ow - 1)
        ro = o if conv.out_store == conv.out_block else tir.min(o, conv.out_store - 1)
        return operands.apply(acc[n, ob, y, x, o], (ob, o), (n, ob, ry, rx, ro))

    out = te.compute(acc.shape, store, name="out")
    if conv.crops:
        stored = out

        def crop(n: Any, ob: Any, y: Any, x: Any, o: Any) -> Any:
            index = (0, y * conv.padded_width + x) if conv.flat else (y, x)
            return stored[(n, ob, *index, o)]

        out = te.compute(conv.out_shape, crop, name="crop")
    return [data, weight, *operands.present, out]


def pad_stage(conv: PackedConv2d, data: Any, extra_rows: int = 0) -> Any:
    """Return the data with borders, converted to what the inner loop reads.

    `extra_rows` are added below the bottom border.
    """
    w = conv.work
    top, _, bottom, _ = w.padding
    needed = 0
    if not conv.flat:
        taps = conv.window_taps if conv.window else w.kw
        needed = (conv.ow_padded - 1) * w.strides[1] + (taps - 1) * w.dilation[1] + 1
    bottom += extra_rows
    height, width = w.ih + top + bottom, max(conv.padded_width, needed)
    if conv.phases:
        ph, pw, rows, columns = conv.phase_shape
        sh, sw = w.strides
        inside = _bordered(conv, data, (rows - 1) * sh + ph, (columns - 1) * sw + pw)

        def phase(n: Any, c: Any, p: Any, y: Any, x: Any, i: Any) -> Any:
            return inside(n, c, y * sh + tir.floordiv(p, pw), x * sw + tir.floormod(p, pw), i)

        shape = (w.n, conv.in_blocks, ph * pw, rows, columns, conv.step_block)
        return te.compute(shape, phase, name="pad")
    if conv.window:
        column_bytes, grain = conv.in_block * conv.window_rows, conv.window_grain
        rows = height
        if conv.window_rows > 1:
            steps = (w.oh - 1) * w.strides[0] + (conv.taps_h - 1) * conv.window_rows
            rows = steps // grain + 1
        inside = _bordered(conv, data, (rows - 1) * grain + conv.window_rows, width)

        def row_of_bytes(n: Any, c: Any, y: Any, x: Any) -> Any:
            """The same with columns and channels in one dimension, for windows to start anywhere.
            """
            column, within = tir.floordiv(x, column_bytes), tir.floormod(x, column_bytes)
            row, channel = tir.floordiv(within, conv.in_block), tir.floormod(x, conv.in_block)
            return inside(n, c, y * grain + row, column, channel)

        return te.compute((w.n, conv.in_blocks, rows, width * column_bytes), row_of_bytes, "pad")
    padded = _bordered(conv, data, height, width)
    if conv.flat:
        last_tap = (w.kh - 1) * w.dilation[0] * width + (w.kw - 1) * w.dilation[1]
        shape = (w.n, conv.in_blocks, 1, conv.ow_padded + last_tap, conv.step_block)

        def row_of_pixels(n: Any, c: Any, _y: Any, x: Any, i: Any) -> Any:
            return padded(n, c, tir.floordiv(x, width), tir.floormod(x, width), i)

        return te.compute(shape, row_of_pixels, name="pad")
    shape = (w.n, conv.in_blocks, height, width, conv.widened or conv.in_block)
    return te.compute(shape, padded, name="pad")


def _bordered(conv: PackedConv2d, data: Any, height: int, width: int) -> Callable[..., Any]:
    """Return ``f(n, block, y, x, i)``, the data with its borders, read up to `height` and `width`.
    """
    w = conv.work
    top, left, _, _ = w.padding
    border = 0 if conv.widens or w.is_float else conv.data_zero_point

    def padded(n: Any, c: Any, y: Any, x: Any, i: Any) -> Any:
        inside = []
        if conv.widened:
            inside.append(i < conv.in_block)
        if top:
            inside.append(y >= top)
        if height > top + w.ih or conv.flat:
            inside.append(y < top + w.ih)
        if left:
            inside.append(x >= left)
        if width > left + w.iw:
            inside.append(x < left + w.iw)
        value = _convert(conv, data[n, c, y - top, x - left, i])
        if not inside:
            return value
        return tir.if_then_else(tir.all(*inside), value, tir.const(border, conv.data_dtype))

    return padded
