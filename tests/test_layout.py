"""layout.py: names, shapes, and packing there and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topi_int8.layout import Layout

NAMES = ("NCHW", "NHWC", "NCHW4c", "NCHW16c", "NCHW64c")


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    layout = Layout.parse(name)
    assert layout.name == name
    assert layout.is_packed == name.endswith("c")
    assert layout.channel_axis == (3 if name == "NHWC" else 1)
    if layout.is_packed:
        assert layout == Layout.packed(layout.block) == Layout(name, layout.block)


@pytest.mark.parametrize("name", ["NCHWc", "NCHW0c", "NCHW16", "NWHC", "", "OIHW", "NCHW16c "])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"layout is .*; allowed: NCHW, NHWC, NCHW<block>c"):
        Layout.parse(name)


@pytest.mark.parametrize(("name", "block"), [("NCHW16c", 8), ("NCHW16c", 0), ("NCHW", 16)])
def test_name_and_block_agree(name, block):
    with pytest.raises(ValueError, match="layout is"):
        Layout(name, block)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("NCHW", (2, 17, 3, 5)),
        ("NHWC", (2, 3, 5, 17)),
        ("NCHW16c", (2, 2, 3, 5, 16)),
        ("NCHW4c", (2, 5, 3, 5, 4)),
        ("NCHW64c", (2, 1, 3, 5, 64)),
    ],
)
def test_shapes(name, shape):
    layout = Layout.parse(name)
    assert layout.shape(2, 17, 3, 5) == shape
    assert layout.logical(shape, 17) == (2, 17, 3, 5)


@pytest.mark.parametrize(
    ("name", "shape", "channels"),
    [("NCHW16c", (1, 2, 3, 5, 16), 33), ("NCHW", (1, 2, 3, 5), 3), ("NHWC", (1, 3, 5, 2), 4)],
)
def test_other_shapes_are_refused(name, shape, channels):
    with pytest.raises(ValueError, match=rf"shape is .*; allowed: .*{name}, {channels} channels"):
        Layout.parse(name).logical(shape, channels)


@given(
    st.sampled_from(NAMES),
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 4), st.integers(1, 4)),
    st.integers(0, 255),
)
def test_pack_and_back(name, shape, pad):
    layout = Layout.parse(name)
    nchw = np.random.default_rng(0).integers(0, 256, shape).astype("uint8")
    packed = layout.pack(nchw, pad)
    assert packed.shape == layout.shape(*shape) and packed.dtype == nchw.dtype
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(layout.unpack(packed, shape[1]), nchw)
    # What is no channel holds the padding.
    assert packed.sum(dtype="int64") == nchw.sum(dtype="int64") + pad * (packed.size - nchw.size)


def test_where_an_element_lies():
    nchw = np.arange(2 * 20 * 3 * 4, dtype="int32").reshape(2, 20, 3, 4)
    packed = Layout.packed(16).pack(nchw, -1)
    assert packed[1, 1, 2, 3, 2] == nchw[1, 18, 2, 3]
    assert (packed[:, 1, :, :, 4:] == -1).all()
    assert Layout.parse("NHWC").pack(nchw)[1, 2, 3, 18] == nchw[1, 18, 2, 3]
