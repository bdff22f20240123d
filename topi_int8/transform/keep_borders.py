# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""KeepBorders: a convolution writes the border that its only reader would add by a copy.

A 3x3 convolution reads its data with a border; where there is none it copies the tensor first: 10
of 60 us at 56x56x64 on AMX, written to the second-level cache and read back.
"""

from __future__ import annotations

from dataclasses import replace

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.target import Target

from .. import op
from ..kernel import Blocks
from ..layout import Layout
from ..strategy import Decision
from ..target import Features, features
from ..workload import INT8_DTYPES
from ._qdq_graph import Graph
from .lower import decide, is_nhwc

Border = tuple[int, int, int, int]
_NONE = (0, 0, 0, 0)


@tvm.transform.module_pass(opt_level=0, name="topi_int8.KeepBorders")
class KeepBorders:
    """Move a convolution's padding into the output of the convolution before it.

    Where that is read by nothing else, is padded with its own zero point, and both kernels are of a
    strategy that can. Run it after ConvertLayout. The input module is not changed.

    Parameters
    ----------
    target : Target
        Chooses the strategies.
    """

    def __init__(self, target: Target) -> None:
        self.feats = features(target)

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the rewritten module."""
        new_mod = mod.clone()
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function) and not (func.attrs and "Primitive" in func.attrs):
                moved = _moved(Graph(func), self.feats)
                if moved:
                    new_mod.update_func(gvar, _Mover(mod, moved).visit_expr(func))
        return new_mod


def _moved(graph: Graph, feats: Features) -> dict[relax.Var, relax.Var]:
    """Return the convolutions whose padding moves, and to which."""
    moved = {}
    for reader, value in graph.value_of.items():
        if not op.is_op(value, "conv2d") or is_nhwc(value):
            continue
        source = value.args[0]
        before = graph.value(source)
        if before is None or not op.is_op(before, "conv2d") or is_nhwc(before):
            continue
        if graph.single_use(source) and _moves(before, value, feats):
            moved[reader] = source
    return moved


def _moves(before: relax.Call, reader: relax.Call, feats: Features) -> bool:
    """Whether the padding of `reader` is worth a border of `before`, and may be one."""
    written, read = op.attrs_of(before), op.attrs_of(reader)
    if not any(read["padding"]) or written["out_dtype"] not in INT8_DTYPES:
        return False
    if written["out_zero_point"] != read["data_zero_point"]:
        return False
    writes, reads = decide(before, feats), decide(reader, feats)
    if not (writes.strategy_row.borders and reads.strategy_row.borders):
        return False
    top, left, bottom, right = read["padding"]
    work = reads.work
    bare = replace(
        work, padding=_NONE, ih=work.ih + top + bottom, iw=work.iw + left + right
    )
    return _copies(reads, reader) and not _copies(replace(reads, work=bare), reader)


def _copies(decision: Decision, call: relax.Call) -> bool:
    """Whether the kernel copies its data before it reads them."""
    attrs = op.attrs_of(call)
    blocks = Blocks(*(Layout.parse(attrs[f"{of}_layout"]).block for of in ("data", "out")))
    return decision.kernel(blocks).packing.needs_pad


@mutator
class _Mover(PyExprMutator):
    """Rebuilds the convolutions that write a border, and those that read it."""

    def __init__(self, mod: tvm.IRModule, moved: dict[relax.Var, relax.Var]) -> None:
        super().__init__(mod)
        self.readers = set(moved)
        self.border: dict[relax.Var, Border] = dict.fromkeys(moved.values(), _NONE)
        self.source = moved

    def visit_dataflow_block_(self, block: relax.DataflowBlock) -> relax.BindingBlock:
        """Note the paddings first: who writes a border comes before who reads it."""
        for binding in block.bindings:
            if binding.var in self.readers:
                self.border[self.source[binding.var]] = op.attrs_of(binding.value)["padding"]
        return super().visit_dataflow_block_(block)

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Give a writer its border, and take a reader's padding away."""
        var, changed = binding.var, {}
        if var in self.readers:
            changed["padding"] = list(_NONE)
        if any(self.border.get(var, _NONE)):
            changed["out_border"] = list(self.border[var])
        if not changed:
            super().visit_var_binding_(binding)
            return
        args = [self.visit_expr(arg) for arg in binding.value.args]
        value = self.builder_.normalize(op.rebuild(binding.value, args, **changed))
        if "out_border" in changed:  # another type, and so another variable
            self.set_var_remap(var, self.builder_.emit(value, var.name))
        else:
            super().visit_var_binding_(relax.VarBinding(var, value))
