"""relay.build of integer models: in packed layouts at any opt_level, with indices LLVM can read.

Relay changes layouts at opt_level 3 only, and a PassContext's default is 2. Weights would be packed
at each run, and tensors reordered between layers: some three times slower, silently.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import tvm
from tvm import relay
from tvm.ir.transform import PassContext
from tvm.relay import build_module
from tvm.relay.backend import vm

from ..switch import DictSlot
from ..target import features, is_supported
from ..workload import INT8_DTYPES
from . import call, wide_indices
from .convert_layout import ConvertLayout

_ALTERS = 3  # the opt_level of Relay's own AlterOpLayout
_ANCHORS = {"nn.batch_matmul", "qnn.conv2d", "qnn.dense", "qnn.batch_matmul"} | {
    "nn.conv2d", "nn.dense", *call.PACKED_OPS,
}  # fmt: skip
_64_BITS = ("x86_64", "aarch64")

_LOGGER = logging.getLogger(__name__)


def single_target(target: Any) -> tvm.target.Target | None:
    """Return the target if it is one, or None: several, or none known."""
    if isinstance(target, str):
        target = tvm.target.Target(target)
    if target is None:
        target = tvm.target.Target.current(allow_none=True)
    return target if isinstance(target, tvm.target.Target) else None


def _has_integer_anchor(mod: tvm.IRModule) -> bool:
    """Whether a convolution or matmul, plain or QNN's, has integer data."""
    found = False

    def visit(node: Any) -> None:
        nonlocal found
        if not isinstance(node, relay.Call) or not isinstance(node.op, tvm.ir.Op):
            return
        if node.op.name in _ANCHORS:
            found |= str(node.args[0].checked_type.dtype) in INT8_DTYPES

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


def context_with(config: Mapping[str, Any], disabled: Sequence[str] = ()) -> PassContext:
    """Return the current PassContext with further settings."""
    current = PassContext.current()
    return PassContext(
        current.opt_level, [*current.required_pass], [*current.disabled_pass, *disabled],
        [*current.instruments], {**current.config, **config},
    )  # fmt: skip


def _wide_indices(target: tvm.target.Target) -> AbstractContextManager:
    """Return what widens the indices of our kernels where addresses have 64 bits."""
    if features(target).arch not in _64_BITS:
        return nullcontext()
    if PassContext.current().instruments:
        # Leaving a context of ours would tell them that theirs is left: they forget what they saw.
        _LOGGER.warning("PassContext with instruments: indices stay narrow, tiles may spill")
        return nullcontext()
    return context_with(wide_indices.setting())


def _ours(build: Callable[..., Any]) -> Callable[..., Any]:
    """Return a build function that prepares integer models for our kernels."""
    signature = inspect.signature(build)
    name = next(iter(signature.parameters))

    @functools.wraps(build)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        mod, target = bound.arguments[name], single_target(bound.arguments.get("target"))
        if isinstance(mod, relay.Function):
            mod = tvm.IRModule.from_expr(mod)
        served = target is not None and is_supported(target) and isinstance(mod, tvm.IRModule)
        if not served or not _has_integer_anchor(mod):
            return build(*args, **kwargs)
        context = PassContext.current()
        alters = "AlterOpLayout" not in map(str, context.disabled_pass)
        if context.opt_level < _ALTERS and alters:
            mod = with_params(mod, bound.arguments.get("params"))
            bound.arguments[name] = ConvertLayout(target)(mod)
        with _wide_indices(target):
            return build(*bound.args, **bound.kwargs)

    return wrapper


SLOTS: tuple[DictSlot, ...] = (
    DictSlot(vars(relay), "build", _ours),
    DictSlot(vars(build_module), "build", _ours),
    DictSlot(vars(vm), "compile", _ours),
)
