"""Insertion: write the quantize/dequantize pairs of a plan into the graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from .graph import Graph
from .plan import Compute, Plan
from .qparams import QParams, QuantizedWeight, quantize_bias, quantize_weight


def insert_qdq(
    mod: tvm.IRModule,
    graph: Graph,
    plan: Plan,
    qparams: Mapping[relax.Var, QParams],
    weight_bits: int = 8,
    per_channel: bool = True,
) -> tvm.IRModule:
    """Return the prepared module with its QDQ pairs.

    A quantized tensor ``t`` becomes ``t_q = quantize(t)`` and ``t_dq = dequantize(t_q)``, which all
    its consumers read. Weights are ``dequantize(int8 constant)`` per channel, biases
    ``dequantize(int32 constant)`` at data scale times weight scale.

    Parameters
    ----------
    qparams : mapping
        Parameters of every tensor of ``plan.tensors``.
    weight_bits : int
        A key of `WEIGHT_MAX`.
    per_channel : bool
        False: weights and biases have one scale a tensor.
    """
    weights = _weights(plan, qparams, weight_bits, per_channel)
    func = _Inserter(mod, plan, qparams, weights).visit_expr(graph.func)
    new = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    new.update_func(mod.get_global_var("main"), func)
    return new


def _weights(
    plan: Plan, qparams: Mapping[relax.Var, QParams], bits: int, per_channel: bool
) -> dict[relax.Var, QuantizedWeight]:
    """Return the int8 weight of each convolution and matmul that has a constant one."""
    biases = {compute: value.reshape(-1) for compute, value, _ in plan.bias.values()}
    return {
        var: quantize_weight(
            compute.weight,
            compute.kernel_axis,
            qparams[compute.data].scale,
            biases.get(var),
            bits,
            per_channel,
        )
        for var, compute in plan.computes.items()
        if compute.weight is not None
    }


@mutator
class _Inserter(PyExprMutator):
    """Rebuilds the function with its pairs."""

    def __init__(
        self,
        mod: tvm.IRModule,
        plan: Plan,
        qparams: Mapping[relax.Var, QParams],
        weights: Mapping[relax.Var, QuantizedWeight],
    ) -> None:
        super().__init__(mod)
        self.plan, self.qparams, self.weights = plan, qparams, weights
        self.params: list[relax.Var] = []

    def visit_function_(self, func: relax.Function) -> relax.Function:
        self.params = list(func.params)
        return super().visit_function_(func)

    def visit_dataflow_block_(self, block: relax.DataflowBlock) -> relax.BindingBlock:
        self.builder_._begin_dataflow_block()
        for param in self.params:
            self._pair(param, is_output=False)
        for binding in block.bindings:
            self.visit_binding(binding)
        return self.builder_._end_block()

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        var, value = binding.var, binding.value
        if var in self.weights:
            value = self._with_weight(value, self.plan.computes[var], self.weights[var])
        elif var in self.plan.bias:
            value = self._with_bias(var, value)
        super().visit_var_binding_(relax.VarBinding(var, value))
        self._pair(var, is_output=not isinstance(var, relax.DataflowVar))

    def _pair(self, var: relax.Var, is_output: bool) -> None:
        """Emit the pair of a tensor that has one, and let everything after it read the pair."""
        params = self.qparams.get(var) if var in self.plan.tensors else None
        if params is None:
            return
        scale, zero_point = (
            relax.const(params.scale, "float32"),
            relax.const(params.zero_point, params.dtype),
        )
        source = self.visit_expr(var)
        q = self.builder_.emit(
            relax.op.quantize(source, scale, zero_point, out_dtype=params.dtype), f"{var.name}_q"
        )
        real = relax.op.dequantize(q, scale, zero_point)
        emit = self.builder_.emit_output if is_output else self.builder_.emit
        self.set_var_remap(var, emit(real, f"{var.name}_dq"))

    def _with_weight(
        self, call: relax.Call, compute: Compute, weight: QuantizedWeight
    ) -> relax.Call:
        real = self._constant(
            weight.values, weight.scale, compute.kernel_axis, f"{compute.var.name}_w"
        )
        return relax.Call(call.op, [call.args[0], real, *call.args[2:]], call.attrs, call.ty_args)

    def _with_bias(self, var: relax.Var, call: relax.Call) -> relax.Call:
        source, value, axis = self.plan.bias[var]
        data = self.plan.computes[source].data
        scale = np.float32(self.qparams[data].scale) * self.weights[source].scale
        steps = quantize_bias(value.reshape(-1), scale).reshape(value.shape)
        real = self._constant(steps, scale, axis, f"{source.name}_b")
        args = [arg if isinstance(arg, relax.Var) else real for arg in call.args]
        return relax.Call(call.op, args, call.attrs, call.ty_args)

    def _constant(self, values: np.ndarray, scale: np.ndarray, axis: int, name: str) -> relax.Var:
        """Emit the dequantize of a constant whose scale is one a channel, or one in all."""
        zero_point = np.zeros(scale.shape, values.dtype)
        real = relax.op.dequantize(
            relax.const(values), relax.const(scale), relax.const(zero_point), axis=axis
        )
        return self.builder_.emit(real, name)
