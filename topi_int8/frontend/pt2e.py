"""PT2E programs: torch's `quantized_decomposed` operators as relax.quantize and relax.dequantize.

torchao's quantizers (X86InductorQuantizer, XNNPACKQuantizer, ..) leave, after torch.export, float
operators between these. The arithmetic is torch's (torch/ao/quantization/fx/_decomposed.py):

    quantize    clamp(rint(x * (1 / scale)) + zero_point, quant_min, quant_max)
    dequantize  (q - zero_point) * scale

``relax.quantize`` divides by the scale instead, and so may differ by one step where x / scale is
within a float32 rounding of half an integer. It saturates to the range of the type; a narrower
range (0..127 of uint8) is said by a clip of the real numbers before it: both ends of the range are
integers, so rounding cannot move anything past them, and FuseQDQ takes such a clip into the
convolution.

What is quantized of parameters (weights that were not folded) is computed by torch, at import.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax

from ..workload import DTYPE_RANGE, INT8_DTYPES

if TYPE_CHECKING:
    import torch

_FLOAT32 = np.finfo("float32")
# torch spells these for observers; here they only tell how a scale is made of a range.
_SYMMETRIC_ZERO_POINT = {"uint8": 128, "int8": 0}


def register_operators() -> None:
    """Make torch know the `quantized_decomposed` operators, before a program that has them is read.

    A torch that has them no longer reads no such program, and needs nothing.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.ao.quantization.fx._decomposed")


def convert_map(program: torch.export.ExportedProgram) -> dict[str, Callable[..., Any]]:
    """Return how TVM's importer converts the operators of a PT2E program.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        Whose parameters may be quantized in the graph.

    Returns
    -------
    dict of str to function
        What ``from_exported_program`` takes as ``custom_convert_map``.
    """
    converter = _Converter(_parameters(program))
    return {
        "quantize_per_tensor.default": converter.quantize,
        "quantize_per_tensor.tensor": converter.quantize,
        "quantize_per_tensor.tensor2": converter.quantize,
        "quantize_per_channel.default": converter.quantize,
        "dequantize_per_tensor.default": converter.dequantize,
        "dequantize_per_tensor.tensor": converter.dequantize,
        "dequantize_per_tensor.tensor2": converter.dequantize,
        "dequantize_per_channel.default": converter.dequantize,
        "choose_qparams.tensor": converter.choose_affine,
        "choose_qparams_symmetric.tensor": converter.choose_symmetric,
        "convert_element_type.no_fuse": converter.convert_element_type,
    }


def _parameters(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Return the tensors of a program that are no inputs of it, by the name of their node."""
    import torch

    held = {**program.constants, **program.state_dict}
    return {
        spec.arg.name: held[spec.target]
        for spec in program.graph_signature.input_specs
        if isinstance(held.get(spec.target), torch.Tensor)
    }


@dataclass(frozen=True)
class _QuantizedAs:
    """The type and range that a tensor is quantized to.

    Raises
    ------
    ValueError
        For a type of other than 8 bits, or a range that is none of the type.
    """

    dtype: str
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.dtype not in INT8_DTYPES:
            raise ValueError(
                f"a tensor is quantized to {self.dtype}; allowed: {', '.join(INT8_DTYPES)}"
            )
        low, high = DTYPE_RANGE[self.dtype]
        if not low <= self.low < self.high <= high:
            raise ValueError(
                f"(quant_min, quant_max) is ({self.low}, {self.high}); allowed for {self.dtype}: "
                f"from {low} to {high}"
            )

    @property
    def whole(self) -> bool:
        """Whether the range is the type's, so that saturation is all the clamping there is."""
        return (self.low, self.high) == DTYPE_RANGE[self.dtype]


class _Converter:
    """Converts one program. Each method takes an fx node and TVM's importer, whose ``env`` has the
    Relax expression of each node before it.
    """

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        self._parameters = parameters
        # A tensor is often quantized once for each of its readers: one of them is enough.
        self._made: dict[tuple, relax.Expr] = {}
        # What choose_qparams gave as float64 and int64, as the scalars that quantize takes.
        self._chosen: dict[relax.Expr, relax.Expr] = {}

    # ------------------------------------------------------------ quantize, dequantize

    def quantize(self, node: torch.fx.Node, importer: Any) -> relax.Expr:
        """Convert quantize_per_tensor and quantize_per_channel."""
        args = _arguments(node)
        evaluated = self._evaluated(node, args)
        if evaluated is not None:
            return importer.block_builder.emit(relax.const(evaluated))
        low, high = (int(_number(self._known(args[k]))) for k in ("quant_min", "quant_max"))
        to = _QuantizedAs(_dtype(importer, args["dtype"]), low, high)
        data = _in_float32(importer, importer.env[args["input"]])
        axis, scale, zero_point = self._params(importer, args, data, to.dtype)
        key = (data, *(_key(x) for x in (scale, zero_point)), axis, to)
        if key not in self._made:
            clipped = data if to.whole else _clipped(importer, data, scale, zero_point, axis, to)
            self._made[key] = importer.block_builder.emit(
                relax.op.quantize(clipped, scale, zero_point, axis, to.dtype)
            )
        return self._made[key]

    def dequantize(self, node: torch.fx.Node, importer: Any) -> relax.Expr:
        """Convert dequantize_per_tensor and dequantize_per_channel.

        Their range is not used, as in torch. An ``out_dtype`` other than float32 is a cast of the
        float32 result.
        """
        args = _arguments(node)
        data = importer.env[args["input"]]
        axis, scale, zero_point = self._params(importer, args, data, str(data.ty.dtype))
        emit = importer.block_builder.emit
        real = emit(relax.op.dequantize(data, scale, zero_point, axis))
        wanted = "float32" if args["out_dtype"] is None else _dtype(importer, args["out_dtype"])
        return real if wanted == "float32" else emit(relax.op.astype(real, wanted))

    def _params(
        self, importer: Any, args: dict[str, Any], data: relax.Expr, dtype: str
    ) -> tuple[int, relax.Expr, relax.Expr]:
        """Return (axis, scale, zero point); those that are known when importing are constants."""
        per_channel = "axis" in args
        axis = int(args["axis"]) % int(data.ty.ndim) if per_channel else -1
        scale = args["scales" if per_channel else "scale"]
        zero_point = args["zero_points" if per_channel else "zero_point"]
        if zero_point is None:
            zero_point = 0
        known = self._known(scale), self._known(zero_point)
        if all(value is not None for value in known):
            scales = np.asarray(known[0], "float32")
            zero_points = _zero_points(np.broadcast_to(np.asarray(known[1]), scales.shape), dtype)
            if not per_channel:
                scales, zero_points = scales.reshape(()), zero_points.reshape(())
            return axis, relax.const(scales), relax.const(zero_points)
        emit = importer.block_builder.emit

        def computed(value: Any, to: str) -> relax.Expr:
            expr = importer.env.get(value)
            if expr is None:
                return emit(relax.const(value, to))
            chosen = self._chosen.get(expr)
            if chosen is not None and str(chosen.ty.dtype) == to:
                return chosen
            shape = (-1,) if per_channel else ()
            return emit(relax.op.reshape(emit(relax.op.astype(expr, to)), shape))

        return axis, computed(scale, "float32"), computed(zero_point, dtype)

    def _evaluated(self, node: torch.fx.Node, args: dict[str, Any]) -> np.ndarray | None:
        """Return what torch makes of an operator whose tensors are all parameters, else None."""
        import torch

        known = {name: self._known(value) for name, value in args.items()}
        if not isinstance(known["input"], torch.Tensor):
            return None
        if any(known[name] is None and value is not None for name, value in args.items()):
            return None
        with torch.no_grad():
            return node.target(**known).contiguous().numpy()

    def _known(self, value: Any) -> Any:
        """Return an argument that is a number, a type or a parameter; None for a computed one."""
        import torch

        if not isinstance(value, torch.fx.Node):
            return value
        return self._parameters.get(value.name) if value.op == "placeholder" else None

    # ------------------------------------------------------------ dynamic quantization

    def choose_affine(self, node: torch.fx.Node, importer: Any) -> tuple[relax.Expr, relax.Expr]:
        """Convert choose_qparams: the scale and zero point of what a tensor holds at run time."""
        return self._choose(node, importer, symmetric=False)

    def choose_symmetric(self, node: torch.fx.Node, importer: Any) -> tuple[relax.Expr, relax.Expr]:
        """Convert choose_qparams_symmetric."""
        return self._choose(node, importer, symmetric=True)

    def _choose(
        self, node: torch.fx.Node, importer: Any, symmetric: bool
    ) -> tuple[relax.Expr, relax.Expr]:
        """Return (scale float64 (1,), zero point int64 (1,)); the arithmetic is float32, torch's.

        Source: torch.ao.quantization.utils.determine_qparams.
        """
        args = _arguments(node)
        low, high = int(args["quant_min"]), int(args["quant_max"])
        to = _QuantizedAs(_dtype(importer, args["dtype"]), low, high)
        emit = importer.block_builder.emit
        zero, eps = relax.const(0.0, "float32"), relax.const(args["eps"], "float32")
        data = _in_float32(importer, importer.env[args["input"]])
        least = emit(relax.op.minimum(emit(relax.op.min(data)), zero))
        most = emit(relax.op.maximum(emit(relax.op.max(data)), zero))
        if symmetric:
            most = emit(relax.op.maximum(emit(relax.op.negative(least)), most))
            half = relax.const((high - low) / 2, "float32")
            scale = emit(relax.op.divide(most, half))
        else:
            width = emit(relax.op.subtract(most, least))
            scale = emit(relax.op.divide(width, relax.const(float(high - low), "float32")))
        scale = emit(relax.op.maximum(scale, eps))
        if symmetric:
            zero_point = emit(relax.const(_SYMMETRIC_ZERO_POINT[to.dtype], to.dtype))
        else:
            # low - rint(least / scale), which is never outside the range.
            zero_point = emit(relax.op.quantize(
                emit(relax.op.negative(least)), scale, relax.const(low, to.dtype), -1, to.dtype
            ))  # fmt: skip
        wide = []
        for chosen, dtype in ((scale, "float64"), (zero_point, "int64")):
            wide.append(emit(relax.op.reshape(emit(relax.op.astype(chosen, dtype)), (1,))))
            self._chosen[wide[-1]] = chosen
        return tuple(wide)

    def convert_element_type(self, node: torch.fx.Node, importer: Any) -> relax.Expr:
        """Convert convert_element_type: a cast that no quantizer's pattern may pass."""
        args = _arguments(node)
        data = importer.env[args["input"]]
        return importer.block_builder.emit(
            relax.op.astype(data, _dtype(importer, args["dtype"]))
        )


def _arguments(node: torch.fx.Node) -> dict[str, Any]:
    """Return a node's arguments by the names of its schema, absent ones at their defaults."""
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def _dtype(importer: Any, dtype: torch.dtype) -> str:
    return importer._convert_data_type(dtype)


def _number(value: Any) -> float:
    if value is None:
        raise ValueError("quant_min or quant_max is computed; allowed: a number or a parameter")
    return float(value)


def _zero_points(values: np.ndarray, dtype: str) -> np.ndarray:
    cast = values.astype(dtype)
    if not np.array_equal(cast, values):
        raise ValueError(f"a zero point is {values.reshape(-1)[:4]}..; allowed: a value of {dtype}")
    return cast


def _in_float32(importer: Any, data: relax.Expr) -> relax.Expr:
    if str(data.ty.dtype) == "float32":
        return data
    return importer.block_builder.emit(relax.op.astype(data, "float32"))


def _key(expr: relax.Expr) -> Any:
    """Return what makes two parameters equal: a constant's bytes, or the variable itself."""
    return expr if isinstance(expr, relax.Var) else expr.value.numpy().tobytes()


def _clipped(
    importer: Any,
    data: relax.Expr,
    scale: relax.Expr,
    zero_point: relax.Expr,
    axis: int,
    to: _QuantizedAs,
) -> relax.Expr:
    """Return data clipped to the real values of the ends of a range."""
    emit = importer.block_builder.emit
    if not isinstance(scale, relax.Var):
        scales = scale.value.numpy().astype("float64")
        offsets = zero_point.value.numpy().astype("int64")
        ends = [
            np.clip((end - offsets) * scales, _FLOAT32.min, _FLOAT32.max).astype("float32")
            for end in (to.low, to.high)
        ]
        if ends[0].ndim == 0:
            return emit(relax.op.clip(data, *(float(end) for end in ends)))
        along = [-1 if i == axis else 1 for i in range(int(data.ty.ndim))]
        low, high = (relax.const(end.reshape(along)) for end in ends)
    else:
        offset = emit(relax.op.astype(zero_point, "int32"))
        steps = [
            emit(relax.op.astype(relax.op.subtract(relax.const(end, "int32"), offset), "float32"))
            for end in (to.low, to.high)
        ]
        low, high = (emit(relax.op.multiply(step, scale)) for step in steps)
    return emit(relax.op.minimum(emit(relax.op.maximum(data, low)), high))
