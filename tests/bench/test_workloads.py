"""bench/workloads.py: types, epilogues and operands of a shape line."""

import numpy as np
import pytest

from bench import workloads
from bench.shape_lines import parse_line
from tests import reference
from topi_int8.workload import Conv2dWorkload, Epilogue

CONV = parse_line("ic16ih8oc24kh3ph1")
DENSE = parse_line("8x32:32x24")


def test_default_epilogues():
    work = workloads.make(CONV)
    assert (work.data_dtype, work.weight_dtype) == ("uint8", "int8")
    assert work.epilogue == Epilogue("uint8", bias=True, scale=True, clip_min=0)
    assert workloads.make(CONV, "s8s8").data_dtype == "int8"
    work = workloads.make(CONV, "f32")
    assert work.is_float and work.weight_range is None
    assert work.epilogue == Epilogue("float32", bias=True, clip_min=0)


def test_epilogue_words():
    assert workloads.parse_epilogue("s32") == Epilogue()
    assert workloads.parse_epilogue("sum+relu+s8") == Epilogue(
        "int8", scale=True, clip_min=0, residual_dtype="int8", residual_scale=0.5
    )


@pytest.mark.parametrize(
    ("text", "bad"),
    [("", "''"), ("bias", "'bias'"), ("bias+bias+u8", "'bias'"), ("gelu+u8", "'gelu'")],
)
def test_bad_epilogue_is_named(text, bad):
    with pytest.raises(ValueError, match=bad):
        workloads.parse_epilogue(text)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"dtype is 'u4'; allowed: u8s8"):
        workloads.make(CONV, "u4")
    with pytest.raises(ValueError, match="allowed with dtype f32"):
        workloads.make(CONV, "f32", "u8")


def test_weight_bits():
    assert workloads.make(CONV, weight_bits=7).weight_range == (-64, 64)
    operands = workloads.random_operands(workloads.make(CONV, weight_bits=7))
    assert operands.weight.min() >= -64 and operands.weight.max() <= 64
    # An activation as weight promises nothing.
    dynamic = workloads.make(parse_line("2x8x32:2x32x24"), weight_bits=7)
    assert dynamic.weight_range is None


@pytest.mark.parametrize("shape", [CONV, DENSE, parse_line("2x8x32:2x32x24")])
@pytest.mark.parametrize("dtype", workloads.DTYPES)
def test_operands_use_the_range_of_the_output(shape, dtype):
    epilogue = "bias+sum+relu+" + ("f32" if dtype == "f32" else "u8")
    work = workloads.make(shape, dtype, epilogue)
    operands = workloads.random_operands(work)
    assert operands.data.dtype == work.data_dtype and operands.weight.dtype == work.weight_dtype
    compute = reference.conv2d if isinstance(work, Conv2dWorkload) else reference.matmul
    out = compute(work, **operands.__dict__)
    assert out.shape == workloads.shapes_of(work)[2]
    # Neither all clipped nor all the same: a wrong kernel would show.
    assert len(np.unique(out)) > 40
    again = workloads.random_operands(work)
    assert np.array_equal(again.data, operands.data) and np.array_equal(again.bias, operands.bias)
