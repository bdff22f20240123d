"""int8 TFLite models into Relax: TVM's own importer, and what it lacks for them.

TVM's importer makes a QDQ graph in NHWC, with every tensor rounded where TFLite rounds it: FuseQDQ
makes integers of it and ConvertLayout NCHW[c]c. `QuantizedOperators` adds what that needs and
mends what would be wrong; each of its methods says why it is there.

What is TFLite's meaning and what is ours
-----------------------------------------
Activations are int8 with a zero point, weights int8 with a scale a channel and no zero point,
biases int32 in units of their product. Sums are exact in both. TFLite's own kernels requantize by a
31-bit multiplier in two roundings; ours, and XNNPACK's, by a float32 multiplier in one, half to
even. On equal inputs an operator's output differs by at most one step from TFLite's: for layers
and products in a few of a thousand elements, for averages (halves) and QUANTIZE (few steps, rounded
twice) in up to a fifth of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.frontend.tflite import tflite_frontend as upstream

# Operators that move integers as they are, which TVM refuses though its converters are right for
# them: which input is moved. Outputs have its scale and zero point.
_MOVES = {
    "DEPTH_TO_SPACE": 0,
    "EXPAND_DIMS": 0,
    "MIRROR_PAD": 0,
    "PACK": 0,
    "PAD": 0,
    "PADV2": 0,
    "RESIZE_NEAREST_NEIGHBOR": 0,
    "SLICE": 0,
    "SPACE_TO_DEPTH": 0,
    "SPLIT": 1,
    "SPLIT_V": 0,
    "SQUEEZE": 0,
    "STRIDED_SLICE": 0,
    "TILE": 0,
    "TRANSPOSE": 0,
    "UNPACK": 0,
}
# Operators with (data, weight, bias).
_LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_IDENTIFIER = b"TFL3"


def from_tflite(
    model: bytes | bytearray | memoryview | str | os.PathLike,
    shape_dict: Mapping[str, tuple[int, ...]] | None = None,
    *,
    exact_adds: bool = True,
) -> tvm.IRModule:
    """Return a TFLite model as a Relax IRModule with its parameters bound as constants.

    Parameters
    ----------
    model : bytes-like or path
        The flatbuffer, or the file it is in. int8 models become QDQ graphs; float32 ones too can be
        imported, and then be given to `topi_int8.quantize`.
    shape_dict : mapping of str to tuple of int, optional
        Shapes of inputs by name, where they shall not be the model's own: another batch.
    exact_adds : bool
        Whether a layer's result is rounded to int8 before an ADD, as TFLite does. False: where
        nothing else reads it, it is added unrounded, in the layer's own epilogue. That spares a
        pass over memory a residual block, loses less, and is no longer within a step of TFLite.

    Returns
    -------
    tvm.IRModule
        One function ``main`` from the model's inputs to its output (a tuple where there are
        several), in its order, types and NHWC layout.

    Raises
    ------
    ImportError
        The package tflite is not installed (``pip install topi_int8[tflite]``).
    TypeError
        ``model`` is neither bytes nor a path.
    ValueError
        ``model`` is no TFLite flatbuffer, or ``shape_dict`` names what is no input.
    tvm.error.OpNotImplemented
        The model has operators that cannot be imported; the message names them.
    """
    try:
        import tflite
    except ImportError as error:
        raise ImportError(
            "TFLite models need the package tflite: pip install 'topi_int8[tflite]'"
        ) from error
    parsed = tflite.Model.GetRootAsModel(_buffer(model), 0)
    shapes = {name: tuple(map(int, shape)) for name, shape in (shape_dict or {}).items()}
    inputs = upstream._input_type(parsed)[0]
    if not set(shapes) <= set(inputs):
        unknown = ", ".join(sorted(set(shapes) - set(inputs)))
        raise ValueError(f"shape_dict names {unknown}; allowed: {', '.join(inputs)}")
    converter = partial(QuantizedOperators, exact_adds=exact_adds)
    mod = upstream.from_tflite(parsed, shapes, op_converter=converter)
    # Its attributes hold every constant a second time.
    main = mod["main"].without_attr("params").without_attr("num_input")
    mod.update_func(mod.get_global_var("main"), main)
    return mod


def _buffer(model: Any) -> bytes:
    if isinstance(model, str | os.PathLike):
        model = Path(model).read_bytes()
    if not isinstance(model, bytes | bytearray | memoryview):
        raise TypeError(f"model is {type(model).__name__}; allowed: bytes or a path")
    model = bytes(model)
    if model[4:8] != _IDENTIFIER:
        raise ValueError(f"model starts with {model[:8]!r}; allowed: a TFLite flatbuffer (TFL3)")
    return model


class QuantizedOperators(upstream.OperatorConverter):
    """TVM's converter of a subgraph's operators, for models of int8 too."""

    _SUPPORTED_QUANTIZED_OPS = upstream.OperatorConverter._SUPPORTED_QUANTIZED_OPS | _MOVES.keys()

    def __init__(self, *args: Any, exact_adds: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exact_adds = exact_adds
        operators = [self.subgraph.Operators(i) for i in range(self.subgraph.OperatorsLength())]
        self.readers = Counter(
            int(i) for op in operators for i in self._indices_or_empty(op.InputsAsNumpy())
        )
        self.readers.update(int(i) for i in self._indices_or_empty(self.subgraph.OutputsAsNumpy()))
        self.convert_map["ADD"] = self.convert_add
        for name, moved in _MOVES.items():
            convert = self.convert_map[name]
            self.convert_map[name] = partial(self._convert_move, name, moved, convert)

    # ------------------------------------------------------------ what converters ask

    def get_input_tensors(self, op: Any) -> list[Any]:
        """Absent optional inputs are left out; a layer's parameters are made complete.

        TVM reads a convolution's absent bias as if it were there, multiplies the scales of a bias
        without its own at run time, and refuses one scale along the axis of one channel.
        """
        tensors = super().get_input_tensors(op)
        while tensors and tensors[-1].tensor_idx < 0:
            tensors.pop()
        if self.get_op_code_str(op) not in _LAYERS or tensors[0].qnn_params is None:
            return tensors
        weight = tensors[1].qnn_params
        if weight is not None and _values(weight).size == 1:
            weight["axis"] = 0
        if len(tensors) > 2 and tensors[2].qnn_params is None and weight is not None:
            scale = _values(tensors[0].qnn_params) * _values(weight)
            tensors[2].qnn_params = dict(
                scale=relax.const(scale, "float32"), zero_point=relax.const(0, "int32"), axis=0
            )
        return tensors

    def get_tensor_shape(self, tensor_wrapper: Any) -> Any:
        """A tensor made so far has its own shape: `shape_dict` may have changed the model's."""
        index = tensor_wrapper.tensor_idx
        if self.has_expr(index):
            return np.array([int(dim) for dim in self._infer_shape(self.get_expr(index))])
        return super().get_tensor_shape(tensor_wrapper)

    def has_same_qnn_params(self, lhs_tensor: Any, rhs_tensor: Any) -> bool:
        """TVM takes scales as equal that differ by 1e-5, however small they are."""
        left, right = lhs_tensor.qnn_params, rhs_tensor.qnn_params
        scales = np.allclose(_values(left), _values(right), rtol=1e-6, atol=0)
        return scales and np.array_equal(*(_values(q, "zero_point") for q in (left, right)))

    def _options(self, op: Any, name: str) -> Any:
        import tflite

        options = getattr(tflite, name)()
        options.Init(op.BuiltinOptions().Bytes, op.BuiltinOptions().Pos)
        return options

    def _real(self, tensor: Any) -> relax.Expr:
        """Return a tensor as float32."""
        expr = self.get_tensor_expr(tensor)
        return self.dequantize(expr, tensor) if tensor.qnn_params else expr

    def _stored(self, real: relax.Expr, tensor: Any, activation: int = 0) -> relax.Expr:
        """Return a float32 tensor clipped by a fused activation, as `tensor` is stored."""
        real = self.convert_fused_activation_function(real, activation)
        return self.quantize(real, tensor) if tensor.qnn_params else real

    # ------------------------------------------------------------ operators

    def _convert_move(self, name: str, moved: int, convert: Any, op: Any) -> relax.Expr:
        source = self.get_input_tensors(op)[moved]
        for tensor in self.get_output_tensors(op) if source.qnn_params else ():
            if not self.has_same_qnn_params(source, tensor):
                raise tvm.error.OpNotImplemented(
                    f"{name} changes the scale or zero point of {tensor.tensor.Name()!r}; "
                    "allowed: those of its input"
                )
        return convert(op)

    def convert_add(self, op: Any) -> relax.Expr:
        """With `exact_adds` as TVM does; else the later of two layers is added unrounded."""
        tensors, (result,) = self.get_input_tensors(op), self.get_output_tensors(op)
        later = max(tensors, key=lambda tensor: tensor.tensor_idx)
        unrounded = None if self.exact_adds else self._unrounded(later)
        if unrounded is None:
            return self._convert_elemwise(op, relax.op.add)
        sides = [unrounded if tensor is later else self._real(tensor) for tensor in tensors]
        activation = self._options(op, "AddOptions").FusedActivationFunction()
        return self._stored(relax.op.add(*sides), result, activation)

    def _unrounded(self, tensor: Any) -> relax.Expr | None:
        """Return what was quantized to make a tensor that one operator reads; None for others."""
        index = tensor.tensor_idx
        made = self.get_expr(index) if self.has_expr(index) else None
        quantized = isinstance(made, relax.Call) and made.op == tvm.ir.Op.get("relax.quantize")
        return made.args[0] if quantized and self.readers[index] == 1 else None

    def convert_fully_connected(self, op: Any) -> relax.Expr:
        """TVM keeps dimensions of the data that TFLite makes rows of."""
        data, weight, *bias = self.get_input_tensors(op)
        (result,) = self.get_output_tensors(op)
        options = self._options(op, "FullyConnectedOptions")
        x, depth = self.get_tensor_expr(data), int(self.get_tensor_shape(weight)[1])
        if not options.KeepNumDims() and len(self.get_tensor_shape(data)) != 2:
            x = relax.op.reshape(x, (-1, depth))
        x = self.dequantize(x, data) if data.qnn_params else x
        y = relax.op.matmul(x, relax.op.permute_dims(self._real(weight), (1, 0)))
        if bias:
            y = relax.op.add(y, self._real(bias[0]))
        return self._stored(y, result, options.FusedActivationFunction())

    def convert_expand_dims(self, op: Any) -> relax.Expr:
        """TVM's passes an argument too many."""
        data, axis = self.get_input_tensors(op)
        return relax.op.expand_dims(self.get_tensor_expr(data), int(self.get_tensor_value(axis)))

    def convert_pool2d(self, op: Any, pool_type: str) -> relax.Expr:
        """TVM's average of integers rounds towards zero; TFLite's to the nearest, as ours."""
        (data,), (result,) = self.get_input_tensors(op), self.get_output_tensors(op)
        if pool_type != "average" or not data.qnn_params:
            return super().convert_pool2d(op, pool_type)
        options = self._options(op, "Pool2DOptions")
        kernel = options.FilterHeight(), options.FilterWidth()
        strides = options.StrideH(), options.StrideW()
        padding = (0, 0, 0, 0)
        if options.Padding() == _same_padding():
            size = [int(dim) for dim in self.get_tensor_shape(data)[1:3]]
            (top, bottom), (left, right) = map(upstream.get_pad_value, size, kernel, strides)
            padding = (top, left, bottom, right)
        # TFLite divides by the elements of a window that are inside the image.
        pooled = relax.op.nn.avg_pool2d(
            self._real(data), kernel, strides, padding, count_include_pad=False, layout="NHWC"
        )
        return self._stored(pooled, result, options.FusedActivationFunction())

    def convert_transpose_conv(self, op: Any) -> relax.Expr:
        """TVM writes it in NHWC, in which it cannot compile it. It stays float (`explain`)."""
        shape, weight, data, *bias = self.get_input_tensors(op)
        (result,) = self.get_output_tensors(op)
        options = self._options(op, "TransposeConvOptions")
        strides = options.StrideH(), options.StrideW()
        size = [int(dim) for dim in self.get_tensor_value(shape)[1:3]]
        kernel = [int(dim) for dim in self.get_tensor_shape(weight)[1:3]]
        sides = [(0, 0), (0, 0)]
        if options.Padding() == _same_padding():
            sides = list(map(upstream.get_pad_value, size, kernel, strides))
        before = [int(dim) for dim in self.get_tensor_shape(data)[1:3]]
        rest = [
            whole - ((length - 1) * stride + k - sum(pads))
            for whole, length, stride, k, pads in zip(
                size, before, strides, kernel, sides, strict=True
            )
        ]
        (top, bottom), (left, right) = sides
        y = relax.op.nn.conv2d_transpose(
            relax.op.permute_dims(self._real(data), (0, 3, 1, 2)),
            relax.op.permute_dims(self._real(weight), (3, 0, 1, 2)),
            strides, (top, left, bottom, right), rest,
        )  # fmt: skip
        y = relax.op.permute_dims(y, (0, 2, 3, 1))
        y = relax.op.add(y, self._real(bias[0])) if bias else y
        return self._stored(y, result, options.FusedActivationFunction())

    def convert_softmax(self, op: Any) -> relax.Expr:
        """TVM does not read beta."""
        (data,), (result,) = self.get_input_tensors(op), self.get_output_tensors(op)
        x, beta = self._real(data), float(self._options(op, "SoftmaxOptions").Beta())
        if beta != 1:
            x = relax.op.multiply(x, relax.const(beta, "float32"))
        return self._stored(relax.op.nn.softmax(x, axis=-1), result)


def _values(params: Mapping[str, Any], of: str = "scale") -> np.ndarray:
    return params[of].value.numpy()


def _same_padding() -> int:
    from tflite.Padding import Padding

    return Padding.SAME
