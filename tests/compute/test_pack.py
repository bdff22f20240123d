"""compute/pack.py packs at run time exactly what the numpy packers pack at compile time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import te

from tests import kernels, reference
from tests.grid import DEPTHWISE, DTYPES, MATMULS, SHAPES
from topi_int8.compute import pack
from topi_int8.compute.conv2d import PackedConv2d
from topi_int8.compute.depthwise import PackedDepthwise
from topi_int8.compute.weights import window_taps
from topi_int8.kernel import MatmulPacking
from topi_int8.strategy import LAYOUTS, declines_nhwc
from topi_int8.target import isa_target
from topi_int8.workload import Conv2dWorkload, Epilogue

CONVS = {
    name: (SHAPES | DTYPES)[name]
    for name in (
        "one_of_everything", "ic3_oc65", "ic17_oc33", "ic65_oc129_1x1", "large_k_1x1", "stem_7x7",
        "gray_5x5", "even_kernel", "groups_aligned", "groups_16", "groups_misaligned",
        "groups_of_3", "channel_multiplier_7", "groups_32x4", "u8u8_weight_zero_point", "s8s8",
        "u8u8_grouped",
        "u8u8_proven_int8", "s8s8_stem",
    )
}  # fmt: skip


def run_te(args: list, out: te.Tensor, arrays: list[np.ndarray]) -> np.ndarray:
    """Return what a TE tensor computes on plain loops."""
    func = te.create_prim_func([*args, out])
    module = tvm.IRModule({"main": func})
    library = kernels.compile_module(module, target=isa_target("generic"))
    shape = tuple(int(extent) for extent in out.shape)
    return kernels.call(library, arrays, np.empty(shape, str(out.dtype)))


def placeholder(array: np.ndarray, name: str) -> te.Tensor:
    return te.placeholder(array.shape, str(array.dtype), name)


@pytest.mark.parametrize("name", CONVS)
def test_conv_weight(name):
    # In turn: the packing of each ISA has its own lanes, steps and types.
    isa = ("avx2", "avx512_vnni", "amx_int8")[list(CONVS).index(name) % 3]
    work = CONVS[name]
    packing = kernels.decide(work, isa).kernel().packing
    weight = reference.random_operands(work, seed=1).weight
    oihw = placeholder(weight, "weight")
    got = run_te([oihw], pack.pack_weight(packing, oihw), [weight])
    np.testing.assert_array_equal(got, packing.pack_weight(weight))


@pytest.mark.parametrize("isa", ["avx2", "amx_int8"])
@pytest.mark.parametrize(
    "name", ["ic3_oc65", "s8s8", "u8u8_weight_zero_point", "groups_misaligned", "s8s8_stem"]
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_bias(has_bias, name, isa):
    work = CONVS[name].with_epilogue(Epilogue(bias=has_bias))
    packing = kernels.decide(work, isa).kernel().packing
    ops = reference.random_operands(work, seed=2)
    arrays = [ops.weight, ops.bias] if has_bias else [ops.weight]
    args = [placeholder(array, f"in{i}") for i, array in enumerate(arrays)]
    bias = args[1] if has_bias else None
    got = run_te(args, pack.pack_bias(packing, args[0], bias), arrays)
    np.testing.assert_array_equal(got, packing.pack_bias(ops.bias, ops.weight))


@pytest.mark.parametrize("name", ["c17", "c65", "kernel_1x7", "u8u8", "weight_zero_point"])
def test_depthwise_weight(name):
    work = DEPTHWISE[name]
    packing = kernels.decide(work, "avx2").kernel().packing
    weight = reference.random_operands(work, seed=3).weight
    oihw = placeholder(weight, "weight")
    got = run_te([oihw], pack.pack_depthwise_weight(packing, oihw), [weight])
    np.testing.assert_array_equal(got, packing.pack_weight(weight))


@pytest.mark.parametrize("isa", ["avx2", "amx_int8"])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    "name",
    ["one_of_everything", "rows_17_odd_n", "k_7", "u8u8", "batch", "batch_odd_n", "batch_k_5"],
)
def test_matmul_weight(name, transposed, isa):
    work = replace(MATMULS[name], transpose_b=transposed)
    packing = kernels.decide(work, isa).kernel().packing
    assert isinstance(packing, MatmulPacking)
    weight = reference.random_operands(work, seed=4).weight
    operand = placeholder(weight, "weight")
    oihw = pack.matmul_weight_as_oihw(
        operand, work.batch, work.n, work.k, packing.conv.out_block, transposed,
        work.weight_zero_point,
    )  # fmt: skip
    got = run_te([operand], pack.pack_weight(packing.conv, oihw), [weight])
    np.testing.assert_array_equal(got, packing.pack_weight(kernels.weight_nk(work, weight)))


# ---- ARM: rows of 4, 8 or 16 weights, windows filled up with taps of zeros, four rows of depthwise

ARM_ISAS = ("neon", "neon_dotprod", "neon_i8mm", "armv7_neon")
PROVEN = {"weight_range": (-127, 127)}


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in CONVS for layout in LAYOUTS
     if layout == "NCHWc" or not declines_nhwc(CONVS[name])],
)  # fmt: skip
def test_conv_weight_on_arm(name, layout):
    work = CONVS[name]
    at = list(CONVS).index(name) + 2 * (layout == "NHWC")
    if work.weight_dtype == "int8" and not work.weight_zero_point and at % 8 < 4:
        work = replace(work, **PROVEN)  # rows for smlal
    packing = kernels.decide(work, ARM_ISAS[at % 4], layout).kernel().packing
    weight = reference.random_operands(work, seed=1).weight
    oihw = placeholder(weight, "weight")
    got = run_te([oihw], pack.pack_weight(packing, oihw), [weight])
    assert got.any()
    np.testing.assert_array_equal(got, packing.pack_weight(weight))


@pytest.mark.parametrize("isa", ["neon", "neon_i8mm"])
@pytest.mark.parametrize("name", ["ic3_oc65", "s8s8", "u8u8_proven_int8", "groups_misaligned"])
def test_bias_on_arm(name, isa):
    """Data that is flipped to signed has its zero point 128 lower."""
    work = CONVS[name].with_epilogue(Epilogue(bias=True))
    packing = kernels.decide(work, isa).kernel().packing
    shift = -128 if packing.data_dtype == "int8" != work.data_dtype else 0
    assert packing.data_zero_point == work.data_zero_point + shift
    ops = reference.random_operands(work, seed=2)
    arrays = [ops.weight, ops.bias]
    args = [placeholder(array, f"in{i}") for i, array in enumerate(arrays)]
    got = run_te(args, pack.pack_bias(packing, *args), arrays)
    np.testing.assert_array_equal(got, packing.pack_bias(ops.bias, ops.weight))
    sums = ops.weight.astype("int64") - work.weight_zero_point
    want = ops.bias - packing.data_zero_point * sums.reshape(work.oc, -1).sum(1)
    np.testing.assert_array_equal(got.reshape(-1)[: work.oc], want.astype("int32"))


@pytest.mark.parametrize(
    ("kw", "block", "k", "taps"),
    [(7, 4, 4, 7), (7, 4, 8, 8), (7, 4, 16, 8), (5, 4, 16, 8), (3, 8, 16, 4), (3, 3, 8, 8),
     (3, 3, 4, 4), (5, 1, 4, 8), (1, 16, 16, 1), (2, 12, 8, 2)],
)  # fmt: skip
def test_windows_are_whole_rows(kw, block, k, taps):
    assert window_taps(kw, block, k) == taps


@pytest.mark.parametrize(("k", "zeros"), [(4, 0), (8, 1), (16, 1)])
def test_windows_have_taps_of_zeros(k, zeros):
    """(oc / lanes, kh, 1, 1, taps * block / k, lanes, k) holds (kh, tap, channel) in a row."""
    work = Conv2dWorkload(1, 3, 9, 11, 8, 2, 7)
    packing = PackedConv2d(work, 4, 16, 4, k, "int8", "int8", window=True, partial=k > 4)
    assert packing.window_taps == 7 + zeros
    weight = reference.random_operands(work, seed=5).weight
    packed = packing.pack_weight(weight)
    rows = packed.transpose(0, 5, 1, 2, 3, 4, 6).reshape(16, 2, packing.window_taps, 4)
    np.testing.assert_array_equal(rows[:8, :, :7, :3], weight.transpose(0, 2, 3, 1))
    assert not rows[:, :, 7:].any() and not rows[..., 3].any() and not rows[8:].any()


@pytest.mark.parametrize("how", ["plain", "pairs", "dot"])
@pytest.mark.parametrize(
    ("name", "block"),
    [("c17", 16), ("c65", 64), ("kernel_1x7", 16), ("kernel_5", 16), ("u8u8", 32),
     ("weight_zero_point", 16)],
)  # fmt: skip
def test_depthwise_weight_in_each_way(name, block, how):
    work = DEPTHWISE[name]
    weight = reference.random_operands(work, seed=3).weight
    if how != "plain":  # int8 less the zero point, proven
        weight = np.clip(weight, *((10, 127) if weight.dtype == "uint8" else (-120, 127)))
    data = "uint8" if name == "u8u8" and how == "dot" else "int8"
    packing = PackedDepthwise(work, block, how, data)
    oihw = placeholder(weight, "weight")
    got = run_te([oihw], pack.pack_depthwise_weight(packing, oihw), [weight])
    np.testing.assert_array_equal(got, packing.pack_weight(weight))
    assert got.shape == packing.weight_shape and got.dtype == packing.weight_dtype
    if how == "dot":
        # (blocks, kh / 4, kw, block, 4) -> (channels, kh, kw), rows of zeros below
        rows = got.transpose(0, 3, 1, 4, 2).reshape(-1, 4 * packing.row_groups, work.kw)
        wide = weight[:, 0].astype("int16") - work.weight_zero_point
        np.testing.assert_array_equal(rows[: work.ic, : work.kh], wide)
        assert not rows[:, work.kh :].any() and not rows[work.ic :].any()


@pytest.mark.parametrize(
    ("kernel", "padding", "ih", "extra"),
    [((3, 3), 1, 9, 1), ((4, 3), 1, 9, 0), ((5, 3), 2, 9, 3), ((1, 7), 0, 9, 3)],
)
def test_depthwise_rows_below_the_image(kernel, padding, ih, extra):
    """Taps of zero weight read rows that must be there."""
    kh, kw = kernel
    work = Conv2dWorkload(
        1, 16, ih, 9, 16, kh, kw, groups=16, padding=(padding, 3, padding, 3)
    )
    assert PackedDepthwise(work, 16, "dot", "int8").extra_rows == extra
    assert PackedDepthwise(work, 16, "pairs", "int8").extra_rows == 0


@pytest.mark.parametrize("name", CONVS)
def test_weight_shape_and_dtype_are_promised(name):
    """`Lower` allocates by these before any array exists."""
    work: Conv2dWorkload = CONVS[name]
    for isa in ("generic", "avx2", "avx512_vnni", "amx_int8"):
        kernel = kernels.decide(work, isa).kernel()
        packed = kernel.pack_weight(reference.random_operands(work).weight)
        assert packed.shape == kernel.weight_shape and packed.dtype == kernel.weight_dtype
        assert packed.flags.c_contiguous
