"""relay.build below opt_level 3: integer models in packed layouts there too.

Relay changes layouts at opt_level 3 only, and a PassContext's default is 2. Weights would be packed
at each run, and tensors reordered between layers: some three times slower, silently.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import relay
from tvm.relay import build_module
from tvm.relay.backend import vm

from ..switch import DictSlot
from ..target import is_supported
from ..workload import INT8_DTYPES
from .convert_layout import ConvertLayout

_ALTERS = 3  # the opt_level of Relay's own AlterOpLayout
_ANCHORS = ("conv2d", "dense", "batch_matmul")


def single_target(target: Any) -> tvm.target.Target | None:
    """Return the target if it is one, or None: several, or none known."""
    if isinstance(target, str):
        target = tvm.target.Target(target)
    if target is None:
        target = tvm.target.Target.current(allow_none=True)
    return target if isinstance(target, tvm.target.Target) else None


def _has_integer_anchor(mod: tvm.IRModule) -> bool:
    """Whether a convolution or matmul, plain or QNN's, has an integer weight."""
    found = False

    def visit(node: Any) -> None:
        nonlocal found
        if not isinstance(node, relay.Call) or not isinstance(node.op, tvm.ir.Op):
            return
        if node.op.name.rpartition(".")[2] in _ANCHORS:
            found |= str(node.args[1].checked_type.dtype) in INT8_DTYPES

    for function in relay.transform.InferType()(mod).functions.values():
        relay.analysis.post_order_visit(function, visit)
    return found


def with_params(mod: tvm.IRModule, params: Mapping[str, Any] | None) -> tvm.IRModule:
    """Return a module whose parameters are constants; the one given is not changed."""
    if not params:
        return mod
    mod = tvm.IRModule(mod.functions, mod.type_definitions, attrs=mod.attrs)
    mod["main"] = build_module.bind_params_by_name(mod["main"], params)
    return mod


def _packed_first(build: Callable[..., Any]) -> Callable[..., Any]:
    """Return a build function that converts layouts first where Relay will not."""
    signature = inspect.signature(build)
    name = next(iter(signature.parameters))

    @functools.wraps(build)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        mod, target = bound.arguments[name], single_target(bound.arguments.get("target"))
        context = tvm.transform.PassContext.current()
        disabled = "AlterOpLayout" in map(str, context.disabled_pass)
        if context.opt_level >= _ALTERS or disabled or target is None or not is_supported(target):
            return build(*args, **kwargs)
        if isinstance(mod, relay.Function):
            mod = tvm.IRModule.from_expr(mod)
        if not isinstance(mod, tvm.IRModule) or not _has_integer_anchor(mod):
            return build(*args, **kwargs)
        mod = with_params(mod, bound.arguments.get("params"))
        bound.arguments[name] = ConvertLayout(target)(mod)
        return build(*bound.args, **bound.kwargs)

    return wrapper


SLOTS: tuple[DictSlot, ...] = (
    DictSlot(vars(relay), "build", _packed_first),
    DictSlot(vars(build_module), "build", _packed_first),
    DictSlot(vars(vm), "compile", _packed_first),
)
