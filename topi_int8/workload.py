"""What an operator computes: frozen, self-validating descriptions of conv2d and dense workloads.

These are the currency between the rooms: `transform/` makes them from Relax calls, `strategy.py`
chooses by them, `compute/` turns them into TE, `bench/` and the tests build them from shape lines.
They know no Relax, no target and no layout.

The arithmetic they stand for (``Z`` the integers, all sums exact in int32)::

    acc[oc]  = sum_k (data[k] - data_zero_point) * (weight[oc, k] - weight_zero_point)
    v        = acc + bias[oc]                                   # int32
    out_dtype int32:            out = clip(v)
    out_dtype float32:          out = clip(float32(v) * scale[oc] + r)
    out_dtype uint8 or int8:    out = clip(rint(float32(v) * scale[oc] + r) + out_zero_point)

where ``r = (residual - residual_zero_point) * residual_scale`` when a residual is added, rint
rounds half to even, and clip saturates to ``[clip_min, clip_max]`` inside the range of
``out_dtype``. Borders are padded with ``data_zero_point`` (a real zero). A float32 workload has
neither zero points nor scale; its bias is float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

INT8_DTYPES = ("uint8", "int8")
OUT_DTYPES = ("uint8", "int8", "int32", "float32")
DTYPE_RANGE = {"uint8": (0, 255), "int8": (-128, 127), "int32": (-(2**31), 2**31 - 1)}

# Types of activations that no kernel takes, and what they lack.
TOO_WIDE = {
    "int16": "products of int16 with int8 leave int32 after 516 of them, and no kernel here sums "
    "in parts or in 64 bits",
    "int32": "no kernel here multiplies int32, whose products with int8 leave int32 at once",
}


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError that names the argument, its value and what is allowed."""
    if not ok:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


def _require_zero_point(name: str, value: int, dtype: str) -> None:
    low, high = DTYPE_RANGE.get(dtype, (0, 0))
    _require(low <= value <= high, name, value, f"an integer in [{low}, {high}] for {dtype}")


@dataclass(frozen=True)
class Epilogue:
    """What happens to the int32 accumulator before it is stored.

    Parameters
    ----------
    out_dtype : str
        "int32", "float32", "uint8" or "int8".
    bias : bool
        Whether a per-channel bias is added: int32 (float32 in a float32 workload), at accumulator
        scale.
    scale : bool
        Whether a per-channel float32 multiplier is applied. Required for uint8/int8 outputs,
        refused for int32.
    out_zero_point : int
        Added after rounding; uint8/int8 outputs only.
    clip_min, clip_max : float or None
        Bounds in units of the output (quantized units, zero point included, for integers). None
        means the range of the type. relu is ``clip_min=out_zero_point``.
    residual_dtype : str or None
        "uint8", "int8" or "float32": a tensor of the output's shape is added before clip. None: no
        residual.
    residual_zero_point : int
    residual_scale : float
        Multiplier that brings the residual to units of the output.
    bounded : bool
        Whether no value, before it is rounded and clipped, can be -2**23 or less: then a kernel may
        leave the lower bound to the saturation of its narrowing. `with_known_bounds` proves it.
    small_sums : bool
        Whether every sum with its bias is between -2**22 and 2**22: then a kernel may count it in
        the bits of a float32. `with_known_bounds` proves it.
    """

    out_dtype: str = "int32"
    bias: bool = False
    scale: bool = False
    out_zero_point: int = 0
    clip_min: float | None = None
    clip_max: float | None = None
    residual_dtype: str | None = None
    residual_zero_point: int = 0
    residual_scale: float = 1.0
    bounded: bool = False
    small_sums: bool = False

    def __post_init__(self) -> None:
        _require(self.out_dtype in OUT_DTYPES, "out_dtype", self.out_dtype, ", ".join(OUT_DTYPES))
        if self.out_dtype in INT8_DTYPES:
            _require(self.scale, "scale", self.scale, f"True when out_dtype is {self.out_dtype}")
            _require_zero_point("out_zero_point", self.out_zero_point, self.out_dtype)
        else:
            _require(self.out_zero_point == 0, "out_zero_point", self.out_zero_point, "0")
        if self.out_dtype == "int32":
            _require(not self.scale, "scale", self.scale, "False when out_dtype is int32")
            _require(self.residual_dtype is None, "residual_dtype", self.residual_dtype, "None")
        _require(
            self.residual_dtype in (None, "uint8", "int8", "float32"),
            "residual_dtype", self.residual_dtype, "None, uint8, int8, float32",
        )  # fmt: skip
        if self.residual_dtype in INT8_DTYPES:
            _require_zero_point(
                "residual_zero_point", self.residual_zero_point, str(self.residual_dtype)
            )
        low, high = self.bounds()
        _require(
            low is None or high is None or low <= high,
            "clip_min, clip_max",
            (low, high),
            "min <= max",
        )

    def bounds(self) -> tuple[float | None, float | None]:
        """Return (low, high) of the stored value: the clip inside the type's range."""
        low, high = self.clip_min, self.clip_max
        if self.out_dtype in DTYPE_RANGE:
            tmin, tmax = DTYPE_RANGE[self.out_dtype]
            low = tmin if low is None else max(low, tmin)
            high = tmax if high is None else min(high, tmax)
        return low, high


def _require_operand_types(work: Conv2dWorkload | MatmulWorkload) -> None:
    """Check a workload's dtypes and zero points: all float32, or 8-bit integers."""
    if work.data_dtype == "float32":
        _require(work.weight_dtype == "float32", "weight_dtype", work.weight_dtype, "float32")
        out_dtype = work.epilogue.out_dtype
        _require(out_dtype == "float32", "out_dtype", out_dtype, "float32 for float32 operands")
        _require(not work.epilogue.scale, "scale", True, "False for float32 operands")
        return
    for which in ("data", "weight"):
        dtype = getattr(work, f"{which}_dtype")
        _require(dtype in INT8_DTYPES, f"{which}_dtype", dtype, "uint8, int8")
        name = f"{which}_zero_point"
        _require_zero_point(name, getattr(work, name), dtype)


@dataclass(frozen=True)
class Conv2dWorkload:
    """A 2-D convolution with its fused epilogue. Shapes are logical (unpadded channels).

    ``padding`` is (top, left, bottom, right). ``out_border``, likewise, is rows and columns around
    the stored output that hold its zero point: the padding that whoever reads it would add;
    ``residual_border`` is what the residual has around it. ``weight_range`` is the pair (min, max)
    of a constant weight, when known: it is what proves that vpmaddubsw cannot saturate.
    ``depthwise`` convolutions are groups == ic == oc.
    """

    n: int
    ic: int
    ih: int
    iw: int
    oc: int
    kh: int
    kw: int
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    data_dtype: str = "uint8"
    weight_dtype: str = "int8"
    data_zero_point: int = 0
    weight_zero_point: int = 0
    weight_range: tuple[int, int] | None = None
    epilogue: Epilogue = field(default_factory=Epilogue)
    out_border: tuple[int, int, int, int] = (0, 0, 0, 0)
    residual_border: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __post_init__(self) -> None:
        for name in ("n", "ic", "ih", "iw", "oc", "kh", "kw", "groups"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        _require(min(self.strides) >= 1, "strides", self.strides, "integers >= 1")
        _require(min(self.dilation) >= 1, "dilation", self.dilation, "integers >= 1")
        for name in ("padding", "out_border", "residual_border"):
            sides = getattr(self, name)
            _require(
                len(sides) == 4 and min(sides) >= 0,
                name, sides, "(top, left, bottom, right), integers >= 0",
            )  # fmt: skip
        _require(
            self.epilogue.residual_dtype is not None or not any(self.residual_border),
            "residual_border", self.residual_border, "zeros where there is no residual",
        )  # fmt: skip
        _require(
            self.ic % self.groups == 0 and self.oc % self.groups == 0,
            "groups", self.groups, f"a divisor of ic={self.ic} and oc={self.oc}",
        )  # fmt: skip
        _require(
            self.oh >= 1 and self.ow >= 1, "kernel", (self.kh, self.kw), "one that fits the input"
        )
        _require_operand_types(self)

    @property
    def oh(self) -> int:
        """Output height."""
        top, _, bottom, _ = self.padding
        return (self.ih + top + bottom - (self.kh - 1) * self.dilation[0] - 1) // self.strides[
            0
        ] + 1

    @property
    def ow(self) -> int:
        """Output width."""
        _, left, _, right = self.padding
        return (self.iw + left + right - (self.kw - 1) * self.dilation[1] - 1) // self.strides[
            1
        ] + 1

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns of the output as it is stored, with its border."""
        return self._with(self.out_border)

    @property
    def residual_shape(self) -> tuple[int, int]:
        """Rows and columns of the residual as it is stored, with its border."""
        return self._with(self.residual_border)

    def _with(self, border: tuple[int, int, int, int]) -> tuple[int, int]:
        top, left, bottom, right = border
        return self.oh + top + bottom, self.ow + left + right

    @property
    def macs(self) -> int:
        """Multiply-accumulates, padding's zeros counted (as benchdnn does)."""
        return self.n * self.oh * self.ow * self.oc * (self.ic // self.groups) * self.kh * self.kw

    @property
    def depth(self) -> int:
        """Products of a sum."""
        return self.ic // self.groups * self.kh * self.kw

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is convolved with its own filter."""
        return self.groups > 1 and self.groups == self.ic == self.oc

    @property
    def is_float(self) -> bool:
        """Whether this is a float32 convolution."""
        return self.data_dtype == "float32"

    def with_epilogue(self, epilogue: Epilogue) -> Conv2dWorkload:
        """Return the same convolution with another epilogue."""
        return replace(self, epilogue=epilogue)


@dataclass(frozen=True)
class MatmulWorkload:
    """``out[b, m, n] = epilogue(sum_k data[b, m, k] * weight[b, n, k])``: dense and batched matmul.

    The weight is given as (N, K) (dense) or (B, N, K); ``transpose_b`` False says that the call's
    own operand is (B, K, N). ``weight_constant`` says whether it can be packed at compile time.
    Bias and scale are per n.
    """

    m: int
    n: int
    k: int
    batch: int = 1
    data_dtype: str = "uint8"
    weight_dtype: str = "int8"
    data_zero_point: int = 0
    weight_zero_point: int = 0
    weight_range: tuple[int, int] | None = None
    weight_constant: bool = True
    transpose_b: bool = True
    epilogue: Epilogue = field(default_factory=Epilogue)

    def __post_init__(self) -> None:
        for name in ("m", "n", "k", "batch"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        _require_operand_types(self)

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.batch * self.m * self.n * self.k

    @property
    def depth(self) -> int:
        """Products of a sum."""
        return self.k

    def with_epilogue(self, epilogue: Epilogue) -> MatmulWorkload:
        """Return the same matmul with another epilogue."""
        return replace(self, epilogue=epilogue)

    @property
    def is_float(self) -> bool:
        """Whether this is a float32 matmul."""
        return self.data_dtype == "float32"


def with_known_bounds(
    work: Conv2dWorkload | MatmulWorkload,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    scale: np.ndarray | None,
) -> Conv2dWorkload | MatmulWorkload:
    """Return the workload with what its constant operands prove of sums and values.

    `Epilogue.small_sums` by the largest sum that the data's type allows with these weights, and the
    largest bias; `Epilogue.bounded` by that at the largest scale, with the largest residual.

    Parameters
    ----------
    work : Conv2dWorkload or MatmulWorkload
    weight : numpy.ndarray or None
        OIHW or (.., N, K), if constant.
    bias, scale : numpy.ndarray or None
        The epilogue's, if it has them and they are constant.
    """
    epi = work.epilogue
    if work.is_float or weight is None or (epi.bias and bias is None):
        return work

    def largest(dtype: str, zero_point: int) -> int:
        return max(abs(bound - zero_point) for bound in DTYPE_RANGE[dtype])

    a_channel = np.abs(weight.reshape(-1, work.depth).astype("int32") - work.weight_zero_point)
    total = int(a_channel.sum(1).max()) * largest(work.data_dtype, work.data_zero_point)
    if epi.bias:
        total += int(np.abs(bias.astype("int64")).max())
    bounded = False
    if scale is not None and epi.residual_dtype != "float32":
        value = total * float(np.abs(scale).max())
        if epi.residual_dtype is not None:
            residual = largest(epi.residual_dtype, epi.residual_zero_point)
            value += residual * abs(epi.residual_scale)
        bounded = value < 2**23
    return work.with_epilogue(replace(epi, bounded=bounded, small_sums=total < 2**22))
