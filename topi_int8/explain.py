"""explain: which strategy each operator of a model gets, and why the faster ones declined.

And a way to see that quantization really happened: `library_counts` counts the dot-product
instructions and the data types of what was built. This is Relax's; `relay/explain.py` is Relay's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import tvm
from tvm import relax
from tvm.target import Target

from intrinsics import byte_lookup

from . import op
from .explanation import Explanation, LibraryCounts, Other, Row, count_sources
from .target import features
from .transform._elementwise import is_pointwise
from .transform._qdq_graph import Graph
from .transform.fuse_elementwise import declined
from .transform.lower import Lower, decide
from .transform.pipeline import integer_passes
from .transform.schedule_rest import ScheduleRest, unscheduled
from .workload import TOO_WIDE

__all__ = ["Explanation", "LibraryCounts", "Other", "Row", "explain", "library_counts"]

_PLAIN = "plain schedule: vectorised, parallel"
_NAMES = 8  # of operators in a note
# What it means for these to be left to TVM, where that is not just "scheduled plainly".
_SLOW = {
    "relax.nn.conv2d": "SLOW: no strategy of ours; symbolic shape or an unsupported type or layout",
    "relax.matmul": "SLOW: no strategy of ours; symbolic shape, or float with a dynamic operand",
    "relax.nn.conv2d_transpose": "SLOW: transposed convolutions have no int8 strategy",
    "relax.nn.conv1d": "SLOW: 1-D convolutions have no int8 strategy",
    "relax.nn.conv3d": "SLOW: 3-D convolutions have no int8 strategy",
}
# Why an operator is computed in float, where it is none that `declined` gives reasons for.
_FLOAT = {
    "relax.image.resize2d": "it interpolates",
    "relax.mean": "not over the height and width of an image, or it reads or makes what is float",
    "relax.nn.log_softmax": "it sums exponentials",
    "relax.nn.softmax": "it sums exponentials",
}
_FLOAT_ELSE = "no integer kernel, or what it reads is float"
_PAIRS = ("relax.dequantize", "relax.quantize")


def _is_float(call: Any) -> bool:
    """Return whether a call of an operator left to TVM computes float32."""
    computes = not op.op_name(call).startswith(op.NAMESPACE) and op.op_name(call) not in _PAIRS
    return computes and str(getattr(call.ty, "dtype", "")) == "float32"


def explain(
    mod: tvm.IRModule, target: Target | str | dict, show: bool = True, layout: str = "NCHWc"
) -> Explanation:
    """Say which strategy each operator of a model gets on a target, and why not a faster one.

    Parameters
    ----------
    mod : IRModule
        Relax, as given to ``tvm.compile``: fp32, QDQ or raw integer. Not changed.
    target : Target or str or dict
        An ``llvm`` CPU target.
    show : bool
        Print the tables too.
    layout : str
        As `pipeline`'s.

    Returns
    -------
    Explanation

    Raises
    ------
    ValueError
        For a target that is not an LLVM CPU, or another layout.
    """
    target = target if isinstance(target, Target) else Target(target)
    feats = features(target)
    with target:
        mod = tvm.transform.Sequential(integer_passes(target, layout))(mod)
        rows: list[Row] = []
        others: Counter = Counter()
        slow: dict[str, list[str]] = {name: [] for name in _SLOW}
        wide: Counter = Counter()
        floats = Counter(declined(mod))

        def visit(call: Any) -> None:
            name = op.op_name(call)
            if not name:
                return
            if (dtype := _quantized_type(call)) in TOO_WIDE:
                wide[name, dtype] += 1
                return
            if not (op.is_op(call, "conv2d") or op.is_op(call, "matmul")):
                others[name] += 1
                if _is_float(call) and not is_pointwise(call) and name not in _SLOW:
                    floats[name, _FLOAT.get(name, _FLOAT_ELSE)] += 1
                if name in slow:
                    slow[name].append(names.get(call, f"op{others[name]}"))
                return
            attrs, decision = op.attrs_of(call), decide(call, feats)
            rows.append(
                Row(
                    attrs.get("name", f"op{len(rows)}"), decision.strategy_row.op, decision.work,
                    decision.strategy, decision.intrinsic, attrs.get("data_layout", "row-major"),
                    attrs.get("out_layout", "row-major"), decision.declined,
                )
            )  # fmt: skip

        for _, func in mod.functions_items():
            if isinstance(func, relax.Function):
                names = {value: var.name for var, value in Graph(func).value_of.items()}
                relax.analysis.post_order_visit(func, visit)
        for (name, _), count in floats.items():
            others[name] -= count
        final = tvm.transform.Sequential(
            [
                Lower(target, layout),
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                ScheduleRest(target),
            ]
        )(mod)
    shuffle = byte_lookup.best(feats.arch, feats.llvm)
    notes = {name: f"{_SLOW[name]}: {_listed(calls)}" for name, calls in slow.items()} | {
        "topi_int8.lookup": f"table of 256: {shuffle.name if shuffle else 'a load a byte'}",
        "topi_int8.concat": "vectors moved from block to block",
    }
    explanation = Explanation(
        f"llvm ({feats.isas[0]})",
        tuple(rows),
        (
            *(
                Other(name, count, notes.get(name, _PLAIN))
                for name, count in sorted((+others).items())
            ),
            *(
                Other(name, count, f"{_PLAIN}, in float: {reason}")
                for (name, reason), count in sorted(floats.items())
            ),
            *(
                Other(name, count, f"SLOW: {dtype}, and float between: {TOO_WIDE[dtype]}")
                for (name, dtype), count in sorted(wide.items())
            ),
        ),
        unscheduled(final),
    )
    if show:
        explanation.show()
    return explanation


def _listed(names: list[str]) -> str:
    """Return some names, and how many more there are."""
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more


def _quantized_type(call: Any) -> str:
    """Return the integer type of a quantize, or of an activation's dequantize; "" for others."""
    name = op.op_name(call)
    if name == "relax.quantize":
        return str(call.attrs.out_dtype)
    is_activation = name == "relax.dequantize" and isinstance(call.args[0], relax.Var)
    return str(call.args[0].ty.dtype) if is_activation else ""


def library_counts(executable: Any) -> LibraryCounts:
    """Count dot-product instructions and data types of what ``tvm.compile`` built.

    Parameters
    ----------
    executable : tvm.runtime.Executable or VMExecutable
        Straight from ``tvm.compile`` (a library loaded from disk keeps no IR).

    Returns
    -------
    LibraryCounts

    Raises
    ------
    ValueError
        If it holds no LLVM module with source.
    """
    module = executable.mod
    modules = [m for m in (module, *module.imports) if m.kind == "llvm"]
    if not modules:
        raise ValueError(f"executable holds {module.kind}; allowed: one with an llvm module")
    return count_sources((m.inspect_source("asm"), m.inspect_source("ll")) for m in modules)
