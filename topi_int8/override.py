"""Makes TVM's own compile use our pipeline for LLVM CPU targets, and puts TVM back as it was.

TVM 0.27 finds the pipeline of a CPU compile in two places, both looked up at call time:

- ``relax.pipeline.PIPELINE_MAP["default"]``: `tvm.compile`, `relax.build` and
  `relax.get_pipeline("default")`, with a target, under ``with target:``, or with neither (TVM then
  builds for plain ``llvm``);
- ``relax.backend.cpu_generic.get_default_pipeline``: `relax.get_default_pipeline(target)`.

``PIPELINE_MAP["default_build"]`` is left alone: ``relax_pipeline="default_build"`` asks for TVM's
own by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax
from tvm.relax.backend import cpu_generic
from tvm.relax.backend.cpu_generic import pipeline as cpu_generic_pipeline
from tvm.target import Target

from .switch import DictSlot, Switch
from .target import is_supported

Factory = Callable[..., tvm.transform.Pass]


def _ours(target: Target) -> tvm.transform.Pass:
    # Imported late: the pipeline imports every room of the package, and TVM calls us long after.
    from topi_int8.transform.pipeline import pipeline

    return pipeline(target)


def _cpu_target(mod: tvm.IRModule) -> Target | None:
    """The CPU target that `mod` is being compiled for, or None if a part is for another."""
    current = Target.current(allow_none=True)
    # With no target at all TVM builds for plain llvm, whatever the module's virtual devices say.
    target = Target("llvm") if current is None else current
    devices = mod.global_infos.get("vdevice", ())
    attributes = [function.attrs or {} for function in mod.functions.values()]
    named = [device.target for device in devices]
    named += [attrs["target"] for attrs in attributes if "target" in attrs]
    return target if all(map(is_supported, (target, *named))) else None


def _wrap_default(stock: Factory) -> Factory:
    """Replace the factory of the pipeline named default; the target shows when it runs."""

    @functools.wraps(stock)
    def default(*args: Any, **kwargs: Any) -> tvm.transform.Pass:
        stock_pass = stock(*args, **kwargs)

        @tvm.transform.module_pass(opt_level=0, name="topi_int8.default")
        def run(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
            target = _cpu_target(mod) if is_enabled() else None
            return (stock_pass if target is None else _ours(target))(mod)

        return run

    return default


def _wrap_target(stock: Factory) -> Factory:
    """Replace the factory of a given CPU target's pipeline."""

    @functools.wraps(stock)
    def get_default_pipeline(target: Target) -> tvm.transform.Pass:
        if not is_enabled() or not is_supported(target):
            return stock(target)

        @tvm.transform.module_pass(opt_level=0, name="topi_int8.default")
        def run(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
            with target:
                mapped = _cpu_target(mod) if is_enabled() else None
                return (stock(target) if mapped is None else _ours(mapped))(mod)

        return run

    return get_default_pipeline


_switch = Switch(
    DictSlot(relax.pipeline.PIPELINE_MAP, "default", _wrap_default),
    DictSlot(vars(cpu_generic), "get_default_pipeline", _wrap_target),
    DictSlot(vars(cpu_generic_pipeline), "get_default_pipeline", _wrap_target),
)
enable, disable = _switch.enable, _switch.disable
disabled, is_enabled = _switch.disabled, _switch.is_enabled
