"""FuseDynamic: layers of dynamically quantized data -> raw integer products, scaled afterwards.

Dynamic quantization measures the range of a tensor when it runs, so that scale s and zero point z
are tensors too, and FuseQDQ, which folds them into a kernel, has nothing to fold. With constant
weights w of zero point 0 and scale t the sum needs neither:

    sum s (q - z) t w  =  (sum q w - z sum w) s t

where ``sum w`` is known a column. FuseQDQ then takes the product for the raw integer matmul it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import tvm
from tvm import relax
from tvm.ir import GenericConst

from .. import op
from ..op import op_name, static_shape
from ..workload import INT8_DTYPES
from ._qdq_emit import constant, is_static
from ._qdq_graph import Graph, rewrite_functions
from ._qdq_values import LOST, View, fold_move, moved_axis, view_of


@tvm.transform.module_pass(opt_level=0, name="topi_int8.FuseDynamic")
class FuseDynamic:
    """Rewrite matmuls of dynamically quantized data by constant weights to integer matmuls.

    Run it before FuseQDQ. Weights of a zero point or of a scale that varies along k, and tensors of
    symbolic shape, are left as they are. The input module is not changed.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the rewritten module."""
        return rewrite_functions(mod, _Rules)


class _Rules:
    """The rewrite of one binding."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.weights: dict[relax.Var, View] = {}

    def rewrite(self, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        """Return the integer form of a matmul; None to keep the binding. Notes weights."""
        name = op_name(value)
        if isinstance(value, GenericConst):
            self.graph.set_array(var, value.value.numpy)
        elif name == "relax.dequantize":
            self._note_weight(var, value)
        elif name in ("relax.reshape", "relax.permute_dims") and value.args[0] in self.weights:
            weight = self.weights[value.args[0]]
            axis = moved_axis(value, weight.axis)
            if axis != LOST:
                moved = constant(fold_move(value, weight.array, op.shape_of(value)))
                self.weights[var] = replace(weight, expr=moved, axis=axis)
        elif name == "relax.matmul" and is_static(value):
            return self._matmul(value)
        return None

    def _note_weight(self, var: relax.Var, call: relax.Call) -> None:
        array, scale, zero_point = (self.graph.array(arg) for arg in call.args)
        dtype = str(call.args[0].ty.dtype)
        if array is None or dtype not in INT8_DTYPES or str(call.attrs.out_dtype) != "float32":
            return
        view = view_of(
            constant(array), dtype, array.ndim, scale, zero_point, int(call.attrs.axis)
        )
        if view is not None and view.zero_point == 0:
            self.weights[var] = view

    def _matmul(self, call: relax.Call) -> relax.Expr | None:
        weight = self.weights.get(call.args[1])
        data = self._dynamic(call.args[0])
        if weight is None or data is None or weight.array.ndim != 2 or weight.axis not in (None, 1):
            return None
        q, scale, zero_point = data
        emit = self.graph.emit
        total = weight.array.astype("int64").sum(0).astype("int32")
        sums = emit(relax.op.matmul(q, weight.expr, out_dtype="int32"))
        offset = emit(relax.op.multiply(_scalar(emit, zero_point, "int32"), constant(total)))
        steps = emit(relax.op.astype(emit(relax.op.subtract(sums, offset)), "float32"))
        unit = emit(relax.op.multiply(_scalar(emit, scale, "float32"), constant(weight.scale)))
        return relax.op.multiply(steps, unit)

    def _dynamic(self, expr: relax.Expr) -> tuple[relax.Expr, relax.Expr, relax.Expr] | None:
        """Return (integers, scale, zero point) of data quantized by what is no constant."""
        call = self.graph.value(expr)
        if op_name(call) == "relax.reshape" and is_static(call):
            inner = self._dynamic(call.args[0])
            if inner is None:
                return None
            shaped = self.graph.emit(relax.op.reshape(inner[0], op.shape_of(call)))
            return shaped, *inner[1:]
        if op_name(call) != "relax.dequantize" or str(call.ty.dtype) != "float32":
            return None
        q, *params = call.args
        static = all(self.graph.is_constant(param) for param in params)
        shapes = [static_shape(param) for param in params]
        single = all(shape is not None and math.prod(shape) == 1 for shape in shapes)
        if static or not single or str(q.ty.dtype) not in INT8_DTYPES:
            return None
        return tuple(self.graph.new(x) for x in call.args)


def _scalar(
    emit: Callable[[relax.Expr], relax.Var], expr: relax.Expr, dtype: str
) -> relax.Var:
    """Return a tensor of one element as one of rank 0 and another type."""
    return emit(relax.op.reshape(emit(relax.op.astype(expr, dtype)), ()))
