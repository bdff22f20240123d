"""A Relax interpreter in torch float32: the reference that whole graphs are held against.

It runs an fp32 or a QDQ graph exactly as written, operator by operator: QDQ stays float arithmetic
between quantize (divide, round half to even, add, saturate) and dequantize. It shares no code with
TVM's lowering nor with ours. The integer operators that FuseQDQ makes are run by tests.reference.
An operator it does not know is an error, never a guess.

>>> simulate(mod, x)                  # the output
>>> simulate(mod, x, trace=True)[1]   # and every tensor by variable name
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tvm
from tvm import ir, relax, tirx

from tests import reference
from topi_int8 import op
from topi_int8.workload import DTYPE_RANGE


def simulate(
    mod: tvm.IRModule,
    *inputs: np.ndarray,
    trace: bool = False,
    forced: Mapping[str, np.ndarray] | None = None,
) -> Any:
    """Return what ``main`` computes, as numpy (a tuple for several outputs).

    With ``trace``, return (output, {variable name: value}). Variables named in ``forced`` are
    computed and traced, but what comes after them reads the forced value: so each step can be held
    against a system under test on that system's own inputs.
    """
    func = mod["main"]
    forced = forced or {}
    computed: dict[str, Any] = {}
    env: dict[relax.Var, Any] = {
        param: torch.from_numpy(np.ascontiguousarray(x))
        for param, x in zip(func.params, inputs, strict=True)
    }
    with torch.no_grad():
        for block in func.body.blocks:
            for binding in block.bindings:
                var = binding.var
                env[var] = computed[var.name] = _evaluate(binding.value, env)
                if var.name in forced:
                    env[var] = torch.from_numpy(forced[var.name])
    result = _to_numpy(_evaluate(func.body.body, env))
    if not trace:
        return result
    return result, {name: _to_numpy(value) for name, value in computed.items()}


def _to_numpy(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_to_numpy(v) for v in value)
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _evaluate(expr: Any, env: dict[relax.Var, Any]) -> Any:
    if isinstance(expr, relax.Var):
        return env[expr]
    if isinstance(expr, ir.GenericConst):
        return torch.from_numpy(np.array(expr.value.numpy()))
    if isinstance(expr, relax.Tuple):
        return tuple(_evaluate(field, env) for field in expr.fields)
    if isinstance(expr, relax.TupleGetItem):
        return _evaluate(expr.tuple_value, env)[expr.index]
    if isinstance(expr, relax.ShapeExpr):
        return [int(d) for d in expr.values]
    if isinstance(expr, (tirx.IntImm, tirx.FloatImm)):
        return expr.value
    if isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op):
        run = OPS.get(expr.op.name)
        if run is None:
            raise NotImplementedError(f"simulate: {expr.op.name}")
        return run(expr, *(_evaluate(arg, env) for arg in expr.args))
    raise NotImplementedError(f"simulate: {type(expr).__name__}")


def _ints(values: Any) -> list[int]:
    return [int(v) for v in values]


def _padded(data: torch.Tensor, padding: Any, value: float = 0.0) -> torch.Tensor:
    top, left, bottom, right = _ints(padding)
    return F.pad(data, (left, right, top, bottom), value=value) if any(_ints(padding)) else data


def _conv2d(call: relax.Call, data: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    a = call.attrs
    assert (a.data_layout, a.kernel_layout) == ("NCHW", "OIHW"), "simulate: NCHW, OIHW only"
    data = _padded(data, a.padding)
    return F.conv2d(
        data, weight, None, _ints(a.strides), 0, _ints(a.dilation), int(a.groups)
    )  # fmt: skip


def _max_pool2d(call: relax.Call, data: torch.Tensor) -> torch.Tensor:
    a = call.attrs
    padding = _ints(a.padding)
    assert padding[:2] == padding[2:], "simulate: symmetric pooling padding only"
    return F.max_pool2d(
        data, _ints(a.pool_size), _ints(a.strides), padding[:2], _ints(a.dilation), a.ceil_mode
    )


def _avg_pool2d(call: relax.Call, data: torch.Tensor) -> torch.Tensor:
    a = call.attrs
    padding = _ints(a.padding)
    assert padding[:2] == padding[2:], "simulate: symmetric pooling padding only"
    return F.avg_pool2d(
        data, _ints(a.pool_size), _ints(a.strides), padding[:2], a.ceil_mode, a.count_include_pad
    )


def _batch_norm(call: relax.Call, data: torch.Tensor, *params: torch.Tensor) -> tuple:
    gamma, beta, mean, var = params
    assert not call.attrs.training
    out = F.batch_norm(data, mean, var, gamma, beta, False, 0.0, float(call.attrs.epsilon))
    return out, mean, var


def _along(values: torch.Tensor, data: torch.Tensor, axis: int) -> torch.Tensor:
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * data.ndim
    shape[axis] = -1
    return values.reshape(shape)


def _quantize(
    call: relax.Call, data: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    axis, dtype = int(call.attrs.axis), str(call.attrs.out_dtype)
    low, high = DTYPE_RANGE[dtype]
    q = torch.round(data / _along(scale, data, axis)) + _along(zero_point, data, axis)
    return q.clamp(low, high).to(getattr(torch, dtype))


def _dequantize(
    call: relax.Call, data: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    axis = int(call.attrs.axis)
    centred = data.to(torch.int32) - _along(zero_point, data, axis).to(torch.int32)
    return centred.to(torch.float32) * _along(scale, data, axis)


def _layer_norm(call: relax.Call, data: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
    a = call.attrs
    assert _ints(a.axes) in ([-1], [data.ndim - 1]), "simulate: layer_norm of the last axis only"
    return F.layer_norm(data, data.shape[-1:], *affine, eps=float(a.epsilon))


def _clip(_call: relax.Call, data: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return data.clamp(low, high)


def _split(call: relax.Call, data: torch.Tensor) -> tuple:
    parts, axis = call.attrs.indices_or_sections, int(call.attrs.axis)
    if hasattr(parts, "__len__"):
        return tuple(torch.tensor_split(data, _ints(parts), axis))
    return tuple(torch.tensor_split(data, int(parts), axis))


def _elementwise(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda _call, *args: function(*args)


def _fused(function: Callable[..., np.ndarray], workload_of: Callable) -> Callable[..., Any]:
    """Return how to run a topi_int8 conv2d or matmul: by the reference, on its workload."""

    def run(call: relax.Call, *args: torch.Tensor) -> torch.Tensor:
        attrs = op.attrs_of(call)
        plain = attrs.get("data_layout", "NCHW"), attrs.get("kernel_layout", "OIHW")
        assert plain == ("NCHW", "OIHW"), "simulate: NCHW, OIHW only"
        present = [name for name, arg in op.operands(call).items() if arg is not None]
        arrays = {name: x.numpy() for name, x in zip(present, args, strict=True)}
        for name in {"bias", "scale"} & set(present):
            arrays[name] = arrays[name].reshape(-1)
        return torch.from_numpy(function(workload_of(call), **arrays))

    return run


def _plain(function: Callable[..., np.ndarray], *drop: str) -> Callable[..., Any]:
    """Return how to run another topi_int8 operator: by the reference, on its attributes."""

    def run(call: relax.Call, *args: torch.Tensor) -> torch.Tensor:
        attrs = {k: v for k, v in op.attrs_of(call).items() if k not in drop}
        return torch.from_numpy(function(*(x.numpy() for x in args), **attrs))

    return run


OPS: dict[str, Callable[..., Any]] = {
    "relax.nn.conv2d": _conv2d,
    "relax.matmul": _elementwise(torch.matmul),
    "relax.nn.batch_norm": _batch_norm,
    "relax.nn.layer_norm": _layer_norm,
    "relax.nn.max_pool2d": _max_pool2d,
    "relax.nn.avg_pool2d": _avg_pool2d,
    "relax.nn.adaptive_avg_pool2d": lambda call, x: F.adaptive_avg_pool2d(
        x, _ints(call.attrs.output_size)
    ),
    "relax.mean": lambda call, x: x.mean(_ints(call.attrs.axis), keepdim=bool(call.attrs.keepdims)),
    "relax.quantize": _quantize,
    "relax.dequantize": _dequantize,
    "relax.clip": _clip,
    "relax.nn.relu": _elementwise(torch.relu),
    "relax.nn.silu": _elementwise(F.silu),
    "relax.nn.gelu": _elementwise(F.gelu),
    "relax.sigmoid": _elementwise(torch.sigmoid),
    "relax.add": _elementwise(torch.add),
    "relax.subtract": _elementwise(torch.sub),
    "relax.multiply": _elementwise(torch.mul),
    "relax.divide": _elementwise(torch.div),
    "relax.maximum": _elementwise(torch.maximum),
    "relax.minimum": _elementwise(torch.minimum),
    "relax.zeros_like": _elementwise(torch.zeros_like),
    "relax.reshape": lambda _call, x, shape: x.reshape(shape),
    "relax.broadcast_to": lambda _call, x, shape: x.broadcast_to(shape),
    "relax.flatten": lambda _call, x: x.reshape(-1),
    "relax.squeeze": lambda call, _x: _x.reshape(_ints(call.ty.shape)),
    "relax.expand_dims": lambda call, x: x.reshape(_ints(call.ty.shape)),
    "relax.permute_dims": lambda call, x: x.permute(_ints(call.attrs.axes)),
    "relax.concat": lambda call, xs: torch.cat(xs, int(call.attrs.axis)),
    "relax.split": _split,
    "topi_int8.conv2d": _fused(reference.conv2d, op.conv2d_workload),
    "topi_int8.matmul": _fused(reference.matmul, op.matmul_workload),
    "topi_int8.add": _plain(reference.add),
    "topi_int8.requantize": _plain(reference.requantize),
    "topi_int8.avg_pool2d": _plain(reference.avg_pool2d, "layout", "channels"),
    "relax.nn.softmax": lambda call, x: torch.softmax(x, int(call.attrs.axis)),
}
