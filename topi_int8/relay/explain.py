"""explain and library_counts on Relay: which kernel each operator of a model gets, and why.

The passes that change layouts are run as `relay.build` runs them, then each convolution and matmul
is put to `strategy.choose`, which the op strategies themselves ask: what is said here is what is
built. What those passes rewrite, they rewrite in place and order; so a call's name, and the reason
why it was left to upstream, are read where it stood before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import tvm
from tvm import relay, te

from ..explanation import Explanation, LibraryCounts, Other, Row, count_sources
from ..kernel import Workload
from ..target import Features, features
from ..workload import INT8_DTYPES
from .alter_layout import alter_conv2d, alter_dense
from .build import with_params
from .call import CONV2D, DENSE, NotOurs
from .convert_layout import LOWERING, PACKING, run
from .strategy import Choice, choose

# Convolutions and matmuls, ours or not, plain, QNN's or packed; not what transforms their weights.
_ANCHOR = re.compile(
    r"q?nn\.(?!.*(?<!without_)weight_transform$)"
    r".*?(batch_matmul|matmul|dense|conv[123]d(?:_transpose)?)"
)
_PACKED_EARLY = "weight packed at compile time"  # what is faster than packing at run time
_ALTERS = {CONV2D: alter_conv2d, DENSE: alter_dense}
_NOTES = {"layout_transform": "SLOW: a pass over the tensor for each"}
_NOTE = "TVM's own schedule"


@dataclass(frozen=True)
class _Anchor:
    """A convolution or matmul: its call, and what it is in a word ("conv2d")."""

    call: Any
    kind: str

    @property
    def op(self) -> str:
        """Name of the Relay operator."""
        return self.call.op.name

    @property
    def operands(self) -> tuple[Any, Any]:
        """Types of data and weight."""
        data, weight = self.call.args[:2]
        return data.checked_type, weight.checked_type

    @property
    def is_integer(self) -> bool:
        """Whether an operand is of integers."""
        return any("int" in str(operand.dtype) for operand in self.operands)

    def choose(self, target: Any) -> Choice:
        """Return our kernel.

        Raises
        ------
        NotOurs
        """
        operands = [
            te.placeholder(
                [te.var() if isinstance(extent, tvm.tir.Any) else extent for extent in type_.shape],
                str(type_.dtype),
            )
            for type_ in self.operands
        ]
        return choose(self.op, self.call.attrs, operands, self.call.checked_type, target)

    def refusal(self, target: Any) -> str | None:
        """Return why none of our kernels computes it, or None."""
        try:
            self.choose(target)
        except NotOurs as reason:
            return str(reason)
        return None


def _anchor(call: Any) -> _Anchor | None:
    match = _ANCHOR.match(call.op.name)
    return _Anchor(call, match[1]) if match else None


def _anchors(mod: tvm.IRModule) -> list[_Anchor]:
    return [anchor for anchor in map(_anchor, _calls(mod)) if anchor]


def _calls(mod: tvm.IRModule) -> Iterator[Any]:
    """Yield the calls of operators in the order they run in, but for other compilers' functions."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, relay.Call) and isinstance(node.op, tvm.ir.Op):
            found.append(node)

    for var in sorted(mod.get_global_vars(), key=lambda var: var.name_hint):
        if isinstance(mod[var], relay.Function) and not _compiler(mod[var]):
            relay.analysis.post_order_visit(mod[var], visit)
    yield from found


def _compiler(function: Any) -> str:
    """Return which other compiler a function is given to, or ""."""
    attrs = function.attrs
    return str(attrs["Compiler"]) if attrs and "Compiler" in attrs.keys() else ""


def _as_before(before: list[_Anchor], after: list[_Anchor]) -> list[_Anchor | None]:
    """Return each anchor as it stood before passes; None where they did more than rewrite it."""
    same = [one.kind for one in before] == [one.kind for one in after]
    return list(before) if same else [None] * len(after)


def _names(given: list[_Anchor | None], anchors: list[_Anchor]) -> list[str]:
    """Return the names that importers leave as spans, where each is one call's; else "conv2d_0"."""
    spans = [_span_name(one and one.call.span) for one in given]
    counts, kinds = Counter(spans), Counter()
    names = []
    for span, anchor in zip(spans, anchors, strict=True):
        plain = f"{anchor.kind}_{kinds[anchor.kind]}"
        names.append(span if span and counts[span] == 1 else plain)
        kinds[anchor.kind] += 1
    return names


def _span_name(span: Any) -> str:
    while isinstance(span, tvm.ir.SequentialSpan):
        span = span.spans[0] if span.spans else None
    return span.source_name.name if span else ""


def _known(work: Workload, weight: Any) -> Workload:
    """Return the workload with its weight's range; a packed weight may be wider than its values."""
    if not isinstance(weight, relay.Constant):
        return work
    values = weight.data.numpy()
    low, high = int(values.min()), int(values.max())
    if str(values.dtype) in INT8_DTYPES:
        return replace(work, weight_range=(low, high))
    dtype = "uint8" if high > 127 else "int8"
    return replace(work, weight_dtype=dtype, weight_range=(low, high))


def _row(name: str, anchor: _Anchor, choice: Choice, feats: Features, target: Any) -> Row:
    req, decision, call = choice.request, choice.decision, anchor.call
    # Strategies do not see a weight's values. The reasons of the others had better know them.
    if not decision.strategy_row.transforms:
        known = replace(req, work=_known(req.work, call.args[1])).decide(feats)
        if known.strategy == decision.strategy:
            decision = known
    unpacked = None if req.packed else _unpacked(anchor, target)
    layout = str(call.attrs.data_layout) if req.layout else "row-major"
    out_layout = (str(call.attrs.out_layout) if req.layout else "") or layout
    return Row(
        name, decision.strategy_row.op, decision.work, choice.name, decision.intrinsic, layout,
        out_layout, ((_PACKED_EARLY, unpacked), *decision.declined) if unpacked
        else decision.declined,
    )  # fmt: skip


def _unpacked(anchor: _Anchor, target: Any) -> str:
    """Return why a weight is packed at run time."""
    alter, call = _ALTERS.get(anchor.op), anchor.call
    if alter is None:
        return "operands of a batched matmul are packed at run time"
    try:
        with target:
            alter(call.attrs, call.args, [arg.checked_type for arg in call.args], call.checked_type)
    except NotOurs as reason:
        return f"{reason}: packed at run time"
    return "packed at run time"


def explain(
    mod: tvm.IRModule, target: Any, show: bool = True, params: Mapping[str, Any] | None = None
) -> Explanation:
    """Say which kernel each integer operator of a model gets on a target, and why not a faster one.

    Rows are the convolutions and matmuls that this package computes, as they are built: signs
    flipped and channels filled up as the kernel takes them. Those that are left to upstream are
    named with the reason under `Explanation.others`. Names are the spans that importers set, where
    each is one call's, else "conv2d_0" by kind and order. It holds for any opt_level, unless
    AlterOpLayout is disabled. Tuning logs for upstream's implementations (autotvm's
    ``ApplyHistoryBest``) are not looked at.

    Parameters
    ----------
    mod : IRModule
        Relay, as given to ``relay.build``: fp32, QNN, or quantized by ``relay.quantize``. Not
        changed. Functions partitioned for another compiler are that compiler's.
    target : Target or str or dict
        An ``llvm`` CPU target.
    show : bool
        Print the tables too.
    params : dict of str to NDArray, optional
        As given to ``relay.build``. Weights that are in neither are packed at run time.

    Returns
    -------
    Explanation

    Raises
    ------
    ValueError
        For a target that is not an LLVM CPU, and while topi_int8 is disabled: there is nothing of
        ours to explain then.
    Exception
        Upstream's own, where it can compile a call no more than we: ``relay.build`` raises it too.
    """
    from . import is_enabled

    target = target if isinstance(target, tvm.target.Target) else tvm.target.Target(target)
    feats = features(target)
    if not is_enabled():
        raise ValueError("topi_int8 is disabled, upstream's strategies run; enable() it to explain")
    if isinstance(mod, relay.Function):
        mod = tvm.IRModule.from_expr(mod)
    lowered = run(LOWERING, with_params(mod, params), target)
    packed = run(PACKING, lowered, target)

    anchors = _anchors(packed)
    given, plain = (_as_before(_anchors(one), anchors) for one in (mod, lowered))
    rows: list[Row] = []
    refused: dict[tuple[str, str], list[str]] = {}
    for name, anchor, *before in zip(_names(given, anchors), anchors, given, plain, strict=True):
        if not anchor.is_integer:
            continue
        try:
            rows.append(_row(name, anchor, anchor.choose(target), feats, target))
        except NotOurs as refusal:
            reason = _reason(*before, str(refusal), target)
            refused.setdefault((anchor.op, reason), []).append(name)
    explanation = Explanation(
        f"llvm ({feats.isas[0]})", tuple(rows), (*_refused(refused), *_rest(packed)), ()
    )
    if show:
        explanation.show()
    return explanation


def _reason(given: _Anchor | None, plain: _Anchor | None, last: str, target: Any) -> str:
    """Return why a call is not ours: the reason as early as it can be told.

    Upstream widens the operands of int8 calls, where it lowers QNN and in Legalize.
    """
    if plain is None:
        return last
    reason = plain.refusal(target) or last
    qnn = given is not None and given.op.startswith("qnn.")
    widened = any(str(operand.dtype) not in INT8_DTYPES for operand in plain.operands)
    return f"{reason}, as Relay lowers this {given.op}" if qnn and widened else reason


def _refused(calls: Mapping[tuple[str, str], list[str]]) -> Iterator[Other]:
    """Yield the integer convolutions and matmuls that upstream computes, by reason."""
    for (op, reason), names in calls.items():
        yield Other(op, len(names), f"NOT OURS: {reason}: {', '.join(names)}")


def _rest(mod: tvm.IRModule) -> Iterator[Other]:
    """Yield what is no integer convolution or matmul."""
    counts: Counter = Counter()
    for call in _calls(mod):
        name = call.op.name
        anchor = _anchor(call)
        if anchor is None:
            counts[name, _NOTES.get(name, _NOTE)] += 1
        elif not anchor.is_integer:
            counts[name, f"{anchor.operands[0].dtype}: {_NOTE}"] += 1
    for var in mod.get_global_vars():
        if compiler := _compiler(mod[var]):
            counts["function", f"given to {compiler}"] += 1
    for (name, note), count in sorted(counts.items()):
        yield Other(name, count, note)


# ---------------------------------------------------------------- what was built


def library_counts(built: Any) -> LibraryCounts:
    """Count dot-product instructions and data types of what ``relay.build`` built.

    Parameters
    ----------
    built : GraphExecutorFactoryModule, AOTExecutorFactoryModule, vm.Executable or runtime.Module
        Straight from ``relay.build`` or ``relay.vm.compile`` (a library loaded from disk keeps no
        IR).

    Returns
    -------
    LibraryCounts

    Raises
    ------
    ValueError
        If it holds no LLVM module with source.
    """
    library = built if isinstance(built, tvm.runtime.Module) else built.lib
    modules = list(_modules(library))
    found = [module for module in modules if module.type_key == "llvm"]
    if not found:
        kinds = ", ".join(module.type_key for module in modules)
        raise ValueError(f"library holds {kinds}; allowed: one with an llvm module")
    return count_sources((module.get_source("asm"), module.get_source("ll")) for module in found)


def _modules(module: tvm.runtime.Module) -> Iterator[tvm.runtime.Module]:
    yield module
    for imported in module.imported_modules:
        yield from _modules(imported)
