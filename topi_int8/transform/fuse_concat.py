"""FuseConcat: an affine of a concat that nothing else reads -> one pass over the concat's inputs.

A DenseNet layer is ``conv(relu(batch_norm(concat(everything before))))``.
"""

from __future__ import annotations

import tvm
from tvm import relax

from .. import op
from ._qdq_graph import Graph, rewrite_functions


@tvm.transform.module_pass(opt_level=0, name="topi_int8.FuseConcat")
class FuseConcat:
    """Rewrite ``affine(topi_int8.concat(parts))`` to one concat.

    Run it after ConvertLayout, which makes the concats. The input module is not changed.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the rewritten module."""
        return rewrite_functions(mod, _Rules)


class _Rules:
    """The rewrite of one binding."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def rewrite(self, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        """Return the concat that stands for an affine of one; None to keep the binding."""
        if not op.is_op(value, "affine") or not self.graph.single_use(value.args[0]):
            return None
        joined = self.graph.value(value.args[0])
        if not op.is_op(joined, "concat") or op.attrs_of(joined)["affine"]:
            return None
        args = [self.graph.new(arg) for arg in (*joined.args, *value.args[1:])]
        return op.rebuild(joined, args, **op.attrs_of(value), affine=True)
