"""Kernels on weights of few bits, whether or not the strategy table would choose them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm.target import Target

from intrinsics import x86_unpack
from tests import reference
from tests.kernels import Built, compare, compile_module, expected, require, run
from topi_int8 import _host, strategy, target
from topi_int8.kernel import Blocks
from topi_int8.workload import MatmulWorkload, with_known_bounds


def packing_target(isa: str) -> Target:
    """Return the canonical Target of an instruction set, with GFNI."""
    plain = target.isa_target(isa)
    config = {key: plain.attrs[key] for key in ("mtriple", "mcpu")}
    mattr = [str(feature) for feature in plain.attrs["mattr"]]
    return Target({"kind": "llvm", **config, "mattr": [*mattr, "+gfni"]})


def require_gfni(isa: str) -> None:
    """Skip the running test unless this CPU has the instruction set and GFNI."""
    require(isa)
    if "gfni" not in _host.cpu_flags():
        pytest.skip("this CPU lacks gfni")


def build_packed(
    work: strategy.Workload, isa: str, bits: int, blocks: Blocks | None = None,
    layout: str = "NCHWc",
) -> Built:  # fmt: skip
    """Compile the kernel of the row that reads weights of so many bits."""
    where = packing_target(isa)
    stem = "matmul" if isinstance(work, MatmulWorkload) else f"conv2d_{layout.lower()}"
    row = next(row for row in strategy.STRATEGIES if row.name == f"{stem}_{isa}_{bits}bit")
    decision = strategy.Decision(work, row, target.features(where), (), layout)
    kernel = decision.kernel(blocks)
    library = compile_module(tvm.IRModule({"main": kernel.func}), target=where)
    return Built(work, decision, kernel, library)


def check_packed(
    work: strategy.Workload, isa: str, bits: int, blocks: Blocks | None = None,
    layout: str = "NCHWc", proven: bool = False, extreme: bool = False,
) -> Built:  # fmt: skip
    """Build, run and compare, weights over their whole range; `proven`: with known bounds."""
    require_gfni(isa)
    zero_point = work.weight_zero_point
    low, high = (bound + zero_point for bound in x86_unpack.bounds(bits))
    ops = reference.random_operands(replace(work, weight_range=(low, high)), 0, extreme)
    if proven:
        work = with_known_bounds(work, _oihw(work, ops.weight), ops.bias, ops.scale)
    built = build_packed(work, isa, bits, blocks, layout)
    compare(work, run(built, ops), expected(work, ops))
    return built


def _oihw(work: strategy.Workload, weight: np.ndarray) -> np.ndarray:
    swaps = isinstance(work, MatmulWorkload) and not work.transpose_b
    return np.swapaxes(weight, -1, -2) if swaps else weight
