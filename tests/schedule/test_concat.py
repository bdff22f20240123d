"""schedule/concat.py: joined tensors and their affine against numpy, on every ISA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm

from tests import reference
from tests.emulator import arm
from tests.emulator.bare import build_program
from tests.kernels import Assembly, call, check_no_more, off_by_one_rarely, require
from topi_int8.layout import Layout
from topi_int8.schedule.concat import Concat
from topi_int8.target import isa_target
from topi_int8.workload import Epilogue

ISAS = ("generic", "avx2", "avx512_bw", "avx512_vnni", "amx_int8")
CASES = {
    "one_part": Concat(1, 3, 4, (64,), (64,), 64, "uint8"),
    "same_blocks": Concat(2, 3, 5, (32, 32), (32, 32), 32, "int8"),
    "into_wider_blocks": Concat(1, 4, 3, (64, 32, 32), (64, 32, 32), 64, "uint8"),
    "into_narrower_blocks": Concat(1, 4, 3, (64, 64), (64, 64), 16, "uint8"),
    "block_not_full": Concat(1, 2, 7, (64, 32), (64, 32), 64, "uint8"),
    "across_a_block": Concat(1, 2, 3, (48, 64, 16), (16, 64, 16), 64, "int8"),
    "odd_end": Concat(3, 2, 3, (32, 20), (32, 32), 64, "uint8"),
    "odd_end_of_16": Concat(1, 2, 3, (16, 5), (16, 16), 16, "uint8"),
    "in_parallel": Concat(2, 28, 28, (64, 32), (64, 32), 32, "uint8"),
}
AFFINE = {
    "relu": Epilogue("uint8", scale=True, out_zero_point=7, clip_min=7),
    "int8": Epilogue("int8", scale=True, out_zero_point=-3),
    "clipped": Epilogue("uint8", scale=True, out_zero_point=0, clip_min=0, clip_max=200),
}


def draw(kernel: Concat) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the parts in NCHW, and the packed scale and bias."""
    rng = np.random.default_rng(4)
    low, high = (0, 256) if kernel.dtype == "uint8" else (-128, 128)
    parts = [
        rng.integers(low, high, (kernel.n, c, kernel.h, kernel.w)).astype(kernel.dtype)
        for c in kernel.channels
    ]
    if kernel.epilogue is None:
        return parts, []
    shape = (kernel.out_shape[1], kernel.out_block)
    scale, bias = rng.normal(0, 1, shape), rng.normal(20, 40, shape)
    return parts, [scale.astype("float32"), bias.astype("float32")]


def arrays(kernel: Concat) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the kernel's inputs, and an array like its output."""
    parts, vectors = draw(kernel)
    packed = [
        Layout.packed(block).pack(part, 77)
        for part, block in zip(parts, kernel.blocks, strict=True)
    ]
    dtype = kernel.epilogue.out_dtype if kernel.epilogue else kernel.dtype
    return [*packed, *vectors], np.zeros(kernel.out_shape, dtype)


def compare(kernel: Concat, got: np.ndarray) -> None:
    parts, vectors = draw(kernel)
    want, channels = np.concatenate(parts, 1), sum(kernel.channels)
    got = Layout.packed(kernel.out_block).unpack(got, channels)
    if kernel.epilogue is None:
        np.testing.assert_array_equal(got, want)
        return
    scale, bias = (v.reshape(-1)[:channels].reshape(1, -1, 1, 1) for v in vectors)
    epi = kernel.epilogue
    want = reference.affine(
        want, scale, bias, zero_point=kernel.zero_point, out_dtype=epi.out_dtype,
        out_zero_point=epi.out_zero_point, clip_min=epi.clip_min, clip_max=epi.clip_max,
    )  # fmt: skip
    off_by_one_rarely(got, want)


def build(kernels: dict[str, Concat], isa: str) -> tvm.runtime.Executable:
    module = tvm.IRModule(
        {name: k.schedule().with_attr("global_symbol", name) for name, k in kernels.items()}
    )
    return tvm.compile(module, target=isa_target(isa))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("isa", ISAS)
def test_concat(isa: str, name: str) -> None:
    require(isa)
    inputs, out = arrays(CASES[name])
    compare(CASES[name], call(build({"main": CASES[name]}, isa), inputs, out))


@pytest.mark.parametrize("epilogue", AFFINE)
@pytest.mark.parametrize("name", ["into_wider_blocks", "across_a_block", "odd_end", "in_parallel"])
@pytest.mark.parametrize("isa", ISAS)
def test_affine(isa: str, name: str, epilogue: str) -> None:
    require(isa)
    kernel = replace(CASES[name], epilogue=AFFINE[epilogue], zero_point=5)
    inputs, out = arrays(kernel)
    compare(kernel, call(build({"main": kernel}, isa), inputs, out))


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_beyond_the_isa(isa: str) -> None:
    kernel = replace(CASES["into_wider_blocks"], epilogue=AFFINE["relu"])
    assembly = Assembly.of(build({"main": kernel}, isa))
    check_no_more(assembly, isa)
    register = {"avx512_bw": "zmm", "avx2": "ymm"}.get(isa)
    if register:  # vectors, and not one channel at a time
        assert assembly.matching(rf"v(cvtdq2ps|fmadd\d+ps) .*%{register}")


@pytest.mark.arm
@pytest.mark.parametrize("isa", arm.MACHINES)
def test_arm(isa: str, tmp_path: Path) -> None:
    reason = arm.problem(isa)
    if reason:
        pytest.skip(reason)
    kernels = dict(CASES)
    for name in ("into_wider_blocks", "odd_end"):
        kernels[f"{name}_affine"] = replace(CASES[name], epilogue=AFFINE["relu"], zero_point=5)
    program = build_program(build(kernels, isa), list(kernels), isa, tmp_path)
    for name, kernel in kernels.items():
        inputs, out = arrays(kernel)
        compare(kernel, program.call(name, [*inputs, out])[-1])


def test_what_fills_a_block_up_is_zero() -> None:
    kernel = CASES["block_not_full"]
    inputs, out = arrays(kernel)
    got = call(build({"main": kernel}, "generic"), inputs, out)
    assert not got[:, 1, :, :, 32:].any()


@pytest.mark.parametrize("wrong", [
    dict(channels=()), dict(channels=(64,)), dict(channels=(20, 32)), dict(blocks=(64, 8)),
    dict(out_block=24), dict(dtype="float32"),
])  # fmt: skip
def test_nonsense_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(Concat(1, 2, 2, (64, 32), (64, 32), 64, "uint8"), **wrong)
