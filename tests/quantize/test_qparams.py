"""Scales and zero points, as properties over ranges and weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topi_int8.quantize.qparams import (
    QParams,
    activation_qparams,
    quantize_bias,
    quantize_weight,
)
from topi_int8.workload import DTYPE_RANGE

REALS = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@given(st.tuples(REALS, REALS).map(sorted), st.sampled_from(["uint8", "int8"]))
def test_activation_range_is_covered_and_zero_is_exact(bounds: list, dtype: str) -> None:
    low, high = bounds
    params = activation_qparams(low, high, dtype)
    qmin, qmax = DTYPE_RANGE[dtype]
    assert qmin <= params.zero_point <= qmax
    # The zero point is an integer of the type, so zero is exact; the ends are within a step.
    smallest = params.scale * (qmin - params.zero_point)
    largest = params.scale * (qmax - params.zero_point)
    slack = 0.51 * params.scale
    assert smallest <= min(low, 0) + slack and largest >= max(high, 0) - slack


def test_relu_outputs_use_the_whole_type() -> None:
    assert activation_qparams(0.0, 25.5, "uint8").zero_point == 0
    assert activation_qparams(0.0, 25.5, "int8").zero_point == -128
    assert activation_qparams(0.0, 25.5, "uint8").scale == pytest.approx(0.1)


def test_a_tensor_of_zeros_has_a_usable_scale() -> None:
    assert activation_qparams(0.0, 0.0, "uint8") == QParams(1.0, 0, "uint8")
    assert activation_qparams(0.0, 1e-45, "uint8").scale == 1.0


def test_symmetric_has_no_zero_point() -> None:
    params = activation_qparams(-1.0, 0.5, "int8", symmetric=True)
    assert params.zero_point == 0 and params.scale == pytest.approx(1 / 127)


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (np.nan, 1.0), (0.0, np.inf)])
def test_impossible_ranges_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="range is"):
        activation_qparams(*bounds, "uint8")


def test_nonsense_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype is 'int4'"):
        QParams(1.0, 0, "int4")
    with pytest.raises(ValueError, match="scale is 0"):
        QParams(0.0, 0, "int8")
    with pytest.raises(ValueError, match="zero_point is 200"):
        QParams(1.0, 200, "int8")


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1]))
def test_weights_are_symmetric_per_channel_and_within_half_a_step(seed: int, axis: int) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(5, 5, 3)) * 10.0 ** rng.integers(-4, 4)).astype("float32")
    quantized = quantize_weight(weight, axis)
    assert quantized.values.dtype == "int8" and quantized.scale.shape == (5,)
    others = tuple(i for i in range(3) if i != axis)
    assert (np.abs(quantized.values.astype(int)).max(axis=others) == 127).all()
    scale = np.expand_dims(quantized.scale, others)
    assert (np.abs(quantized.values * scale - weight) <= 0.5001 * scale).all()


def test_a_dead_channel_keeps_its_bias() -> None:
    weight = np.ones((2, 4), "float32")
    weight[0] *= 1e-12
    bias = np.array([0.7, 0.7], "float32")
    quantized = quantize_weight(weight, 0, data_scale=0.02, bias=bias)
    scale = np.float32(0.02) * quantized.scale
    back = quantize_bias(bias, scale) * scale
    np.testing.assert_allclose(back, bias, rtol=1e-3)


def test_a_channel_of_zeros_has_a_usable_scale() -> None:
    quantized = quantize_weight(np.zeros((2, 3), "float32"), 0)
    assert (quantized.scale == 1).all() and not quantized.values.any()


def test_seven_bit_weights_stay_within_63() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")
    quantized = quantize_weight(weight, 0, bits=7)
    assert np.abs(quantized.values).max() == 63
    restored = quantized.values * quantized.scale[:, None]
    assert np.abs(restored - weight).max() <= quantized.scale.max() / 2 * 1.001


@pytest.mark.parametrize(("bits", "top"), [(4, 7), (2, 1)])
def test_few_bits_clip_where_it_costs_less(bits: int, top: int) -> None:
    """Less noise than without clipping in every channel; whole channels of zeros stay so."""
    weight = np.random.default_rng(0).normal(size=(6, 500)).astype("float32")
    weight[2] = 0
    weight[3] *= 1e-3
    quantized = quantize_weight(weight, 0, bits=bits)
    assert np.abs(quantized.values).max() == top and not quantized.values[2].any()

    def lost(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return ((values * scale[:, None] - weight) ** 2).sum(1)

    step = np.where(weight.any(1), np.abs(weight).max(1) / top, 1)
    plain = lost(np.clip(np.rint(weight / step[:, None]), -top, top), step)
    clipped = lost(quantized.values, quantized.scale)
    assert (clipped <= plain * 1.0001).all()
    assert (clipped[[0, 1, 3, 4, 5]] < 0.8 * plain[[0, 1, 3, 4, 5]]).all()
