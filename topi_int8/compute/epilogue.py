"""The fused epilogue in TE: bias, requantize, residual, clip, and the cast to the stored type.

Rounding half to even without a rounding instruction: adding 1.5 * 2**23 to a float32 of magnitude
under 2**22 leaves the rounded integer in the low mantissa bits, by the IEEE addition's own
rounding. One add replaces vrndscale + vcvttps2dq on x86 and frint + fcvtzs on ARM, and every ISA
has it. The clamp comes first, in float: clamping to integers commutes with rounding, and it bounds
the magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te

from intrinsics.compat import dtype_of, tir
from intrinsics.x86_narrow import ROUND, ROUND_BITS, narrowed

from ..workload import Epilogue


def cast(value: Any, dtype: str) -> Any:
    """Return an expression cast to `dtype`; a vector stays one."""
    _, lanes, count = dtype_of(value).partition("x")
    return value.astype(dtype + lanes + count)


def f32(value: Any) -> Any:
    """Return a float32 constant, or an expression cast to float32."""
    if isinstance(value, int | float):
        return tir.const(value, "float32")
    return cast(value, "float32")


def quantize_value(value: Any, zero_point: int, low: float, high: float, dtype: str) -> Any:
    """Return ``clip(rint(value) + zero_point, low, high)`` as `dtype`, for a float32 expression.

    `low` and `high` are integers inside the range of an 8-bit `dtype`.
    """
    value = tir.max(value, f32(float(low - zero_point)))
    value = tir.min(value, f32(float(high - zero_point)))
    value = value + f32(ROUND)
    bits = tir.reinterpret(dtype_of(value).replace("float32", "int32"), value)
    if zero_point:
        bits = bits + tir.const(zero_point - ROUND_BITS, "int32")
    return cast(bits, dtype)


def dequantize_value(value: Any, zero_point: int, scale: float) -> Any:
    """Return ``(value - zero_point) * scale`` in float32 for an 8-bit expression."""
    shifted = cast(value, "int32")
    if zero_point:
        shifted = shifted - tir.const(zero_point, "int32")
    return f32(shifted) * f32(float(scale))


def clip_value(value: Any, low: float | None, high: float | None, dtype: str) -> Any:
    """Return value clipped to the bounds that are not None."""
    if low is not None:
        value = tir.max(value, tir.const(low, dtype))
    if high is not None:
        value = tir.min(value, tir.const(high, dtype))
    return value


def apply(epilogue: Epilogue, acc: Any, bias: Any, scale: Any, residual: Any) -> Any:
    """Return the stored value for one accumulator element; absent operands are None.

    The arithmetic is `workload`'s. `acc` is int32 (or float32 in a float32 workload).
    """
    if bias is not None:
        acc = acc + bias
    if epilogue.out_dtype == "int32":
        if epilogue.clip_min is None and epilogue.clip_max is None:
            return acc
        low, high = epilogue.bounds()
        return clip_value(acc, int(low), int(high), "int32")
    return stored_value(epilogue, real_value(epilogue, acc, scale, residual))


def real_value(epilogue: Epilogue, acc: Any, scale: Any, residual: Any) -> Any:
    """Return the float32 value, in units of the output, of one sum with its bias."""
    value = acc if dtype_of(acc).startswith("float32") else f32(acc)
    if scale is not None:
        value = value * scale
    if residual is not None:
        if dtype_of(residual).startswith("float32"):
            scaled = residual
            if epilogue.residual_scale != 1.0:
                scaled = scaled * f32(epilogue.residual_scale)
        else:
            scaled = dequantize_value(
                residual, epilogue.residual_zero_point, epilogue.residual_scale
            )
        value = value + scaled
    return value


def stored_value(epilogue: Epilogue, value: Any) -> Any:
    """Return what is stored of a float32 value: clipped, and rounded to an integer `out_dtype`."""
    low, high = epilogue.bounds()
    if epilogue.out_dtype == "float32":
        return clip_value(value, low, high, "float32")
    return quantize_value(value, epilogue.out_zero_point, low, high, epilogue.out_dtype)


def narrowed_values(epilogue: Epilogue, values: list[Any], converts: bool = False) -> Any:
    """Return what is stored of float32 vectors in 8 bits, by x86's packing: see `narrowed`."""
    low, high = (int(bound) for bound in epilogue.bounds())
    ends = (epilogue.out_zero_point, low, high)
    return narrowed(values, epilogue.out_dtype, *ends, epilogue.bounded, converts)


@dataclass(frozen=True)
class Operands:
    """The tensors an epilogue reads besides the accumulator; those it has not are None."""

    epilogue: Epilogue
    bias: Any
    scale: Any
    residual: Any

    @staticmethod
    def declare(
        epilogue: Epilogue,
        takes_bias: bool,
        acc_dtype: str,
        channel_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
    ) -> Operands:
        """Return placeholders: bias and scale per channel, the residual of the output's shape."""
        dtype = epilogue.residual_dtype
        return Operands(
            epilogue,
            te.placeholder(channel_shape, acc_dtype, "bias") if takes_bias else None,
            te.placeholder(channel_shape, "float32", "scale") if epilogue.scale else None,
            te.placeholder(out_shape, dtype, "residual") if dtype else None,
        )

    @property
    def present(self) -> list[Any]:
        """The tensors there are, in the order in which kernels take them."""
        return [t for t in (self.bias, self.scale, self.residual) if t is not None]

    def apply(self, acc: Any, channel: tuple, element: tuple) -> Any:
        """Return the stored value of one accumulator, at these indices of the operands."""
        return apply(self.epilogue, acc, *self._at(channel, element))

    def _at(self, channel: tuple, element: tuple) -> list[Any]:
        """Return (bias, scale, residual) of an element; absent operands are None."""
        operands = ((self.bias, channel), (self.scale, channel), (self.residual, element))
        return [None if tensor is None else tensor[index] for tensor, index in operands]
