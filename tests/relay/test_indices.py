"""Register tiles stay in registers: LLVM sees that a tile's addresses differ by constants."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import tvm
from tvm import relay
from tvm.ir.instrument import PassTimingInstrument

import topi_int8.relay
from tests.relay.calls import X86

# Compiled only: instruction set -> the product, and how many of them a register tile has at least.
PRODUCTS = {"avx512_vnni": ("vpdpbusd", 28), "avx2": ("vpmaddwd", 12)}


def module(batch: int, layout: str = "NCHW") -> tvm.IRModule:
    extent = {"N": batch, "C": 64, "H": 56, "W": 56}
    data = relay.var("data", shape=[extent[axis] for axis in layout], dtype="uint8")
    rng = np.random.default_rng(0)
    kernel = {"NCHW": "OIHW", "NHWC": "HWIO"}[layout]
    shape = {"OIHW": (64, 64, 3, 3), "HWIO": (3, 3, 64, 64)}[kernel]
    sums = relay.nn.conv2d(
        data, relay.const(rng.integers(-127, 128, shape, "int8")), padding=(1, 1), channels=64,
        kernel_size=(3, 3), data_layout=layout, kernel_layout=kernel, out_dtype="int32",
    )  # fmt: skip
    out = relay.cast(relay.clip(relay.right_shift(sums, relay.const(9)), 0, 255), "uint8")
    return tvm.IRModule.from_expr(relay.Function([data], out))


def straight(asm: str) -> list[str]:
    """Return the pieces of assembly that hold no jump and no label."""
    return re.split(r"^\S+:.*\n|^\s+j\w+\s.*\n", asm, flags=re.MULTILINE)


def spills(mod: tvm.IRModule, isa: str, **context) -> int:
    """Return how often the loop that multiplies loads or stores a vector of the stack."""
    with tvm.transform.PassContext(opt_level=3, **context):
        asm = relay.build(mod, X86[isa]).get_lib().get_source("asm")
    product, least = PRODUCTS[isa]
    loop = max(straight(asm), key=lambda piece: piece.count(product))
    assert loop.count(product) >= least
    return len(re.findall(r"\(%rsp\).*%[yz]mm|%[yz]mm\d+, -?\d*\(%rsp\)", loop))


def test_the_counter_sees_spills():
    """Instruments keep our settings out: indices have 32 bits."""
    assert spills(module(2), "avx512_vnni", instruments=[PassTimingInstrument()]) > 10


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("isa", PRODUCTS)
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_no_accumulator_is_spilled(batch, isa, layout):
    assert spills(module(batch, layout), isa) == 0


@pytest.mark.parametrize("isa", PRODUCTS)
def test_no_accumulator_is_spilled_by_schedules_of_tir(isa):
    with topi_int8.relay.database():
        assert spills(module(8), isa) == 0


def test_instruments_keep_what_they_saw(caplog):
    timing = PassTimingInstrument()
    with (
        tvm.transform.PassContext(opt_level=3, instruments=[timing]),
        caplog.at_level(logging.WARNING, "topi_int8"),
    ):
        relay.build(module(1), X86["avx512_vnni"])
        assert "AlterOpLayout" in timing.render()
    assert "indices stay narrow" in caplog.text
