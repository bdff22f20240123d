"""F(2x2, 3x3) in Relay: weights transformed as constants, sums exact, in TE and in TIR."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relay

import topi_int8
from tests import reference
from tests.grid import SAME, conv
from tests.relay.calls import EXECUTORS, X86, Call, run
from topi_int8.relay import ConvertLayout, call
from topi_int8.target import runs_here

AVX2 = X86["avx2"]
needs_avx2 = pytest.mark.skipif(not runs_here("avx2"), reason="this CPU lacks AVX2")

WORKS = {
    "bands": conv(32, (32, 28), 48, (3, 3), padding=SAME),
    "bands_of_two_rows": conv(16, (36, 14), 32, (3, 3), padding=SAME),
    "one_band": conv(64, (14, 14), 64, (3, 3), padding=SAME),
    "cropped": conv(64, (7, 7), 64, (3, 3), padding=SAME),
    "unpadded": conv(32, (12, 11), 16, (3, 3)),
    "batch_3": conv(20, (5, 6), 20, (3, 3), n=3, padding=SAME),
    "asymmetric": conv(17, (9, 8), 33, (3, 3), padding=(0, 1, 2, 0)),
    "s8s8": conv(32, (9, 12), 32, (3, 3), padding=SAME, data_dtype="int8"),
    "u8u8": conv(32, (9, 12), 32, (3, 3), padding=SAME, weight_dtype="uint8"),
    "seven_bits": conv(48, (14, 14), 48, (3, 3), padding=SAME, weight_range=(-63, 63)),
}


def operators(mod: tvm.IRModule) -> list[str]:
    """Return the operators that a model is converted to."""
    found: list[str] = []
    relay.analysis.post_order_visit(
        ConvertLayout(AVX2)(mod)["main"],
        lambda node: found.append(node.op.name) if isinstance(node, relay.Call) else None,
    )
    return found


@needs_avx2
@pytest.mark.parametrize("requantized", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", WORKS)
def test_sums(name: str, layout: str, requantized: bool) -> None:
    made = Call(WORKS[name], layout, requantized=requantized)
    ops = made.operands(extreme=True)
    mod = made.module(ops)
    assert (call.CONV2D_TRANSFORMED in operators(mod)) == (name != "u8u8")
    (got,) = run(mod, made.inputs(ops), AVX2)
    want = made.expected(ops)
    if requantized:
        with topi_int8.disabled(), relay.qnn.op.qnn.requantize_config(compute_dtype="float32"):
            (want,) = run(mod, made.inputs(ops), "llvm")
    np.testing.assert_array_equal(got, want)


@needs_avx2
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("level", [1, 3])
def test_executors(executor: str, level: int) -> None:
    made = Call(WORKS["one_band"])
    ops = made.operands()
    (got,) = run(made.module(ops), made.inputs(ops), AVX2, executor, level)
    np.testing.assert_array_equal(got, made.expected(ops))


@needs_avx2
@pytest.mark.parametrize("name", ["bands", "one_band", "cropped", "batch_3"])
def test_by_schedules_of_tir(name: str) -> None:
    made = Call(WORKS[name], requantized=True)
    ops = made.operands()
    (want,) = run(made.module(ops), made.inputs(ops), AVX2)
    with topi_int8.relay.database():
        (got,) = run(made.module(ops), made.inputs(ops), AVX2)
    np.testing.assert_array_equal(got, want)


def test_explain_names_it() -> None:
    made = Call(WORKS["one_band"])
    (row,) = topi_int8.explain(made.module(made.operands()), AVX2, show=False).rows
    assert row.strategy == "conv2d_nchwc_winograd_avx2.topi_int8"
    assert row.work == replace(made.plain, weight_range=(-128, 127))


@pytest.mark.parametrize(("most", "suffix"), [(127, "winograd_avx2"), (63, "avx2_7bit")])
def test_seven_bits_may_make_the_direct_sum_faster(most: int, suffix: str) -> None:
    work = conv(16, (6, 7), 16, (3, 3), padding=SAME, weight_range=(-most, most))
    made = Call(work)
    mod = made.module(reference.random_operands(work))
    (row,) = topi_int8.explain(mod, AVX2, show=False).rows
    assert row.strategy == f"conv2d_nchwc_{suffix}.topi_int8"


@pytest.mark.parametrize("isa", ["generic", "avx512_vnni"])
def test_other_targets_keep_the_direct_sum(isa: str) -> None:
    made = Call(WORKS["one_band"])
    (row,) = topi_int8.explain(made.module(made.operands()), X86[isa], show=False).rows
    assert "winograd" not in row.strategy


def test_upstreams_own_operator_is_left_to_it() -> None:
    """Of float, in NCHW, for tuners: no kernel of ours."""
    data = relay.var("x", shape=(1, 8, 8, 8))
    weight = relay.var("w", shape=(4, 4, 8, 8))
    out = relay.nn.contrib_conv2d_winograd_without_weight_transform(
        data, weight, 2, channels=8, kernel_size=(3, 3), padding=(1, 1)
    )
    mod = tvm.IRModule.from_expr(relay.Function([data, weight], out))
    explained = topi_int8.explain(mod, AVX2, show=False)
    assert not explained.rows
