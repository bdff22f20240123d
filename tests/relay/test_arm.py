"""Relay builds for ARM, run under qemu: awkward calls between guard pages, a network; instructions.

A sample of the grid; the marker `arm_full` has all of it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relay

import topi_int8
from bench import arm_asm
from tests import reference
from tests.emulator import arm
from tests.emulator.bare import KernelFault
from tests.grid import DEPTHWISE, DTYPES, MATMULS, SAME, SHAPES, conv
from tests.relay import arm_graph, qnn_models
from tests.relay.calls import Call, run
from topi_int8.target import features
from topi_int8.workload import MatmulWorkload

pytestmark = pytest.mark.arm
each_isa = pytest.mark.parametrize("isa", arm_graph.TARGETS)

Record = Callable[[str, object], None]


@dataclass(frozen=True)
class Case:
    """A call and its operands."""

    call: Call
    ops: reference.Operands

    @functools.cached_property
    def expected(self) -> np.ndarray:
        """The output: the reference's sums, or those as plain LLVM requantizes them."""
        sums = self.call.expected(self.ops)
        if not self.call.requantized:
            return sums
        given = relay.var("sums", shape=sums.shape, dtype="int32")
        function = relay.Function([given], self.call.requantize(given))
        with topi_int8.disabled():
            return run(tvm.IRModule.from_expr(function), {"sums": sums}, "llvm")[0]


def _random(call: Call) -> Case:
    return Case(call, call.operands())


def _narrow(call: Call) -> Case:
    """Without a weight of -128."""
    ops = call.operands()
    return Case(call, replace(ops, weight=np.maximum(ops.weight, -127)))


def _lowest(call: Call) -> Case:
    """The smallest numbers alone: two products of them do not fit int16."""
    ops = call.operands()
    low = {key: np.full_like(getattr(ops, key), -128) for key in ("data", "weight")}
    return Case(call, replace(ops, **low))


def _needs(isa: str) -> None:
    if reason := arm.problem(isa):
        pytest.skip(reason)


def _check(cases: Mapping[str, Case], isa: str, folder: Path, record: Record) -> None:
    """Build all of them, link them into one program, run each and compare."""
    _needs(isa)
    graphs = {
        name: arm_graph.build(f"case{at}", case.call.module(case.ops), isa)
        for at, (name, case) in enumerate(cases.items())
    }
    program = arm_graph.link_program(list(graphs.values()), isa, folder)
    wrong = []
    for name, case in cases.items():
        try:
            (got,) = graphs[name].run(program, case.call.inputs(case.ops))
            np.testing.assert_array_equal(got, case.expected)
        except (AssertionError, KernelFault) as error:
            wrong.append(f"{name}: {error}")
    where = f"{isa} on {arm.MACHINES[isa].cpu}"
    record("qemu", (where, "Relay's calls between guard pages", len(cases)))
    assert not wrong, "\n".join(wrong)


_S8 = conv(64, (3, 5), 32, data_dtype="int8")

SAMPLE: dict[str, Case] = {
    "odd_channels": _random(Call(SHAPES["ic17_oc33"])),
    "stem": _random(Call(SHAPES["stem_3x3"], "NHWC", requantized=True)),
    "image_7x7": _narrow(Call(SHAPES["image_7x7"], requantized=True)),
    "everything": _random(Call(SHAPES["everything"], "NHWC", constant=False)),
    "groups": _narrow(Call(SHAPES["groups_misaligned"])),
    "u8u8": _random(Call(DTYPES["u8u8"], requantized=True)),
    "s8u8": _random(Call(DTYPES["s8u8"], "NHWC", constant=False)),
    "depthwise": _narrow(Call(DEPTHWISE["c65"], requantized=True)),
    "depthwise_strided": _random(Call(DEPTHWISE["stride_2"], "NHWC")),
    "depthwise_5x5": _narrow(Call(DEPTHWISE["kernel_5"], "NHWC")),
    "dense": _narrow(Call(MATMULS["k_768"])),
    "dense_u8u8": _random(Call(MATMULS["u8u8"])),
    "batch_n24": _random(Call(MATMULS["batch"], requantized=True)),  # vectors of 12
    "batch": _random(Call(MATMULS["batch_odd_n"], constant=False)),
    "lowest": _lowest(Call(_S8)),
    "lowest_variable": _lowest(Call(_S8, "NHWC", constant=False)),
    "lowest_depthwise": _lowest(Call(DEPTHWISE["s8s8"])),
    "lowest_dense": _lowest(Call(MatmulWorkload(5, 32, 64, data_dtype="int8"))),
}


@each_isa
def test_sample(isa: str, tmp_path: Path, record_property: Record) -> None:
    _check(SAMPLE, isa, tmp_path, record_property)


TABLES = {"shapes": SHAPES, "dtypes": DTYPES, "depthwise": DEPTHWISE, "matmuls": MATMULS}
FULL = [
    (table, *rest)
    for table, *rest in itertools.product(TABLES, ("NCHW", "NHWC"), (True, False), (True, False))
    if table != "matmuls" or rest[0] == "NCHW"
]


@pytest.mark.arm_full
@each_isa
@pytest.mark.parametrize(("table", "layout", "constant", "requantized"), FULL)
def test_grid(
    isa: str, table: str, layout: str, constant: bool, requantized: bool, tmp_path: Path,
    record_property: Record,
) -> None:  # fmt: skip
    calls = {
        name: Call(work, layout, constant, requantized) for name, work in TABLES[table].items()
    }
    cases = {name: _random(call) for name, call in calls.items()}
    if constant:
        signed = {name: call for name, call in calls.items() if call.work.weight_dtype == "int8"}
        cases |= {f"{name}_narrow": _narrow(call) for name, call in signed.items()}
    _check(cases, isa, tmp_path, record_property)


@pytest.mark.parametrize("isa", ["neon"])
def test_requantize_of_any_scale(isa: str, tmp_path: Path, record_property: Record) -> None:
    """Its own lowering on AArch64: shifts both ways, ties, and sums of many bits."""
    _needs(isa)
    rng = np.random.default_rng(0)
    scales = (2.0 ** rng.uniform(-24, 6, 64)).astype("float32")
    scales[:8] = 0.5 ** np.arange(-2, 6)  # ties
    sums = rng.integers(-(2**24), 2**24, (9, 64)).astype("int32") >> rng.integers(0, 20, (9, 64))
    given, zero = relay.var("sums", shape=sums.shape, dtype="int32"), relay.const(0, "int32")
    out = relay.qnn.op.requantize(
        given, relay.const(scales), zero, relay.const(1.0), zero, axis=1, out_dtype="int32"
    )
    mod = relay.transform.InferType()(tvm.IRModule.from_expr(relay.Function([given], out)))
    inputs = {"sums": sums.astype("int32")}
    with topi_int8.disabled():
        expected = run(mod, inputs, "llvm")
    graph = arm_graph.build("requantize", mod, isa)
    got = graph.run(arm_graph.link_program([graph], isa, tmp_path), inputs)
    np.testing.assert_array_equal(got, expected)
    assert "srshl" in graph.assembly()
    record_property("qemu", (f"{isa} on {arm.MACHINES[isa].cpu}", "requantizations", 1))


@pytest.mark.model
@pytest.mark.parametrize(
    "isa",
    ["armv7_neon", *(pytest.param(isa, marks=pytest.mark.arm_full)
                     for isa in ("neon", "neon_dotprod"))],
)  # fmt: skip
def test_network(isa: str, tmp_path: Path, record_property: Record) -> None:
    """Every tensor of a network bit for bit, as plain LLVM computes it here."""
    _needs(isa)
    mod = qnn_models.branches()
    data = np.random.default_rng(0).integers(0, 256, (1, 3, 28, 28)).astype("uint8")
    with topi_int8.disabled():
        expected = run(mod, {"data": data}, "llvm")
    graph = arm_graph.build("network", mod, isa)
    program = arm_graph.link_program([graph], isa, tmp_path)
    for got, want in zip(graph.run(program, {"data": data}), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    where = f"{isa} on {arm.MACHINES[isa].cpu}"
    record_property("qemu", (where, "Relay's networks", 1))


# ---- instructions


def _inner(graph: arm_graph.Graph) -> arm_asm.Loop:
    """Return the loop that multiplies most, of a graph's kernels."""
    loops = [loop for each in arm_asm.parse(graph.assembly()) for loop in each.innermost]
    return max(loops, key=lambda loop: sum(map(arm_asm.macs, loop.instructions)))


def _built(case: Case, isa: str, options: str = "") -> arm_graph.Graph:
    return arm_graph.build("call", case.call.module(case.ops), isa, options)


def _layer(data_dtype: str, weight_dtype: str, narrow: bool) -> Case:
    """A middle layer of a ResNet."""
    work = conv(64, (14, 14), 64, (3, 3), padding=SAME, data_dtype=data_dtype,
                weight_dtype=weight_dtype)  # fmt: skip
    call = Call(work, requantized=True)
    return _narrow(call) if narrow else _random(call)


_LANE = r"v\d+\.4s, v\d+\.16b, v\d+\.4b\[\d\]"

# ISA, dtypes, whether no weight is -128 -> what the inner loop is made of, and what not
INNER: tuple[tuple[str, str, str, bool, tuple[str, ...], str], ...] = (
    ("neon", "int8", "int8", True, ("smull ", "smlal2 ", "sadalp "), "smlal "),
    ("neon", "int8", "int8", False, ("smull ", "smull2 ", "sadalp "), "smlal"),
    ("neon", "uint8", "uint8", False, ("umull ", "umull2 ", "uadalp "), "umlal"),
    ("neon_dotprod", "int8", "int8", False, (f"sdot {_LANE}",), "smull"),
    ("neon_dotprod", "uint8", "int8", False, (f"sdot {_LANE}",), "smull"),
    ("neon_dotprod", "uint8", "uint8", False, (f"udot {_LANE}",), "umull"),
    ("armv7_neon", "int8", "int8", True, (r"vmull\.s8", r"vmlal\.s8", r"vpadal\.s16"), "vmul.i"),
    ("armv7_neon", "int8", "int8", False, (r"vmull\.s8", r"vpadal\.s16"), "vmlal"),
    ("armv7_neon", "uint8", "uint8", False, (r"vmull\.u8", r"vpadal\.u16"), "vmlal"),
)
# Without a core to schedule for, LLVM 10 starts more products than there are registers.
CORE = {"neon": "-mcpu=cortex-a72"}


@pytest.mark.parametrize(("isa", "data", "weight", "narrow", "made_of", "not_of"), INNER)
def test_inner_loop(
    isa: str, data: str, weight: str, narrow: bool, made_of: tuple[str, ...], not_of: str
) -> None:
    graph = _built(_layer(data, weight, narrow), isa, CORE.get(isa, ""))
    fused = [name for name in graph.functions if "conv2d_NCHWc" in name]
    assert len(fused) == 1 and "fixed_point_multiply" in fused[0], graph.functions
    loop = _inner(graph)
    code = [instruction.text for instruction in loop.instructions]
    for pattern in made_of:
        assert any(re.match(pattern, text) for text in code), f"no {pattern} in {code}"
    assert not [text for text in code if text.startswith(not_of)]
    assert not [i.text for i in loop.instructions if arm_asm.on_stack(i)], "sums are spilled"


@pytest.mark.parametrize(("isa", "products"), [("neon", 16), ("armv7_neon", 4)])
def test_a_short_reduction_stays_a_loop(isa: str, products: int) -> None:
    """LLVM would unroll it and keep all of its weights: it spilled most of them."""
    loop = _inner(_built(_narrow(Call(conv(32, (14, 14), 32, data_dtype="int8"))), isa))
    multiplied = [i.text for i in loop.instructions if re.match(r"v?smull|vmull", i.text)]
    assert len(multiplied) == products, multiplied


@pytest.mark.parametrize("isa", ["neon", "neon_dotprod"])
def test_sums_are_requantized_in_vectors(isa: str) -> None:
    graph = _built(_layer("int8", "int8", narrow=True), isa)
    every = (loop for each in arm_asm.parse(graph.assembly()) for loop in each.loops)
    code = [i.text for loop in every for i in loop.instructions]
    assert any(text.startswith("srshl") for text in code)
    assert not [text for text in code if re.match(r"mov x\d+, v|fmov x", text)]


def test_i8mm_is_served_by_dotprod() -> None:
    """LLVM 10 knows no i8mm, and says so: kernels are chosen by what it does know."""
    target = arm_graph.TARGETS["neon_dotprod"].replace("+dotprod", "+dotprod,+i8mm")
    assert features(target).isas[0] == "neon_dotprod"
