"""DetachWeights: what leaves a module, under which names, and what stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import ir, relax, te

from topi_int8.transform.detach_weights import DetachWeights


def sums(*constants: np.ndarray) -> tvm.IRModule:
    """Return a module whose ``main`` adds each constant to ``x``, by a kernel each."""
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(constants[0].shape, "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            y: Any = x
            for constant in constants:
                y = bb.emit_te(_add, y, relax.const(constant))
            out = bb.emit_output(y)
        bb.emit_func_output(out)
    return bb.get()


def _add(a: te.Tensor, b: te.Tensor) -> te.Tensor:
    return te.compute(a.shape, lambda *i: a(*i) + b(*i))


def constants(mod: tvm.IRModule) -> list[np.ndarray]:
    found: list[np.ndarray] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, ir.GenericConst):
            found.append(expr.value.numpy())

    relax.analysis.post_order_visit(mod["main"], visit)
    return found


def test_large_constants_leave_and_equal_ones_are_held_once() -> None:
    one, two = np.full((8, 16), 1, "float32"), np.full((8, 16), 2, "float32")
    mod = sums(one, two, one)
    weights: dict[str, tvm.runtime.Tensor] = {}
    new = DetachWeights(weights, min_bytes=512)(mod)
    assert constants(new) == [] and len(constants(mod)) == 3
    assert sorted(float(w.numpy().max()) for w in weights.values()) == [1, 2]
    assert all(name.startswith("topi_int8.") and len(name) == 42 for name in weights)
    again: dict[str, tvm.runtime.Tensor] = {}
    DetachWeights(again, min_bytes=512)(mod)
    assert list(again) == list(weights)

    kept: dict[str, tvm.runtime.Tensor] = {}
    assert len(constants(DetachWeights(kept, min_bytes=513)(mod))) == 3 and not kept


def test_a_name_says_type_and_shape_too() -> None:
    weights: dict[str, tvm.runtime.Tensor] = {}
    for shape in ((2, 8), (4, 4)):
        DetachWeights(weights, min_bytes=0)(sums(np.zeros(shape, "float32")))
    assert sorted(tuple(w.shape) for w in weights.values()) == [(2, 8), (4, 4)]


def test_the_runtime_gives_them_back() -> None:
    weights: dict[str, tvm.runtime.Tensor] = {}
    half = np.full((8, 16), 0.5, "float32")
    new = DetachWeights(weights, min_bytes=0)(sums(half, half))
    machine = relax.VirtualMachine(tvm.compile(new, "llvm"), tvm.cpu())
    x = tvm.runtime.tensor(np.ones((8, 16), "float32"))
    with pytest.raises(TypeError, match="expected Tensor"):  # not loaded yet
        machine["main"](x)
    [(name, tensor)] = weights.items()
    tvm.get_global_func("vm.builtin.tensor_cache.update")(name, tensor)
    try:
        np.testing.assert_array_equal(machine["main"](x).numpy(), np.full((8, 16), 2.0))
    finally:
        tvm.get_global_func("vm.builtin.tensor_cache.remove")(name)


def test_refusal() -> None:
    with pytest.raises(ValueError, match="min_bytes is -1; allowed: 0 or more"):
        DetachWeights({}, min_bytes=-1)
