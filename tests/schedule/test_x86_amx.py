"""x86_amx.py: convolutions and matmuls on tiles, bit-exact over the grid; their assembly; and what
the choices of rows, steps and blocks promise.

On a CPU without AMX the tiles are emulated, and the rest of the kernel is AVX2.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st

from intrinsics.compat import tir
from intrinsics.x86_amx import TILES
from tests.emulator import counts, native_features, reset
from tests.grid import DTYPES, EPILOGUE_BASES, EPILOGUES, MATMULS, SAME, SHAPES, conv
from tests.kernels import Assembly, build, check, check_instructions, decide
from topi_int8 import kernel
from topi_int8.kernel import Blocks
from topi_int8.schedule.stages import PREFETCHED
from topi_int8.schedule.x86_amx import choose_bands
from topi_int8.strategy import FEW_ROWS
from topi_int8.target import features, isa_target, runs_here
from topi_int8.workload import Conv2dWorkload, MatmulWorkload

ISA = "amx_int8" if runs_here("amx_int8") else "amx_int8_avx2"
# Weights that no tile takes: their difference to the zero point may not fit int8.
UNPROVEN = {name for name in DTYPES if "weight_zero_point" in name or name == "u8u8_grouped"}


# ---- bit-exact


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    built = check(SHAPES[name], ISA)
    assert built.decision.strategy == "conv2d_nchwc_amx_int8"


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name):
    built = check(DTYPES[name], ISA, extreme=True)
    assert ("amx" in built.decision.strategy) == (name not in UNPROVEN)


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("base", EPILOGUE_BASES)
def test_epilogues(base, name):
    at = list(EPILOGUES).index(name) + list(EPILOGUE_BASES).index(base)
    if at % 2:  # each epilogue meets one or two of the three
        check(EPILOGUE_BASES[base].with_epilogue(EPILOGUES[name]), ISA)
    else:
        work = EPILOGUE_BASES[base].with_epilogue(EPILOGUES[name])
        assert decide(work, ISA).strategy == "conv2d_nchwc_amx_int8"


@pytest.mark.parametrize("name", MATMULS)
def test_matmuls(name):
    work = MATMULS[name]
    if work.m <= FEW_ROWS:  # of which tiles take only what vpdpbusd does not
        work = replace(work, weight_dtype="uint8")
    built = check(work, ISA)
    assert ("amx" in built.decision.strategy) == (name != "u8u8")


@pytest.mark.parametrize(
    ("data", "out"), [(16, 64), (32, 16), (48, 48), (64, 32), (4, 128), (8, 16), (20, 80)]
)
def test_blocks_that_a_neighbour_chose(data, out):
    """ConvertLayout may hand over any block of data, and ask for any of output."""
    channels = min(data, 3) if data == 4 else 2 * data - 3
    work = replace(EPILOGUE_BASES["conv"], ic=channels, oc=2 * out - 5)
    work = work.with_epilogue(EPILOGUES["u8_residual_u8"])
    built = check(work, ISA, blocks=Blocks(data, out))
    assert built.kernel.data_layout.block == data and built.kernel.out_layout.block == out


def test_work_is_done_by_tiles():
    work = Conv2dWorkload(1, 64, 16, 16, 64, 3, 3, padding=(1, 1, 1, 1))
    reset()
    check(work, ISA)
    if "amx" not in native_features():
        found = counts()
        full = 16 * 64 * 16
        assert found["tdpbusd"] == work.macs / full
        # 2x2 tiles: as many loads as products
        assert found["tileloadd"] == found["tdpbusd"]
        assert found["ldtilecfg"] == found["tilerelease"]


STRIDED = {
    "one_tap": conv(130, (14, 14), 40, strides=(2, 2)),
    "three_taps": conv(70, (15, 13), 33, (3, 3), strides=(2, 2), padding=SAME),
    "groups": conv(128, (14, 15), 128, (3, 3), strides=(2, 2), padding=(0, 1, 1, 0), groups=2),
    "dilated": conv(20, (17, 16), 20, (3, 3), strides=(2, 3), padding=(2,) * 4, dilation=(2, 2)),
    "large_stride": conv(20, (21, 22), 20, (2, 5), strides=(4, 3), n=3),
}


@pytest.mark.parametrize("name", STRIDED)
def test_strided_convolutions_by_phases(name):
    built = check(STRIDED[name].with_epilogue(EPILOGUES["u8_residual_s8"]), ISA)
    assert built.kernel.packing.phases


FLOAT_SUMS = {
    "one_step": conv(64, (9, 14), 256),
    "two_steps": conv(100, (5, 7), 130, n=3),
    "short_rows": conv(16, (7, 7), 64, (3, 3), padding=SAME),
    "border": replace(
        conv(64, (6, 7), 64, epilogue=EPILOGUES["s8_small_sums"]),
        out_border=(1, 1, 1, 1), residual_border=(0, 1, 2, 1),
    ),
    "groups": conv(128, (5, 6), 128, groups=2),
    "signed": conv(64, (5, 6), 128, data_dtype="int8", data_zero_point=-9),
    "matmul": MatmulWorkload(20, 128, 64, data_zero_point=3),
}  # fmt: skip


@pytest.mark.parametrize("epilogue", [name for name in EPILOGUES if "small_sums" in name])
@pytest.mark.parametrize("name", FLOAT_SUMS)
def test_sums_counted_in_floats(name, epilogue):
    work = FLOAT_SUMS[name]
    if EPILOGUES[epilogue].residual_dtype is None and isinstance(work, Conv2dWorkload):
        work = replace(work, residual_border=(0, 0, 0, 0))
    work = work.with_epilogue(EPILOGUES[epilogue])
    packing = check(work, ISA).kernel.packing
    packing = getattr(packing, "conv", packing)
    assert packing.float_sums == (ISA == "amx_int8")  # without AVX-512 nothing is narrowed by it
    larger = work.with_epilogue(replace(work.epilogue, small_sums=False))
    assert not getattr(decide(larger, ISA).kernel().packing, "float_sums", False)


def test_instructions_of_sums_counted_in_floats():
    work = FLOAT_SUMS["one_step"].with_epilogue(EPILOGUES["u8_small_sums"])
    found = Assembly.of(build(work, "amx_int8").library).mnemonics()
    vectors = 4 * found["vpackuswb"]
    assert found["vpshufb"] == found["vcvtps2dq"] == vectors > 0
    assert found["vporq"] == 0
    assert found["vpermd"] == found["vcvtdq2ps"] == found["vpmovzxbd"] == 0


@pytest.mark.parametrize(
    ("kernel_size", "strides", "padding", "rows", "grain"),
    [
        ((7, 7), (2, 2), (3, 3, 3, 3), 2, 2),
        ((3, 3), (2, 2), (1, 0, 1, 1), 3, 2),
        ((3, 3), (1, 1), (1, 1, 1, 1), 3, 1),
        ((5, 5), (3, 1), (2, 0, 1, 3), 3, 3),
        ((4, 4), (4, 4), (0, 0, 0, 0), 4, 4),
        ((11, 11), (4, 4), (2, 2, 2, 2), 1, 1),
        ((3, 7), (4, 2), (0, 0, 0, 9), 2, 2),
    ],
)
@pytest.mark.parametrize("width", [15, 37])
def test_windows_over_several_rows(kernel_size, strides, padding, rows, grain, width):
    """Rows are woven together in vectors where an image is at least one wide."""
    work = conv(3, (22, width), 33, kernel_size, strides=strides, padding=padding, n=2)
    built = check(work.with_epilogue(EPILOGUES["u8"]), ISA)
    packing = built.kernel.packing
    assert packing.window and (packing.window_rows, packing.window_grain) == (rows, grain)


def test_a_reduction_too_long_to_unroll():
    work = conv(64 * 83, (3, 5), 40)
    assert check(work.with_epilogue(EPILOGUES["s8"]), ISA).kernel.plan.pipeline.unrolled < 83
    work = conv(64 * 84, (3, 5), 40)
    assert check(work.with_epilogue(EPILOGUES["s8"]), ISA).kernel.plan.pipeline.unrolled == 42


# ---- assembly, on every machine

CONV = Conv2dWorkload(1, 64, 14, 14, 64, 3, 3, padding=(1, 1, 1, 1))


@pytest.mark.parametrize("isa", ["amx_int8", "amx_int8_avx2"])
@pytest.mark.parametrize(
    ("name", "mnemonic"), [("u8s8", "tdpbusd"), ("s8s8", "tdpbssd"), ("u8u8", "tdpbuud")]
)
def test_instructions(name, mnemonic, isa):
    work = replace(DTYPES[name], iw=33, epilogue=EPILOGUES["u8_residual_u8"])
    built = build(work, isa)
    check_instructions(built, isa, mnemonic, "tmm")
    assembly = Assembly.of(built.library)
    # The epilogue works in the widest vectors.
    register = "zmm" if isa == "amx_int8" else "ymm"
    assert assembly.matching(rf"^vmaxps .*%{register}")
    if isa == "amx_int8_avx2":  # where AVX-512 packs, saturation is the upper bound
        assert assembly.matching(rf"^vminps .*%{register}")
    assert bool(assembly.matching(r"^vpackuswb .*%zmm")) == (isa == "amx_int8")
    assert len(assembly.matching("syscall")) == 1


def test_permission_is_asked_for_when_wanted():
    decision = decide(CONV, "amx_int8")
    asking, silent = (str(decision.kernel(ask_permission=ask).func) for ask in (True, False))
    assert asking.count('"syscall"') == 1
    assert '"syscall"' not in silent
    assert "tilezero" in str(decision.kernel().func.body)
    assert "tilezero" not in str(decide(CONV, "avx2").kernel().func.body)


def test_tiles_start_from_the_bias():
    found = Assembly.of(build(CONV.with_epilogue(EPILOGUES["u8"]), "amx_int8").library).mnemonics()
    # Stored where the next block starts, and the last block behind the loop.
    assert found["tilezero"] == 0 and found["tilestored"] == 8
    assert found["tileloadd"] == found["tdpbusd"] + 4


def test_four_products_need_four_loads():
    """2x2 tiles of 64 channels, all eight registers; the taps are unrolled."""
    found = Assembly.of(build(CONV, "amx_int8").library).mnemonics()
    assert found["tdpbusd"] % 4 == 0
    assert found["tileloadd"] == found["tdpbusd"]
    assert found["tilezero"] == 4 and found["tilestored"] == 8
    assert found["ldtilecfg"] == found["tilerelease"] == 1


# ---- choosing blocks and tasks


def number(expression: Any) -> int:
    """Return the value of an expression of constants."""
    return int(tvm.sym.Analyzer().simplify(expression))


@st.composite
def convolutions(draw) -> Conv2dWorkload:
    return Conv2dWorkload(
        1, draw(st.integers(1, 200)), draw(st.integers(1, 40)), draw(st.integers(1, 40)),
        draw(st.integers(1, 300)), 3, 3, padding=(1, 1, 1, 1),
        strides=draw(st.sampled_from([(1, 1), (2, 2), (2, 1)])),
    )  # fmt: skip


@given(convolutions())
def test_block_fits_the_registers_and_divides_the_shape(work):
    feats = features(isa_target("amx_int8"))
    plan = kernel.build_amx(work, kernel.default_blocks(work, feats), feats, True).plan
    packing, pipeline, block = plan.conv, plan.pipeline, plan.pipeline.block
    assert block.c_tiles + min(block.m_tiles, block.n_tiles) + 1 <= TILES
    assert packing.out_block % (block.n_tiles * 16) == 0
    assert packing.step_block % pipeline.step == 0
    bands = pipeline.pixels
    assert bands.bands * bands.height >= work.oh
    # Every output pixel lies in a tile, and no tile leaves its band.
    seen = set()
    for band in range(bands.bands):
        first = min(band * bands.height, work.oh - bands.height)
        for tile in range(bands.blocks * bands.m_tiles):
            row, column = (number(at) for at in bands.first(tir.const(tile, "int32")))
            for offset in range(bands.rows):
                at = column + offset
                y, x = divmod(at, bands.width)
                assert first + row + y < work.oh and at < bands.pixels
                if x < work.ow:
                    starts = [tir.const(start, "int32") for start in (row, column)]
                    origin = [bands.origin(*starts, width) for width in (work.ow, work.ow + 5)]
                    pixel = number(bands.pixel(*origin[0], offset, work.ow))
                    assert pixel == (row + y) * work.ow + x
                    wide = number(bands.pixel(*origin[1], offset, work.ow + 5))
                    assert wide == (row + y) * (work.ow + 5) + x
                    seen.add(first * work.ow + pixel)
    assert seen == set(range(work.oh * work.ow))


@given(convolutions())
def test_blocks_fetch_the_next_weights_once(work):
    """All blocks of a group ask for each line of the next one, and for no more than a share more.
    """
    feats = features(isa_target("amx_int8"))
    plan = kernel.build_amx(work, kernel.default_blocks(work, feats), feats, True).plan.pipeline
    if not plan.prefetches:
        assert math.prod(plan.conv.weight_shape) <= PREFETCHED
        return
    lines, blocks = plan.n_tiles * plan.step // 4, plan.images * plan.bands * plan.pixels.blocks
    assert plan.prefetching <= blocks
    assert lines <= plan.prefetching * plan.prefetches < lines + plan.prefetches


@given(convolutions(), st.integers(1, 32))
def test_bands_are_many_and_overlap_little(work, limit):
    feats = features(isa_target("amx_int8"))
    plan = kernel.build_amx(work, kernel.default_blocks(work, feats), feats, True).plan.pipeline
    limit = min(limit, work.oh)
    bands = choose_bands(plan, limit)
    height = -(-work.oh // bands)
    assert 1 <= bands <= limit and (bands - 1) * height < work.oh <= bands * height

    def pixels(count: int) -> int:
        cut = replace(plan, bands=count)
        return count * cut.pixels.blocks * cut.m_tiles * cut.pixels.rows

    for other in range(max(1, limit // 2), limit + 1):
        assert pixels(bands) <= pixels(other)


# ---- threads


def test_threads_share_out_rows_of_large_images_and_channels_of_large_weights():
    def pipeline(work: Conv2dWorkload) -> Any:
        return decide(work, "amx_int8").kernel().plan.pipeline

    wide = pipeline(conv(64, (56, 56), 64, (3, 3), padding=SAME))
    assert wide.rows_first and 1 < wide.bands <= wide.tasks
    assert wide.tasks % wide.bands == 0
    deep = pipeline(conv(256, (14, 14), 256, (3, 3), padding=SAME))
    assert not deep.rows_first and deep.tasks > 1
    small = pipeline(conv(64, (14, 14), 64))
    assert not small.rows_first and small.bands == small.tasks == 1


_SHARED_OUT = """
from tests.grid import EPILOGUES, SAME, conv
from tests.kernels import check

for work in (
    conv(128, (14, 14), 128, (3, 3), padding=SAME),
    conv(64, (30, 31), 64, (3, 3), padding=SAME),
    conv(64, (56, 56), 256),
    conv(3, (64, 64), 64, (7, 7), strides=(2, 2), padding=(3, 3, 3, 3), n=2),
    conv(130, (28, 28), 300, (3, 3), strides=(2, 2), padding=SAME),
):
    built = check(work.with_epilogue(EPILOGUES["u8_residual_u8"]), "{isa}")
    print(built.kernel.plan.pipeline.tasks)
"""


def test_threads_share_nothing():
    """Four threads, whatever this process has: each needs its own sums and tile state."""
    program = _SHARED_OUT.format(isa=ISA)
    environment = os.environ | {"TVM_NUM_THREADS": "4", "TVM_BIND_THREADS": "0"}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert max(int(line) for line in ran.stdout.split()) > 1
