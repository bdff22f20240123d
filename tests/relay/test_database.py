"""database(): Relay's builds by our TIR schedules: the same numbers, every kernel, a clean exit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relay
from tvm.contrib import graph_executor
from tvm.relay.op.strategy import x86

import topi_int8.relay
from intrinsics import compat
from tests import grid
from tests.emulator.arm import problem
from tests.relay import arm_graph, qnn_models
from tests.relay.calls import EXECUTORS, Call, run
from topi_int8.relay import database, tir_plans, tir_schedule
from topi_int8.target import runs_here

VNNI, AVX2 = "llvm -mcpu=cascadelake", "llvm -mcpu=haswell"
TARGETS = [
    pytest.param(
        VNNI, id="vnni",
        marks=pytest.mark.skipif(not runs_here("avx512_vnni"), reason="no AVX512-VNNI here"),
    ),
    pytest.param(AVX2, id="avx2"),
]  # fmt: skip

CONVOLUTIONS = {
    name: {**grid.SHAPES, **grid.DTYPES}[name]
    for name in (
        "one_of_everything", "ic17_oc33", "aligned", "prime_17_s2", "stem_3x3", "groups_aligned",
        "groups_misaligned", "batch_3_1x1", "everything", "s8s8_zero_point", "u8u8",
    )
}  # fmt: skip
DEPTHWISE = {name: grid.DEPTHWISE[name] for name in ("c17", "c128", "stride_2_1", "s8s8")}
MATMULS = {
    name: grid.MATMULS[name] for name in ("vector_odd", "rows_13", "square", "s8s8", "batch_odd_n")
}


@dataclass
class Asked:
    """What the database was asked: how many functions it scheduled and declined; plans followed."""

    scheduled: int = 0
    declined: int = 0
    plans: list[Any] = field(default_factory=list)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Return the count of what the database is asked from now on."""
    count, real = Asked(), tir_schedule.schedule

    def schedule(sch: Any) -> bool:
        notes = (sch.get(block).annotations for block in compat.child_blocks(sch))
        plans = [placed.plan for placed in map(tir_plans.placed, notes) if placed is not None]
        done = real(sch)
        count.scheduled, count.declined = count.scheduled + done, count.declined + (not done)
        count.plans += plans if done else []
        return done

    monkeypatch.setattr(tir_schedule, "schedule", schedule)
    return count


def check(call: Call, target: str, asked: Asked, executor: str = "graph") -> None:
    ops = call.operands()
    with database():
        (got,) = run(call.module(ops), call.inputs(ops), target, executor)
    np.testing.assert_array_equal(got, call.expected(ops))
    assert len(asked.plans) == 1 and not asked.declined


# ---------------------------------------------------------------- one call


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, layout: str, target: str, asked: Asked) -> None:
    check(Call(CONVOLUTIONS[name], layout), target, asked)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise(name: str, layout: str, target: str, asked: Asked) -> None:
    check(Call(DEPTHWISE[name], layout), target, asked)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MATMULS)
def test_matmul(name: str, target: str, asked: Asked) -> None:
    check(Call(MATMULS[name]), target, asked)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ["ic17_oc33", "groups_misaligned", "s8s8_zero_point"])
def test_weight_that_is_an_input(name: str, layout: str, asked: Asked) -> None:
    """It is packed, and its zero point's compensation summed up, at run time."""
    check(Call(CONVOLUTIONS[name], layout, constant=False), AVX2, asked)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_executors(executor: str, asked: Asked) -> None:
    check(Call(CONVOLUTIONS["ic17_oc33"]), AVX2, asked, executor)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_epilogue_is_that_of_the_strategies(layout: str, asked: Asked) -> None:
    call = Call(CONVOLUTIONS["aligned"], layout, requantized=True)
    ops = call.operands()
    (expected,) = run(call.module(ops), call.inputs(ops), AVX2)
    assert not asked.scheduled
    with database():
        (got,) = run(call.module(ops), call.inputs(ops), AVX2)
    np.testing.assert_array_equal(got, expected)
    assert len(asked.plans) == 1 and got.std() > 1


@pytest.mark.parametrize("isa", arm_graph.TARGETS)
def test_arm(isa: str, asked: Asked, tmp_path: Path) -> None:
    """Blocks of accumulators, partial sums, gathered rows, and loops that are to stay loops."""
    if missing := problem(isa):
        pytest.skip(missing)
    calls = {
        "conv": Call(CONVOLUTIONS["ic17_oc33"], "NHWC"),
        "packed": Call(CONVOLUTIONS["aligned"], requantized=True),
        "depthwise": Call(DEPTHWISE["stride_2_1"]),
        "batch": Call(MATMULS["batch_odd_n"]),
    }
    operands = {name: call.operands() for name, call in calls.items()}
    modules = {name: call.module(operands[name]) for name, call in calls.items()}
    with database():
        graphs = [arm_graph.build(name, mod, isa) for name, mod in modules.items()]
    assert len(asked.plans) == len(calls) and not asked.declined
    program = arm_graph.link_program(graphs, isa, tmp_path)
    for graph, (name, call) in zip(graphs, calls.items(), strict=True):
        inputs = call.inputs(operands[name])
        (got,) = graph.run(program, {k: np.ascontiguousarray(v) for k, v in inputs.items()})
        expected = call.expected(operands[name])
        if call.requantized:
            (expected,) = run(modules[name], inputs, AVX2)
        np.testing.assert_array_equal(got, expected, name)


# ---------------------------------------------------------------- a network


def test_every_convolution_of_a_network(asked: Asked) -> None:
    target = VNNI if runs_here("avx512_vnni") else AVX2
    mod = qnn_models.resnet(18, size=32)
    data = np.random.default_rng(3).integers(0, 256, (1, 3, 32, 32)).astype("uint8")

    def built() -> Any:
        with tvm.transform.PassContext(opt_level=3):
            return relay.build(mod, target=target)

    def output(lib: Any) -> np.ndarray:
        made = graph_executor.GraphModule(lib["default"](tvm.cpu()))
        made.run(data=data)
        return made.get_output(0).numpy()

    expected = output(built())
    assert not asked.scheduled
    with database():
        lib = built()
    np.testing.assert_array_equal(output(lib), expected)
    nodes = json.loads(lib.get_graph_json())["nodes"]
    names = [node["attrs"]["func_name"] for node in nodes if node["op"] != "null"]
    anchors = [name for name in names if "conv2d" in name or "dense" in name]
    assert len(anchors) == 21  # 20 convolutions, one dense
    assert len(asked.plans) == len(set(anchors)) and not asked.declined
    if target == VNNI:
        assert lib.get_lib().get_source("asm").count("vpdpbusd") > 16 * len(set(anchors))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_branches_and_odd_channels(layout: str, asked: Asked) -> None:
    """Concatenation, grouped convolution, pooling, two outputs; nothing is left to a warning."""
    mod = qnn_models.branches(qnn_models.Network(layout))
    shape = [int(extent) for extent in mod["main"].params[0].checked_type.shape]
    inputs = {"data": np.random.default_rng(5).integers(0, 256, shape).astype("uint8")}
    expected = run(mod, inputs, AVX2)
    with database():
        got = run(mod, inputs, AVX2)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(asked.plans) > 5 and not asked.declined


# ---------------------------------------------------------------- the rest


def _floats() -> tvm.IRModule:
    data, weight = relay.var("data", shape=(4, 32)), relay.var("weight", shape=(16, 32))
    out = relay.nn.softmax(relay.nn.dense(data, weight))
    return tvm.IRModule.from_expr(relay.Function([data, weight], out))


def test_float_matmul_keeps_its_own_schedule(asked: Asked) -> None:
    """And it is the one that it has without a database, not what a tuner would start from."""
    rng = np.random.default_rng(0)
    inputs = {"data": rng.random((4, 32), "float32"), "weight": rng.random((16, 32), "float32")}
    with database():
        assert not x86.is_meta_schedule_enabled()
        (got,) = run(_floats(), inputs, AVX2)
    (expected,) = run(_floats(), inputs, AVX2)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    # The softmax, and the packing of the weight.
    assert (asked.declined, asked.scheduled, asked.plans) == (1, 2, [])


# ---------------------------------------------------------------- the context manager


def test_context_is_left_as_it_was(asked: Asked) -> None:
    def config() -> tuple[int, dict[str, Any], list[str]]:
        current = tvm.transform.PassContext.current()
        return current.opt_level, dict(current.config), [*map(str, current.disabled_pass)]

    seen: list[tuple[int, dict[str, Any], list[str]]] = []

    @tvm.instrument.pass_instrument
    class Watch:
        def run_before_pass(self, _mod: Any, _info: Any) -> None:
            seen.append(config())

    call = Call(CONVOLUTIONS["one_of_everything"])
    ops = call.operands()
    user = tvm.transform.PassContext(
        opt_level=1, disabled_pass=["FoldScaleAxis"], instruments=[Watch()],
        config={"tir.disable_vectorize": True},
    )  # fmt: skip
    with user, database():
        with database():
            pass
        before, found = config(), relay.build
        relay.build(call.module(ops), target=AVX2)
        assert (config(), relay.build) == (before, found)
        assert tvm.meta_schedule.Database.current() is None
    assert len(asked.plans) == 1
    during = [at for at in seen if "relay.backend.use_meta_schedule" in at[1]]
    assert during and all(level == 1 for level, _, _ in during)
    assert all("FoldScaleAxis" in skipped for _, _, skipped in during)
    assert all(bool(given["tir.disable_vectorize"]) for _, given, _ in during)
    relay.build(call.module(ops), target=AVX2)
    assert len(asked.plans) == 1


def test_other_targets_are_left(asked: Asked) -> None:
    call = Call(CONVOLUTIONS["one_of_everything"])
    with database():
        relay.build(call.module(call.operands()), target="c")
    assert not asked.scheduled and not asked.declined


def test_is_an_error_while_disabled() -> None:
    with (
        topi_int8.relay.disabled(),
        pytest.raises(ValueError, match="topi_int8 is disabled"),
        database(),
    ):
        pass
    with database():
        pass


_SCRIPT = """
import logging
for name in ("autotvm", "strategy", "te_compiler", "topi"):
    logging.getLogger(name).setLevel(logging.ERROR)
from tests import grid
from tests.relay.calls import Call, run
from topi_int8.relay import database
call = Call(grid.SHAPES["ic17_oc33"], "NHWC", requantized=True)
ops = call.operands()
with database():
    out, = run(call.module(ops), call.inputs(ops), "llvm -mcpu=haswell")
print(out.shape)
"""


def test_process_ends_in_peace() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 7, 13, 33)\n", "")
