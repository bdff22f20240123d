"""Random small convolutions and matmuls: whatever the strategy table chooses is bit-exact.

HYPOTHESIS_PROFILE=search looks at hundreds of new ones.
"""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.kernels import check, require
from topi_int8.target import runs_here
from topi_int8.workload import DTYPE_RANGE, Conv2dWorkload, Epilogue, MatmulWorkload

AMX = "amx_int8" if runs_here("amx_int8") else "amx_int8_avx2"
VECTORS = next(isa for isa in ("avx512_vnni", "avx512_bw", "avx2", "generic") if runs_here(isa))
each_isa = pytest.mark.parametrize("isa", [VECTORS, AMX])

small = st.integers(1, 3)


@st.composite
def epilogues(draw) -> Epilogue:
    out_dtype = draw(st.sampled_from(["int32", "int32", "uint8", "int8", "float32"]))
    if out_dtype == "int32":
        return Epilogue(bias=draw(st.booleans()), clip_min=draw(st.sampled_from([None, 0])))
    low, high = DTYPE_RANGE.get(out_dtype, (0, 0))
    zero_point = draw(st.integers(low, high))
    residual = draw(st.sampled_from([None, "uint8", "int8", "float32"]))
    shift = draw(st.integers(*DTYPE_RANGE[residual])) if residual in DTYPE_RANGE else 0
    return Epilogue(
        out_dtype,
        bias=draw(st.booleans()),
        scale=True,
        out_zero_point=zero_point,
        clip_min=draw(st.sampled_from([None, zero_point])),
        residual_dtype=residual,
        residual_zero_point=shift,
        residual_scale=draw(st.sampled_from([1.0, 0.37, 1.7])),
    )


@st.composite
def operands(draw) -> dict:
    """Types and zero points; half of the time the plain u8 x s8."""
    if draw(st.booleans()):
        return {"data_zero_point": draw(st.integers(0, 255))}
    data, weight = (draw(st.sampled_from(["uint8", "int8"])) for _ in range(2))
    return {
        "data_dtype": data,
        "weight_dtype": weight,
        "data_zero_point": draw(st.integers(*DTYPE_RANGE[data])),
        "weight_zero_point": draw(st.sampled_from([0, draw(st.integers(*DTYPE_RANGE[weight]))])),
    }


@st.composite
def convolutions(draw) -> Conv2dWorkload:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    per_group = st.integers(1, 40 if groups == 1 else 9)
    channels = draw(st.one_of(st.tuples(per_group, per_group), st.just((1, 1))))
    arguments = dict(
        n=draw(st.sampled_from([1, 1, 2])),
        ic=groups * channels[0],
        oc=groups * channels[1],
        ih=draw(st.integers(1, 12)),
        iw=draw(st.integers(1, 34)),
        kh=draw(small),
        kw=draw(st.integers(1, 5)),
        strides=(draw(small), draw(small)),
        dilation=(draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 3]))),
        padding=tuple(draw(st.integers(0, 3)) for _ in range(4)),
        groups=groups,
        epilogue=draw(epilogues()),
        **draw(operands()),
    )
    top, left, bottom, right = arguments["padding"]
    (dh, dw), (kh, kw) = arguments["dilation"], (arguments["kh"], arguments["kw"])
    assume(arguments["ih"] + top + bottom > (kh - 1) * dh)
    assume(arguments["iw"] + left + right > (kw - 1) * dw)
    return Conv2dWorkload(**arguments)


@st.composite
def matmuls(draw) -> MatmulWorkload:
    return MatmulWorkload(
        m=draw(st.integers(1, 40)),
        n=draw(st.integers(1, 70)),
        k=draw(st.integers(1, 150)),
        batch=draw(st.sampled_from([1, 1, 3])),
        transpose_b=draw(st.booleans()),
        epilogue=draw(epilogues()),
        **draw(operands()),
    )


@each_isa
@given(work=convolutions(), seed=st.integers(0, 99), extreme=st.booleans())
def test_convolutions(isa, work, seed, extreme):
    require(isa)
    check(work, isa, seed, extreme)


@each_isa
@given(work=matmuls(), seed=st.integers(0, 99), extreme=st.booleans())
def test_matmuls(isa, work, seed, extreme):
    require(isa)
    check(work, isa, seed, extreme)
