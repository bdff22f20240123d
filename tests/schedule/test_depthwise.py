"""depthwise.py: bit-exact on each ISA over the grid, in vectors, on the ISA's own registers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st

from bench import arm_asm
from tests.grid import DEPTHWISE, EPILOGUES
from tests.kernels import Assembly, build, check, check_instructions
from topi_int8 import strategy
from topi_int8.compute.depthwise import PackedDepthwise
from topi_int8.kernel import Blocks
from topi_int8.schedule.depthwise import choose_pairs, choose_strip
from topi_int8.target import isa_target, named
from topi_int8.workload import Conv2dWorkload

ISAS = ("generic", "avx2", "avx_vnni", "avx512_bw", "avx512_vnni", "amx_int8")
each_isa = pytest.mark.parametrize("isa", ISAS)


@each_isa
@pytest.mark.parametrize("name", DEPTHWISE)
def test_shapes_and_dtypes(name, isa):
    """Weights that do not fit int8 have the plain kernel on every ISA; others see
    `test_x86_depthwise`.
    """
    work = DEPTHWISE[name]
    built = check(work, isa, extreme="zero_point" in name or name == "s8s8")
    plain = isa == "generic" or work.weight_dtype == "uint8" or work.weight_zero_point != 0
    assert (built.decision.strategy == "depthwise_nchwc") == plain


@pytest.mark.parametrize("isa", ["avx2", "avx512_bw"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(name, isa):
    base = DEPTHWISE[("c17", "stride_2", "batch_3")[list(EPILOGUES).index(name) % 3]]
    check(replace(base, weight_dtype="uint8").with_epilogue(EPILOGUES[name]), isa)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_blocks_of_the_neighbours(block):
    """On AMX the neighbours' blocks have 64 channels."""
    unsigned = {"weight_dtype": "uint8", "epilogue": EPILOGUES["u8_residual_u8"]}
    work = replace(DEPTHWISE["c65"], **unsigned)
    built = check(work, "avx2", blocks=Blocks(block, block))
    assert built.kernel.data_layout.block == built.kernel.out_layout.block == block


@pytest.mark.parametrize(
    ("isa", "register"),
    [
        ("generic", "xmm"),
        ("avx2", "ymm"),
        ("avx_vnni", "ymm"),
        ("avx512_bw", "zmm"),
        ("avx512_vnni", "zmm"),
    ],
)
def test_instructions(isa, register):
    unsigned = {"weight_dtype": "uint8", "epilogue": EPILOGUES["u8"]}
    built = build(replace(DEPTHWISE["c128"], iw=28, **unsigned), isa)
    # LLVM sees that the products of widened bytes fit pmaddwd.
    check_instructions(built, isa, "pmaddwd", register)
    # Neither are floats multiplied one by one.
    assert not Assembly.of(built.library).matching("^v?mulss")


# ---- ARM: pairs of taps, and the dot product over four rows

# Weights that two products of int16 take.
PROVEN = {"data_dtype": "int8", "weight_range": (-127, 127)}


@given(st.integers(1, 64), st.integers(1, 200))
def test_pairs_keep_sixteen_sums(quarter, ow):
    block = 4 * quarter
    lanes, strip = choose_pairs(block, ow)
    assert block % lanes == 0 and ow % strip == 0
    assert lanes * strip <= 16
    assert lanes == 16 or block % 16


def depthwise(size: int, kernel: tuple[int, int], stride: int = 1, dilation: int = 1, **more):
    """Return a depthwise workload of 128 channels with `size` output columns."""
    kh, kw = kernel
    width = (size - 1) * stride + (kw - 1) * dilation + 1
    height = (3 - 1) * stride + (kh - 1) * dilation + 1
    return Conv2dWorkload(
        1, 128, height, width, 128, kh, kw, groups=128, strides=(stride, stride),
        dilation=(dilation, dilation), **(PROVEN | more),
    )  # fmt: skip


@given(
    st.integers(1, 200), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 3),
    st.integers(1, 3),
)  # fmt: skip
def test_gathered_rows_of_a_strip_fit_the_stack(size, kernel, stride, dilation):
    work = depthwise(size, kernel, stride, dilation)
    strip = choose_strip(work)
    packing = PackedDepthwise(work, 16, "dot", "int8", strip)  # which refuses what does not divide
    assert 1 <= strip <= 16
    bytes_of = packing.strip_columns * packing.row_groups * 16 * 4
    assert bytes_of <= 1024 or strip == 1


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "strip"),
    [
        ((3, 3), 1, 112, 14),  # 16 columns
        ((3, 3), 1, 7, 7),
        ((3, 3), 1, 31, 1),
        ((5, 5), 1, 28, 4),  # two groups of rows: 8 columns
        ((5, 5), 2, 28, 2),
        ((9, 9), 1, 28, 1),
    ],
)
def test_strips(kernel, stride, size, strip):
    assert choose_strip(depthwise(size, kernel, stride)) == strip


def instructions(work: Conv2dWorkload, target: tvm.target.Target, layout: str = "NCHWc"):
    """Return (the decision, every loop that multiplies and whether it has a frame pointer)."""
    decision = strategy.conv2d(work, target, layout)
    func = decision.kernel().func.with_attr("global_symbol", "main")
    library = tvm.compile(tvm.IRModule({"main": func}), target=target)
    loops = [
        (loop, arm_asm.has_frame_pointer(function))
        for function in arm_asm.parse(library.mod.inspect_source("asm"))
        for loop in function.innermost
        if any(arm_asm.macs(i) and not i.mnemonic.startswith("f") for i in loop.instructions)
    ]
    assert loops
    return decision, loops


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("core", ["cortex-a53", "cortex-a72"])
def test_pairs_are_long_multiplies(core, stride):
    """Each pair is smull and smlal, and one wide add for both; 16 sums stay in registers."""
    decision, loops = instructions(depthwise(28, (3, 3), stride), named(core))
    assert decision.strategy == "depthwise_nchwc_neon"
    for loop, frame in loops:
        names = Counter(i.mnemonic for i in loop.instructions)
        # Nine taps are five pairs, the last of one tap; each vector is two halves of 8 channels.
        assert names["smull"] == names["smull2"] == 5
        assert names["smlal"] == names["smlal2"] == 4
        # A wide add for each of these four a pair; the first two pairs' are one saddl.
        long_adds = names["saddl"] + names["saddl2"]
        assert names["saddw"] + names["saddw2"] + 2 * long_adds == 20, names
        assert not [i.text for i in loop.instructions if arm_asm.on_stack(i, frame)]


@pytest.mark.parametrize("layout", strategy.LAYOUTS)
@pytest.mark.parametrize("core", ["cortex-a55", "cortex-a76", "neoverse-n1"])
def test_rows_are_gathered_once_and_multiplied(core, layout):
    """A column of 16 channels is eight zips, for all horizontal taps."""
    work = replace(depthwise(14, (3, 3)), ic=16, oc=16, groups=16)
    decision = strategy.conv2d(work, named(core), layout)
    assert decision.strategy == f"depthwise_{layout.lower()}_neon_dotprod"
    func = decision.kernel().func.with_attr("global_symbol", "main")
    asm = tvm.compile(tvm.IRModule({"main": func}), target=named(core)).mod.inspect_source("asm")
    code = [i for f in arm_asm.parse(asm) for block in f.blocks for i in block.instructions]
    names = Counter(i.mnemonic for i in code)
    assert names["zip1"] + names["zip2"] == 8 * 16
    # 14 pixels, 3 taps, in a loop over the four vectors of channels that LLVM may unroll; the
    # epilogue's conversions are no products.
    assert names["sdot"] in (42, 2 * 42, 4 * 42)
    assert not (names["smlal"] or names["mla"] or names["mul.4s"])


def test_code_does_not_grow_with_the_channels_of_nhwc():
    """16 of them are gathered at a time."""
    sizes = []
    for channels in (32, 320):
        work = replace(depthwise(14, (3, 3)), ic=channels, oc=channels, groups=channels)
        func = strategy.conv2d(work, named("neoverse-n1"), "NHWC").kernel().func
        module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        asm = tvm.compile(module, target=named("neoverse-n1")).mod.inspect_source("asm")
        sizes.append(sum(len(b.instructions) for f in arm_asm.parse(asm) for b in f.blocks))
    assert sizes[1] < 1.2 * sizes[0]


@pytest.mark.parametrize(
    ("types", "weight_zero_point", "isa", "made"),
    [
        (("int8", "int8"), 0, "neon_dotprod", "sdot"),
        (("uint8", "int8"), 0, "neon_dotprod", "sdot"),  # flipped where it is padded
        (("uint8", "uint8"), 0, "neon_dotprod", "udot"),
        (("int8", "uint8"), 0, "neon_dotprod", "udot"),
        (("uint8", "uint8"), 100, "neon_dotprod", "sdot"),  # proven to fit int8
        (("int8", "int8"), 0, "neon_i8mm", "sdot"),
        (("uint8", "int8"), 0, "neon_i8mm", "usdot"),
        (("uint8", "uint8"), 0, "neon_i8mm", "udot"),
    ],
)
def test_dots_of_the_types(types, weight_zero_point, isa, made):
    weights = (0, 200) if types[1] == "uint8" else (-127, 127)
    work = depthwise(
        14, (3, 3), data_dtype=types[0], weight_dtype=types[1], weight_range=weights,
        weight_zero_point=weight_zero_point,
    )  # fmt: skip
    decision, loops = instructions(work, isa_target(isa))
    assert decision.strategy == "depthwise_nchwc_neon_dotprod"
    dots = {i.mnemonic for loop, _ in loops for i in loop.instructions if "dot" in i.mnemonic}
    assert dots == {made}


@pytest.mark.parametrize("stride", [1, 2])
def test_pairs_on_armv7_are_long_multiplies(stride):
    decision, loops = instructions(depthwise(28, (3, 3), stride), named("rpi2"))
    assert decision.strategy == "depthwise_nchwc_armv7_neon"
    for loop, frame in loops:
        names = Counter(i.mnemonic for i in loop.instructions)
        assert names["vmull.s8"] and names["vmlal.s8"]
        assert not [i.text for i in loop.instructions if arm_asm.on_stack(i, frame)]
