"""SignActivations: uint8 tensors between quantize and dequantize become int8, where that is faster.

ARM's dot products (sdot, and smull + smlal before them) multiply signed by signed; only with i8mm
is there a mixed one. A kernel that is given uint8 data must flip its sign bits first: a copy of the
tensor. x and x - 128 with zero points zp and zp - 128 stand for the same real number, so the graph
can choose once, and its tensors are written signed where they are made.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.target import Target

from ..op import op_name
from ..target import Features, features
from ._qdq_graph import Graph


def prefers_signed(feats: Features) -> bool:
    """Whether the target's products take signed data with signed weights, and nothing else."""
    return not feats.has("neon_i8mm") and (feats.has("neon") or feats.has("armv7_neon"))


@tvm.transform.module_pass(opt_level=0, name="topi_int8.SignActivations")
class SignActivations:
    """Rewrite ``quantize`` to uint8 whose readers are all ``dequantize`` to int8.

    Run it before FuseQDQ. Tensors that the function takes or returns, and those that anything else
    reads, keep their type; so does everything on targets that do not prefer signed data.

    Parameters
    ----------
    target : Target
    """

    def __init__(self, target: Target) -> None:
        self.feats = features(target)

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Return the rewritten module; the argument is not changed."""
        if not prefers_signed(self.feats):
            return mod
        new = tvm.IRModule(mod.functions, attrs=mod.attrs)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                new.update_func(gvar, _Signer(mod, Graph(func)).visit_expr(func))
        return new


def _constant(graph: Graph, expr: Any) -> np.ndarray | None:
    """Return a constant's value, inline or bound to a variable; None if it is not one."""
    bound = graph.value(expr)
    expr = expr if bound is None else bound
    return expr.value.numpy() if isinstance(expr, GenericConst) else None


def _signable(graph: Graph) -> set[Any]:
    """Return the variables quantized to uint8 that nothing but dequantize reads.

    Zero points must be constants, of the pair on both sides.
    """
    quantized, reads = set(), Counter()
    for var, value in graph.value_of.items():
        name = op_name(value)
        if name not in ("relax.quantize", "relax.dequantize"):
            continue
        if _constant(graph, value.args[2]) is None:
            continue
        if name == "relax.dequantize":
            reads[value.args[0]] += 1
        elif str(value.ty.dtype) == "uint8":
            quantized.add(var)
    return {var for var in quantized if graph.uses[var] == reads[var]}


@mutator
class _Signer(PyExprMutator):
    """Rewrites the chosen quantize calls and the dequantize calls that read them."""

    def __init__(self, mod: tvm.IRModule, graph: Graph) -> None:
        super().__init__(mod)
        self.graph, self.chosen = graph, _signable(graph)

    def _shifted(self, zero_point: Any) -> Any:
        values = _constant(self.graph, zero_point).astype("int32") - 128
        return relax.const(values.astype("int8"))

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        call = binding.value
        reads = op_name(call) == "relax.dequantize" and call.args[0] in self.chosen
        if binding.var in self.chosen:
            new = relax.op.quantize(
                self.visit_expr(call.args[0]), self.visit_expr(call.args[1]),
                self._shifted(call.args[2]), axis=int(call.attrs.axis), out_dtype="int8",
            )  # fmt: skip
            # The new variable has another type: it takes the old one's place.
            self.set_var_remap(binding.var, self.builder_.emit(new, binding.var.name))
        elif reads:
            new = relax.op.dequantize(
                self.visit_expr(call.args[0]), self.visit_expr(call.args[1]),
                self._shifted(call.args[2]), axis=int(call.attrs.axis),
                out_dtype=str(call.attrs.out_dtype),
            )  # fmt: skip
            super().visit_var_binding_(
                relax.VarBinding(binding.var, self.builder_.normalize(new))
            )
        else:
            super().visit_var_binding_(binding)
