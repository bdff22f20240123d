"""Rewrites of the prepared fp32 graph: other constants, biases where there were none."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from .graph import Graph, constant
from .plan import Compute, make_plan

# Module attribute: the names of layers that `with_biases` gave one.
BIASED = "topi_int8.biased"


def with_constants(mod: tvm.IRModule, values: Mapping[str, np.ndarray]) -> tvm.IRModule:
    """Return a prepared module with other constants; names stay.

    Parameters
    ----------
    values : mapping of str to array
        Variable name -> the new value of the one constant that its operator reads.
    """
    return _replace_main(mod, _Constants(mod, values))


def with_biases(mod: tvm.IRModule, names: Collection[str]) -> tvm.IRModule:
    """Return a prepared module in which these layers have a bias of zeros, named ``<layer>_bias``.

    For layers without one: whatever read the layer reads the sum, so that it fuses as any bias.
    The module remembers their names, for `prepare_like`.
    """
    if not names:
        return mod
    computes = {var.name: compute for var, compute in make_plan(Graph(mod)).computes.items()}
    wanted = {name: computes[name] for name in names}
    return _replace_main(mod, _Biases(mod, wanted)).with_attr(BIASED, sorted(names))


def _replace_main(mod: tvm.IRModule, rewriter: PyExprMutator) -> tvm.IRModule:
    new = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    new.update_func(mod.get_global_var("main"), rewriter.visit_expr(mod["main"]))
    return new


@mutator
class _Constants(PyExprMutator):
    """Puts other constants into operators."""

    def __init__(self, mod: tvm.IRModule, values: Mapping[str, np.ndarray]) -> None:
        super().__init__(mod)
        self.values = values

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        value = self.values.get(binding.var.name)
        if value is not None:
            call = binding.value
            args = [
                arg if constant(arg) is None else relax.const(value, str(arg.ty.dtype))
                for arg in call.args
            ]
            changed = relax.Call(call.op, args, call.attrs, call.ty_args)
            binding = relax.VarBinding(binding.var, changed)
        super().visit_var_binding_(binding)


@mutator
class _Biases(PyExprMutator):
    """Adds zeros to the outputs of layers."""

    def __init__(self, mod: tvm.IRModule, computes: Mapping[str, Compute]) -> None:
        super().__init__(mod)
        self.computes = computes

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        super().visit_var_binding_(binding)
        compute = self.computes.get(binding.var.name)
        if compute is None:
            return
        shape = [1] * int(binding.var.ty.ndim)
        shape[compute.channel_axis] = compute.channels
        is_output = not isinstance(binding.var, relax.DataflowVar)
        emit = self.builder_.emit_output if is_output else self.builder_.emit
        biased = relax.op.add(
            self.visit_expr(binding.var), relax.const(np.zeros(shape, "float32"))
        )
        self.set_var_remap(binding.var, emit(biased, f"{binding.var.name}_bias"))
