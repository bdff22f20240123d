"""workload.py: what a workload says about itself, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from topi_int8.workload import Conv2dWorkload, Epilogue, MatmulWorkload, with_known_bounds

CONV = {"n": 1, "ic": 8, "ih": 9, "iw": 9, "oc": 16, "kh": 3, "kw": 3}
MATMUL = {"m": 4, "n": 5, "k": 6}
FLOAT = {"data_dtype": "float32", "weight_dtype": "float32"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_dtype": "int16"}, r"out_dtype is 'int16'; allowed: uint8, int8, int32, float32"),
        ({"out_dtype": "uint8"}, r"scale is False; allowed: True when out_dtype is uint8"),
        ({"out_dtype": "int32", "scale": True}, r"scale is True; allowed: False when out_dtype is"),
        ({"out_dtype": "int32", "out_zero_point": 1}, r"out_zero_point is 1; allowed: 0"),
        ({"out_dtype": "float32", "out_zero_point": 1}, r"out_zero_point is 1; allowed: 0"),
        (
            {"out_dtype": "uint8", "scale": True, "out_zero_point": -1},
            r"out_zero_point is -1; allowed: an integer in \[0, 255\] for uint8",
        ),
        (
            {"out_dtype": "int8", "scale": True, "out_zero_point": 128},
            r"out_zero_point is 128; allowed: an integer in \[-128, 127\] for int8",
        ),
        ({"residual_dtype": "uint8"}, r"residual_dtype is 'uint8'; allowed: None"),
        (
            {"out_dtype": "float32", "residual_dtype": "int32"},
            r"residual_dtype is 'int32'; allowed: None, uint8, int8, float32",
        ),
        (
            {"out_dtype": "float32", "residual_dtype": "int8", "residual_zero_point": 200},
            r"residual_zero_point is 200; allowed: an integer in \[-128, 127\]",
        ),
        ({"clip_min": 3, "clip_max": 2}, r"clip_min, clip_max is \(3, 2\); allowed: min <= max"),
        (
            {"out_dtype": "uint8", "scale": True, "clip_min": 300},
            r"clip_min, clip_max is \(300, 255\)",
        ),
    ],
)
def test_epilogue_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Epilogue(**arguments)


@pytest.mark.parametrize(
    ("epilogue", "bounds"),
    [
        (Epilogue(), (-(2**31), 2**31 - 1)),
        (Epilogue(clip_min=0), (0, 2**31 - 1)),
        (Epilogue("float32"), (None, None)),
        (Epilogue("float32", clip_min=0.0, clip_max=6.0), (0.0, 6.0)),
        (Epilogue("uint8", scale=True), (0, 255)),
        (Epilogue("uint8", scale=True, clip_min=-5, clip_max=999), (0, 255)),
        (Epilogue("int8", scale=True, clip_min=-3), (-3, 127)),
    ],
    ids=str,
)
def test_bounds_are_the_clip_inside_the_type(epilogue, bounds):
    assert epilogue.bounds() == bounds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, r"n is 0; allowed: an integer >= 1"),
        ({"oc": -1}, r"oc is -1"),
        ({"strides": (1, 0)}, r"strides is \(1, 0\); allowed: integers >= 1"),
        ({"dilation": (0, 1)}, r"dilation is \(0, 1\)"),
        ({"padding": (1, 1)}, r"padding is \(1, 1\); allowed: \(top, left, bottom, right\)"),
        ({"padding": (0, -1, 0, 0)}, r"padding is \(0, -1, 0, 0\)"),
        ({"groups": 3}, r"groups is 3; allowed: a divisor of ic=8 and oc=16"),
        ({"kh": 10}, r"kernel is \(10, 3\); allowed: one that fits the input"),
        ({"dilation": (5, 1)}, r"kernel is \(3, 3\)"),
        ({"data_dtype": "int16"}, r"data_dtype is 'int16'; allowed: uint8, int8"),
        ({"weight_dtype": "float32"}, r"weight_dtype is 'float32'"),
        ({"data_zero_point": -1}, r"data_zero_point is -1; allowed: an integer in \[0, 255\]"),
        ({"weight_zero_point": 128}, r"weight_zero_point is 128; allowed: an integer in \[-128"),
        ({"data_dtype": "float32"}, r"weight_dtype is 'int8'; allowed: float32"),
        (FLOAT, r"out_dtype is 'int32'; allowed: float32"),
        (FLOAT | {"epilogue": Epilogue("float32", scale=True)}, r"scale is True"),
    ],
)
def test_conv2d_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Conv2dWorkload(**(CONV | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 0}, r"m is 0; allowed: an integer >= 1"),
        ({"batch": 0}, r"batch is 0"),
        ({"data_dtype": "int32"}, r"data_dtype is 'int32'; allowed: uint8, int8"),
        ({"data_zero_point": 256}, r"data_zero_point is 256; allowed: an integer in \[0, 255\]"),
        ({"data_dtype": "float32"}, r"weight_dtype is 'int8'; allowed: float32"),
        (FLOAT | {"epilogue": Epilogue("float32", scale=True)}, r"scale is True"),
    ],
)
def test_matmul_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        MatmulWorkload(**(MATMUL | change))


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, (7, 7)),
        ({"padding": (1, 1, 1, 1)}, (9, 9)),
        ({"padding": (0, 1, 2, 0)}, (9, 8)),
        ({"strides": (2, 3)}, (4, 3)),
        ({"strides": (2, 2), "padding": (1, 0, 0, 1)}, (4, 4)),
        ({"dilation": (2, 4)}, (5, 1)),
        ({"kh": 1, "kw": 9}, (9, 1)),
    ],
    ids=str,
)
def test_output_size(change, size):
    work = Conv2dWorkload(**(CONV | change))
    assert (work.oh, work.ow) == size
    assert work.macs == size[0] * size[1] * 16 * 8 * work.kh * work.kw


def test_macs_of_groups_and_batches():
    assert Conv2dWorkload(**(CONV | {"groups": 4, "n": 3})).macs == 3 * 49 * 16 * 2 * 9
    assert MatmulWorkload(4, 5, 6, batch=7).macs == 4 * 5 * 6 * 7


@pytest.mark.parametrize(
    ("change", "depthwise"),
    [
        ({}, False),
        ({"groups": 8}, False),  # a channel multiplier of 2
        ({"groups": 8, "oc": 8}, True),
        ({"ic": 1, "oc": 1}, False),
    ],
    ids=str,
)
def test_depthwise(change, depthwise):
    assert Conv2dWorkload(**(CONV | change)).is_depthwise == depthwise


def test_workloads_are_values():
    work = Conv2dWorkload(**CONV)
    assert work == Conv2dWorkload(**CONV) and hash(work) == hash(Conv2dWorkload(**CONV))
    assert work.with_epilogue(Epilogue(bias=True)).epilogue.bias
    assert (
        not work.is_float
        and Conv2dWorkload(**(CONV | FLOAT), epilogue=Epilogue("float32")).is_float
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        work.n = 2


EPI = Epilogue("uint8", bias=True, scale=True)
PROVEN = Conv2dWorkload(1, 64, 4, 4, 2, 1, 1, epilogue=EPI)
WEIGHT = np.stack([np.full((64, 1, 1), -127, "int8"), np.full((64, 1, 1), 5, "int8")])
RESIDUAL = {"residual_dtype": "uint8", "residual_zero_point": 3, "residual_scale": 2.0}


@pytest.mark.parametrize(
    ("work", "data", "residual"),
    [
        (PROVEN, 255, 0),
        (dataclasses.replace(PROVEN, data_zero_point=127), 128, 0),
        (PROVEN.with_epilogue(dataclasses.replace(EPI, **RESIDUAL)), 255, 2 * 252),
        (MatmulWorkload(4, 2, 64, epilogue=EPI), 255, 0),
    ],
    ids=["plain", "zero_point", "residual", "matmul"],
)
def test_values_known_to_be_bounded(work, data, residual):
    bias = np.int32([-1000, 7])
    limit = (2**23 - residual) / (64 * data * 127 + 1000)
    for factor, bounded in ((0.999999, True), (1.000001, False)):
        scale = np.float64([-limit, limit / 2]) * factor
        assert with_known_bounds(work, WEIGHT, bias, scale).epilogue.bounded == bounded
    for unknown in ((WEIGHT, None, bias * 1e-9), (WEIGHT, bias, None), (None, bias, bias * 1e-9)):
        assert not with_known_bounds(work, *unknown).epilogue.bounded


@pytest.mark.parametrize("zero_point", [0, 127])
def test_sums_known_to_be_small(zero_point):
    work = dataclasses.replace(PROVEN, data_zero_point=zero_point)
    most = 64 * (255 - zero_point) * 127
    for bias, small in ((2**22 - most - 1, True), (2**22 - most, False)):
        found = with_known_bounds(work, WEIGHT, np.int32([0, -bias]), None).epilogue
        assert found.small_sums == small and not found.bounded
    for unknown in ((WEIGHT, None), (None, np.int32([0, 0]))):
        assert not with_known_bounds(work, *unknown, None).epilogue.small_sums


def test_sums_are_of_each_channel():
    """The largest weight times the depth would be too much: no channel has as many."""
    weight = np.zeros((2, 64, 3, 3), "int8")
    weight[0, 5] = weight[1, 7] = 127
    work = dataclasses.replace(PROVEN, kh=3, kw=3)
    assert with_known_bounds(work, weight, np.int32([0, 0]), None).epilogue.small_sums
    weight[:] = 127
    assert not with_known_bounds(work, weight, np.int32([0, 0]), None).epilogue.small_sums


def test_values_of_a_float_residual_are_not_known_to_be_bounded():
    work = PROVEN.with_epilogue(dataclasses.replace(EPI, residual_dtype="float32"))
    found = with_known_bounds(work, WEIGHT, np.int32([0, 0]), np.float32([1e-9, 1e-9]))
    assert not found.epilogue.bounded
    work = Conv2dWorkload(**(CONV | FLOAT), epilogue=Epilogue("float32"))
    assert with_known_bounds(work, WEIGHT, None, None) == work
