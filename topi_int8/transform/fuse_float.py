"""FuseFloat: float32 convolutions and dense layers that remain -> topi_int8 operators in float32.

Layers that were not quantized (skipped first or last ones, unquantized models) still deserve a
packed schedule: their bias and clip are folded in, and `Lower` gives them the NCHWc float kernel.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from .. import op
from ..layout import Layout
from ..op import op_name, static_shape
from ._qdq_chain import Chain, ChainBook, conv2d_attrs
from ._qdq_emit import constant, dequantized_array, is_static
from ._qdq_graph import Graph, rewrite_functions
from ._qdq_values import KernelLayout, fold_move, folds

_CLIPS = ("relax.nn.relu", "relax.nn.relu6", "relax.clip", "relax.maximum", "relax.minimum")


@tvm.transform.module_pass(opt_level=0, name="topi_int8.FuseFloat")
class FuseFloat:
    """Rewrite float32 conv2d and dense of constant weights, with bias and clip, to our operators.

    Run it after FuseQDQ. Weights that are not constant, other types and symbolic shapes are left.
    The input module is not changed.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the rewritten module."""
        return rewrite_functions(mod, _FloatRules)


class _FloatRules:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.book = ChainBook(graph)

    def rewrite(self, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        """Return what replaces the value of a binding; None to keep it."""
        name = op_name(value)
        if isinstance(value, GenericConst):
            self.graph.set_array(var, value.value.numpy)
        elif not name or not is_static(value) or str(getattr(value.ty, "dtype", "")) != "float32":
            return None
        elif name == "relax.nn.conv2d":
            return self._conv2d(var, value)
        elif name == "relax.matmul":
            return self._matmul(var, value)
        elif name == "relax.add":
            return self.book.extend_by_constant(var, value)
        elif name in _CLIPS:
            return self.book.extend_by_clip(var, value)
        elif name == "relax.dequantize":
            # Of integer weights whose data is float: TVM would dequantize them at each run.
            q, scale, zero_point = (self.graph.array(arg) for arg in value.args)
            if q is not None and scale is not None and zero_point is not None:
                axis = int(value.attrs.axis)
                self.graph.set_array(var, lambda: dequantized_array(q, scale, zero_point, axis))
        elif folds(value) and self.graph.is_constant(value.args[0]):
            shape = op.shape_of(value)
            self.graph.set_array(
                var, lambda: fold_move(value, self.graph.array(value.args[0]), shape)
            )
        return None

    def _operands(self, call: relax.Call) -> tuple[relax.Expr, np.ndarray] | None:
        data, weight = call.args
        known = static_shape(data) is not None and self.graph.is_constant(weight)
        if not known or any(str(arg.ty.dtype) != "float32" for arg in call.args):
            return None
        return self.graph.new(data), self.graph.array(weight)

    def _conv2d(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        attrs, pair = conv2d_attrs(call, var.name), self._operands(call)
        kernel = KernelLayout.parse(str(call.attrs.kernel_layout))
        if attrs is None or pair is None or kernel is None:
            return None
        if attrs["data_layout"] not in ("NCHW", "NHWC"):
            return None
        data, weight = pair
        axis = Layout.parse(attrs["data_layout"]).channel_axis
        if kernel.is_oihw and isinstance(call.args[1], GenericConst):
            expr = call.args[1]
        else:
            expr = constant(
                weight.transpose(kernel.axes()).reshape(kernel.oihw_shape(weight.shape))
            )
        chain = Chain("conv2d", data, expr, op.shape_of(call), (axis,), None, attrs=attrs)
        return self.book.record(var, chain)

    def _matmul(self, var: relax.Var, call: relax.Call) -> relax.Expr | None:
        pair = self._operands(call)
        if pair is None or pair[1].ndim != 2 or len(call.args[0].ty.shape) < 2:
            return None
        data, weight = pair
        attrs = dict(transpose_b=True, name=var.name)
        expr = constant(weight.T)
        return self.book.record(
            var, Chain("matmul", data, expr, op.shape_of(call), (-1,), None, attrs=attrs)
        )
