"""AVX-512 kernels and intrinsics, executed: all in one boot of an emulated machine.

What `tests/schedule` can only compile where the CPU lacks AVX-512 (and the 512-bit rows of
`tests/intrinsics`) runs here, checked by the C++ runner against the same reference.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm

from intrinsics.x86_dot import DOT_INTRINSICS
from tests import kernels, reference
from tests.grid import DEPTHWISE, DTYPES, EPILOGUE_BASES, EPILOGUES, FLOATS, MATMULS, SHAPES
from tests.intrinsics import test_x86_narrow
from topi_int8.target import isa_target

from . import build_runner
from .bochs import problem, run

ISAS = ("avx512_vnni", "avx512_bw")
BITS_7, BITS_8 = {"weight_range": (-64, 64)}, {"weight_range": (-128, 127)}
CONV = EPILOGUE_BASES["conv"]
IMAGE_7 = SHAPES["image_7x7"].with_epilogue(EPILOGUES["u8_residual_u8"])

# name -> (workload, whether its operands are extreme); 36 and 20 channels have tails.
CASES: dict[str, tuple[kernels.Workload, bool]] = {
    "conv3x3_residual": (CONV.with_epilogue(EPILOGUES["u8_residual_u8"]), False),
    "conv3x3_s8": (CONV.with_epilogue(EPILOGUES["s8_residual_s8"]), False),
    "conv1x1": (SHAPES["prime_31"], False),
    "stem": (SHAPES["stem_7x7"].with_epilogue(EPILOGUES["u8_relu"]), False),
    "image_7x7": (SHAPES["image_7x7"], False),
    "everything": (SHAPES["everything"], False),
    "grouped": (SHAPES["groups_misaligned"], False),
    "depthwise": (DEPTHWISE["c65"].with_epilogue(EPILOGUES["u8"]), False),
    "depthwise_s2": (DEPTHWISE["stride_2"], False),
    "depthwise_7bit": (replace(DEPTHWISE["kernel_5"], **BITS_7), True),
    "depthwise_u8": (DEPTHWISE["u8u8"], False),
    "u8s8_extreme": (DTYPES["u8s8_zero_point_255"], True),
    "s8s8_extreme": (DTYPES["s8s8_zero_point"], True),
    "u8u8_zero_point": (DTYPES["u8u8_weight_zero_point"], True),
    "seven_bits": (replace(SHAPES["prime_17_s2"], **BITS_7), True),
    "tiles": (replace(SHAPES["ic17_oc33"], **BITS_8), True),
    "tiles_u8": (replace(IMAGE_7, **BITS_8), False),
    "matmul_1": (MATMULS["vector_odd"], False),
    "matmul_13": (MATMULS["u8"], False),
    "matmul_s8s8": (MATMULS["s8s8"], True),
    "matmul_batch": (MATMULS["batch_odd_n"], False),
    "float": (FLOATS["conv"], False),
}  # fmt: skip


# Vectors of 512 bits; the shorter ones run natively everywhere.
NARROW = [
    case
    for case in test_x86_narrow.GRID
    if case.lanes == 16 and (not case.bounded or case.vectors == 4)
]


def save(folder: Path, name: str, inputs: list[np.ndarray], out: np.ndarray, tol: float) -> None:
    """Write one case of the runner beside its library."""
    for i, array in enumerate(inputs):
        np.save(folder / f"{name}.in{i}.npy", np.ascontiguousarray(array))
    np.save(folder / f"{name}.out.npy", np.ascontiguousarray(out))
    (folder / f"{name}.tol").write_text(f"{tol}\n")


def export_kernel(folder: Path, name: str, work: kernels.Workload, isa: str, extreme: bool) -> str:
    """Export a workload's kernel with operands and the reference's output; return its strategy."""
    built = kernels.build(work, isa)
    ops = reference.random_operands(work, seed=0, extreme=extreme)
    want = kernels.pack_output(built, kernels.expected(work, ops))
    inputs = kernels.inputs(built, ops)
    # What a padding channel stores is the kernel's own business: run the padded channels too.
    if isinstance(work, kernels.Conv2dWorkload):
        want = with_padding_channels(built, want)
    tolerance = {"int32": 0.0, "float32": 1e-4}.get(work.epilogue.out_dtype, 1.0)
    built.library.export_library(str(folder / f"{name}.so"))
    save(folder, name, inputs, want, tolerance)
    return built.decision.strategy


def with_padding_channels(built: kernels.Built, want: np.ndarray) -> np.ndarray:
    """Return the expected packed output with what zero weights give in the padding channels."""
    work, epi = built.work, built.work.epilogue
    block = built.kernel.out_layout.block
    padding = -work.oc % block
    if not padding:
        return want
    assert epi.out_dtype != "float32" or epi.residual_dtype is None
    zeros = np.zeros((work.n, padding, work.oh, work.ow), "float32" if work.is_float else "int32")
    bare = replace(epi, bias=False)
    scale = np.zeros(padding, "float32") if epi.scale else None
    residual = None
    if epi.residual_dtype:
        residual = np.zeros(zeros.shape, epi.residual_dtype)  # as `kernels.inputs` packs it
    filled = want.copy()
    stored = reference.apply_epilogue(bare, zeros, None, scale, residual, channel_axis=1)
    filled[:, -1, :, :, block - padding :] = stored.transpose(0, 2, 3, 1)
    return filled


def export_dot(folder: Path, name: str) -> None:
    """Export an intrinsic's own function (A, B, C): C = 0 first, so that it is an output."""
    dot = DOT_INTRINSICS[name]
    rng = np.random.default_rng(5)
    from tvm import te

    from intrinsics import compat

    steps = 4
    a = te.placeholder((steps, dot.k), dot.a, "a")
    b = te.placeholder((steps, dot.n, dot.k), dot.b, "b")
    s, k = te.reduce_axis((0, steps), "s"), te.reduce_axis((0, dot.k), "k")

    def product(j: object) -> object:
        return te.sum(a[s, k].astype("int32") * b[s, j, k].astype("int32"), axis=[s, k])

    sch = compat.Schedule(te.create_prim_func([a, b, te.compute((dot.n,), product, name="c")]))
    block = compat.get_block(sch, "c")
    j, s, k = sch.get_loops(block)
    sch.reorder(s, j, k)
    sch.decompose_reduction(block, s)
    sch.tensorize(j, dot.register())
    library = tvm.compile(sch.mod, target=isa_target(dot.isa))
    library.export_library(str(folder / f"{name}.so"))
    low, high = (-255, 255) if dot.a == "int16" else (0, 255)
    bound = 255 if dot.b == "int16" else 127 if dot.exact else 64
    x = np.where(rng.integers(0, 2, (steps, dot.k)), high, low).astype(dot.a)
    w = np.where(rng.integers(0, 2, (steps, dot.n, dot.k)), bound, -bound).astype(dot.b)
    want = np.einsum("sk,sjk->j", x.astype("int32"), w.astype("int32"))
    save(folder, name, [x, w], want.astype("int32"), 0.0)


def export_narrow(folder: Path, case: test_x86_narrow.Case) -> None:
    """Export the narrowing of values to 8 bits."""
    test_x86_narrow.build(case).export_library(str(folder / f"{case.name}.so"))
    values = test_x86_narrow.draw(case)
    save(folder, case.name, [values], test_x86_narrow.wanted(case, values), 0.0)


@pytest.mark.slow_emulator
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is not installed, it links kernels and the runner"
)
def test_avx512_kernels_in_bochs(tmp_path: Path) -> None:
    reason = problem()
    if reason:
        pytest.skip(reason)
    strategies = set()
    for isa in ISAS:
        for name, (work, extreme) in CASES.items():
            strategies.add(export_kernel(tmp_path, f"{isa}-{name}", work, isa, extreme))
    dots = [name for name, dot in DOT_INTRINSICS.items() if dot.isa.startswith("avx512")]
    for name in dots:
        export_dot(tmp_path, name)
    for case in NARROW:
        export_narrow(tmp_path, case)
    assert {"conv2d_nchwc_avx512_vnni", "conv2d_nchwc_avx512_bw", "conv2d_nchwc_avx512_bw_7bit",
            "conv2d_nchwc_winograd_avx512_bw", "matmul_avx512_vnni", "matmul_avx512_bw",
            "depthwise_nchwc_avx512_vnni", "depthwise_nchwc_avx512_bw", "depthwise_nchwc",
            "depthwise_nchwc_avx512_bw_7bit", "conv2d_nchwc_float32"} <= strategies  # fmt: skip
    files = {f"/data/{path.name}": path for path in tmp_path.iterdir()}
    result = run(build_runner(), ["/data"], files, model="corei7_icelake_u")
    print(f"{result.seconds:.0f} s in Bochs\n{result.output}")
    lines = [line for line in result.output.splitlines() if not line.startswith("running ")]
    total = len(ISAS) * len(CASES) + len(dots) + len(NARROW)
    assert [line for line in lines[:-1] if not line.startswith("PASS ")] == []
    assert lines[-1] == f"{total} passed, 0 failed"
    assert result.exit_code == 0
