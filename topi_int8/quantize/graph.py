"""The fp32 graph as quantization sees it: one dataflow block, canonical, its layers named.

`prepare` is the only place that changes the fp32 graph; everything after it reads `Graph`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import tvm
from tvm import ir, relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from ..op import op_name
from ..transform.fold_batch_norm import FoldBatchNorm

# Operators that list_layers shows and that get readable names, by the stem of the name.
LAYER_STEMS = {
    "relax.nn.conv2d": "conv2d",
    "relax.matmul": "matmul",
    "relax.add": "add",
    "relax.nn.max_pool2d": "max_pool2d",
    "relax.nn.avg_pool2d": "avg_pool2d",
    "relax.nn.adaptive_avg_pool2d": "avg_pool2d",
    "relax.mean": "mean",
    "relax.concat": "concat",
}


def constant(expr: Any) -> np.ndarray | None:
    """Return the value of a constant tensor, None for anything else."""
    return expr.value.numpy() if isinstance(expr, ir.GenericConst) else None


def prepare(mod: tvm.IRModule) -> tvm.IRModule:
    """Return a copy of the module ready to be quantized.

    BatchNorm folded, trivial bindings gone, layers named by operator and position ("conv2d_3").
    The same module always gets the same names.

    Raises
    ------
    TypeError
        ``mod`` is not an IRModule.
    ValueError
        ``mod`` has no ``main``, or it has control flow or more than one block.
    """
    if not isinstance(mod, tvm.IRModule):
        raise TypeError(f"mod is {type(mod).__name__}; allowed: a tvm.IRModule")
    names = [var.name_hint for var in mod.get_global_vars()]
    if "main" not in names or not isinstance(mod["main"], relax.Function):
        raise ValueError(f"mod has the functions {names}; allowed: a Relax function 'main'")
    mod = tvm.ir.transform.Sequential(
        [
            relax.transform.Normalize(),
            relax.transform.ConvertToDataflow(min_size=1),
            relax.transform.CanonicalizeBindings(),
            FoldBatchNorm(),
            relax.transform.CanonicalizeBindings(),
            relax.transform.DeadCodeElimination(),
        ]
    )(mod)
    blocks = mod["main"].body.blocks
    if len(blocks) != 1 or not isinstance(blocks[0], relax.DataflowBlock):
        raise ValueError(
            f"mod's main has {len(blocks)} blocks or control flow; allowed: one dataflow block"
        )
    named = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    named.update_func(mod.get_global_var("main"), _Namer(mod).visit_expr(mod["main"]))
    return named


@mutator
class _Namer(PyExprMutator):
    """Gives each layer its readable name."""

    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.counts: Counter[str] = Counter()

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        stem = LAYER_STEMS.get(op_name(binding.value))
        if stem is None or (
            stem == "add" and any(constant(a) is not None for a in binding.value.args)
        ):
            super().visit_var_binding_(binding)
            return
        kind = relax.DataflowVar if isinstance(binding.var, relax.DataflowVar) else relax.Var
        var = kind(f"{stem}_{self.counts[stem]}", binding.var.ty)
        self.counts[stem] += 1
        value = self.builder_.normalize(self.visit_expr(binding.value))
        self.builder_.emit_normalized(relax.VarBinding(var, value))
        self.set_var_remap(binding.var, var)


class Graph:
    """The single dataflow block of a prepared ``main``, indexed."""

    def __init__(self, mod: tvm.IRModule) -> None:
        self.func: relax.Function = mod["main"]
        bindings = self.func.body.blocks[0].bindings
        self.order: list[relax.Var] = [b.var for b in bindings]
        self.values: dict[relax.Var, relax.Expr] = {b.var: b.value for b in bindings}
        self.position = {var: i for i, var in enumerate(self.order)}
        self.uses: Counter[relax.Var] = Counter(relax.analysis.free_vars(self.func.body.body))
        for value in self.values.values():
            # Not free_vars: a call that reads a tensor twice is two uses.
            self.uses.update(_variables(value))

    def single_use(self, var: Any) -> bool:
        """Return whether a variable is read exactly once."""
        return self.uses[var] == 1

    def tensors(self, expr: Any) -> list[relax.Var]:
        """Return the variables a call reads, through a tuple argument."""
        return [var for var in _variables(self.resolve_tuple(expr)) if isinstance(var, relax.Var)]

    def resolve_tuple(self, expr: Any) -> Any:
        """Return the call with a variable that stands for a tuple replaced by the tuple."""
        if isinstance(expr, relax.Call) and len(expr.args) == 1:
            inner = self.values.get(expr.args[0])
            return inner if isinstance(inner, relax.Tuple) else expr
        return expr


def _variables(expr: Any) -> list[relax.Var]:
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, relax.Call):
        return [var for arg in expr.args for var in _variables(arg)]
    if isinstance(expr, relax.Tuple):
        return [var for field in expr.fields for var in _variables(field)]
    if isinstance(expr, relax.TupleGetItem):
        return _variables(expr.tuple_value)
    return list(relax.analysis.free_vars(expr)) if isinstance(expr, relax.Expr) else []
