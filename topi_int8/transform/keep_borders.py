# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""KeepBorders: a convolution writes the border that its only reader would add by a copy.

A 3x3 convolution reads its data with a border; where there is none it copies the tensor first: 10
of 60 us at 56x56x64 on AMX, written to the second-level cache and read back.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.target import Target

from .. import op
from ..kernel import Blocks
from ..strategy import Decision
from ..target import Features, features
from ..workload import INT8_DTYPES
from ._qdq_graph import Graph, functions_of
from .lower import blocks_of, decide, is_nhwc

Border = tuple[int, int, int, int]
_NONE = (0, 0, 0, 0)


@tvm.transform.module_pass(opt_level=0, name="topi_int8.KeepBorders")
class KeepBorders:
    """Move a convolution's padding into the output of the convolution before it.

    Where that is read by nothing else, other than as residuals, is padded with its own zero point,
    and all kernels are of strategies that can. Run it after ConvertLayout. The input module is not
    changed.

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
        for gvar, func in functions_of(mod):
            moves = _moves(Graph(func), self.feats)
            if moves:
                new_mod.update_func(gvar, _Mover(mod, moves).visit_expr(func))
        return new_mod


@dataclass(frozen=True)
class _Move:
    """A padding that moves.

    Attributes
    ----------
    writer, reader : relax.Var
        The convolution that writes the border, and the one whose padding it was.
    border : tuple of int
    adders : tuple of relax.Var
        Convolutions that read the tensor as their residual.
    """

    writer: relax.Var
    reader: relax.Var
    border: Border
    adders: tuple[relax.Var, ...]


def _moves(graph: Graph, feats: Features) -> list[_Move]:
    """Return the paddings that move."""
    convs = {
        var: value
        for var, value in graph.value_of.items()
        if op.is_op(value, "conv2d") and not is_nhwc(value)
    }
    data, added = defaultdict(list), defaultdict(list)
    for var, value in convs.items():
        data[value.args[0]].append(var)
        added[op.operands(value)["residual"]].append(var)

    @cache
    def decision(var: relax.Var) -> Decision:
        """A decision reads the whole weight."""
        return decide(convs[var], feats)

    moves = []
    for writer, value in convs.items():
        readers, adders = data[writer], added[writer]
        if len(readers) != 1 or graph.uses[writer] != 1 + len(adders):
            continue
        reader = readers[0]
        written, read = op.attrs_of(value), op.attrs_of(convs[reader])
        same = written["out_zero_point"] == read["data_zero_point"]
        if not (any(read["padding"]) and same and written["out_dtype"] in INT8_DTYPES):
            continue
        able = all(decision(var).strategy_row.borders for var in (writer, reader, *adders))
        if able and not _copies_without_padding(decision(reader), blocks_of(convs[reader])):
            moves.append(_Move(writer, reader, read["padding"], tuple(adders)))
    return moves


def _copies_without_padding(decision: Decision, blocks: Blocks) -> bool:
    """Whether a kernel copies its data for other reasons than its padding."""
    work = decision.work
    top, left, bottom, right = work.padding
    bare = replace(
        work, padding=_NONE, ih=work.ih + top + bottom, iw=work.iw + left + right
    )
    return replace(decision, work=bare).kernel(blocks).packing.needs_pad


@mutator
class _Mover(PyExprMutator):
    """Rebuilds the convolutions that write a border, and those that read it."""

    def __init__(self, mod: tvm.IRModule, moves: list[_Move]) -> None:
        super().__init__(mod)
        self.changed: dict[relax.Var, dict[str, list[int]]] = defaultdict(dict)
        self.writers = {move.writer for move in moves}
        for move in moves:
            self.changed[move.writer]["out_border"] = list(move.border)
            self.changed[move.reader]["padding"] = list(_NONE)
            for adder in move.adders:
                self.changed[adder]["residual_border"] = list(move.border)

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Give a writer its border, and take a reader's padding away."""
        var = binding.var
        if var not in self.changed:
            super().visit_var_binding_(binding)
            return
        args = [self.visit_expr(arg) for arg in binding.value.args]
        value = self.builder_.normalize(op.rebuild(binding.value, args, **self.changed[var]))
        if var in self.writers:  # another type, and so another variable
            self.set_var_remap(var, self.builder_.emit(value, var.name))
        else:
            super().visit_var_binding_(relax.VarBinding(var, value))
