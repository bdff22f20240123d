"""The numpy reference against plain loops that follow the stated arithmetic letter by letter."""

from __future__ import annotations

import numpy as np
import pytest

from tests import reference
from topi_int8.workload import Conv2dWorkload, Epilogue, MatmulWorkload


def _loop_value(epi: Epilogue, acc: int, bias, scale, residual) -> float:
    v = int(acc) + (0 if bias is None else int(bias))
    low, high = epi.bounds()
    if epi.out_dtype == "int32":
        return min(max(v, low), high)
    r = np.float32(0)
    if residual is not None:
        r = np.float32(np.float32(residual) - np.float32(epi.residual_zero_point))
        r = np.float32(r * np.float32(epi.residual_scale))
    x = np.float32(np.float32(np.float32(v) * np.float32(scale)) + r)
    if epi.out_dtype != "float32":
        # round() on Python floats is half to even
        x = round(float(x)) + epi.out_zero_point
    if low is not None:
        x = max(x, low)
    return x if high is None else min(x, high)


def _loop_conv2d(work: Conv2dWorkload, ops: reference.Operands) -> np.ndarray:
    out = np.empty((work.n, work.oc, work.oh, work.ow), work.epilogue.out_dtype)
    icg, ocg = work.ic // work.groups, work.oc // work.groups
    for n, oc, oh, ow in np.ndindex(*out.shape):
        acc = 0
        for c, kh, kw in np.ndindex(icg, work.kh, work.kw):
            y = oh * work.strides[0] - work.padding[0] + kh * work.dilation[0]
            x = ow * work.strides[1] - work.padding[1] + kw * work.dilation[1]
            inside = 0 <= y < work.ih and 0 <= x < work.iw
            # the border holds the zero point
            value = ops.data[n, oc // ocg * icg + c, y, x] if inside else work.data_zero_point
            acc += (int(value) - work.data_zero_point) * (
                int(ops.weight[oc, c, kh, kw]) - work.weight_zero_point
            )
        args = (None if a is None else a[oc] for a in (ops.bias, ops.scale))
        residual = None if ops.residual is None else ops.residual[n, oc, oh, ow]
        out[n, oc, oh, ow] = _loop_value(work.epilogue, acc, *args, residual)
    return out


_U8 = Epilogue("uint8", bias=True, scale=True, out_zero_point=31, clip_min=31)
_S8 = Epilogue(
    "int8", scale=True, out_zero_point=-5, residual_dtype="uint8",
    residual_zero_point=7, residual_scale=0.37, clip_max=90.0,
)  # fmt: skip
_F32 = Epilogue("float32", bias=True, scale=True, residual_dtype="float32", clip_min=-0.5)
_BASE = dict(n=2, ic=4, ih=5, iw=6, oc=6, kh=3, kw=2)


@pytest.mark.parametrize(
    "work",
    [
        Conv2dWorkload(**_BASE),
        Conv2dWorkload(**_BASE, padding=(1, 0, 2, 1), data_zero_point=3, epilogue=_U8),
        Conv2dWorkload(**_BASE, strides=(2, 1), dilation=(1, 2), data_dtype="int8", epilogue=_S8),
        Conv2dWorkload(**_BASE, groups=2, padding=(1,) * 4, weight_zero_point=-2, epilogue=_F32),
        Conv2dWorkload(
            **{**_BASE, "oc": 4}, groups=4, weight_dtype="uint8", weight_zero_point=9, epilogue=_U8
        ),
        Conv2dWorkload(**_BASE, weight_range=(-63, 63), epilogue=Epilogue("int32", bias=True)),
    ],
    ids=["plain", "u8", "s8-residual", "grouped-f32", "depthwise", "int32-bias"],
)
@pytest.mark.parametrize("extreme", [False, True])
def test_conv2d_equals_plain_loops(work: Conv2dWorkload, extreme: bool) -> None:
    ops = reference.random_operands(work, seed=1, extreme=extreme)
    out = reference.conv2d(work, **ops.named())
    assert out.dtype == work.epilogue.out_dtype
    np.testing.assert_array_equal(out, _loop_conv2d(work, ops))


@pytest.mark.parametrize("batch, transpose_b", [(1, True), (1, False), (3, True), (3, False)])
def test_matmul_equals_plain_loops(batch: int, transpose_b: bool) -> None:
    work = MatmulWorkload(
        m=3, n=4, k=5, batch=batch, transpose_b=transpose_b, data_zero_point=12, epilogue=_U8
    )
    ops = reference.random_operands(work, seed=2)
    out = reference.matmul(work, **ops.named())
    data, weight = ops.data.reshape(batch, 3, 5), ops.weight.reshape(batch, *ops.weight.shape[-2:])
    for b, m, n in np.ndindex(batch, 3, 4):
        row = weight[b, n] if transpose_b else weight[b, :, n]
        acc = sum((int(x) - 12) * int(w) for x, w in zip(data[b, m], row, strict=True))
        want = _loop_value(work.epilogue, acc, ops.bias[n], ops.scale[n], None)
        assert out.reshape(batch, 3, 4)[b, m, n] == want


def test_rounds_half_to_even_and_saturates() -> None:
    data = np.array([-3, -1, 1, 3, 5, 1000, -1000], "int32")
    out = reference.requantize(data, zero_point=0, scale=0.5, out_dtype="int8", out_zero_point=0)
    np.testing.assert_array_equal(out, [-2, 0, 0, 2, 2, 127, -128])


def test_add_dequantizes_both_sides() -> None:
    a, b = np.array([[10, 200]], "uint8"), np.array([[4, -6]], "int8")
    out = reference.add(
        a, b, a_zero_point=10, a_scale=0.5, b_zero_point=-6, b_scale=2.0,
        out_dtype="uint8", out_zero_point=3, clip_min=30,
    )  # fmt: skip
    np.testing.assert_array_equal(out, [[30, 98]])  # 0 + 20 + 3 is under the clip; 95 + 0 + 3


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("include_pad", [False, True])
def test_avg_pool2d_equals_torch_semantics(ceil_mode: bool, include_pad: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
    data = np.random.default_rng(0).integers(0, 256, (2, 3, 7, 8)).astype("uint8")
    out = reference.avg_pool2d(
        data, pool_size=(3, 2), strides=(2, 2), padding=(1, 1, 1, 1), ceil_mode=ceil_mode,
        count_include_pad=include_pad, zero_point=9, scale=0.5, out_dtype="float32",
        out_zero_point=0,
    )  # fmt: skip
    want = torch.nn.functional.avg_pool2d(
        torch.from_numpy(data.astype("float32") - 9), (3, 2), 2, 1, ceil_mode, include_pad
    )
    np.testing.assert_allclose(out, want.numpy() * 0.5, rtol=1e-5, atol=1e-5)


def test_random_operands_fill_the_range_and_respect_weight_range() -> None:
    work = Conv2dWorkload(1, 16, 8, 8, 16, 3, 3, weight_range=(-64, 63), epilogue=_U8)
    ops = reference.random_operands(work, seed=3)
    assert ops.weight.min() >= -64 and ops.weight.max() <= 63
    out = reference.conv2d(work, **ops.named())
    assert len(np.unique(out)) > 60
    again = reference.random_operands(work, seed=3)
    for first, second in zip(ops.present(), again.present(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_epilogue_refuses_operands_it_does_not_name() -> None:
    work = Conv2dWorkload(1, 1, 1, 1, 1, 1, 1)
    one = np.ones((1, 1, 1, 1), "uint8")
    with pytest.raises(AssertionError, match="given"):
        reference.conv2d(work, one, one.astype("int8"), bias=np.ones(1, "int32"))
