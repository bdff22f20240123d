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
from topi_int8.strategy import MatmulPacking
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
    library = tvm.compile(tvm.IRModule({"main": func}), target=isa_target("generic"))
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


@pytest.mark.parametrize("name", CONVS)
def test_weight_shape_and_dtype_are_promised(name):
    """`Lower` allocates by these before any array exists."""
    work: Conv2dWorkload = CONVS[name]
    for isa in ("generic", "avx2", "avx512_vnni", "amx_int8"):
        kernel = kernels.decide(work, isa).kernel()
        packed = kernel.pack_weight(reference.random_operands(work).weight)
        assert packed.shape == kernel.weight_shape and packed.dtype == kernel.weight_dtype
        assert packed.flags.c_contiguous
