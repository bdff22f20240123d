"""The walk shared by FuseQDQ and FuseFloat: facts about a function, and rebuilding it by rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import numpy as np
import tvm
import tvm_ffi
from tvm import ir, relax
from tvm.ir import GenericConst
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

from ..op import op_name


def functions_of(mod: tvm.IRModule) -> list[tuple[ir.GlobalVar, relax.Function]]:
    """Return the Relax functions that passes rewrite: all but those that FuseOps has made."""
    return [
        (gvar, func)
        for gvar, func in mod.functions_items()
        if isinstance(func, relax.Function) and "Primitive" not in (func.attrs or {})
    ]


def quantize_key(call: relax.Call) -> tuple | None:
    """Return what makes two quantize calls equal; None if a parameter is not an inline constant."""
    if not all(isinstance(arg, GenericConst) for arg in call.args[1:]):
        return None
    params = tuple(arg.value.numpy().tobytes() for arg in call.args[1:])
    return (call.args[0], *params, int(call.attrs.axis), str(call.attrs.out_dtype))


@visitor
class _Collector(PyExprVisitor):
    """Collects a function's bindings, nested ones too, and counts the uses of each variable."""

    def __init__(self) -> None:
        self.value_of: dict[relax.Var, relax.Expr] = {}
        self.uses: Counter = Counter()
        self._quantized: set[tuple] = set()

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        self.value_of[binding.var] = binding.value
        if op_name(binding.value) == "relax.quantize":
            # Equal quantizes of one tensor are one: many tools put a pair before every consumer.
            key = quantize_key(binding.value)
            if key is not None and key in self._quantized:
                return
            self._quantized.add(key)
        self.visit_expr(binding.value)

    def visit_var_(self, var: relax.Var) -> None:
        self.uses[var] += 1

    def visit_dataflow_var_(self, var: relax.Var) -> None:
        self.uses[var] += 1


class Graph:
    """What is known of the function being rewritten, and how to write into the new one."""

    def __init__(self, func: relax.Function) -> None:
        collector = _Collector()
        collector.visit_expr(func)
        self.value_of = collector.value_of
        self.uses = collector.uses
        self._arrays: dict[relax.Var, np.ndarray | Callable[[], np.ndarray]] = {}
        self.emit: Callable[[relax.Expr], relax.Var]
        self.normalize: Callable[[relax.Expr], relax.Expr]
        self.new: Callable[[relax.Expr], relax.Expr]
        self.made: Callable[[relax.Expr], relax.Expr | None]

    def array(self, expr: relax.Expr) -> np.ndarray | None:
        """Return the value of a constant, inline or bound; None if it is not known."""
        if isinstance(expr, GenericConst):
            return expr.value.numpy()
        known = self._arrays.get(expr) if isinstance(expr, relax.Var) else None
        if callable(known):
            known = self._arrays[expr] = known()
        return known

    def set_array(self, var: relax.Var, value: np.ndarray | Callable[[], np.ndarray]) -> None:
        """Remember the value of a variable that is constant; a function is called when needed."""
        self._arrays[var] = value

    def is_constant(self, expr: relax.Expr) -> bool:
        """Return whether `array` would give a value, without computing it."""
        return isinstance(expr, GenericConst) or expr in self._arrays

    def value(self, expr: relax.Expr) -> relax.Expr | None:
        """Return what a variable of the old graph is bound to; None for parameters."""
        return self.value_of.get(expr) if isinstance(expr, relax.Var) else None

    def single_use(self, expr: relax.Expr) -> bool:
        """Return whether exactly one consumer reads a variable (the function's result counts)."""
        return self.uses[expr] == 1


class Rules(Protocol):
    """A rewrite: `rewrite` returns the value that replaces a binding's, or None to keep it."""

    def rewrite(self, var: relax.Var, value: relax.Expr) -> relax.Expr | None: ...


@mutator
class _Rewriter(PyExprMutator):
    """Rebuilds a function, asking the rules about every binding."""

    def __init__(self, mod: tvm.IRModule, graph: Graph, rules: Rules) -> None:
        super().__init__(mod)
        self.graph, self.rules = graph, rules
        # A branch of an If must not reuse what another branch emitted.
        self.shared: dict[tuple, relax.Var] = {}
        graph.emit = self.builder_.emit
        graph.normalize = self.builder_.normalize
        graph.new = self.visit_expr
        graph.made = self._made

    def _made(self, expr: relax.Expr) -> relax.Expr | None:
        """Return what a variable of the old graph is bound to in the new one; None for others."""
        new = self.visit_expr(expr)
        return self.lookup_binding(new) if isinstance(new, relax.Var) else None

    def visit_seq_expr_(self, op: relax.SeqExpr) -> relax.Expr:
        outer, self.shared = self.shared, dict(self.shared)
        result = super().visit_seq_expr_(op)
        self.shared = outer
        return result

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        value = binding.value
        key = quantize_key(value) if op_name(value) == "relax.quantize" else None
        replacement = self.shared.get(key) if key is not None else None
        if replacement is None:
            replacement = self.rules.rewrite(binding.var, value)
        if replacement is not None:
            replacement = self.graph.normalize(replacement)
            if not tvm_ffi.structural_equal(replacement.ty, value.ty):
                replacement = None  # never trade a tensor for one of another type
        if replacement is not None:
            super().visit_var_binding_(relax.VarBinding(binding.var, replacement))
        else:
            super().visit_var_binding_(binding)
        if key is not None:
            self.shared[key] = self.visit_expr(binding.var)


def rewrite_functions(mod: tvm.IRModule, make_rules: Callable[[Graph], Rules]) -> tvm.IRModule:
    """Return a module whose Relax functions were rebuilt by rules; `mod` itself is left alone."""
    new_mod = mod.clone() if hasattr(mod, "clone") else tvm.IRModule(mod.functions, attrs=mod.attrs)
    for gvar, func in functions_of(mod):
        func = relax.analysis.remove_all_unused(func)
        graph = Graph(func)
        rewriter = _Rewriter(mod, graph, make_rules(graph))
        new_mod.update_func(gvar, relax.analysis.remove_all_unused(rewriter.visit_expr(func)))
    return relax.transform.CanonicalizeBindings()(new_mod)
