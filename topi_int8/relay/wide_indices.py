"""Indices of 64 bits in our kernels: with 32, LLVM may not see how a tile's addresses differ.

TVM 0.17 indexes by int32, and LLVM extends each index for the address. It may move the extension
inside sums that are known not to wrap, but it forgets that they do not when it factors strides out,
as it does where batches are a multiple of channel blocks apart. Then it computes the address of
each pixel of a tile apart, and spills accumulators for them. Sums of 64 bits need no extension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import tir
from tvm.ir.transform import PassContext

MARK = "topi_int8_kernel"  # a pragma of TE's, an attribute of TIR's functions
_PRAGMA = f"pragma_{MARK}"
_PASSES = "tir.add_lower_pass"
_PHASE = 3  # its passes see the indices that LLVM will
_NAME = "topi_int8.WideIndices"
_WIDE = "int64"
_BINARY = (tir.Add, tir.Sub, tir.Mul, tir.FloorDiv, tir.FloorMod, tir.Min, tir.Max)
_ACCESSES = ["tir.BufferLoad", "tir.BufferStore"]


def lower_pass(phase: int, made: Any) -> dict[str, Any]:
    """Return the setting of the current PassContext with one more pass of lowering."""
    return {_PASSES: [*PassContext.current().config.get(_PASSES, ()), [phase, made]]}


def setting() -> Mapping[str, Any]:
    """Return the setting that widens the indices of marked kernels."""
    return lower_pass(_PHASE, WideIndices)


def mark(stage: Any) -> None:
    """Mark a stage of TE as part of a kernel of ours, if anybody will look for it."""
    passes = PassContext.current().config.get(_PASSES, ())
    if any(made.info.name == _NAME for _, made in passes):
        stage.pragma(stage.op.axis[0], MARK)


def _widened(index: Any) -> Any:
    """Return an index of int32, a vector of them too, in int64."""
    if isinstance(index, tir.IntImm):
        return tir.IntImm(_WIDE, index.value)
    if isinstance(index, _BINARY):
        return type(index)(_widened(index.a), _widened(index.b))
    if isinstance(index, tir.Ramp):
        return tir.Ramp(_widened(index.base), _widened(index.stride), index.lanes)
    if isinstance(index, tir.Broadcast):
        return tir.Broadcast(_widened(index.value), index.lanes)
    return index.astype(index.dtype.replace("int32", _WIDE))


def _widen_access(node: Any) -> Any:
    indices = [_widened(index) for index in node.indices]
    if isinstance(node, tir.BufferLoad):
        return tir.BufferLoad(node.buffer, indices)
    return tir.BufferStore(node.buffer, node.value, indices)


@tir.transform.prim_func_pass(opt_level=0, name=_NAME)
def WideIndices(func: tir.PrimFunc, _mod: tvm.IRModule, _ctx: PassContext) -> tir.PrimFunc:
    """Return the function with indices of int64, and without its mark, if it is marked."""
    marked = bool(func.attrs) and MARK in func.attrs

    def unmark(node: Any) -> Any:
        nonlocal marked
        if node.attr_key != _PRAGMA:
            return None
        marked = True
        return node.body

    body = tir.stmt_functor.ir_transform(func.body, None, unmark, ["tir.AttrStmt"])
    if not marked:
        return func
    return func.with_body(tir.stmt_functor.ir_transform(body, None, _widen_access, _ACCESSES))
