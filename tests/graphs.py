"""What the graph tests share: build a Relax module, list its operators, compare signals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import ir, relax


def build(shape: tuple[int, ...], body: Callable[[Any, relax.Var], relax.Expr]) -> tvm.IRModule:
    """Return a module whose ``main`` maps a float32 ``x`` of that shape to ``body(emit, x)``."""
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(body(bb.emit, x))
        bb.emit_func_output(out)
    return bb.get()


def bindings(mod: tvm.IRModule) -> list[tuple[relax.Var, relax.Expr]]:
    """Return the bindings of ``main`` in order."""
    return [(b.var, b.value) for block in mod["main"].body.blocks for b in block.bindings]


def op_name(expr: Any) -> str:
    """Return an operator call's name without "relax.", or the kind of the expression."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op):
        return expr.op.name.removeprefix("relax.")
    return type(expr).__name__


def ops(mod: tvm.IRModule) -> list[str]:
    """Return the operators of ``main`` in order; copies of variables are left out."""
    names = [op_name(value) for _, value in bindings(mod)]
    return [name for name in names if name not in ("Var", "DataflowVar")]


def count(mod: tvm.IRModule) -> Counter[str]:
    """Return how often each operator occurs in ``main``."""
    return Counter(ops(mod))


def sqnr(reference: np.ndarray, value: np.ndarray) -> float:
    """Return the signal to quantization noise ratio in dB: 10 log10(sum r^2 / sum (r - v)^2)."""
    reference, value = reference.astype("float64"), value.astype("float64")
    noise = float(np.sum((reference - value) ** 2))
    return float("inf") if noise == 0 else 10 * np.log10(float(np.sum(reference**2)) / noise)
