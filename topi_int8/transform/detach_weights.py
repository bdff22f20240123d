"""DetachWeights: large constants leave the module; its functions ask the runtime for them by name.

A VM executable keeps its constants in one serialized blob inside the library. TVM's loaders copy
that blob whole, twice, before the tensors are made of it: the pages of the file, two copies and the
tensors are resident at once, four times the weights.
"""

from __future__ import annotations

import hashlib
from math import prod

import tvm
from tvm import ir, relax
from tvm.relax.expr_functor import PyExprMutator, mutator

# Asking costs a call of the VM each run (under 0.4 us): not worth it for biases and multipliers.
MIN_BYTES = 16 * 1024
_GET = "vm.builtin.tensor_cache.get"  # of TVM's runtime: a tensor of its process-wide cache
_CALL_TIR = ir.Op.get("relax.call_tir")


@tvm.transform.module_pass(opt_level=0, name="topi_int8.DetachWeights")
class DetachWeights:
    """Take constant operands of ``call_tir`` out of a module, for TVM's tensor cache to give back.

    Run it after all that folds constants and before ``CallTIRRewrite``. The input module is not
    changed.

    Parameters
    ----------
    weights : dict of str to Tensor
        Receives what is taken out. The name is a digest of the tensor, so that equal ones are held
        once, and libraries in one process do not collide.
    min_bytes : int
        Smaller constants stay.

    Raises
    ------
    ValueError
        For negative `min_bytes`.
    """

    def __init__(
        self, weights: dict[str, tvm.runtime.Tensor], min_bytes: int = MIN_BYTES
    ) -> None:
        if min_bytes < 0:
            raise ValueError(f"min_bytes is {min_bytes}; allowed: 0 or more")
        self.weights, self.min_bytes = weights, min_bytes

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the rewritten module."""
        new = mod.clone()
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                detacher = _Detacher(mod, self.weights, self.min_bytes)
                new.update_func(gvar, detacher.visit_expr(func))
        return new


@mutator
class _Detacher(PyExprMutator):
    def __init__(
        self, mod: tvm.IRModule, weights: dict[str, tvm.runtime.Tensor], min_bytes: int
    ) -> None:
        super().__init__(mod)
        self.weights, self.min_bytes = weights, min_bytes

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        """Give a kernel variables in the place of its large constants."""
        if call.op != _CALL_TIR:
            return super().visit_call_(call)
        func, given, *rest = call.args
        fields = [self._detached(arg) for arg in given]
        new = relax.Call(call.op, [func, relax.Tuple(fields), *rest], call.attrs, call.ty_args)
        return super().visit_call_(new)

    def _detached(self, arg: relax.Expr) -> relax.Expr:
        if not isinstance(arg, ir.GenericConst) or _nbytes(arg.value) < self.min_bytes:
            return arg
        name = _digest(arg.value)
        self.weights[name] = arg.value
        got = relax.op.call_pure_packed(_GET, ir.StringImm(name), ty_args=arg.ty)
        return self.builder_.emit(got)


def _nbytes(tensor: tvm.runtime.Tensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _digest(tensor: tvm.runtime.Tensor) -> str:
    """Return a name that says a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.numpy().data)
    return f"topi_int8.{digest.hexdigest()[:32]}"
