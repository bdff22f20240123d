"""FoldBatchNorm: inference BatchNorm, and any constant per-channel affine, into conv and matmul.

``batch_norm(conv(x, W) + b)`` is ``conv(x, W * s) + (b * s + t)`` with, per output channel,
``s = gamma / sqrt(var + eps)`` and ``t = beta - mean * s``. The same holds for a chain of constant
multiply, divide, add and subtract, the form other importers decompose BatchNorm into. A BatchNorm
that follows no convolution (DenseNet's) becomes one multiply and one add.

Why not TVM's own: `relax.transform.FoldBatchnormToConv2D` does not see through a bias, folds no
decomposed form and duplicates a convolution that has other uses; `DecomposeOpsForInference` with
`FoldConstant` leaves four elementwise operators a layer and compiles a kernel for each constant
(15 s for ResNet-50, where this pass takes well under one).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import ir, relax
from tvm.relax.expr_functor import PyExprMutator, mutator

# (scale, shift) of ``x <op> c`` for a constant c; None: no such factor.
_AFFINE = {
    "relax.multiply": lambda c: (c, None),
    "relax.divide": lambda c: (1.0 / c, None),
    "relax.add": lambda c: (None, c),
    "relax.subtract": lambda c: (None, -c),
}
_COMMUTATIVE = ("relax.multiply", "relax.add")


@dataclass(frozen=True)
class _Linear:
    """A convolution or matmul and the affine after it: ``call(x, weight * scale) + shift``.

    scale and shift are float64 vectors, one value an output channel; None stands for 1 and 0.
    """

    call: relax.Call
    channels: int
    channel_axis: int
    kernel_axis: int
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None

    def then(self, scale: np.ndarray | None, shift: np.ndarray | None) -> _Linear:
        """Return this followed by ``* scale + shift``."""
        new = self
        if scale is not None:
            old_scale = 1.0 if self.scale is None else self.scale
            old_shift = None if self.shift is None else self.shift * scale
            new = replace(new, scale=old_scale * scale, shift=old_shift)
        if shift is not None:
            new = replace(new, shift=shift if new.shift is None else new.shift + shift)
        return new


@relax.transform.function_pass(opt_level=0)
class FoldBatchNorm:
    """Fold BatchNorm into the convolution or matmul before it, where its output has no other use.

    The weight must be a constant, and so must BatchNorm's parameters. Reshapes, permutations and
    expand_dims of constants are evaluated on the way.
    """

    def transform_function(
        self, func: relax.Function, mod: ir.IRModule, _ctx: ir.transform.PassContext
    ) -> relax.Function:
        """Return the function with its BatchNorms folded; primitive functions are left alone."""
        if func.attrs is not None and func.attrs.get("Primitive", 0):
            return func
        return relax.analysis.remove_all_unused(_Folder(func, mod).visit_expr(func))


@mutator
class _Folder(PyExprMutator):
    """Follows each affine chain from its convolution; what it leaves behind unused is removed."""

    def __init__(self, func: relax.Function, mod: ir.IRModule) -> None:
        super().__init__(mod)
        self.values = dict(relax.analysis.get_var2val(func))
        self.uses = Counter(relax.analysis.free_vars(func.body.body))
        for value in self.values.values():
            self.uses.update(relax.analysis.free_vars(value))
        self.linear: dict[relax.Var, _Linear] = {}
        self.binding: relax.Var | None = None

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        self.binding = binding.var
        super().visit_var_binding_(binding)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        name = call.op.name if isinstance(call.op, ir.Op) else ""
        if name in ("relax.nn.conv2d", "relax.matmul"):
            linear = self._start(call, name)
            if linear is not None:
                self.linear[self.binding] = linear
        elif name in _FOLDED_CONSTANTS:
            value = self._constant(call)
            if value is not None:
                return relax.const(value, str(call.ty.dtype))
        elif name in _AFFINE and (step := self._affine_step(call, name)) is not None:
            folded = self._extend(*step)
            if folded is not None:
                return folded
        return super().visit_call_(call)

    def visit_tuple_getitem_(self, item: relax.TupleGetItem) -> relax.Expr:
        norm = self.values.get(item.tuple_value)
        if not _is_call(norm, "relax.nn.batch_norm") or norm.attrs.training:
            return super().visit_tuple_getitem_(item)
        gamma, beta, mean, var = (self._constant(arg) for arg in norm.args[1:])
        if any(c is None for c in (gamma, beta, mean, var)):
            return super().visit_tuple_getitem_(item)
        if item.index > 0:
            # In inference the running statistics come out as they went in.
            return norm.args[2 + item.index]
        scale = 1.0 / np.sqrt(var.astype("float64") + float(norm.attrs.epsilon))
        if norm.attrs.scale:
            scale = scale * gamma
        shift = -mean * scale + (beta if norm.attrs.center else 0.0)
        data, axis = norm.args[0], int(norm.attrs.axis)
        linear = self.linear.get(data)
        if linear is not None and linear.channel_axis == axis % _rank(data):
            folded = self._extend(data, scale, shift)
            if folded is not None:
                return folded
        broadcast = [1] * _rank(data)
        broadcast[axis] = -1
        dtype = str(norm.args[0].ty.dtype)
        scaled = relax.op.multiply(
            self.visit_expr(data), relax.const(scale.reshape(broadcast), dtype)
        )
        return relax.op.add(scaled, relax.const(shift.reshape(broadcast), dtype))

    # ------------------------------------------------------------ chains

    def _start(self, call: relax.Call, name: str) -> _Linear | None:
        weight = self._constant(call.args[1])
        if weight is None:
            return None
        if name == "relax.matmul":
            if weight.ndim != 2:
                return None
            return _Linear(call, weight.shape[1], _rank(call) - 1, 1)
        layouts = call.attrs.out_layout or call.attrs.data_layout, call.attrs.kernel_layout
        if any(len(text) != 4 for text in layouts):
            return None
        kernel_axis = layouts[1].index("O")
        return _Linear(call, weight.shape[kernel_axis], layouts[0].index("C"), kernel_axis)

    def _affine_step(
        self, call: relax.Call, name: str
    ) -> tuple[relax.Var, np.ndarray | None, np.ndarray | None] | None:
        """Return (chain's end, scale, shift) where the call is a per-channel step of a chain."""
        pairs = [(call.args[0], call.args[1])]
        if name in _COMMUTATIVE:
            pairs.append((call.args[1], call.args[0]))
        for source, other in pairs:
            linear, constant = self.linear.get(source), self._constant(other)
            if linear is None or constant is None:
                continue
            vector = _per_channel(constant, linear, _rank(source))
            if vector is not None:
                return (source, *_AFFINE[name](vector))
        return None

    def _extend(
        self, source: relax.Var, scale: np.ndarray | None, shift: np.ndarray | None
    ) -> relax.Expr | None:
        """Return the chain with one step more, written out; None if its end has other uses."""
        if self.uses[source] != 1:
            return None
        linear = self.linear[source].then(scale, shift)
        self.linear[self.binding] = linear
        call = linear.call
        dtype = str(call.ty.dtype)
        weight = self._constant(call.args[1])
        if linear.scale is not None:
            along = [1] * weight.ndim
            along[linear.kernel_axis] = -1
            weight = weight.astype("float64") * linear.scale.reshape(along)
        args = [self.visit_expr(call.args[0]), relax.const(weight, dtype)]
        out = relax.Call(call.op, args, call.attrs, call.ty_args)
        if linear.shift is None:
            return out
        broadcast = [1] * (_rank(call) - linear.channel_axis)
        broadcast[0] = -1
        if _rank(call) == 4:
            broadcast = [-1 if i == linear.channel_axis else 1 for i in range(4)]
        return relax.op.add(out, relax.const(linear.shift.reshape(broadcast), dtype))

    # ------------------------------------------------------------ constants

    def _constant(self, expr: Any) -> np.ndarray | None:
        """Return the value of a constant, through reshapes and permutations; None for others."""
        if isinstance(expr, relax.Var):
            expr = self.values.get(expr)
        if isinstance(expr, ir.GenericConst):
            return expr.value.numpy()
        if isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op):
            evaluate = _FOLDED_CONSTANTS.get(expr.op.name)
            if evaluate is not None:
                value = self._constant(expr.args[0])
                return None if value is None else evaluate(value, expr)
        return None


# How an operator that only moves a constant's elements is evaluated.
_FOLDED_CONSTANTS = {
    "relax.reshape": lambda value, call: value.reshape([int(d) for d in call.ty.shape]),
    "relax.expand_dims": lambda value, call: value.reshape([int(d) for d in call.ty.shape]),
    "relax.permute_dims": lambda value, call: np.ascontiguousarray(
        value.transpose(None if call.attrs.axes is None else [int(a) for a in call.attrs.axes])
    ),
}


def _is_call(expr: Any, name: str) -> bool:
    return isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op) and expr.op.name == name


def _rank(expr: relax.Expr) -> int:
    return int(expr.ty.ndim)


def _per_channel(constant: np.ndarray, linear: _Linear, rank: int) -> np.ndarray | None:
    """Return a constant that broadcasts along the channels only as a float64 vector, else None."""
    if constant.ndim > rank:
        return None
    shape = (1,) * (rank - constant.ndim) + constant.shape
    wanted = [1] * rank
    wanted[linear.channel_axis] = linear.channels
    if any(have not in (1, want) for have, want in zip(shape, wanted, strict=True)):
        return None
    vector = constant.reshape(-1).astype("float64")
    return np.broadcast_to(vector, (linear.channels,))
