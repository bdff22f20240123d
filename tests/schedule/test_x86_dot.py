"""x86_dot.py: what statements add to the register tile; `test_spatial_pack` has the whole grid."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.grid import EPILOGUES, conv
from tests.kernels import Assembly, build, check, decide
from topi_int8.kernel import Blocks
from topi_int8.schedule.spatial_pack import SpatialPack
from topi_int8.schedule.stages import PREFETCHED, TASKS
from topi_int8.schedule.x86_dot import DotPlan, pixels_of
from topi_int8.workload import MatmulWorkload

U8, S8 = EPILOGUES["u8_bounded"], EPILOGUES["s8_bounded"]
SAME = (1, 1, 1, 1)
ISAS = ("avx2", "avx_vnni", "avx512_bw", "avx512_vnni")
each_isa = pytest.mark.parametrize("isa", ISAS)
# Widths that tiles do not divide, with each kind of output; one row of pixels; few pixels.
PATHS = {
    "odd_width": conv(20, (5, 29), 33, (3, 3), padding=SAME, epilogue=U8),
    "odd_width_residual": conv(20, (5, 31), 33, (3, 3), padding=SAME, epilogue=S8),
    "odd_width_int32": conv(20, (5, 29), 33, (3, 3), padding=SAME),
    "strided": conv(32, (9, 27), 48, (1, 1), strides=(2, 2), epilogue=U8),
    "pointwise_7x7": conv(64, (7, 7), 96, epilogue=S8),
    "pointwise_13x11": conv(64, (13, 11), 17, n=3, epilogue=U8),
    "pointwise_1x1": conv(64, (1, 1), 80, epilogue=U8),
    "grouped": conv(64, (7, 7), 64, (3, 3), groups=4, padding=SAME, epilogue=U8),
}


@each_isa
@pytest.mark.parametrize("name", PATHS)
def test_paths(name, isa):
    built = check(PATHS[name], isa)
    assert isinstance(built.kernel.plan, DotPlan)


@each_isa
@pytest.mark.parametrize("block", [32, 64])
def test_blocks_of_the_neighbours(block, isa):
    """More vectors in a block than a tile takes: its bytes are stored in pieces."""
    check(conv(70, (6, 7), 70, (3, 3), padding=SAME, epilogue=S8), isa, blocks=Blocks(block, block))


@each_isa
@pytest.mark.parametrize("n", [16, 40, 100, 1000])
def test_matmuls(n, isa):
    for rows in (1, 3, 29):
        check(MatmulWorkload(rows, n, 36, epilogue=U8), isa)


def test_nothing_is_cropped_or_converted_one_by_one():
    """A width that no tile divides; outputs leave as whole lines, four vectors narrowed at once."""
    work = conv(64, (29, 29), 64, (3, 3), padding=SAME, epilogue=U8, weight_range=(-127, 127))
    built = build(work, "avx512_vnni")
    assert 29 % built.kernel.plan.tile.width and "crop" not in str(built.kernel.func)
    found = Assembly.of(built.library).mnemonics()
    assert found["vpmovdb"] == found["vpmovusdb"] == 0
    assert found["vpackuswb"] >= found["vpackssdw"] / 2 > 0


def test_relay_keeps_the_scheduled_computation():
    work = conv(64, (14, 14), 64, (3, 3), padding=SAME)
    scheduled = decide(work, "avx512_vnni").kernel(Blocks(16, 16, scheduled=True))
    assert isinstance(scheduled.plan, SpatialPack)


def test_pixels_of_a_pointwise_convolution_are_one_row():
    pointwise = conv(16, (7, 9), 16)
    assert pixels_of(pointwise) == (1, 63)
    for change in (
        {"kh": 2, "ih": 8}, {"strides": (2, 1)}, {"strides": (1, 2)}, {"padding": (0, 1, 0, 0)},
    ):  # fmt: skip
        other = replace(pointwise, **change)
        assert pixels_of(other) == (other.oh, other.ow)


@given(st.integers(1, 4), st.integers(1, 60), st.integers(1, 60), st.sampled_from([16, 100, 2048]))
def test_tasks_share_out_all_tiles(n, ih, iw, oc):
    plan = decide(conv(16, (ih, iw), oc, (3, 3), n=n, padding=SAME), "avx512_vnni").kernel().plan
    blocks, parts = plan.groups
    shares = -(-plan.tiles // plan.share)
    assert (shares - 1) * plan.share < plan.tiles <= shares * plan.share
    tasks = n * blocks * parts
    assert tasks * shares >= min(TASKS, tasks * plan.tiles) / 2


def test_lone_tiles_and_small_weights_are_not_fetched_ahead():
    one = decide(MatmulWorkload(1, 1024, 64), "avx512_vnni").kernel().plan
    assert one.tiles == 1 and one.prefetches[1] == 0
    small = conv(64, (28, 28), 48, (3, 3), padding=SAME)
    assert 64 * 48 * 9 < PREFETCHED < 64 * 64 * 9
    assert decide(small, "avx512_vnni").kernel().plan.prefetches[1] == 0
    large = conv(64, (28, 28), 64, (3, 3), padding=SAME)
    assert Assembly.of(build(large, "avx512_vnni").library).mnemonics()["prefetcht1"] > 0


@given(
    st.integers(16, 600), st.integers(5, 40), st.integers(64, 600),
    st.sampled_from([(1, 1), (3, 3), (1, 5)]), st.sampled_from(["avx512_vnni", "avx2"]),
)  # fmt: skip
def test_tiles_fetch_the_next_weights_once(ic, size, oc, kernel, isa):
    """All tiles together ask for each line of the next group, and for no more than twice as many
    beyond it.
    """
    plan = decide(conv(ic, (size, size), oc, kernel), isa).kernel().plan
    loops, count = plan.prefetches
    turns = math.prod(list(plan.steps.values())[:loops])
    busy = min(plan.tiles, -(-plan.lines // max(1, turns * count)))
    assert not count or plan.lines <= busy * turns * count <= 3 * plan.lines


BORDERED = {
    "pointwise": conv(32, (7, 9), 48, epilogue=U8),
    "taps": conv(20, (6, 15), 33, (3, 3), padding=SAME, epilogue=S8),
    "strided": conv(32, (9, 27), 16, (3, 3), strides=(2, 2), padding=SAME, epilogue=U8),
    "residual": conv(16, (5, 5), 64, (3, 3), n=2, padding=SAME,
                     epilogue=EPILOGUES["u8_residual_u8"]),
    "one_row": conv(16, (1, 40), 16, (1, 3), padding=(0, 1, 0, 1), epilogue=U8),
    "grouped": conv(64, (7, 7), 64, (3, 3), groups=4, padding=SAME, epilogue=U8),
    "stem": conv(3, (20, 20), 64, (7, 7), strides=(2, 2), padding=(3, 3, 3, 3), epilogue=U8),
}  # fmt: skip


@pytest.mark.parametrize("border", [SAME, (2, 0, 1, 3), (0, 0, 0, 1), (1, 0, 0, 0)])
@pytest.mark.parametrize("isa", [*ISAS, "amx_int8", "amx_int8_avx2"])
@pytest.mark.parametrize("name", BORDERED)
def test_borders_hold_the_zero_point(name, isa, border):
    """Around the output, whatever tiles wrote there before."""
    work = replace(BORDERED[name], out_border=border)
    built = check(work, isa)
    assert built.kernel.packing.out_shape[2:4] == work.stored
    assert built.decision.strategy_row.borders
    if work.epilogue.residual_dtype:
        for other in (border, (1, 1, 1, 1), (0, 3, 2, 0)):
            check(replace(work, residual_border=other), isa)
