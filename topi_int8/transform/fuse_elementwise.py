"""FuseElementwise: float operators between dequantize and quantize -> one pass over integers.

What lies between two integer convolutions and is not part of either:

- a function of one tensor, such as x * sigmoid(x), however many operators it is written in, has
  256 values: `op.lookup`;
- a scale and a shift a channel, such as a BatchNorm before its convolution, and a clip:
  `op.affine`;
- the product of two tensors, such as squeeze-and-excitation's: `op.multiply`.

Everything else stays in float, and `declined` says why. Clips alone, moves and sums are FuseQDQ's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from .. import op
from ..op import op_name
from ..qparams import QParams, all_integers
from ..workload import INT8_DTYPES
from ._elementwise import Finder, NotPointwise, Pointwise, is_pointwise
from ._qdq_emit import constant, dequantized, is_static, stored
from ._qdq_graph import Graph, rewrite_functions
from ._qdq_values import scalar, view_of


@tvm.transform.module_pass(opt_level=0, name="topi_int8.FuseElementwise")
class FuseElementwise:
    """Rewrite what FuseQDQ cannot: functions, per-channel affines and products of integers.

    Run it before FuseQDQ, which then stores its convolutions as the integers that these read. The
    input module is not changed. Tensors of symbolic shape are left as they are.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the rewritten module."""
        return rewrite_functions(mod, _Rules)


@dataclass(frozen=True)
class _Integers:
    """A float tensor of the graph as the integers that a dequantize reads."""

    var: relax.Var
    params: QParams


class _Declined(Exception):
    """A quantize whose input stays float; the message says why."""


class _Rules:
    """The rewrite of one binding."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.finder = Finder(graph.value, graph.array)

    def rewrite(self, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        """Return the integer operator that makes a quantized tensor; None to keep the binding."""
        self.note(var, value)
        if op_name(value) != "relax.quantize" or not is_static(value):
            return None
        out, source = self.params(value), value.args[0]
        made = self.graph.value(source)
        if out is None or made is None or not is_static(made):
            return None
        try:
            return self.made(source, out)
        except _Declined:
            return None

    def note(self, var: relax.Var, value: relax.Expr) -> None:
        """Remember a constant that is bound to a variable, or dequantized."""
        if isinstance(value, GenericConst):
            self.graph.set_array(var, value.value.numpy)
        elif op_name(value) == "relax.dequantize" and isinstance(value.args[0], GenericConst):
            source, rank = value.args[0], int(value.ty.ndim)
            scale, zero_point = (self.graph.array(arg) for arg in value.args[1:])
            dtype, axis = str(source.ty.dtype), int(value.attrs.axis)
            view = view_of(source, dtype, rank, scale, zero_point, axis)
            if view is not None and str(value.attrs.out_dtype) == "float32":
                self.graph.set_array(var, lambda: dequantized(view))

    def made(self, var: relax.Var, out: QParams) -> relax.Call:
        """Return ``quantize(var)`` as one operator on integers; _Declined where it is none."""
        try:
            return self._lookup(self.finder.pointwise(var), out)
        except NotPointwise as why:
            for other in (self._affine(var, out), self._product(var, out)):
                if other is not None:
                    return other
            raise _Declined(str(why)) from None

    def _lookup(self, function: Pointwise, out: QParams) -> relax.Call:
        if function.only_clips:
            raise _Declined("a clip")
        source = self._integers(function.source)
        if source is None:
            raise _Declined(f"{function.source.name} is not 8-bit integers of one scale")
        values = function(source.params.dequantize(all_integers(source.params.dtype)))
        if np.isnan(values).any():
            raise _Declined("it has no value for some integers")
        return op.lookup(self.graph.new(source.var), constant(out.quantize(values)))

    def _affine(self, var: relax.Var, out: QParams) -> relax.Call | None:
        affine = self.finder.affine(var)
        source = self._integers(affine.source) if affine is not None else None
        if affine is None or source is None or affine.only_clips:
            return None
        shape = np.broadcast_shapes(
            affine.scale.shape, affine.shift.shape, (1,) * int(var.ty.ndim)
        )
        scale = np.broadcast_to(affine.scale * source.params.scale / out.scale, shape)
        shift = np.broadcast_to(affine.shift / out.scale, shape)
        scale, shift = scale.astype("float32"), shift.astype("float32")
        if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
            return None
        return op.affine(
            self.graph.new(source.var), constant(scale), constant(shift),
            zero_point=source.params.zero_point, **stored(out, affine.bounds),
        )  # fmt: skip

    def _product(self, var: relax.Var, out: QParams) -> relax.Call | None:
        product = self.finder.product(var)
        sides = [self._integers(x) for x in (product.a, product.b)] if product else [None]
        if product is None or None in sides:
            return None
        a, b = sides
        return op.multiply(
            self.graph.new(a.var), self.graph.new(b.var),
            a_zero_point=a.params.zero_point, b_zero_point=b.params.zero_point,
            scale=a.params.scale * b.params.scale / out.scale, **stored(out, product.bounds),
        )  # fmt: skip

    def params(self, call: relax.Call) -> QParams | None:
        """Return the parameters of a quantize or dequantize; None unless of one constant scale."""
        scale, zero_point = (scalar(self.graph.array(arg)) for arg in call.args[1:])
        quantizes = op_name(call) == "relax.quantize"
        dtype = str(call.attrs.out_dtype if quantizes else call.args[0].ty.dtype)
        real = call.args[0].ty.dtype if quantizes else call.attrs.out_dtype
        if scale is None or zero_point is None or dtype not in INT8_DTYPES or real != "float32":
            return None
        if not (np.isfinite(scale) and scale > 0):
            return None
        return QParams(scale, int(zero_point), dtype)

    def _integers(self, expr: relax.Expr) -> _Integers | None:
        call = self.graph.value(expr)
        if op_name(call) != "relax.dequantize" or not isinstance(call.args[0], relax.Var):
            return None
        params = self.params(call)
        return _Integers(call.args[0], params) if params is not None else None


def declined(mod: tvm.IRModule) -> Iterator[tuple[str, str]]:
    """Yield (operator, why it stays float) for each elementwise float operator of a module.

    Parameters
    ----------
    mod : tvm.IRModule
        As this pass, or any after it and before Lower, leaves it.
    """
    for _, func in mod.functions_items():
        if isinstance(func, relax.Function):
            yield from _Leftovers(Graph(func)).reasons()


class _Leftovers:
    """The elementwise float operators of a function, and why they are still there."""

    def __init__(self, graph: Graph) -> None:
        graph.new = lambda expr: expr  # nothing is rebuilt here
        self.graph, self.rules = graph, _Rules(graph)
        self.readers: dict[relax.Var, list[relax.Var]] = {}
        for var, value in graph.value_of.items():
            self.rules.note(var, value)
            for arg in getattr(value, "args", ()):
                if isinstance(arg, relax.Var):
                    self.readers.setdefault(arg, []).append(var)

    def reasons(self) -> Iterator[tuple[str, str]]:
        """Yield (operator, reason)."""
        for var, value in self.graph.value_of.items():
            if is_pointwise(value) and str(getattr(value.ty, "dtype", "")) == "float32":
                yield op_name(value), self._reason(var)

    def _reason(self, var: relax.Var) -> str:
        if not is_static(self.graph.value(var)):
            return "symbolic shape"
        end = self._end(var)
        quantizes = [
            call for call in map(self.graph.value, self.readers.get(end, ()))
            if op_name(call) == "relax.quantize"
        ]  # fmt: skip
        if not quantizes:
            return "a float operator reads it, or it is a result"
        out = self.rules.params(quantizes[0])
        if out is None:
            return "quantized with several scales, or none that is constant"
        try:
            self.rules.made(end, out)
        except _Declined as why:
            return str(why)
        return "FuseElementwise was not run"

    def _end(self, var: relax.Var) -> relax.Var:
        """Return the last variable of the elementwise operators that a variable goes through."""
        while True:
            readers = self.readers.get(var, ())
            following = [r for r in readers if is_pointwise(self.graph.value(r))]
            if not following:
                return var
            var = following[-1]
