"""Requantization by channel on AArch64: TVM's fixed-point product, bit for bit, in vectors.

LLVM 10 moves the widening of what a channel's multiplier is out of the loop, and then multiplies
64 bits by 64 bits: one by one, in scalar registers. It took longer than a 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm

from intrinsics.compat import tir

_OP = "tir.q_multiply_shift_per_axis"
_LANES = 4  # 32 bits in a vector of 128
_FRACTION = 31  # bits of a multiplier behind the point


def _llvm(name: str, dtype: str, *args: Any) -> Any:
    count = tir.const(len(args), "uint32")
    return tir.call_llvm_pure_intrin(dtype, f"llvm.aarch64.neon.{name}", count, *args)


def _half(value: Any, part: str) -> Any:
    lanes = tvm.DataType(value.dtype).lanes
    return tir.call_intrin(f"int32x{lanes // 2}", f"tir.vector{part}", value)


def _rounded(x: Any, multiplier: Any, shift: Any) -> Any:
    """Return ``round(x * multiplier * 2**shift)`` of vectors, shifts negative, halves up."""
    lanes = tvm.DataType(x.dtype).lanes

    def half(part: str) -> Any:
        operands = [_half(value, part) for value in (x, multiplier, shift)]
        if lanes > _LANES:
            return _rounded(*operands)
        product = _llvm("smull.v2i64", "int64x2", *operands[:2])
        wide_shift = operands[2].astype("int64x2")
        return _llvm("srshl.v2i64", "int64x2", product, wide_shift).astype("int32x2")

    return tir.call_intrin(f"int32x{lanes}", "tir.vectorcombine", half("low"), half("high"))


def _lower(call: Any) -> Any:
    """Return ``((x << left) * multiplier + half) >> (right + 31)``, as TVM defines the operator."""
    x, multiplier, left, right, fraction, shifts_left, _ = call.args
    dtype = tvm.DataType(call.dtype)
    fraction = getattr(fraction, "value", fraction)  # of a Broadcast
    halves = dtype.lanes >= _LANES and dtype.lanes & (dtype.lanes - 1) == 0
    if not halves or int(fraction) != _FRACTION:
        return call
    shift = tir.Broadcast(tir.const(-_FRACTION, "int32"), dtype.lanes) - right
    if int(getattr(shifts_left, "value", shifts_left)):
        shift = shift + left
    names = [tir.Var(name, call.dtype) for name in ("x", "multiplier", "shift")]
    body = _rounded(*names)
    for name, value in zip(names, (x, multiplier, shift), strict=True):
        body = tir.Let(name, value, body)
    return body


class _LoweringSlot:
    """The operator's lowering for AArch64, which upstream has none of."""

    def install(self) -> Callable[[], None]:
        """Register ours; return what takes it away."""
        key, op = "llvm.aarch64.FLowerIntrinsic", tvm.ir.Op.get(_OP)
        if op.get_attr(key) is not None:
            return lambda: None  # somebody else's
        tvm.ir.register_intrin_lowering(_OP, target="llvm.aarch64", f=_lower)
        return lambda: op.reset_attr(key)


SLOTS = (_LoweringSlot(),)
