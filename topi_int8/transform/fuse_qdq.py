"""FuseQDQ: quantize/dequantize graphs and raw integer Relax -> topi_int8 operators.

Two mechanisms, both driven by the walk of `_qdq_graph`:

* forward: a dequantize makes a `View` (this float tensor is that integer one); operators that only
  move values, and clips, carry views along; convolutions and matmuls of views start a `Chain`, and
  the adds and clips after them extend it;
* backward: a quantize asks for its input *as integers*. A view is requantized (or is the answer
  itself), a chain is stored quantized, and through moves, clips, pools and adds the question is
  passed on to their inputs.

What matches neither stays as it was, in float.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from .. import op
from ..layout import Layout
from ..op import op_name, static_shape
from ..workload import DTYPE_RANGE, INT8_DTYPES
from ._qdq_chain import Chain, ChainBook, Residual, conv2d_attrs
from ._qdq_emit import (
    accumulator_scale,
    average_window,
    constant,
    dequantized,
    is_static,
    quantized,
    requantized,
    stored,
)
from ._qdq_graph import Graph, rewrite_functions
from ._qdq_values import (
    LOST,
    NO_BOUNDS,
    Bounds,
    KernelLayout,
    QParams,
    View,
    clip_of,
    fold_move,
    folds,
    moved_axis,
    narrow,
    permutation,
    scalar,
    view_of,
)

# Operators that move values without changing them (a maximum picks one).
_MOVES = (
    "relax.reshape",
    "relax.flatten",
    "relax.nn.batch_flatten",
    "relax.squeeze",
    "relax.expand_dims",
    "relax.permute_dims",
    "relax.strided_slice",
    "relax.split",
    "relax.concat",
    "relax.nn.pad",
    "relax.nn.max_pool2d",
)
_CLIPS = ("relax.nn.relu", "relax.nn.relu6", "relax.clip", "relax.maximum", "relax.minimum")


@tvm.transform.module_pass(opt_level=0, name="topi_int8.FuseQDQ")
class FuseQDQ:
    """Rewrite QDQ patterns and raw integer convolutions and matmuls to topi_int8 operators.

    Run it before LegalizeOps and FoldConstant, which would fold ``dequantize(int8 weight)`` to
    float32. The input module is not changed. Tensors of symbolic shape are left as they are.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the rewritten module."""
        return rewrite_functions(mod, QDQRules)


class QDQRules:
    """The rewrite of one binding; see the module's docstring for the two directions."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.book = ChainBook(graph)
        self._views: dict[relax.Var, View] = {}
        # int32 tensors that are 8-bit ones less a zero point: scale 1.
        self._widened: dict[relax.Var, View] = {}
        self._forward: dict[str, Callable[[relax.Var, relax.Call], relax.Expr | None]] = {
            "relax.dequantize": self._dequantize,
            "relax.quantize": self._quantize,
            "relax.nn.conv2d": self._conv2d,
            "relax.matmul": self._matmul,
            "relax.add": self._add,
            "relax.astype": self._widen,
            "relax.subtract": self._shift,
            **dict.fromkeys(_CLIPS, self._clip),
            **dict.fromkeys(_MOVES, self._move),
        }
        self._backward: dict[str, Callable[[relax.Call, QParams, Bounds], relax.Expr | None]] = {
            "relax.add": self._quantized_add,
            "relax.subtract": self._quantized_add,
            "relax.nn.avg_pool2d": self._quantized_average,
            "relax.nn.adaptive_avg_pool2d": self._quantized_average,
            "relax.mean": self._quantized_average,
            **dict.fromkeys(_CLIPS, self._quantized_clip),
            **dict.fromkeys(_MOVES, self._quantized_move),
        }

    def rewrite(self, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        """Return what replaces the value of a binding; None to keep it. Notes facts on the way."""
        if isinstance(value, GenericConst):
            self.graph.set_array(var, value.value.numpy)
        elif isinstance(value, relax.Var):
            self._alias(var, value)
        elif isinstance(value, relax.TupleGetItem):
            view = self._views.get(value.tuple_value)
            if view is not None:
                item = self.graph.emit(relax.TupleGetItem(view.expr, value.index))
                self._views[var] = replace(view, expr=item)
        elif op_name(value) in self._forward and is_static(value):
            return self._forward[op_name(value)](var, value)
        return None

    def _alias(self, var: relax.Var, source: relax.Var) -> None:
        if self.graph.is_constant(source):
            self.graph.set_array(var, lambda: self.graph.array(source))
        for views in (self._views, self._widened):
            if source in views:
                views[var] = views[source]

    # ------------------------------------------------------------ views

    def _dequantize(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        if str(call.attrs.out_dtype) != "float32":
            return None
        source = call.args[0]
        scale, zero_point = (self.graph.array(arg) for arg in call.args[1:])
        rank = len(call.ty.shape)
        chain = self.book.open(source)
        if chain is not None and scale is not None and zero_point is not None:
            per_channel_fits = scale.size == 1 or chain.channel_axes == (call.attrs.axis % rank,)
            real = chain.dequantized(scale) if per_channel_fits and not zero_point.any() else None
            return self.book.record(var, real) if real is not None else None
        dtype = str(source.ty.dtype)
        view = view_of(
            self._constant_or_new(source), dtype, rank, scale, zero_point, int(call.attrs.axis)
        )
        if view is not None:
            self._views[var] = view
            if view.array is not None:
                self.graph.set_array(var, lambda: dequantized(view))
        return None

    def _widen(self, var: relax.Var, call: relax.Call) -> None:
        source = call.args[0]
        if self.graph.is_constant(source) and folds(call):
            self.graph.set_array(var, self._folded_move(call))
        view = self._raw_view(source) if str(source.ty.dtype) in INT8_DTYPES else None
        if view is not None and str(call.attrs.dtype) == "int32":
            self._widened[var] = view

    def _shift(self, var: relax.Var, call: relax.Call) -> None:
        source, other = call.args
        view = self._widened.get(source) if isinstance(source, relax.Var) else None
        zero_point = scalar(self.graph.array(other)) if view is not None else None
        if view is None or zero_point is None or static_shape(call) != static_shape(source):
            return
        low, high = DTYPE_RANGE[view.dtype]
        if low <= view.zero_point + zero_point <= high:
            self._widened[var] = replace(view, zero_point=view.zero_point + int(zero_point))

    def _constant_or_new(self, expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var) and self.graph.is_constant(expr):
            return constant(self.graph.array(expr))
        return self.graph.new(expr)

    def _view(self, expr: relax.Expr) -> View | None:
        return self._views.get(expr) if isinstance(expr, relax.Var) else None

    def _integers(self, expr: relax.Expr) -> tuple[relax.Expr, QParams] | None:
        """Return a float tensor of the old graph as integers of the new, any pending clip done."""
        view = self._view(expr)
        params = view.per_tensor if view is not None else None
        if view is None or params is None:
            return None
        clip = view.exact_clip()
        if clip is None:
            return None
        if clip == (None, None):
            return view.expr, params
        clipped = op.requantize(
            view.expr,
            zero_point=params.zero_point,
            scale=1.0,
            out_dtype=params.dtype,
            out_zero_point=params.zero_point,
            clip_min=clip[0],
            clip_max=clip[1],
        )
        return self.graph.emit(clipped), params

    def _clip(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        grown = self.book.extend_by_clip(var, call)
        clip = clip_of(call, self.graph.array)
        view = self._view(clip[0]) if grown is None and clip is not None else None
        if view is not None and clip is not None:
            self._views[var] = view.clipped(clip[1])
        if grown is None and clip is not None and str(call.ty.dtype) in INT8_DTYPES:
            return self._clipped_integers(*clip)
        return grown

    def _clipped_integers(self, source: relax.Expr, bounds: Bounds) -> relax.Call | None:
        """Return the operator of ours that makes an 8-bit tensor, clipping it to bounds too."""
        made = self.graph.made(source) if self.graph.single_use(source) else None
        if op.is_op(made, "lookup"):
            table = made.args[1].value.numpy()
            return op.lookup(made.args[0], constant(np.clip(table, *bounds).astype(table.dtype)))
        # What is stored with a zero point has an epilogue, and that a clip.
        attrs = op.attrs_of(made) if op_name(made).startswith(op.NAMESPACE) else {}
        if "out_zero_point" not in attrs:
            return None
        type_low, type_high = DTYPE_RANGE[attrs["out_dtype"]]
        own = attrs.get("clip_min", type_low), attrs.get("clip_max", type_high)
        low, high = narrow(own, bounds)
        return op.rebuild(made, list(made.args), clip_min=float(low), clip_max=float(high))

    def _move(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        source = call.args[0]
        if self.graph.is_constant(source) and folds(call):
            self.graph.set_array(var, self._folded_move(call))
        if op_name(call) == "relax.concat":
            self._move_concat(var, call)
            return None
        view = self._view(source)
        axis = moved_axis(call, view.axis) if view is not None else None
        if view is None or axis == LOST:
            return None
        if view.array is not None and folds(call):
            expr: relax.Expr = constant(fold_move(call, view.array, op.shape_of(call)))
        else:
            # A pad value need not lie inside a pending clip's bounds: clip first.
            if op_name(call) == "relax.nn.pad" and view.bounds != NO_BOUNDS:
                done = self._integers(source)
                if done is None:
                    return None
                view = replace(view, expr=done[0], bounds=NO_BOUNDS)
            made = self._moved(call, [view.expr], view.per_tensor, exact=True)
            if made is None:
                return None
            expr = self.graph.emit(made)
        self._views[var] = replace(view, expr=expr, axis=axis)
        return None

    def _folded_move(self, call: relax.Call) -> Callable[[], np.ndarray]:
        return lambda: fold_move(call, self.graph.array(call.args[0]), op.shape_of(call))

    def _move_concat(self, var: relax.Var, call: relax.Call) -> None:
        parts = [self._integers(field) for field in self._fields(call)]
        if not parts or any(part is None for part in parts):
            return
        first = parts[0][1]
        if all(first.same(params) for _, params in parts):
            made = self._moved(call, [expr for expr, _ in parts], first, exact=True)
            scale = np.float32(first.scale)
            self._views[var] = View(
                self.graph.emit(made), np.asarray(scale), first.zero_point, first.dtype
            )

    def _fields(self, call: relax.Call) -> list[relax.Expr]:
        packed = call.args[0]
        packed = packed if isinstance(packed, relax.Tuple) else self.graph.value(packed)
        return list(packed.fields) if isinstance(packed, relax.Tuple) else []

    def _moved(
        self, call: relax.Call, data: list[relax.Expr], params: QParams | None, exact: bool = False
    ) -> relax.Call | None:
        """Return a move of integers; None where a constant it writes is not among them."""
        name, rest = op_name(call), [self.graph.new(arg) for arg in call.args[1:]]
        if name == "relax.nn.pad" and str(call.attrs.pad_mode) == "constant":
            real = float(call.attrs.pad_value)
            if params is None or not np.isfinite(real):
                return None
            value = int(params.quantize(np.asarray(real)))
            if (
                exact
                and abs((value - params.zero_point) * params.scale - real) > 1e-3 * params.scale
            ):
                return None
            widths = [int(width) for width in call.attrs.pad_width]
            return relax.op.nn.pad(data[0], widths, "constant", float(value))
        first = relax.Tuple(data) if name == "relax.concat" else data[0]
        return relax.Call(call.op, [first, *rest], call.attrs)

    # ------------------------------------------------------------ chains

    def _add(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        grown = self.book.extend_by_constant(var, call)
        if grown is not None:
            return grown
        for this, other in ((0, 1), (1, 0)):
            chain, addend = self.book.open(call.args[this]), call.args[other]
            if chain is None or static_shape(addend) != chain.shape:
                continue
            integers = self._integers(addend)
            residual = (
                Residual(self.graph.new(addend))
                if integers is None
                else Residual(integers[0], integers[1].scale, integers[1].zero_point)
            )
            with_residual = chain.with_residual(residual)
            if with_residual is not None:
                return self.book.record(var, with_residual)
        return None

    def _conv2d(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        attrs = conv2d_attrs(call, var.name)
        kernel = KernelLayout.parse(str(call.attrs.kernel_layout))
        pair = self._operands(call)
        shape = static_shape(call.args[1])
        if attrs is None or kernel is None or pair is None or shape is None:
            return None
        try:
            layout = Layout.parse(attrs["data_layout"])
        except ValueError:
            return None
        (data, data_params), weight = pair
        if weight.axis is not None and (kernel.blocks or weight.axis != kernel.letters.index("O")):
            return None
        channels = op.shape_of(call.args[0])[layout.channel_axis] * max(layout.block, 1)
        chain = Chain(
            "conv2d",
            data,
            self._as_oihw(weight, kernel, shape),
            op.shape_of(call),
            (1, 4) if layout.is_packed else (layout.channel_axis,),
            accumulator_scale(call, data_params, weight, kernel.oihw_shape(shape)[0]),
            attrs=dict(
                attrs,
                channels=channels,
                data_zero_point=data_params.zero_point,
                weight_zero_point=weight.zero_point,
            ),
        )
        return self.book.record(var, chain)

    def _as_oihw(self, weight: View, kernel: KernelLayout, shape: tuple[int, ...]) -> relax.Expr:
        target = kernel.oihw_shape(shape)
        if kernel.is_oihw:
            return weight.expr
        if weight.array is not None:
            return constant(weight.array.transpose(kernel.axes()).reshape(target))
        moved = self.graph.emit(relax.op.permute_dims(weight.expr, list(kernel.axes())))
        return self.graph.emit(relax.op.reshape(moved, target)) if kernel.blocks else moved

    def _operands(self, call: relax.Call) -> tuple[tuple[relax.Expr, QParams], View] | None:
        """Return (data with its parameters, weight view) of a convolution or matmul.

        A raw integer operator's operands are seen as views of scale 1: 8-bit tensors, or what such
        tensors are in int32, less a zero point.
        """
        data, weight = call.args
        if str(call.ty.dtype) == "int32":
            raw, raw_weight = self._raw_view(data), self._raw_view(weight)
            if raw is None or raw_weight is None:
                return None
            return (raw.expr, raw.per_tensor), raw_weight
        integers, view = self._integers(data), self._view(weight)
        if integers is None or view is None or view.dtype not in INT8_DTYPES:
            return None
        if view.bounds != NO_BOUNDS:
            done = self._integers(weight)
            if done is None:
                return None
            view = replace(view, expr=done[0], bounds=NO_BOUNDS)
        return integers, view

    def _raw_view(self, expr: relax.Expr) -> View | None:
        if isinstance(expr, relax.Var) and expr in self._widened:
            return self._widened[expr]
        if str(expr.ty.dtype) not in INT8_DTYPES:
            return None
        one = np.asarray(1.0, "float32")
        return View(self._constant_or_new(expr), one, 0, str(expr.ty.dtype))

    def _matmul(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        pair = self._operands(call)
        data_shape, shape = (static_shape(arg) for arg in call.args)
        if pair is None or data_shape is None or shape is None:
            return None
        (data, data_params), weight = pair
        if len(data_shape) < 2 or len(shape) < 2:
            return None
        if weight.axis not in (None, len(shape) - 1):
            return None
        batched = any(dim != 1 for dim in shape[:-2]) or (weight.array is None and len(shape) > 2)
        if batched and shape[:-2] != data_shape[:-2]:
            return None  # a broadcast of whole matrices
        if not batched and len(shape) > len(data_shape):
            return None
        expr, transpose_b = self._transposed_weight(call.args[1], weight, batched)
        chain = Chain(
            "matmul",
            data,
            expr,
            op.shape_of(call),
            (-1,),
            accumulator_scale(call, data_params, weight, shape[-1]),
            attrs=dict(
                transpose_b=transpose_b,
                data_zero_point=data_params.zero_point,
                weight_zero_point=weight.zero_point,
                name=var.name,
            ),
        )
        return self.book.record(var, chain)

    def _transposed_weight(
        self, old: relax.Expr, weight: View, batched: bool
    ) -> tuple[relax.Expr, bool]:
        """Return the weight, as (.., N, K) if that costs nothing, and whether it is so."""
        array = weight.array
        if array is not None:
            array = array if batched else array.reshape(array.shape[-2:])
            return constant(np.ascontiguousarray(array.swapaxes(-1, -2))), True
        source = self.graph.value(old)
        if op_name(source) == "relax.permute_dims":
            rank = len(source.ty.shape)
            swap = (*range(rank - 2), rank - 1, rank - 2)
            before = source.args[0]
            view = self._view(before) if self._view(old) is not None else self._raw_view(before)
            if permutation(source) == swap and view is not None and view.bounds == NO_BOUNDS:
                return view.expr, True
        return weight.expr, False

    # ------------------------------------------------------------ backward from a quantize

    def _quantize(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        scale, zero_point = (self.graph.array(arg) for arg in call.args[1:])
        dtype = str(call.attrs.out_dtype)
        if scale is None or zero_point is None or dtype not in INT8_DTYPES:
            return None
        if not np.all(np.isfinite(scale)) or np.any(scale <= 0):
            return None
        if self.graph.is_constant(call.args[0]):
            real = self.graph.array(call.args[0])
            self.graph.set_array(var, quantized(real, scale, zero_point, call.attrs.axis, dtype))
            return constant(self.graph.array(var))
        one_scale, one_zero_point = scalar(scale), scalar(zero_point)
        if one_scale is None or one_zero_point is None:
            return None
        return self._as_integers(
            call.args[0], QParams(one_scale, int(one_zero_point), dtype), NO_BOUNDS
        )

    def _as_integers(self, expr: relax.Expr, out: QParams, bounds: Bounds) -> relax.Expr | None:
        """Return ``quantize(clip(expr, *bounds))`` for a float tensor of the old graph, or None."""
        view = self._view(expr)
        if view is not None:
            return requantized(view, out, bounds)
        if self.graph.is_constant(expr):
            return constant(out.quantize(np.clip(self.graph.array(expr), *bounds)))
        if not self.graph.single_use(expr):
            return None
        chain = self.book.open(expr)
        if chain is not None:
            real = chain.with_clip(bounds)
            return real.emit(out) if real is not None else None
        value = self.graph.value(expr)
        through = self._backward.get(op_name(value))
        return through(value, out, bounds) if through is not None and is_static(value) else None

    def _quantized_clip(self, call: relax.Call, out: QParams, bounds: Bounds) -> relax.Expr | None:
        clip = clip_of(call, self.graph.array)
        if clip is None:
            return None
        return self._as_integers(clip[0], out, narrow(clip[1], bounds))

    def _quantized_move(self, call: relax.Call, out: QParams, bounds: Bounds) -> relax.Expr | None:
        name = op_name(call)
        if name == "relax.split" or (name == "relax.nn.pad" and bounds != NO_BOUNDS):
            return None
        inputs = self._fields(call) if name == "relax.concat" else [call.args[0]]
        data = []
        for source in inputs:
            integers = self._as_integers(source, out, bounds)
            if integers is None:
                return None
            data.append(self._named(integers))
        return self._moved(call, data, out) if data else None

    def _named(self, expr: relax.Expr) -> relax.Expr:
        return self.graph.emit(expr) if isinstance(expr, relax.Call) else expr

    def _quantized_add(self, call: relax.Call, out: QParams, bounds: Bounds) -> relax.Expr | None:
        sides = [self._integers(arg) for arg in call.args]
        shape = static_shape(call)
        if None in sides or any(static_shape(arg) != shape for arg in call.args):
            return None
        (a, a_params), (b, b_params) = sides
        sign = -1 if op_name(call) == "relax.subtract" else 1
        return op.add(
            a,
            b,
            a_zero_point=a_params.zero_point,
            a_scale=a_params.scale / out.scale,
            b_zero_point=b_params.zero_point,
            b_scale=sign * b_params.scale / out.scale,
            **stored(out, bounds),
        )

    def _quantized_average(
        self, call: relax.Call, out: QParams, bounds: Bounds
    ) -> relax.Expr | None:
        window = average_window(call)
        integers = self._integers(call.args[0]) if window is not None else None
        if window is None or integers is None:
            return None
        data, params = integers
        pooled = op.avg_pool2d(
            data,
            **window,
            zero_point=params.zero_point,
            scale=params.scale / out.scale,
            **stored(out, bounds),
        )
        shape = op.shape_of(call)
        if len(shape) == 4:
            return pooled
        return relax.op.reshape(self.graph.emit(pooled), shape)
