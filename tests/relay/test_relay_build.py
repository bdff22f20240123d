"""relay.build with topi_int8: every awkward call, bit for bit, on three executors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relay

import topi_int8
from tests import grid, reference
from tests.kernels import require
from tests.relay.calls import EXECUTORS, X86, Call, Workload, in_float32, raw, run, upstream
from topi_int8.workload import MatmulWorkload

# Relay's operators have no zero points and no epilogue: what differs in those only is one call.
WORKLOADS: dict[str, Workload] = {
    name: work
    for work, name in reversed([
        (raw(work), f"{table}-{name}")
        for table, works in (
            ("shape", grid.SHAPES), ("dtype", grid.DTYPES), ("depthwise", grid.DEPTHWISE),
            ("matmul", grid.MATMULS),
        )
        for name, work in works.items()
    ])
}  # fmt: skip
WORKLOADS = {name: WORKLOADS[name] for name in {raw(w): n for n, w in WORKLOADS.items()}.values()}

_AXES = {
    "isa": tuple(X86), "layout": ("NCHW", "NHWC"), "constant": (True, False),
    "executor": tuple(EXECUTORS), "level": (1, 2, 3),
}  # fmt: skip
_BUILDS = list(itertools.product(*_AXES.values()))
_STEP = 37  # has no factor in common with len(_BUILDS): steps of it mix all axes


@dataclass(frozen=True)
class Case:
    """One call, and one way to build it."""

    name: str
    isa: str
    layout: str
    constant: bool
    executor: str
    level: int

    def __str__(self) -> str:
        weight = "constant" if self.constant else "variable"
        where = f"{self.isa}-{self.layout}-{weight}-{self.executor}-O{self.level}"
        return f"{self.name}-{where}"


def plain() -> list[Case]:
    """Every second workload as most people build it."""
    return [Case(name, "avx512_vnni", "NCHW", True, "graph", 3) for name in list(WORKLOADS)[::2]]


def mixed() -> list[Case]:
    """Every workload once more, each built in another way."""
    builds = (_BUILDS[at * _STEP % len(_BUILDS)] for at in range(len(WORKLOADS)))
    return [Case(name, *build) for name, build in zip(WORKLOADS, builds, strict=True)]


def whole() -> Iterator[Case]:
    """Every workload on all instruction sets, in all layouts; executors and levels in turn."""
    products = itertools.product(
        WORKLOADS, _AXES["isa"], _AXES["layout"], _AXES["constant"]
    )
    turns = itertools.cycle(itertools.product(_AXES["executor"], _AXES["level"]))
    for (name, isa, layout, constant), (executor, level) in zip(products, turns, strict=False):
        if layout == "NCHW" or not isinstance(WORKLOADS[name], MatmulWorkload):
            yield Case(name, isa, layout, constant, executor, level)


_SAMPLE = list(dict.fromkeys([*plain(), *mixed()]))
_CASES = [pytest.param(case, id=str(case)) for case in _SAMPLE] + [
    pytest.param(case, id=str(case), marks=pytest.mark.relay_full)
    for case in whole()
    if case not in _SAMPLE
]


def test_the_sample_has_every_pair_of_settings() -> None:
    builds = [tuple(vars(case).values())[1:] for case in mixed()]
    for (a, first), (b, second) in itertools.combinations(enumerate(_AXES.values()), 2):
        seen = {(build[a], build[b]) for build in builds}
        assert seen == set(itertools.product(first, second))


@pytest.mark.parametrize("case", _CASES)
def test_sums(case: Case) -> None:
    require(case.isa)
    call = Call(WORKLOADS[case.name], case.layout, case.constant)
    ops = call.operands(extreme=case.level == 2)
    (got,) = run(call.module(ops), call.inputs(ops), X86[case.isa], case.executor, case.level)
    np.testing.assert_array_equal(got, call.expected(ops))


# ---------------------------------------------------------------- what stands behind the sums


_REQUANTIZED = (
    "shape-ic17_oc33", "shape-aligned", "shape-stem_7x7", "shape-batch_3_1x1",
    "shape-groups_misaligned", "dtype-s8s8", "dtype-s8s8_1x1", "depthwise-c65",
    "depthwise-stride_2", "matmul-rows_17_odd_n", "matmul-vector_classifier",
    "matmul-batch",
)  # fmt: skip


@pytest.mark.parametrize("name", _REQUANTIZED)
def test_requantized_is_what_upstream_computes(name: str) -> None:
    at = _REQUANTIZED.index(name)
    isa, layout = list(X86)[at % 4], ("NCHW", "NHWC")[at // 4 % 2]
    require(isa)
    call = Call(WORKLOADS[name], layout, requantized=True)
    ops = call.operands()
    mod, inputs = call.module(ops), call.inputs(ops)
    with in_float32():
        (got,) = run(mod, inputs, X86[isa], list(EXECUTORS)[at % 3])
    (want,) = upstream(mod, inputs)
    assert got.dtype == "uint8" and np.ptp(want) > 50
    np.testing.assert_array_equal(got, want)


# ---------------------------------------------------------------- extreme values


@pytest.mark.parametrize("isa", X86)
@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("name", ["shape-aligned", "depthwise-c65", "matmul-rows_17_odd_n"])
def test_extreme_values_do_not_saturate(name: str, weight: int, isa: str) -> None:
    require(isa)
    call = Call(WORKLOADS[name], "NCHW")
    ops = call.operands()
    ops = reference.Operands(np.full_like(ops.data, 255), np.full_like(ops.weight, weight))
    (got,) = run(call.module(ops), call.inputs(ops), X86[isa])
    np.testing.assert_array_equal(got, call.expected(ops))


def test_upstream_saturates_there() -> None:
    require("avx2")
    call = Call(WORKLOADS["shape-aligned"], "NCHW")
    ops = call.operands()
    ops = reference.Operands(np.full_like(ops.data, 255), np.full_like(ops.weight, 127))
    with topi_int8.disabled():
        (got,) = run(call.module(ops), call.inputs(ops), X86["avx2"])
    assert np.count_nonzero(got != call.expected(ops)) > got.size // 2


# ---------------------------------------------------------------- what is not known when building


def _any_batch(op: str) -> tuple[tvm.IRModule, tuple[int, ...], np.ndarray]:
    """Return (module, a shape for its input, weight) of a call whose batch is not known."""
    rng = np.random.default_rng(5)
    if op == "conv2d":
        weight = rng.integers(-128, 128, (20, 17, 3, 3)).astype("int8")
        data = relay.var("data", shape=(relay.Any(), 17, 6, 7), dtype="uint8")
        out = relay.nn.conv2d(
            data, relay.const(weight), padding=(1, 1), channels=20, kernel_size=(3, 3),
            out_dtype="int32",
        )  # fmt: skip
        return tvm.IRModule.from_expr(relay.Function([data], out)), (3, 17, 6, 7), weight
    weight = rng.integers(-128, 128, (33, 40)).astype("int8")
    data = relay.var("data", shape=(relay.Any(), 40), dtype="uint8")
    out = relay.nn.dense(data, relay.const(weight), out_dtype="int32")
    return tvm.IRModule.from_expr(relay.Function([data], out)), (5, 40), weight


def _reference(op: str, data: np.ndarray, weight: np.ndarray) -> np.ndarray:
    call: Any
    if op == "conv2d":
        call = grid.conv(17, data.shape[2:], 20, (3, 3), n=len(data), padding=grid.SAME)
        return reference.conv2d(raw(call), data, weight)
    return reference.matmul(MatmulWorkload(len(data), 33, 40), data, weight)


@pytest.mark.parametrize("isa", ["generic", "avx512_vnni"])
@pytest.mark.parametrize("op", ["conv2d", "dense"])
def test_unknown_batch_is_left_to_upstream(op: str, isa: str) -> None:
    require(isa)
    mod, shape, weight = _any_batch(op)
    data = np.random.default_rng(6).integers(0, 256, shape).astype("uint8")
    (got,) = run(mod, {"data": data}, X86[isa], "vm")
    np.testing.assert_array_equal(got, _reference(op, data, weight))


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_other_types_are_left_to_upstream(dtype: str) -> None:
    rng = np.random.default_rng(7)
    data, weight = (
        rng.integers(-9, 9, shape).astype(dtype) for shape in ((1, 17, 6, 7), (20, 17, 3, 3))
    )
    x = relay.var("x", shape=data.shape, dtype=dtype)
    out = relay.nn.conv2d(
        x, relay.const(weight), padding=(1, 1), channels=20, kernel_size=(3, 3), out_dtype=dtype
    )
    mod = tvm.IRModule.from_expr(relay.Function([x], out))
    (got,) = run(mod, {"x": data}, X86["generic"])
    work = raw(grid.conv(17, (6, 7), 20, (3, 3), padding=grid.SAME))
    np.testing.assert_array_equal(got, reference.conv2d(work, data, weight).astype(dtype))
