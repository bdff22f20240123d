"""Packing of weights that are not constants, in TE: what `PackedConv2d`'s numpy packers do, at run
time.
"""

from __future__ import annotations

from typing import Any

from tvm import te

from intrinsics.compat import tir

from .conv2d import PackedConv2d
from .depthwise import PackedDepthwise


def pack_weight(conv: PackedConv2d, weight: Any) -> Any:
    """Return an OIHW weight packed into ``conv.weight_shape``.

    Block-diagonal where groups were merged, zero in padding channels, zero point subtracted.
    """
    w = conv.work
    icg, ocg = w.ic // w.groups, w.oc // w.groups
    per_super = w.groups // conv.super_groups

    def element(ob: Any, kh: Any, *inner: Any) -> Any:
        *taps, ik, lane, kk = inner
        kw, cb = conv.ordered(*taps)  # swapping twice is swapping back
        oc = ob * conv.lanes + lane
        channel = cb * conv.step_block + ik * conv.k + kk
        inside = [oc < w.oc]
        if conv.window:
            tap = tir.floordiv(channel, conv.in_block)
            channel = tir.floormod(channel, conv.in_block)
            kw, row = tir.floordiv(tap, conv.window_rows), tir.floormod(tap, conv.window_rows)
            kh = kh * conv.window_rows + row
            inside += [channel < w.ic, kw < w.kw, kh < w.kh]
        else:
            if conv.widened:
                block = tir.floordiv(channel, conv.widened)
                channel = tir.floormod(channel, conv.widened)
                inside.append(channel < conv.in_block)
                channel = block * conv.in_block + channel
            # Position inside this output channel's own group.
            group = tir.floormod(tir.floordiv(oc, ocg), per_super)
            channel = channel - group * icg
            inside += [channel >= 0, channel < icg]
        value = weight[oc, channel, kh, kw]
        value = value.astype(conv.weight_dtype) if w.is_float else value.astype("int32")
        if w.weight_zero_point:
            value = value - tir.const(w.weight_zero_point, "int32")
        value = value.astype(conv.weight_dtype)
        return tir.if_then_else(tir.all(*inside), value, tir.const(0, conv.weight_dtype))

    return te.compute(conv.weight_shape, element, name="pack_weight")


def pack_bias(conv: PackedConv2d, weight: Any, bias: Any | None) -> Any:
    """Return the int32 bias (out_blocks, out_block), the zero point's compensation folded in."""
    w = conv.work
    axes = [
        te.reduce_axis((0, int(d)), name) for d, name in zip(weight.shape[1:], "ihw", strict=True)
    ]
    zero_point = tir.const(w.weight_zero_point, "int32")
    sums = te.compute(
        (w.oc,),
        lambda o: te.sum(weight[(o, *axes)].astype("int32") - zero_point, axis=axes),
        name="weight_sum",
    )
    factor = 0 if conv.widens else conv.data_zero_point

    def element(ob: Any, o: Any) -> Any:
        oc = ob * conv.out_block + o
        value = sums[oc] * tir.const(-factor, "int32")
        if bias is not None:
            value = value + bias[oc]
        return tir.if_then_else(oc < w.oc, value, tir.const(0, "int32"))

    return te.compute((conv.out_blocks, conv.out_block), element, name="pack_bias")


def pack_depthwise_weight(conv: PackedDepthwise, weight: Any) -> Any:
    """Return an OIHW weight (c, 1, kh, kw) packed into ``conv.weight_shape``, zero point
    subtracted.
    """
    w = conv.work

    def element(cb: Any, *inner: Any) -> Any:
        if conv.how == "dot":
            group, kw, i, t = inner
            kh = group * 4 + t
        else:
            kh, kw, i = inner
        channel = cb * conv.block + i
        value = weight[channel, 0, kh, kw]
        if w.weight_zero_point:
            value = value.astype("int16") - tir.const(w.weight_zero_point, "int16")
        value = value.astype(conv.weight_dtype)
        inside = tir.all(channel < w.ic, kh < w.kh)
        return tir.if_then_else(inside, value, tir.const(0, conv.weight_dtype))

    return te.compute(conv.weight_shape, element, name="pack_weight")


def matmul_weight_as_oihw(
    weight: Any, batch: int, n: int, k: int, padded_n: int, transpose_b: bool, zero_point: int
) -> Any:
    """Return a matmul's weight (.., N, K), or (.., K, N) if not `transpose_b`, as OIHW.

    Rows that pad N to `padded_n` hold the zero point.
    """

    def element(oc: Any, kk: Any, *_taps: Any) -> Any:
        b, row = tir.floordiv(oc, padded_n), tir.floormod(oc, padded_n)
        index = (row, kk) if transpose_b else (kk, row)
        value = weight[(b, *index)] if len(weight.shape) == 3 else weight[index]
        return tir.if_then_else(row < n, value, tir.const(zero_point, str(weight.dtype)))

    return te.compute((batch * padded_n, k, 1, 1), element, name="weight_oihw")
