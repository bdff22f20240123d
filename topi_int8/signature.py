"""What goes into a network and comes out of it: names, shapes, types, quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .qparams import QParams

# An attribute of main, a list of names: what the model calls its outputs.
OUTPUT_NAMES = "topi_int8.output_names"


@dataclass(frozen=True)
class TensorInfo:
    """An input or output.

    Parameters
    ----------
    name : str
        As the model has it; "output_0", ... where it has none.
    shape : tuple of int or str
        A name where a dimension is symbolic: any size will do.
    dtype : str
        What is passed in or comes out.
    quantization : QParams, optional
        Of a uint8 or int8 tensor: what its integers stand for. Of a float32 one: what the network
        makes of it first, or made it of last; nothing has to be done about it.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    quantization: QParams | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.dtype:
            raise ValueError(f"name is {self.name!r}, dtype is {self.dtype!r}; allowed: no empty")
        if any(isinstance(dim, int) and dim < 0 for dim in self.shape):
            raise ValueError(f"shape of {self.name} is {self.shape}; allowed: 0 or more, or a name")

    def __str__(self) -> str:
        dims = ", ".join(map(str, self.shape))
        text = f"{self.name}: {self.dtype} ({dims})"
        q = self.quantization
        if q is None:
            return text
        return f"{text}, {q.dtype} inside" if self.dtype != q.dtype else (
            f"{text}, {q.scale:.6g} * (q - {q.zero_point})"
        )  # fmt: skip

    def accept(self, value: Any) -> np.ndarray:
        """Return a value as the C-contiguous array to pass in.

        Raises
        ------
        ValueError
            When its shape or type is another.
        """
        array = np.asarray(value)
        fits = array.ndim == len(self.shape) and all(
            isinstance(want, str) or want == have
            for want, have in zip(self.shape, array.shape, strict=True)
        )
        if not fits or str(array.dtype) != self.dtype:
            dims = ", ".join(map(str, self.shape))
            raise ValueError(
                f"{self.name} is {array.dtype} {array.shape}; allowed: {self.dtype} ({dims})"
            )
        return np.ascontiguousarray(array)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        q = self.quantization
        inside = None if q is None else {
            "scale": q.scale, "zero_point": q.zero_point, "dtype": q.dtype,
        }  # fmt: skip
        return {
            "name": self.name, "shape": list(self.shape), "dtype": self.dtype,
            "quantization": inside,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> TensorInfo:
        """Return what `to_dict` wrote."""
        q = entry["quantization"]
        params = None if q is None else QParams(**q)
        return cls(entry["name"], tuple(entry["shape"]), entry["dtype"], params)
