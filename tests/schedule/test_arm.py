"""arm.py: what the choices of block and step promise; and what the inner loops are made of, on the
cores by name: the right products, all sums in registers.

Results are checked under qemu, in tests/emulator. Here everything is compiled and read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st

from bench import arm_asm
from intrinsics.arm_dot import PRODUCTS, ArmBlock
from tests.grid import DTYPES
from topi_int8 import kernel, strategy
from topi_int8.compute.weights import window_taps
from topi_int8.schedule.arm import choose_block, choose_step, wants_flat, wants_window
from topi_int8.target import Features, features, isa_target, named
from topi_int8.workload import Conv2dWorkload, Epilogue

SAME = (1, 1, 1, 1)
# Weights that smlal takes.
PROVEN = {"weight_range": (-127, 127)}
each_product = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS.keys())

# ---- choosing a block and a step


@each_product
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([4, 12, 16, 20, 32, 48, 64, 1008]))
def test_block_fits_the_registers_and_covers_the_row(product, oh, ow, out_block):
    h, w, n, padded = choose_block(product, oh, ow, out_block)
    assert oh % h == 0 and out_block % n == 0
    assert padded % w == 0 and ow <= padded < ow + w
    k = product.k[0]
    block = ArmBlock(product, h, w, n, k, k)  # which refuses what it cannot compute
    sums = block.pixels * n // (1 if product.partial else 4)
    # Beside the sums: with partial ones a product of each, else a vector of weights and the data.
    beside = sums if product.partial else 1 + (block.pixels // 2 if product.how == "mmla" else 1)
    assert sums + beside <= product.registers


@each_product
def test_large_images_hide_the_latency(product):
    """Two pipes times four cycles until a sum can be added to again, where registers allow it."""
    h, w, n, padded = choose_block(product, 56, 56, 64)
    sums = h * w * n // (1 if product.partial else 4)
    assert sums >= (8 if product.registers == 32 else 4)
    assert padded <= 60


@pytest.mark.parametrize("out_block", [6, 10, 63])
def test_block_needs_whole_vectors(out_block):
    with pytest.raises(ValueError, match=rf"out_block is {out_block}; allowed: multiples of 4"):
        choose_block(PRODUCTS["dot_s8s8s32_neon_dotprod"], 7, 7, out_block)


@given(st.sampled_from(list(PRODUCTS.values())), st.integers(0, 1), st.integers(1, 200))
def test_step_is_whole_rows_of_weights(product, which, rows):
    k = product.k[which % len(product.k)]
    step = choose_step(product, rows * k, k)
    assert step % k == 0 and rows * k % step == 0
    # One vector of channels, where channels come in vectors; two at the most.
    limit = 4 if product.how == "fma" else 16 if rows * k % 16 == 0 else 32
    assert step <= limit
    larger = [s for s in range(step + k, limit + 1, k) if rows * k % s == 0]
    assert not larger
    ArmBlock(product, 1, 2, 4, step, k)


@pytest.mark.parametrize(
    ("change", "flat"),
    [
        ({"ih": 7, "iw": 7}, True),
        ({"ih": 7, "iw": 8}, False),
        ({"ih": 1, "iw": 7}, True),  # padded: three rows
        ({"ih": 13, "iw": 13, "strides": (2, 2)}, False),
        ({"ih": 3, "iw": 7, "padding": (0, 1, 0, 1)}, False),  # one row
    ],
    ids=str,
)
def test_narrow_images_are_one_row(change, flat):
    work = replace(Conv2dWorkload(1, 64, 14, 14, 64, 3, 3, padding=SAME), **change)
    if change == {"ih": 1, "iw": 7}:
        work = replace(work, padding=(2, 1, 2, 1))
    assert wants_flat(work) == flat


@pytest.mark.parametrize(
    ("change", "block", "window"),
    [
        ({}, 4, True),
        ({}, 8, True),
        ({}, 16, False),  # a pixel is a vector
        ({"ic": 5}, 4, False),  # two blocks
        ({"kw": 1}, 4, False),
        ({"kw": 16}, 4, True),
        ({"kw": 17}, 4, False),
        ({"dilation": (2, 1)}, 4, True),
        ({"dilation": (1, 2)}, 4, False),
        ({"ic": 4, "oc": 4, "groups": 2}, 4, False),
    ],
    ids=str,
)
def test_stems_read_windows(change, block, window):
    work = replace(Conv2dWorkload(1, 3, 40, 60, 64, 7, 7), **change)
    assert wants_window(work, block, (16, 8)) == window


@st.composite
def convolutions(draw) -> Conv2dWorkload:
    return Conv2dWorkload(
        1, draw(st.integers(1, 80)), draw(st.integers(3, 40)), draw(st.integers(3, 40)),
        draw(st.integers(1, 80)), 3, draw(st.integers(1, 5)), padding=(1, 2, 1, 2),
        strides=draw(st.sampled_from([(1, 1), (2, 2), (2, 1)])),
        dilation=draw(st.sampled_from([(1, 1), (1, 1), (2, 1)])),
    )  # fmt: skip


ROWS = [(row[1], row[2]) for row in strategy._ARM_ROWS]


@pytest.mark.parametrize(("isa", "how"), ROWS, ids=map("-".join, ROWS))
@given(work=convolutions(), layout=st.sampled_from(strategy.LAYOUTS), signed=st.booleans())
def test_packing_is_what_the_block_reads(isa, how, work, layout, signed):
    """`blocks.schedule` splits by the block without a remainder, and tensorize finds its strides.

    Rows of weights are whole, whatever the channels of a block.
    """
    feats = features(isa_target(isa))
    mixed = (isa, how) == ("neon_i8mm", "dot")  # usdot, of unsigned data alone
    work = replace(work, data_dtype="int8" if signed and not mixed else "uint8")
    blocks = kernel.default_blocks(work, feats, layout)
    plan = kernel.build_arm(isa, how)(work, blocks, feats, True).plan
    packing, block = plan.conv, plan.block
    assert (packing.lanes, packing.k) == (block.n, block.k)
    assert packing.partial == block.product.partial
    assert packing.ow_padded % block.w == 0 and packing.rows % block.h == 0
    assert packing.step_block % block.step == 0
    assert (packing.data_dtype, packing.weight_dtype) == (block.product.a, block.product.b)
    assert block.window == packing.window and not (packing.window and packing.widened)
    column = work.strides[1] * (packing.in_block if packing.window else 1)
    assert (block.stride_h, block.stride_w) == (work.strides[0], column)
    assert packing.step_block % 4 == 0


@pytest.mark.parametrize("how", ["smlal", "dot", "mmla"])
@pytest.mark.parametrize(
    ("block", "kw"),
    [(4, 7), (4, 3), (4, 5), (8, 3), (12, 3), (3, 3), (3, 7), (5, 3), (11, 2), (11, 3)],
)
def test_a_window_is_shorter_than_its_taps(block, kw, how):
    """Else the taps would rather be read one by one, each filled up to whole rows."""
    rows = next(row.k for row in PRODUCTS.values() if row.how == how)
    work = Conv2dWorkload(1, block, 40, 60, 64, kw, kw)
    window = min(window_taps(kw, block, k) * block for k in rows)
    alone = min(kw * (-(-block // k) * k) for k in rows)
    assert wants_window(work, block, rows) == (window <= alone)


# ---- assembly, on cores by name: what LLVM makes of it changes from core to core


@dataclass(frozen=True)
class Inner:
    """An innermost loop that multiplies what the workload multiplies."""

    code: tuple[arm_asm.Instruction, ...]
    frame: bool

    def products(self, is_float: bool = False) -> set[str]:
        """Return the mnemonics of its multiply-accumulates, of integers or of floats."""
        names = {i.mnemonic for i in self.code if arm_asm.macs(i)}
        return {name for name in names if (name[0] == "f" or ".f" in name) == is_float}

    def spills(self) -> list[str]:
        """Return what it stores, or does with the stack: sums stay in registers."""
        return [
            i.text
            for i in self.code
            if arm_asm.on_stack(i, self.frame) or re.match(r"v?st|push", i.text)
            or re.search(r"\bsp\b", i.operands)
        ]  # fmt: skip


def multiplying_loops(work: Conv2dWorkload, target: tvm.target.Target) -> list[Inner]:
    func = strategy.conv2d(work, target).kernel().func.with_attr("global_symbol", "main")
    library = tvm.compile(tvm.IRModule({"main": func}), target=target)
    functions = arm_asm.parse(library.mod.inspect_source("asm"))
    every = [
        Inner(loop.instructions, arm_asm.has_frame_pointer(function))
        for function in functions for loop in function.innermost
    ]  # fmt: skip
    return [loop for loop in every if loop.products(work.is_float)]


CORES = {
    "cortex-a53": "neon", "cortex-a72": "neon", "cortex-a55": "neon_dotprod",
    "cortex-a76": "neon_dotprod", "neoverse-n1": "neon_dotprod", "neoverse-n2": "neon_i8mm",
    "neoverse-v1": "neon_i8mm", "rpi2": "armv7_neon",
}  # fmt: skip
MADE_OF = {
    "neon": {"smull", "smlal2"}, "neon_dotprod": {"sdot"}, "neon_i8mm": {"smmla"},
    "armv7_neon": {"vmull.s8", "vmlal.s8"},
}  # fmt: skip
RESNET = {
    "stem": Conv2dWorkload(1, 3, 56, 56, 64, 7, 7, strides=(2, 2), padding=(3, 3, 3, 3)),
    "3x3": Conv2dWorkload(1, 64, 56, 56, 64, 3, 3, padding=SAME),
    "1x1_64": Conv2dWorkload(1, 64, 56, 56, 256, 1, 1),
    "3x3_7x7": Conv2dWorkload(1, 512, 7, 7, 512, 3, 3, padding=SAME),
    # `make test-arm` only
    "3x3_14": Conv2dWorkload(1, 256, 14, 14, 256, 3, 3, padding=SAME),
    "3x3_s2": Conv2dWorkload(1, 64, 56, 56, 128, 3, 3, strides=(2, 2), padding=SAME),
    "1x1_s2": Conv2dWorkload(1, 64, 56, 56, 128, 1, 1, strides=(2, 2)),
    "1x1_256": Conv2dWorkload(1, 256, 56, 56, 64, 1, 1),
    "1x1_7x7": Conv2dWorkload(1, 512, 7, 7, 2048, 1, 1),
}
QUICK = 4


def layers() -> list:
    found = []
    for core in CORES:
        for at, name in enumerate(RESNET):
            marks = [pytest.mark.arm_full] if at >= QUICK else []
            found.append(pytest.param(core, name, id=f"{core}-{name}", marks=marks))
    return found


@pytest.mark.arm
@pytest.mark.parametrize(("core", "name"), layers())
def test_inner_loops(core, name):
    """Made of the products of the instruction set alone, and nothing in them on the stack."""
    work = replace(RESNET[name], data_dtype="int8", **PROVEN)
    work = work.with_epilogue(Epilogue("uint8", scale=True))
    target = named(core)
    assert strategy.conv2d(work, target).strategy == f"conv2d_nchwc_{CORES[core]}"
    loops = multiplying_loops(work, target)
    assert loops
    assert all(loop.products() == MADE_OF[CORES[core]] for loop in loops)
    assert not [text for loop in loops for text in loop.spills()]


@pytest.mark.parametrize(
    ("isa", "name", "change", "made"),
    [
        ("neon", "s8s8", PROVEN, {"smull", "smlal2"}),
        ("neon", "u8s8", PROVEN, {"smull", "smlal2"}),  # flipped where it is padded
        ("neon", "s8s8", {}, {"smull", "smull2"}),
        ("neon", "u8u8", {}, {"umull", "umull2"}),
        ("neon", "s8u8", {}, {"umull", "umull2"}),
        ("neon", "u8u8_proven_int8", {}, {"smull", "smlal2"}),
        ("neon_dotprod", "u8s8", {}, {"sdot"}),
        ("neon_dotprod", "u8u8", {}, {"udot"}),
        ("neon_dotprod", "u8u8_proven_int8", {}, {"sdot"}),
        ("neon_i8mm", "u8s8", {}, {"usmmla"}),
        ("neon_i8mm", "s8s8", {}, {"smmla"}),
        ("neon_i8mm", "u8u8", {}, {"ummla"}),
        ("neon_i8mm", "s8u8", {}, {"ummla"}),
        ("armv7_neon", "s8s8", {}, {"vmull.s8"}),
        ("armv7_neon", "u8u8", {}, {"vmull.u8"}),
    ],
)
def test_products_of_the_types(isa, name, change, made):
    work = replace(DTYPES[name], ic=64, oc=16, ih=4, iw=16, **change)
    loops = multiplying_loops(work, isa_target(isa))
    assert loops and all(loop.products() <= made for loop in loops)
    assert set().union(*(loop.products() for loop in loops)) == made


@pytest.mark.parametrize(
    "core",
    [
        "cortex-a53", "cortex-a72", "neoverse-n1", "rpi2",
    ],
)
def test_float_inner_loops(core):
    floats = {"data_dtype": "float32", "weight_dtype": "float32", "data_zero_point": 0}
    work = replace(RESNET["3x3"], **floats, epilogue=Epilogue("float32"))
    loops = multiplying_loops(work, named(core))
    made = {"vmul.f32"} if core == "rpi2" else {"fmla"}  # LLVM fuses nothing for an A7
    assert loops and all(loop.products(is_float=True) == made for loop in loops)
    assert not [text for loop in loops for text in loop.spills()]


def test_cores_have_what_their_row_says():
    """The table above is of cores whose features LLVM tells."""
    for core, isa in CORES.items():
        feats: Features = features(named(core))
        assert feats.has(isa)
        assert feats.has("neon_i8mm") == (isa == "neon_i8mm")
