"""What is run on a shape: operand types, the fused epilogue, and the operands themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

from topi_int8.workload import DTYPE_RANGE, Conv2dWorkload, Epilogue, MatmulWorkload

from .shape_lines import Shape

Workload = Conv2dWorkload | MatmulWorkload

DTYPES = {
    "u8s8": ("uint8", "int8"),
    "s8s8": ("int8", "int8"),
    "f32": ("float32", "float32"),
}
OUTPUTS = {"u8": "uint8", "s8": "int8", "s32": "int32", "f32": "float32"}
# Bounds of the random weights; kernels are told them, as they are told a model's.
WEIGHT_RANGES = {2: (-1, 1), 4: (-7, 7), 7: (-64, 64), 8: (-127, 127)}
_STEPS = ("bias", "relu", "sum")


def parse_epilogue(text: str) -> Epilogue:
    """Return the epilogue of ``bias+relu+u8``: steps joined by ``+``, the output type last.

    Steps are ``bias``, ``relu`` and ``sum`` (a residual of the output's type is added before relu).
    Outputs are u8 and s8 (requantized), f32 (scaled on int8 inputs) and s32.

    Raises
    ------
    ValueError
        Naming the part that is not allowed.
    """
    *steps, output = text.split("+")
    if output not in OUTPUTS:
        raise ValueError(f"epilogue ends in {output!r}; allowed: {', '.join(OUTPUTS)}")
    for step in steps:
        if step not in _STEPS or steps.count(step) > 1:
            raise ValueError(f"epilogue has {step!r}; allowed: {', '.join(_STEPS)}, each once")
    out_dtype = OUTPUTS[output]
    return Epilogue(
        out_dtype=out_dtype,
        bias="bias" in steps,
        scale=out_dtype != "int32",
        clip_min=0 if "relu" in steps else None,
        residual_dtype=out_dtype if "sum" in steps else None,
        residual_scale=0.5 if "sum" in steps else 1.0,
    )


def make(shape: Shape, dtype: str = "u8s8", epilogue: str = "", weight_bits: int = 8) -> Workload:
    """Return the workload of a shape.

    Parameters
    ----------
    dtype : str
        A key of `DTYPES`.
    epilogue : str
        See `parse_epilogue`; empty is bias+relu+u8, and bias+relu+f32 for f32.

    weight_bits : int
        A key of `WEIGHT_RANGES`: the range of constant int8 weights.

    Raises
    ------
    ValueError
        For an unknown dtype or epilogue, or a shape that workloads cannot express.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    parsed = parse_epilogue(epilogue or ("bias+relu+f32" if dtype == "f32" else "bias+relu+u8"))
    if dtype == "f32":
        if parsed.out_dtype != "float32":
            raise ValueError(f"epilogue is {epilogue!r}; allowed with dtype f32: ...+f32")
        parsed = Epilogue(**{**parsed.__dict__, "scale": False})
    workload = shape.workload(*DTYPES[dtype], parsed)
    if workload.weight_range is None:
        return workload
    return replace(workload, weight_range=WEIGHT_RANGES[weight_bits])


@dataclass(frozen=True)
class Operands:
    """Arrays of one workload: NCHW and OIHW, or (B, M, K) and (B, N, K); optional ones None."""

    data: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    scale: np.ndarray | None
    residual: np.ndarray | None


def shapes_of(workload: Workload) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Return the shapes of data, weight and output, and the number of output channels."""
    w = workload
    if isinstance(w, Conv2dWorkload):
        weight = (w.oc, w.ic // w.groups, w.kh, w.kw)
        return (w.n, w.ic, w.ih, w.iw), weight, (w.n, w.oc, w.oh, w.ow), w.oc
    weight = (w.n, w.k) if w.weight_constant else (w.batch, w.n, w.k)
    return (w.batch, w.m, w.k), weight, (w.batch, w.m, w.n), w.n


def random_operands(workload: Workload, seed: int = 0) -> Operands:
    """Return seeded operands over the full ranges, scaled so that outputs fill theirs."""
    rng = np.random.default_rng(seed)
    epilogue = workload.epilogue
    data_shape, weight_shape, out_shape, channels = shapes_of(workload)

    def fill(
        shape: tuple[int, ...], dtype: str, bounds: tuple[int, int] | None = None
    ) -> np.ndarray:
        if dtype == "float32":
            return rng.uniform(-1, 1, shape).astype(dtype)
        low, high = bounds or DTYPE_RANGE[dtype]
        return rng.integers(low, high + 1, shape).astype(dtype)

    data = fill(data_shape, workload.data_dtype)
    weight = fill(weight_shape, workload.weight_dtype, workload.weight_range)
    reduced = int(np.prod(weight_shape[1:])) if len(weight_shape) == 4 else weight_shape[-1]
    # Root mean squares of uniform integers: 147 for 0..255, 74 for -127..127.
    deviation = sqrt(reduced) * (147 if workload.data_dtype == "uint8" else 74) * 74
    bias = scale = residual = None
    if epilogue.bias and workload.is_float:
        bias = fill((channels,), "float32")
    elif epilogue.bias:
        bias = fill((channels,), "int32", (-int(deviation), int(deviation)))
    if epilogue.scale:
        scale = rng.uniform(40 / deviation, 80 / deviation, channels).astype("float32")
    if epilogue.residual_dtype:
        residual = fill(out_shape, epilogue.residual_dtype)
    return Operands(data, weight, bias, scale, residual)
