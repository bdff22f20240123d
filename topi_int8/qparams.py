"""Per-tensor quantization parameters: what a scale and a zero point make of real numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .workload import DTYPE_RANGE, INT8_DTYPES


@dataclass(frozen=True)
class QParams:
    """Per-tensor quantization parameters: real = scale * (q - zero_point), q of `dtype`."""

    scale: float
    zero_point: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in INT8_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(INT8_DTYPES)}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale is {self.scale!r}; allowed: a finite number > 0")

    def quantize(self, real: np.ndarray) -> np.ndarray:
        """Return real values as integers of `dtype`: half to even, saturated."""
        low, high = DTYPE_RANGE[self.dtype]
        q = np.rint(np.asarray(real, "float32") / np.float32(self.scale)) + self.zero_point
        return np.clip(q, low, high).astype(self.dtype)

    def dequantize(self, q: np.ndarray) -> np.ndarray:
        """Return integers as the float32 reals that they stand for."""
        shifted = (q.astype("int64") - self.zero_point).astype("float32")
        return shifted * np.float32(self.scale)

    def bound(self, real: float) -> int | None:
        """Return a real clip bound in quantized units inside the type's range; None if infinite."""
        if math.isinf(real):
            return None
        low, high = DTYPE_RANGE[self.dtype]
        q = float(np.rint(np.float32(real) / np.float32(self.scale))) + self.zero_point
        return int(min(max(q, low), high))

    def same(self, other: QParams) -> bool:
        """Return whether two tensors of these parameters hold equal integers for equal reals."""
        close = math.isclose(self.scale, other.scale, rel_tol=1e-6)
        return close and (self.zero_point, self.dtype) == (other.zero_point, other.dtype)


def all_integers(dtype: str) -> np.ndarray:
    """Return the 256 integers of "uint8" or "int8", in the order of their bits (int8: 0 .. -1)."""
    return np.arange(256, dtype="uint8").view(dtype)
