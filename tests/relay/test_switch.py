"""enable, disable, disabled: upstream's own objects are put back, and ours stand beside them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relay, te
from tvm.relay.backend import te_compiler

import topi_int8
from tests import grid
from tests.relay.calls import X86, Call, run
from topi_int8.relay import alter_layout, build, strategy
from topi_int8.switch import DictSlot

ROOT = Path(__file__).resolve().parents[2]
VNNI = X86["avx512_vnni"]

# All of TVM that could be touched, looked at from a process in which topi_int8 was never imported.
_WHOLE_STATE = """
import tvm
from tvm import relay, topi
from tvm.relay import build_module
from tvm.relay.backend import te_compiler, vm

def state():
    found = {}
    for module in (relay, build_module, vm, te_compiler):
        found |= {(module.__name__, name): value for name, value in vars(module).items()}
    for name, function in vars(topi.nn).items():
        for key, value in getattr(function, "dispatch_dict", {}).items():
            found["topi.nn", name, key] = value
    for name in tvm.ir.Op.list_op_names():
        for attr in ("FTVMLegalize", "FTVMAlterOpLayout", "FTVMStrategy"):
            value = tvm.ir.Op.get(name).get_attr(attr)
            is_function = isinstance(value, tvm.runtime.PackedFunc)
            found[name, attr] = value.handle.value if is_function else value
    return found

def changed(before):
    after = state()
    assert not set(after) - set(before) - {key for key in after if key[1].startswith("__")}
    def same(a, b):
        return a is b or a == b or isinstance(a, tvm.runtime.Object) and a.same_as(b)
    return [key for key, value in before.items() if not same(after[key], value)]

before = state()
import topi_int8
ours = changed(before)
topi_int8.disable()
left = changed(before)
topi_int8.enable()
again = changed(before)
topi_int8.disable()
print(len(ours), sorted(map(str, left)), sorted(ours, key=str) == sorted(again, key=str),
      len(changed(before)))
"""


def test_disable_puts_back_all_that_was_there() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WHOLE_STATE], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, *rest = done.stdout.split()
    assert rest == ["[]", "True", "0"]
    slots = [*alter_layout.SLOTS, *build.SLOTS]
    places = {(id(slot.names), slot.key) for slot in slots if isinstance(slot, DictSlot)}
    # Strategies are registered inside TVM: another test looks at what they return.
    assert int(count) >= len(places) + 1  # and the Legalize attribute of round


# ---------------------------------------------------------------- implementations


def _asked(mod: tvm.IRModule) -> tuple[Any, ...]:
    """Return (op, attributes, inputs, output type) of a module's one call, as Relay asks for it."""
    found = []
    relay.analysis.post_order_visit(
        mod["main"], lambda node: found.append(node) if isinstance(node, relay.Call) else None
    )
    (one,) = found
    inputs = [te.placeholder(a.checked_type.shape, a.checked_type.dtype) for a in one.args]
    return one.op, one.attrs, inputs, one.checked_type


def names(call: Call, target: str) -> dict[str, int]:
    """Return the implementations of a call by name, with their priorities."""
    target = tvm.target.Target(target)
    with target:
        found = te_compiler.get_valid_implementations(*_asked(call.module(call.operands())), target)
    return {implementation.name: implementation.plevel for implementation in found}


def chosen(call: Call, target: str) -> str:
    """Return the implementation that Relay takes."""
    target = tvm.target.Target(target)
    with target:
        asked = _asked(call.module(call.operands()))
        return te_compiler.select_implementation(*asked, target, use_autotvm=False)[0].name


CALLS = {
    "conv_nchw": Call(grid.SHAPES["aligned"], "NCHW"),
    "conv_nhwc": Call(grid.SHAPES["aligned"], "NHWC"),
    "dense": Call(grid.MATMULS["rows_13"]),
    "batch_matmul": Call(grid.MATMULS["batch"]),
}


@pytest.mark.parametrize("target", [X86["generic"], X86["avx2"], VNNI])
@pytest.mark.parametrize("name", CALLS)
def test_ours_is_chosen_and_upstreams_stay(name: str, target: str) -> None:
    call = CALLS[name]
    ours = names(call, target)
    with topi_int8.disabled():
        upstream, before = names(call, target), chosen(call, target)
    added = set(ours) - set(upstream)
    assert len(added) == 1 and added.pop() == chosen(call, target)
    assert chosen(call, target).endswith(strategy.SUFFIX)
    assert upstream and upstream.items() <= ours.items()
    assert not any(one.endswith(strategy.SUFFIX) for one in upstream)
    assert before in upstream


def test_the_name_says_which_strategy() -> None:
    for isa, target in X86.items():
        assert chosen(CALLS["conv_nchw"], target) == f"conv2d_nchwc_{isa}{strategy.SUFFIX}"


def test_float_calls_are_asked_of_upstream_alone() -> None:
    x, w = (relay.var(name, shape=(1, 16, 8, 8)) for name in "xw")
    mod = relay.transform.InferType()(
        tvm.IRModule.from_expr(relay.Function([x, w], relay.nn.conv2d(x, w)))
    )
    target = tvm.target.Target(VNNI)
    with target:
        found = [one.name for one in te_compiler.get_valid_implementations(*_asked(mod), target)]
        with topi_int8.disabled():
            upstream = te_compiler.get_valid_implementations(*_asked(mod), target)
    assert found == [one.name for one in upstream] != []


# ---------------------------------------------------------------- a build while it is off


def _functions(call: Call) -> str:
    with tvm.transform.PassContext(opt_level=3):
        built = relay.build(call.module(call.operands()), target=VNNI)
    return built.get_lib().get_source("asm")


def test_switching_changes_what_is_built_and_back() -> None:
    call = Call(grid.SHAPES["ic17_oc33"], "NCHW")
    ours = _functions(call)
    with topi_int8.disabled():
        assert not topi_int8.is_enabled()
        upstream = _functions(call)
        topi_int8.enable()
        assert _functions(call) == ours
        topi_int8.disable()
        assert _functions(call) == upstream
    assert topi_int8.is_enabled()
    assert _functions(call) == ours != upstream


def test_a_disabled_build_is_upstreams_at_every_level() -> None:
    call = Call(grid.SHAPES["aligned"], "NHWC")
    ops = call.operands()
    for level in (1, 2, 3):
        with topi_int8.disabled():
            (got,) = run(call.module(ops), call.inputs(ops), "llvm", "graph", level)
        np.testing.assert_array_equal(got, call.expected(ops))
