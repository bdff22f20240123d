"""Run a Relax module that holds topi_int8 operators: they in numpy, the rest by stock TVM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Op
from tvm.relax.expr_functor import PyExprMutator, mutator

from tests import reference
from topi_int8 import op
from topi_int8.layout import Layout


def _conv2d(call: relax.Call, *arrays: np.ndarray) -> np.ndarray:
    attrs = op.attrs_of(call)
    layout, out_layout = Layout.parse(attrs["data_layout"]), Layout.parse(attrs["out_layout"])
    work = op.conv2d_workload(call)
    named = _named(call, arrays)
    named["data"] = layout.unpack(named["data"], work.ic)
    named["weight"] = named["weight"].transpose([attrs["kernel_layout"].index(c) for c in "OIHW"])
    if named["residual"] is not None:
        named["residual"] = out_layout.unpack(named["residual"], work.oc)
    return out_layout.pack(reference.conv2d(work, **named))


def _named(call: relax.Call, arrays: tuple[np.ndarray, ...]) -> dict[str, Any]:
    left = list(arrays)
    return {k: None if v is None else left.pop(0) for k, v in op.operands(call).items()}


def _matmul(call: relax.Call, *arrays: np.ndarray) -> np.ndarray:
    return reference.matmul(op.matmul_workload(call), **_named(call, arrays))


def _avg_pool2d(call: relax.Call, data: np.ndarray) -> np.ndarray:
    attrs = op.attrs_of(call)
    layout = Layout.parse(attrs.pop("layout"))
    nchw = layout.unpack(data, attrs.pop("channels"))
    return layout.pack(reference.avg_pool2d(nchw, **attrs))


def _concat(call: relax.Call, *arrays: np.ndarray) -> np.ndarray:
    attrs = op.attrs_of(call)
    channels, block = attrs.pop("channels"), attrs.pop("out_block")
    count = len(channels)
    joined = np.concatenate([
        Layout.packed(part.shape[-1]).unpack(part, c)
        for part, c in zip(arrays[:count], channels, strict=True)
    ], 1)  # fmt: skip
    packed = Layout.packed(block).pack(joined)
    return reference.affine(packed, *arrays[count:], **attrs) if attrs.pop("affine") else packed


_NUMPY: dict[str, Callable[..., np.ndarray]] = {
    "conv2d": _conv2d,
    "matmul": _matmul,
    "avg_pool2d": _avg_pool2d,
    "affine": lambda call, *arrays: reference.affine(*arrays, **op.attrs_of(call)),
    "concat": _concat,
    "lookup": lambda call, data, table: reference.lookup(data, table),
    "multiply": lambda call, a, b: reference.multiply(a, b, **op.attrs_of(call)),
    "add": lambda call, a, b: reference.add(a, b, **op.attrs_of(call)),
    "requantize": lambda call, a: reference.requantize(a, **op.attrs_of(call)),
}


@mutator
class _ToPacked(PyExprMutator):
    """Replaces each topi_int8 call by a call of a Python function that computes it in numpy."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        name = call.op.name if isinstance(call.op, Op) else ""
        if not name.startswith("topi_int8."):
            return super().visit_call_(call)
        compute = _NUMPY[name.removeprefix("topi_int8.")]

        def packed(*tensors: Any) -> None:
            *inputs, out = tensors
            result = compute(call, *(t.numpy() for t in inputs))
            assert result.dtype == str(out.dtype) and result.shape == tuple(out.shape)
            out.copyfrom(np.ascontiguousarray(result))

        unique = f"tests.transform.{name}.{id(call)}"
        tvm.register_global_func(unique, packed, override=True)
        args = [self.visit_expr(arg) for arg in call.args]
        return relax.op.call_dps_packed(unique, args, out_ty=call.ty)


def run(mod: tvm.IRModule, *inputs: np.ndarray) -> list[np.ndarray]:
    """Return the outputs of `main`; the stock pipeline runs whatever is not ours."""
    mod = tvm.IRModule({gvar: func for gvar, func in mod.functions_items()})
    for gvar, func in list(mod.functions_items()):
        if isinstance(func, relax.Function):
            mod.update_func(gvar, _ToPacked(mod).visit_expr(func))
    built = tvm.compile(mod, "llvm", relax_pipeline=relax.get_pipeline("default_build"))
    vm = relax.VirtualMachine(built, tvm.cpu())
    out = vm["main"](*(tvm.runtime.tensor(x) for x in inputs))
    return [t.numpy() for t in out] if not isinstance(out, tvm.runtime.Tensor) else [out.numpy()]


def count(mod: tvm.IRModule) -> dict[str, int]:
    """Return how often each operator is called in a module's Relax functions."""
    found: dict[str, int] = {}

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and isinstance(expr.op, Op):
            found[expr.op.name] = found.get(expr.op.name, 0) + 1

    for _, func in mod.functions_items():
        if isinstance(func, relax.Function):
            relax.analysis.post_order_visit(func, visit)
    return found


def calls(mod: tvm.IRModule, name: str) -> list[relax.Call]:
    """Return the calls of `topi_int8.<name>` in `main`, in order."""
    found: list[relax.Call] = []

    def visit(expr: relax.Expr) -> None:
        if op.is_op(expr, name):
            found.append(expr)

    relax.analysis.post_order_visit(mod["main"], visit)
    return found
