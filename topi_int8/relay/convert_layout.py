"""ConvertLayout: the integer region of a Relay model in our packed layouts, as one pass.

What `relay.build` does at opt_level 3 on the way, with `alter_layout`'s rewrites, this does by
itself: a model can be converted, looked at, saved, and built by whichever executor, at any
opt_level, without a weight packed or a tensor reordered at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import relay

from ..target import features

# What relay.build runs, as far as layouts depend on it: QNN and batch normalisation become plain
# operators, weights constants; then layouts change, and folding constants packs the weights.
LOWERING = (
    relay.transform.RemoveUnusedFunctions,
    relay.qnn.transform.Legalize,
    relay.qnn.transform.CanonicalizeOps,
    relay.transform.SimplifyInference,
    relay.transform.DynamicToStatic,
    relay.transform.FoldConstant,
    relay.transform.FoldScaleAxis,
    relay.transform.SimplifyExpr,
    relay.transform.CanonicalizeCast,
    relay.transform.CanonicalizeOps,
    relay.transform.FlattenAtrousConv,
    relay.transform.InferType,
)
PACKING = (
    relay.transform.Legalize,
    relay.transform.FoldConstant,
    relay.transform.AlterOpLayout,
    relay.transform.FoldConstant,
    relay.transform.InferType,
)


def run(passes: Sequence[Callable], mod: tvm.IRModule, target: Any) -> tvm.IRModule:
    """Return the module after passes, run for a target as opt_level 3 runs them."""
    if not _is_dynamic(mod):  # it takes as long as all the others
        passes = [make for make in passes if make is not relay.transform.DynamicToStatic]
    with target, tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential([make() for make in passes])(mod)


def _is_dynamic(mod: tvm.IRModule) -> bool:
    """Whether a function uses an operator whose shape is an operand."""
    found = False

    def visit(node: Any) -> None:
        nonlocal found
        found |= isinstance(node, tvm.ir.Op) and node.name.startswith("dyn.")

    for function in mod.functions.values():
        relay.analysis.post_order_visit(function, visit)
    return found


@tvm.transform.module_pass(opt_level=0, name="topi_int8.relay.ConvertLayout")
class ConvertLayout:
    """Put integer convolutions and dense layers, and all between them, in packed layouts.

    QNN operators are lowered, weights that are constants are packed, and residual additions,
    concatenations, pooling and per-channel requantization between the convolutions work on the
    packed tensors. Inputs and outputs keep their layouts. The model is built with topi_int8 enabled
    and for the same target.

    Parameters
    ----------
    target : Target or str
        An ``llvm`` CPU target.

    Raises
    ------
    ValueError
        For a target that is not an LLVM CPU; when run, if topi_int8 is disabled.
    """

    def __init__(self, target: Any) -> None:
        self.target = target if isinstance(target, tvm.target.Target) else tvm.target.Target(target)
        features(self.target)

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        """Return the converted module."""
        from . import is_enabled

        if not is_enabled():
            raise ValueError("topi_int8 is disabled; enable() it: nothing else builds its layouts")
        return run((*LOWERING, *PACKING), mod, self.target)
