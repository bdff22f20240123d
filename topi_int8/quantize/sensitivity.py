"""How much noise each layer makes by itself: quantized alone, on the float32 network's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from .bias_correction import quantized_weights
from .calibrate import run_instrumented
from .plan import Plan
from .qparams import QParams


def own_noise(
    prepared: tvm.IRModule,
    qdq: tvm.IRModule,
    plan: Plan,
    qparams: Mapping[relax.Var, QParams],
    inputs: Iterable[Any],
    target: tvm.target.Target | None = None,
) -> dict[str, float]:
    """Return layer name -> noise power over signal power, of its output with its bias.

    Every layer gets a second one beside it, of the same float32 data rounded to its range and of
    the quantized weight: what only it does wrong, and not what earlier layers did. One compile of
    twice the layers, one run over the inputs.

    Parameters
    ----------
    prepared : tvm.IRModule
        Prepared fp32 module that the plan is of.
    qdq : tvm.IRModule
        What `insert_qdq` made of the plan and qparams.
    inputs : iterable
        As `calibrate`'s.
    target : tvm.target.Target, optional
        This machine by default.
    """
    biases = {
        source: (value.reshape(-1), plan.computes[source].channel_axis)
        for source, value, _ in plan.bias.values()
    }
    shadowed = tvm.IRModule(dict(prepared.functions_items()), attrs=prepared.attrs)
    rewriter = _Shadows(prepared, plan, qparams, quantized_weights(qdq))
    shadowed.update_func(prepared.get_global_var("main"), rewriter.visit_expr(prepared["main"]))
    layers = list(plan.computes)
    names = [var.name for var in layers]
    signal, noise = np.zeros(len(layers)), np.zeros(len(layers))
    runs = run_instrumented(shadowed, names + [_shadow(name) for name in names], inputs, target)
    for tensors in runs:
        for i, var in enumerate(layers):
            wanted, got = tensors[i].astype("float64"), tensors[len(layers) + i]
            noise[i] += np.sum((wanted - got) ** 2)
            if var in biases:
                value, axis = biases[var]
                wanted += np.expand_dims(value, [d for d in range(wanted.ndim) if d != axis])
            signal[i] += np.sum(wanted**2)
    # A layer that is always zero and is computed so makes no noise.
    ratios = np.where(noise > 0, noise / np.maximum(signal, np.finfo("float64").tiny), 0.0)
    return dict(zip(names, map(float, ratios), strict=True))


def _shadow(name: str) -> str:
    return f"{name}_alone"


@mutator
class _Shadows(PyExprMutator):
    """Puts beside every layer of the plan the same one on rounded operands."""

    def __init__(
        self,
        mod: tvm.IRModule,
        plan: Plan,
        qparams: Mapping[relax.Var, QParams],
        weights: Mapping[str, np.ndarray],
    ) -> None:
        super().__init__(mod)
        self.plan, self.qparams, self.weights = plan, qparams, weights
        self.rounded: dict[relax.Var, relax.Var] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        super().visit_var_binding_(binding)
        compute = self.plan.computes.get(binding.var)
        if compute is None:
            return
        call, name = binding.value, binding.var.name
        if compute.weight is None:
            weight = self._round(call.args[1])
        else:
            weight = relax.const(self.weights[name], "float32")
        args = [self._round(compute.data), weight]
        self.builder_.emit(relax.Call(call.op, args, call.attrs, call.ty_args), _shadow(name))

    def _round(self, var: relax.Var) -> relax.Var:
        if var not in self.rounded:
            params = self.qparams[var]
            scale = relax.const(params.scale, "float32")
            zero_point = relax.const(params.zero_point, params.dtype)
            q = relax.op.quantize(self.visit_expr(var), scale, zero_point, out_dtype=params.dtype)
            self.rounded[var] = self.builder_.emit(
                relax.op.dequantize(self.builder_.emit(q), scale, zero_point)
            )
        return self.rounded[var]
