"""int8 TFLite models written by hand: a network is built and computed step by step.

Each step writes an operator and its tensors, and computes its output by `tflite_reference` for the
network's sample input; the scale and zero point of the output are those of its real values there,
as a converter's calibration would choose them. `Net.model` is the flatbuffer.

>>> net = Net(seed=0)
>>> x = net.input((1, 8, 8, 3))
>>> y = net.conv2d(x, 16, 3, stride=2, activation="RELU6")
>>> net.model(y), x.value, y.value          # the file, the sample, what TFLite makes of it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
import tflite
from tvm.relax.frontend.tflite.tflite_frontend import get_pad_value

from tests.frontend import tflite_reference as reference
from tests.frontend.tflite_reference import ACTIVATIONS, Padding, Params


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model: its number, its value for the sample, and how that is quantized."""

    index: int
    value: np.ndarray
    params: Params = (0.0, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def real(self) -> np.ndarray:
        return reference.dequantize(self.value, self.params)


class Net:
    """A network being built; see the module's docstring.

    Parameters
    ----------
    seed : int
        Of the weights and of the sample input.
    first : Net, optional
        The same network, built before, whose scales and zero points this one has.
    values : sequence of np.ndarray, optional
        What the tensors of `first.steps` shall hold instead, so that each step is computed from
        the values that another system gave its inputs. `computed` is what the steps make of them.
    """

    def __init__(
        self, seed: int = 0, first: Net | None = None, values: Sequence[np.ndarray] = ()
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.inputs: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.operators: list[str] = []  # the operator of each step
        self.computed: list[np.ndarray] = []
        self._calibrations: list[Params] = []
        self._first, self._values = first, values
        self._file = _File()

    # ------------------------------------------------------------ tensors

    def input(
        self, shape: Sequence[int], scale: float = 0.02, zero_point: int = -3, name: str = ""
    ) -> Tensor:
        """Return an input of int8; the sample is uniform."""
        value = self.rng.integers(-128, 128, tuple(shape)).astype("int8")
        name = name or f"input{len(self.inputs)}"
        index = self._file.tensor(value, scale, zero_point, name=name)
        self.inputs.append(Tensor(index, value, (scale, zero_point)))
        return self.inputs[-1]

    def constant(self, value: np.ndarray, scales: Any = None, axis: int = 0) -> Tensor:
        """Return a constant; with one scale, or several along an axis, zero points are 0."""
        params = (float(np.asarray(scales).flat[0]), 0) if scales is not None else (0.0, 0)
        index = self._file.tensor(value, scales, 0, axis, data=True)
        return Tensor(index, value, params)

    def _made(self, value: np.ndarray, params: Params) -> Tensor:
        """Return the tensor that a step has computed."""
        index = self._file.tensor(value, *params)
        self.computed.append(value)
        value = self._values[len(self.steps)] if len(self._values) else value
        self.steps.append(Tensor(index, value, params))
        return self.steps[-1]

    def _weight(self, shape: tuple[int, ...], channel_axis: int, per_channel: bool) -> tuple:
        value = self.rng.integers(-127, 128, shape).astype("int8")
        count = shape[channel_axis] if per_channel else 1
        # A uniform int8 is 73 on average: sums are about as large as what is summed.
        depth = value.size / shape[channel_axis]
        scales = (self.rng.uniform(0.5, 2, count) / (50 * depth**0.5)).astype("float32")
        return self.constant(value, scales, channel_axis if per_channel else 0), scales

    def _calibrated(self, real: np.ndarray, activation: str = "NONE") -> Params:
        low, high = ACTIVATIONS[activation]
        real = np.clip(real, low, high)
        low, high = min(float(real.min()), 0.0), max(float(real.max()), 0.0)
        scale = float(np.float32((high - low) / 255))
        params = scale, int(np.clip(round(-128 - low / scale), -128, 127))
        if self._first is not None:
            params = self._first._calibrations[len(self._calibrations)]
        self._calibrations.append(params)
        return params

    # ------------------------------------------------------------ operators

    def _operator(
        self, name: str, options: dict[str, Any], inputs: Sequence[Tensor], *outputs: Tensor,
        kind: str | None = None,
    ) -> Tensor:  # fmt: skip
        indices = [[tensor.index for tensor in tensors] for tensors in (inputs, outputs)]
        self._file.operator(name, kind, options, *indices)
        self.operators += [name] * len(outputs)
        return outputs[0]

    def conv2d(
        self, x: Tensor, channels: int, kernel: int | tuple[int, int], stride: int = 1,
        padding: str = "SAME", activation: str = "NONE", *, multiplier: int = 0, groups: int = 1,
        dilation: int = 1, per_channel: bool = True, bias: bool = True, bias_params: bool = True,
    ) -> Tensor:  # fmt: skip
        """Return CONV_2D, or with a `multiplier` of channels DEPTHWISE_CONV_2D."""
        kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
        ic = x.shape[3]
        if multiplier:
            channels, groups = ic * multiplier, ic
            weight, scales = self._weight((1, kh, kw, channels), 3, per_channel)
            ohwi = weight.value.transpose(3, 1, 2, 0)
        else:
            weight, scales = self._weight((channels, kh, kw, ic // groups), 0, per_channel)
            ohwi = weight.value
        bias_value = np.zeros(channels, "int32")
        operands = [x, weight]
        product = np.float32(x.params[0]) * scales
        if bias:
            bias_value = self.rng.integers(-4000, 4000, channels).astype("int32")
            operands.append(self.constant(bias_value, product if bias_params else None))
        sides = _padding(x.shape[1:3], (kh, kw), stride, padding, dilation)
        sums = reference.conv2d_sums(
            x.value, x.params[1], ohwi, bias_value, (stride, stride), sides,
            (dilation, dilation), groups,
        )  # fmt: skip
        options = dict(
            StrideH=stride, StrideW=stride, Padding=padding, DilationHFactor=dilation,
            DilationWFactor=dilation, FusedActivationFunction=activation,
        )  # fmt: skip
        if multiplier:
            options["DepthMultiplier"] = multiplier
        name, kind = ("DEPTHWISE_CONV_2D", "DepthwiseConv2D") if multiplier else ("CONV_2D", None)
        return self._layer(name, kind or "Conv2D", options, operands, sums, product, activation)

    def depthwise(self, x: Tensor, kernel: int, multiplier: int = 1, **kwargs: Any) -> Tensor:
        """Return DEPTHWISE_CONV_2D."""
        return self.conv2d(x, 0, kernel, multiplier=multiplier, **kwargs)

    def transposed(
        self, x: Tensor, channels: int, kernel: int, stride: int, size: tuple[int, int],
        padding: str = "SAME", activation: str = "NONE",
    ) -> Tensor:  # fmt: skip
        """Return TRANSPOSE_CONV."""
        weight, scales = self._weight((channels, kernel, kernel, x.shape[3]), 0, True)
        product = np.float32(x.params[0]) * scales
        bias = self.constant(self.rng.integers(-4000, 4000, channels).astype("int32"), product)
        sides = _padding(size, (kernel, kernel), stride, padding)
        sums = reference.transposed_sums(
            x.value, x.params[1], weight.value, bias.value, stride, sides, size
        )
        shape = self.constant(np.asarray((x.shape[0], *size, channels), "int32"))
        options = dict(
            Padding=padding, StrideH=stride, StrideW=stride, FusedActivationFunction=activation
        )
        return self._layer(
            "TRANSPOSE_CONV", "TransposeConv", options, [shape, weight, x, bias], sums, product,
            activation,
        )  # fmt: skip

    def dense(
        self, x: Tensor, units: int, activation: str = "NONE", *, keep: bool = False,
        per_channel: bool = True,
    ) -> Tensor:  # fmt: skip
        """Return FULLY_CONNECTED of the last axis, other axes made rows unless kept."""
        depth = x.shape[-1]
        weight, scales = self._weight((units, depth), 0, per_channel)
        product = np.float32(x.params[0]) * scales
        bias = self.constant(self.rng.integers(-4000, 4000, units).astype("int32"), product)
        rows = x.value.reshape(-1, 1, 1, depth)
        ohwi = weight.value[:, None, None]
        no_padding = (0, 0, 0, 0)
        sums = reference.conv2d_sums(rows, x.params[1], ohwi, bias.value, (1, 1), no_padding)
        sums = sums.reshape(*x.shape[:-1], units) if keep else sums.reshape(-1, units)
        options = dict(FusedActivationFunction=activation, KeepNumDims=keep)
        return self._layer(
            "FULLY_CONNECTED", "FullyConnected", options, [x, weight, bias], sums, product,
            activation,
        )  # fmt: skip

    def _layer(
        self, name: str, kind: str, options: dict[str, Any], operands: list[Tensor],
        sums: np.ndarray, scales: np.ndarray, activation: str,
    ) -> Tensor:  # fmt: skip
        out = self._calibrated(sums * scales.astype("float64"), activation)
        value = reference.requantized(sums, scales, out, activation)
        return self._operator(name, options, operands, self._made(value, out), kind=kind)

    def add(self, a: Tensor, b: Tensor, activation: str = "NONE", sign: int = 1) -> Tensor:
        """Return ADD, or with a `sign` of -1 SUB."""
        out = self._calibrated(a.real + sign * b.real, activation)
        value = reference.add(a.value, b.value, (a.params, b.params), out, activation, sign)
        name, kind = ("ADD", "Add") if sign == 1 else ("SUB", "Sub")
        options = dict(FusedActivationFunction=activation)
        return self._operator(name, options, [a, b], self._made(value, out), kind=kind)

    def multiply(self, a: Tensor, b: Tensor, activation: str = "NONE") -> Tensor:
        """Return MUL."""
        out = self._calibrated(a.real * b.real, activation)
        value = reference.multiply(a.value, b.value, (a.params, b.params), out, activation)
        options = dict(FusedActivationFunction=activation)
        return self._operator("MUL", options, [a, b], self._made(value, out), kind="Mul")

    def pool(
        self, x: Tensor, kind: str, kernel: int, stride: int, padding: str = "VALID",
        activation: str = "NONE",
    ) -> Tensor:  # fmt: skip
        """Return AVERAGE_POOL_2D or MAX_POOL_2D, by `kind` "average" or "max"."""
        sides = _padding(x.shape[1:3], (kernel, kernel), stride, padding)
        if kind == "average":
            value = reference.average_pool(x.value, kernel, stride, sides, x.params, activation)
        else:
            value = reference.max_pool(x.value, kernel, stride, sides)
            value = reference.stored(value.astype("int64") - x.params[1], x.params, activation)
        options = dict(
            StrideH=stride, StrideW=stride, FilterHeight=kernel, FilterWidth=kernel,
            Padding=padding, FusedActivationFunction=activation,
        )  # fmt: skip
        made = self._made(value, x.params)
        return self._operator(f"{kind.upper()}_POOL_2D", options, [x], made, kind="Pool2D")

    def mean(self, x: Tensor, axes: tuple[int, ...] = (1, 2), keep: bool = False) -> Tensor:
        """Return MEAN."""
        out = self._calibrated(x.real.mean(axes))
        value = reference.mean(x.value, axes, keep, x.params, out)
        operands = [x, self.constant(np.asarray(axes, "int32"))]
        made = self._made(value, out)
        return self._operator("MEAN", dict(KeepDims=keep), operands, made, kind="Reducer")

    def quantize(self, x: Tensor, params: Params) -> Tensor:
        """Return QUANTIZE of int8 to another scale and zero point."""
        made = self._made(reference.requantize(x.value, x.params, params), params)
        return self._operator("QUANTIZE", {}, [x], made)

    def concat(self, parts: Sequence[Tensor], axis: int = 3) -> Tensor:
        """Return CONCATENATION of tensors of equal scales and zero points."""
        assert len({part.params for part in parts}) == 1
        made = self._made(np.concatenate([p.value for p in parts], axis), parts[0].params)
        options = dict(Axis=axis, FusedActivationFunction="NONE")
        return self._operator("CONCATENATION", options, parts, made, kind="Concatenation")

    def pad(self, x: Tensor, *widths: tuple[int, int]) -> Tensor:
        """Return PAD, which writes the zero point."""
        value = np.pad(x.value, widths, constant_values=x.params[1])
        operands = [x, self.constant(np.asarray(widths, "int32"))]
        return self._operator("PAD", {}, operands, self._made(value, x.params), kind="Pad")

    def move(
        self, name: str, x: Tensor, value: np.ndarray, *operands: Any, kind: str,
        params: Params | None = None, others: Sequence[Tensor] = (), **options: Any,
    ) -> Tensor:  # fmt: skip
        """Return any operator that moves integers, and whose result is given.

        Its inputs are `x`, `others`, and constants of int32.
        """
        constants = [self.constant(np.asarray(operand, "int32")) for operand in operands]
        made = self._made(value, params or x.params)
        return self._operator(name, options, [x, *others, *constants], made, kind=kind)

    def split(self, x: Tensor, axis: int, count: int) -> list[Tensor]:
        """Return SPLIT."""
        parts = [self._made(v, x.params) for v in np.split(x.value, count, axis)]
        operands = [self.constant(np.asarray(axis, "int32")), x]
        self._operator("SPLIT", dict(NumSplits=count), operands, *parts, kind="Split")
        return parts

    def reshape(self, x: Tensor, *shape: int) -> Tensor:
        """Return RESHAPE."""
        return self.move("RESHAPE", x, x.value.reshape(shape), shape, kind="Reshape")

    def function(
        self, name: str, x: Tensor, real: Callable[[np.ndarray], np.ndarray],
        params: Params | None = None, kind: str | None = None, operands: Sequence = (),
        **options: Any,
    ) -> Tensor:  # fmt: skip
        """Return an operator computed in real numbers; `params` where TFLite fixes them."""
        out = params or self._calibrated(real(x.real.astype("float64")))
        made = self._made(reference.function(x.value, x.params, out, real), out)
        inputs = [x, *map(self.constant, operands)]
        return self._operator(name, options, inputs, made, kind=kind)

    def logistic(self, x: Tensor) -> Tensor:
        """Return LOGISTIC."""
        return self.function("LOGISTIC", x, reference.logistic, (1 / 256, -128))

    def hard_swish(self, x: Tensor) -> Tensor:
        """Return HARD_SWISH."""
        return self.function("HARD_SWISH", x, reference.hard_swish)

    def softmax(self, x: Tensor, beta: float = 1.0) -> Tensor:
        """Return SOFTMAX."""
        return self.function(
            "SOFTMAX", x, lambda real: reference.softmax(beta * real), (1 / 256, -128),
            kind="Softmax", Beta=beta,
        )  # fmt: skip

    # ------------------------------------------------------------ the file

    def model(self, *outputs: Tensor) -> bytes:
        """Return the flatbuffer of the network from its inputs to these outputs."""
        return self._file.bytes(
            [tensor.index for tensor in self.inputs], [tensor.index for tensor in outputs]
        )


def _padding(
    size: Sequence[int], kernel: tuple[int, int], stride: int, padding: str, dilation: int = 1
) -> Padding:
    if padding == "VALID":
        return 0, 0, 0, 0
    (top, bottom), (left, right) = (
        get_pad_value(length, dilation * (k - 1) + 1, stride)
        for length, k in zip(size, kernel, strict=True)
    )
    return top, left, bottom, right


_TYPES = {
    "int8": tflite.TensorType.INT8,
    "uint8": tflite.TensorType.UINT8,
    "int32": tflite.TensorType.INT32,
    "float32": tflite.TensorType.FLOAT32,
}
# Options whose values are names of an enumeration.
_ENUMERATIONS = {
    "Padding": tflite.Padding,
    "FusedActivationFunction": tflite.ActivationFunctionType,
}


class _File:
    """A flatbuffer of the TFLite schema; children are written before what holds them."""

    def __init__(self) -> None:
        self.builder = flatbuffers.Builder(1024)
        self.buffers = [self._table("Buffer")]  # the first one is empty, by convention
        self.tensors: list[int] = []
        self.operators: list[int] = []
        self.codes: dict[str, int] = {}

    def _table(self, name: str, **fields: Any) -> int:
        getattr(tflite, f"{name}Start")(self.builder)
        for field, value in fields.items():
            if value is not None:
                getattr(tflite, f"{name}Add{field}")(self.builder, value)
        return getattr(tflite, f"{name}End")(self.builder)

    def _vector(self, values: Any, dtype: str) -> int:
        return self.builder.CreateNumpyVector(np.atleast_1d(np.asarray(values, dtype)))

    def _offsets(self, offsets: Sequence[int]) -> int:
        self.builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self.builder.PrependUOffsetTRelative(offset)
        return self.builder.EndVector()

    def _data(self, array: np.ndarray) -> int:
        """Return a vector of bytes, aligned as TFLite wants a buffer's."""
        data = array.tobytes()
        self.builder.StartVector(1, len(data), 16)
        self.builder.head -= len(data)
        self.builder.Bytes[self.builder.head : self.builder.head + len(data)] = data
        return self.builder.EndVector()

    def tensor(
        self, value: np.ndarray, scale: Any, zero_point: int, axis: int = 0, *, name: str = "",
        data: bool = False,
    ) -> int:  # fmt: skip
        """Write a tensor, with its data if it is a constant; return its number."""
        quantization = None
        if scale is not None:
            scales = self._vector(scale, "float32")
            zeros = self._vector(np.full(np.size(scale), zero_point), "int64")
            quantization = self._table(
                "QuantizationParameters", Scale=scales, ZeroPoint=zeros, QuantizedDimension=axis
            )
        buffer = 0
        if data:
            buffer = len(self.buffers)
            self.buffers.append(self._table("Buffer", Data=self._data(value)))
        text = self.builder.CreateString(name or f"t{len(self.tensors)}")
        shape = self._vector(value.shape, "int32")
        self.tensors.append(
            self._table(
                "Tensor", Shape=shape, Type=_TYPES[str(value.dtype)], Buffer=buffer, Name=text,
                Quantization=quantization,
            )
        )  # fmt: skip
        return len(self.tensors) - 1

    def operator(
        self, name: str, kind: str | None, options: dict[str, Any], inputs: list[int],
        outputs: list[int],
    ) -> None:  # fmt: skip
        """Write an operator; `kind` names its table of options, None for one without."""
        values = {
            field: getattr(_ENUMERATIONS[field], value) if field in _ENUMERATIONS
            else self._ints(value) if isinstance(value, list) else value
            for field, value in options.items()
        }
        table = self._table(f"{kind}Options", **values) if kind else None
        code = self.codes.setdefault(name, len(self.codes))
        self.operators.append(
            self._table(
                "Operator", OpcodeIndex=code, Inputs=self._ints(inputs),
                Outputs=self._ints(outputs), BuiltinOptions=table,
                BuiltinOptionsType=getattr(tflite.BuiltinOptions, f"{kind}Options") if kind else 0,
            )
        )  # fmt: skip

    def _ints(self, values: list[int]) -> int:
        return self._vector(values, "int32")

    def bytes(self, inputs: list[int], outputs: list[int]) -> bytes:
        """Finish the file."""
        numbers = [getattr(tflite.BuiltinOperator, name) for name in self.codes]
        codes = [
            self._table(
                "OperatorCode", DeprecatedBuiltinCode=min(n, 127), BuiltinCode=n, Version=1
            )
            for n in numbers
        ]
        graph = dict(
            Tensors=self._offsets(self.tensors), Inputs=self._ints(inputs),
            Outputs=self._ints(outputs), Operators=self._offsets(self.operators),
        )  # fmt: skip
        subgraph = self._table("SubGraph", **graph)
        model = dict(
            OperatorCodes=self._offsets(codes), Subgraphs=self._offsets([subgraph]),
            Buffers=self._offsets(self.buffers),
        )  # fmt: skip
        self.builder.Finish(self._table("Model", Version=3, **model), file_identifier=b"TFL3")
        return bytes(self.builder.Output())
