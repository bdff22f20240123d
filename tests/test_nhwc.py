"""Convolutions that stay in NHWC: kernels, the pass that leaves them there, whole graphs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relax

import topi_int8
from tests import graphs
from tests.grid import DEPTHWISE, DTYPES, EPILOGUE_BASES, EPILOGUES, FLOATS, SHAPES
from tests.kernels import check
from topi_int8 import strategy
from topi_int8.target import isa_target
from topi_int8.workload import Conv2dWorkload

STAYS = {
    name: work
    for name, work in {**SHAPES, **DTYPES, **DEPTHWISE, **FLOATS}.items()
    if isinstance(work, Conv2dWorkload) and not strategy.declines_nhwc(work)
}


@pytest.mark.parametrize("name", STAYS)
def test_the_grid_in_nhwc(name: str) -> None:
    built = check(STAYS[name], "avx2", layout="NHWC")
    assert "_nhwc" in built.decision.strategy
    assert built.kernel.data_layout.name == built.kernel.out_layout.name == "NHWC"


@pytest.mark.parametrize("isa", ["avx512_vnni", "amx_int8_avx2", "generic"])
@pytest.mark.parametrize("name", ["ic17_oc33", "aligned", "stem_7x7", "ic65_oc129_1x1"])
def test_other_instruction_sets(name: str, isa: str) -> None:
    check(SHAPES[name], isa, layout="NHWC")


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues(epilogue: str) -> None:
    check(EPILOGUE_BASES["conv"].with_epilogue(EPILOGUES[epilogue]), "avx2", layout="NHWC")


def test_what_cannot_stay_says_why() -> None:
    target = isa_target("neon")
    with pytest.raises(ValueError, match=r"layout is 'NHWC'; allowed .*NCHWc: the channels"):
        strategy.conv2d(SHAPES["groups_16"], target, "NHWC")
    odd = replace(DEPTHWISE["c17"])
    with pytest.raises(ValueError, match="17 channels are no whole number of vectors"):
        strategy.conv2d(odd, target, "NHWC")
    with pytest.raises(ValueError, match="layout is 'NCDHW'; allowed: NCHWc, NHWC"):
        topi_int8.pipeline(target, layout="NCDHW")


def _graph() -> tvm.IRModule:
    """Two raw integer convolutions in NHWC with a relu between."""
    rng = np.random.default_rng(0)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 9, 10, 20), "int8"))
    w1 = relax.const(rng.integers(-127, 128, (3, 3, 20, 32)).astype("int8"))
    w2 = relax.const(rng.integers(-127, 128, (1, 1, 32, 17)).astype("int8"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(
                relax.op.nn.conv2d(
                    x, w1, padding=(1, 1), data_layout="NHWC", kernel_layout="HWIO",
                    out_dtype="int32",
                )
            )  # fmt: skip
            y = builder.emit(relax.op.nn.relu(y))
            y = builder.emit(relax.op.right_shift(y, relax.const(12, "int32")))
            y = builder.emit(relax.op.astype(y, "int8"))
            out = builder.emit_output(
                relax.op.nn.conv2d(
                    y, w2, data_layout="NHWC", kernel_layout="HWIO", out_dtype="int32"
                )
            )
        builder.emit_func_output(out)
    return builder.get()


def _in_both_layouts(mod: tvm.IRModule, target: tvm.target.Target, x: np.ndarray) -> list:
    """Return what a module computes in each of `strategy.LAYOUTS`."""
    results = []
    for layout in strategy.LAYOUTS:
        executable = tvm.compile(
            mod, target, relax_pipeline=topi_int8.pipeline(target, layout=layout)
        )
        machine = relax.VirtualMachine(executable, tvm.cpu())
        results.append(machine["main"](tvm.runtime.tensor(x)).numpy())
    return results


def test_a_graph_keeps_its_layout_and_its_result() -> None:
    mod, target = _graph(), isa_target("avx2")
    kept = topi_int8.explain(mod, target, show=False, layout="NHWC")
    assert [row.data_layout for row in kept] == ["NHWC", "NHWC"]
    assert all(row.strategy.startswith("conv2d_nhwc_") for row in kept)
    assert not any("layout_transform" in other.op for other in kept.others)
    packed = topi_int8.explain(mod, target, show=False)
    assert all(row.data_layout.startswith("NCHW") for row in packed)
    x = np.random.default_rng(1).integers(-128, 128, (1, 9, 10, 20)).astype("int8")
    results = _in_both_layouts(mod, target, x)
    np.testing.assert_array_equal(*results)
    assert results[0].any()


def _inverted_residual(emit, x: relax.Expr) -> relax.Expr:
    """QDQ in NHWC: expand, depthwise, project, the residual added; (1, 9, 10, 16)."""
    rng = np.random.default_rng(2)

    def quantized(value: relax.Expr, scale: float, zero_point: int) -> relax.Expr:
        args = relax.const(np.float32(scale)), relax.const(zero_point, "uint8")
        return emit(
            relax.op.dequantize(emit(relax.op.quantize(value, *args, out_dtype="uint8")), *args)
        )

    def conv(value: relax.Expr, kernel: int, inputs: int, outputs: int, groups: int = 1):
        weight = rng.integers(-127, 128, (kernel, kernel, inputs // groups, outputs)).astype("int8")
        scale = relax.const(rng.uniform(0.002, 0.004, outputs).astype("float32"))
        zero = relax.const(np.zeros(outputs, "int8"))
        real = emit(relax.op.dequantize(relax.const(weight), scale, zero, axis=3))
        return emit(
            relax.op.nn.conv2d(
                value, real, padding=kernel // 2, groups=groups, data_layout="NHWC",
                kernel_layout="HWIO",
            )
        )  # fmt: skip

    x = quantized(x, 0.04, 120)
    y = quantized(emit(relax.op.clip(conv(x, 1, 16, 32), 0, 6)), 6 / 255, 0)
    y = quantized(emit(relax.op.clip(conv(y, 3, 32, 32, groups=32), 0, 6)), 6 / 255, 0)
    return quantized(emit(relax.op.add(x, conv(y, 1, 32, 16))), 0.05, 128)


@pytest.mark.parametrize("isa", ["avx2", "neon_dotprod", "neon", "armv7_neon"])
def test_an_inverted_residual_stays(isa: str) -> None:
    """Depthwise and the residual too; nothing is transposed, and the addition is an epilogue."""
    mod, target = graphs.build((1, 9, 10, 16), _inverted_residual), isa_target(isa)
    kept = topi_int8.explain(mod, target, show=False, layout="NHWC")
    assert [row.data_layout for row in kept] == ["NHWC"] * 3
    dense = f"conv2d_nhwc_{isa}"
    assert [row.strategy for row in kept] == [dense, f"depthwise_nhwc_{isa}", dense]
    others = [other.op for other in kept.others]
    assert not any(name in op for op in others for name in ("layout_transform", "permute", "add"))


def test_an_inverted_residual_is_the_same_in_both_layouts() -> None:
    mod, target = graphs.build((1, 9, 10, 16), _inverted_residual), isa_target("avx2")
    x = np.random.default_rng(3).normal(0, 1, (1, 9, 10, 16)).astype("float32")
    results = _in_both_layouts(mod, target, x)
    assert results[0].std() > 1
    np.testing.assert_array_equal(*results)
    with topi_int8.disabled():
        executable = tvm.compile(mod, target)
    want = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
    # One step of each quantizer that rounds a tie, or the float's error, another way.
    assert graphs.sqnr(want, results[1]) > 35
