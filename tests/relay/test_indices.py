"""Register tiles stay in registers: TVM's sharing of indices would have LLVM spill them."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import tvm
from tvm import relay
from tvm.ir.instrument import PassTimingInstrument

TARGET = "llvm -mcpu=cascadelake"  # compiled only


def module(batch: int) -> tvm.IRModule:
    data = relay.var("data", shape=(batch, 64, 56, 56), dtype="uint8")
    weight = relay.const(np.random.default_rng(0).integers(-127, 128, (64, 64, 3, 3), "int8"))
    sums = relay.nn.conv2d(
        data, weight, padding=(1, 1), channels=64, kernel_size=(3, 3), out_dtype="int32"
    )
    out = relay.cast(relay.clip(relay.right_shift(sums, relay.const(9)), 0, 255), "uint8")
    return tvm.IRModule.from_expr(relay.Function([data], out))


def spills(mod: tvm.IRModule, **context) -> int:
    """Return how many accumulators are loaded from the stack."""
    with tvm.transform.PassContext(opt_level=3, **context):
        asm = relay.build(mod, TARGET).get_lib().get_source("asm")
    assert asm.count("vpdpbusd") >= 28
    return len(re.findall(r"vmovdq\w+\s+-?\d*\(%rsp\), %zmm", asm))


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_no_accumulator_is_spilled(batch):
    assert spills(module(batch)) <= 2


def test_a_users_setting_stands():
    assert spills(module(2), config={"tir.disable_cse_tir": False}) > 10


def test_instruments_keep_what_they_saw(caplog):
    timing = PassTimingInstrument()
    with (
        tvm.transform.PassContext(opt_level=3, instruments=[timing]),
        caplog.at_level(logging.WARNING, "topi_int8"),
    ):
        relay.build(module(1), TARGET)
        assert "AlterOpLayout" in timing.render()
    assert "tir.disable_cse_tir" in caplog.text
