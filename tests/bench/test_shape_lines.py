"""bench/shape_lines.py: benchdnn's syntax, its defaults, its errors, and the way back to text."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.shape_lines import (
    Axis,
    ConvShape,
    MatmulShape,
    ShapeLineError,
    find_batch,
    parse_line,
    read_shapes,
)
from topi_int8.workload import Conv2dWorkload, Epilogue


def conv_workload(line: str) -> Conv2dWorkload:
    return parse_line(line).workload("uint8", "int8", Epilogue())


def test_issue_line():
    shape = parse_line('ic64ih56oc64oh56kh3ph1n"res2a_branch2b*3"')
    axis = Axis(i=56, o=56, k=3, s=1, p=1, d=0)
    assert shape == ConvShape(ic=64, oc=64, h=axis, w=axis, name="res2a_branch2b", count=3)
    assert shape.macs == 56 * 56 * 64 * 64 * 9
    assert shape.macs == conv_workload(shape.format()).macs


def test_matmul_line():
    shape = parse_line('128x768:768x3072n"ffn1*12"')
    assert shape == MatmulShape((128, 768), (768, 3072), "ffn1", 12)
    work = shape.workload("uint8", "int8", Epilogue())
    assert (work.m, work.k, work.n, work.batch) == (128, 768, 3072, 1)
    assert work.weight_constant and work.weight_range == (-127, 127)


def test_batched_matmul_is_dynamic():
    work = parse_line("2x6x128x64:2x6x64x32_n'x'").workload("int8", "int8", Epilogue())
    assert (work.batch, work.m, work.k, work.n) == (12, 128, 64, 32)
    assert not work.weight_constant and work.weight_range is None


def test_batch_of_a_constant_weight_folds_into_rows():
    work = parse_line("4x10x64:1x64x32").workload("int8", "int8", Epilogue())
    assert (work.batch, work.m, work.weight_constant) == (1, 40, True)


# Each line with what benchdnn's rules make of it: (h axis, w axis, ndims).
AXES = {
    # The output computed; the square rule; separators; keys in any order.
    "ic8oc8ih10kh3": (Axis(10, 8, 3), Axis(10, 8, 3), 2),
    "g2_mb1_ic8ih10_oc8oh10_kh3ph1": (Axis(10, 10, 3, 1, 1), Axis(10, 10, 3, 1, 1), 2),
    "kh3oc8ph1ih10ic8": (Axis(10, 10, 3, 1, 1), Axis(10, 10, 3, 1, 1), 2),
    # The padding computed from the output alone.
    "ic8oc8ih10oh10kh3": (Axis(10, 10, 3, 1, 1), Axis(10, 10, 3, 1, 1), 2),
    # w of its own, with its own defaults.
    "ic8oc8ih10iw7kh3kw1sh2ph1": (Axis(10, 5, 3, 2, 1), Axis(7, 7, 1), 2),
    # Dilation counts from 0.
    "ic8oc8ih10kh3dh1": (Axis(10, 6, 3, 1, 0, 1), Axis(10, 6, 3, 1, 0, 1), 2),
    # One-dimensional.
    "ic8oc8iw10kw3pw1": (Axis(), Axis(10, 10, 3, 1, 1), 1),
    "ic8oc8id4kd3pd1": (Axis(4, 4, 3, 1, 1), Axis(4, 4, 3, 1, 1), 3),
}


@pytest.mark.parametrize("line", AXES)
def test_axes(line):
    shape = parse_line(line)
    assert (shape.h, shape.w, shape.ndims) == AXES[line]


# The padding of the workload gives the line's own output; symmetric wherever that does.
PADDING = {
    "ic3ih224oc64oh112kh7sh2ph3": (3, 3, 3, 3),
    "ic3ih224oc64oh112kh3sh2ph0": (0, 0, 1, 1),
    "ic8ih5oc8oh7kh3ph1": (1, 1, 3, 3),
    "ic8ih13oc8oh1kh3sh3ph1dh5": (1, 1, 1, 1),
    "ic8ih14oc8oh4kh3sh3ph0": (0, 0, 0, 0),
    "ic8oc8iw10kw3pw1": (0, 1, 0, 1),
}


@pytest.mark.parametrize("line", PADDING)
def test_padding(line):
    shape, work = parse_line(line), conv_workload(line)
    assert work.padding == PADDING[line]
    assert (work.oh, work.ow) == (shape.h.o, shape.w.o)


@pytest.mark.parametrize(
    ("line", "token", "why"),
    [
        ("", "", "descriptor"),
        ("ic64qq3", "qq3", "unknown key; allowed: g, mb"),
        ("ic64ih56oc64kh", "kh", "needs an integer"),
        ("ic64ih-5oc64kh3", "ih-5", "needs an integer"),
        ("ih56oc64kh3", "ic", "missing"),
        ("ic8oc8", "ih", "no spatial dimension"),
        ("ic8oc8ih5", "kh", "missing"),
        ("ic8oc8ih5kh7", "kh7", "does not fit"),
        ("ic8oc8ih5kh3sh0", "sh0", ">= 1"),
        ("g3ic8oc9ih5kh3", "g", "divisor"),
        ("mb0ic8oc8ih5kh3", "mb", ">= 1"),
        ("ic8oc8id5kd3ih5kh3", "d", "3-D"),
        ("ic8oc8ih5kh3!", "!", "unknown key"),
        ("12x5", "12x5", "src:weight"),
        ("12x5:5x", "5x", "joined by x"),
        ("12x5:6x7", "K", "allowed: 5"),
        ("12x5:5x7:12x8", "12x8", "12x7"),
        ("2x3x5:4x5x7", "weight", "batch dimensions"),
    ],
)
def test_errors_name_line_and_token(line, token, why):
    with pytest.raises(ShapeLineError, match=re.escape(why)) as caught:
        parse_line(line)
    assert caught.value.token == token
    assert repr(line) in str(caught.value) and repr(token) in str(caught.value)


@pytest.mark.parametrize("line", ["ic8oc8id4kd3pd1", "ic8ih14oc8oh2kh3ph0", "1x2x3:4x3x5"])
def test_workload_refuses_in_words(line):
    shape = parse_line(line)
    with pytest.raises(ValueError, match="allowed"):
        shape.workload("uint8", "int8", Epilogue())


def axes():
    """Axes that benchdnn's rules can express: the output follows from the rest."""

    @st.composite
    def build(draw):
        k, s, d = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
        p = draw(st.integers(0, 4))
        extent = (k - 1) * (d + 1) + 1
        i = draw(st.integers(max(1, extent - 2 * p), 40))
        natural = (i - extent + 2 * p) // s + 1
        return Axis(i=i, o=draw(st.integers(1, natural + 2)), k=k, s=s, p=p, d=d)

    return build()


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters='"'))


@st.composite
def conv_shapes(draw):
    g, ndims = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    h = draw(axes()) if ndims > 1 else Axis()
    return ConvShape(
        ic=g * draw(st.integers(1, 40)), oc=g * draw(st.integers(1, 40)), g=g, ndims=ndims,
        mb=draw(st.integers(1, 4)), d=draw(axes()) if ndims > 2 else Axis(), h=h,
        w=h if ndims > 1 and draw(st.booleans()) else draw(axes()),
        name=draw(NAMES), count=draw(st.integers(1, 9)),
    )  # fmt: skip


@given(conv_shapes())
def test_conv_round_trip(shape):
    assert parse_line(shape.format()) == shape


@given(
    st.lists(st.integers(1, 9), max_size=2), st.integers(1, 99), st.integers(1, 99),
    st.integers(1, 99), NAMES, st.integers(1, 9),
)  # fmt: skip
def test_matmul_round_trip(batch, m, k, n, name, count):
    shape = MatmulShape((*batch, m, k), (*batch, k, n), name, count)
    assert parse_line(shape.format()) == shape


@given(axes())
def test_pads_give_the_output(axis):
    try:
        lead, trail = axis.pads
    except ValueError:
        # Only a line that crops whole outputs is refused.
        assert axis.trailing_padding <= -axis.s
        return
    assert (axis.i + lead + trail - axis.extent) // axis.s + 1 == axis.o


def test_find_batch(tmp_path: Path):
    (tmp_path / "mine").write_text("")
    assert find_batch(tmp_path / "mine") == tmp_path / "mine"
    assert find_batch("resnet18").name == "resnet18"
    with pytest.raises(FileNotFoundError, match=r"'resnet99'.*resnet18"):
        find_batch("resnet99")


# In the manner of benchdnn's own batch files: knobs, knobs over several lines, inclusion.
BATCH = r"""
# a comment ic8oc8ih5kh3
--reset --dt=u8:s8:u8,s8:s8:s8
--attr-post-ops=relu, \
                clip:-2:3
--mb=2,16
ic8oc8ih5kh3n"a*2"   # behind a shape, ic8oc8ih6kh3
--mb=0
--batch=other
ic8oc8ih6kh3 ic8oc8\
ih7kh3
"""


def test_read_shapes(tmp_path: Path):
    (tmp_path / "batch").write_text(BATCH)
    (tmp_path / "other").write_text("mb5ic16oc16ih5kh1\n3x4:4x5\n")
    lines = [shape.format() for shape in read_shapes(tmp_path / "batch")]
    assert lines == [
        'mb2ic8ih5oc8oh3kh3ph0n"a*2"',
        'mb16ic8ih5oc8oh3kh3ph0n"a*2"',
        "mb5ic16ih5oc16oh5kh1ph0",
        "3x4:4x5",
        "mb1ic8ih6oc8oh4kh3ph0",
        "mb1ic8ih7oc8oh5kh3ph0",
    ]
    # A batch asked for by the caller beats the file's.
    mbs = [s.mb for s in read_shapes(tmp_path / "batch", mb=7) if isinstance(s, ConvShape)]
    assert mbs == [7, 7, 7, 7]


def test_read_shapes_says_where(tmp_path: Path):
    bad = tmp_path / "bad"
    bad.write_text("# fine\nic8oc8ih5kh3\nic8oc\n")
    with pytest.raises(ShapeLineError, match=re.escape(f"{bad}:3: shape line 'ic8oc': 'oc'")):
        read_shapes(bad)
    bad.write_text("ic8\\")
    with pytest.raises(ShapeLineError, match="continued"):
        read_shapes(bad)
    bad.write_text("--mb=x")
    with pytest.raises(ShapeLineError, match="mb needs"):
        read_shapes(bad)
