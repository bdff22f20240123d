"""bench/kernels.py: what is timed is right, over operand types and epilogues."""

import dataclasses

import numpy as np
import pytest

from bench import kernels, targets, workloads
from bench.shape_lines import parse_line
from topi_int8.target import isa_target

LINES = (
    "ic17ih7iw9oc19kh3kw1ph1pw0sh2",
    "g2ic32ih6oc32kh3ph1",
    "g16ic16ih6oc16kh3ph1",
    "mb2ic8ih5oc16kh1",
    "5x24:24x20",
    "3x5x24:3x24x16",
)


@pytest.fixture(scope="module")
def host():
    return targets.choose("host")


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize(
    ("dtype", "epilogue"),
    [
        ("u8s8", ""), ("s8s8", "bias+sum+relu+s8"), ("u8s8", "s32"), ("s8s8", "bias+f32"),
        ("f32", ""),
    ],
)  # fmt: skip
def test_kernel_is_right(host, line, dtype, epilogue):
    kernel = kernels.build(workloads.make(parse_line(line), dtype, epilogue), host)
    kernel.check()
    assert kernel.strategy and kernel.intrinsic
    assert min(kernel.sampler()(0.001)) > 0


def test_check_finds_a_wrong_result(host):
    kernel = kernels.build(workloads.make(parse_line("ic16ih6oc16kh3ph1")), host)
    changed = dataclasses.replace(kernel.operands, bias=kernel.operands.bias + 100_000)
    with pytest.raises(ValueError, match="differs from the reference by"):
        dataclasses.replace(kernel, operands=changed).check()


def test_declined_strategies_have_reasons():
    """Of no instruction set, so that on every CPU there is something faster."""
    kernel = kernels.build(workloads.make(parse_line("ic16ih6oc16kh3ph1")), isa_target("generic"))
    assert kernel.declined
    assert all(name and reason for name, reason in kernel.declined)


def test_operands_of_another_shape_are_refused():
    class Buffer:
        name, shape, dtype = "data", (2, 3), "int8"

    assert kernels._fit(np.zeros((1, 6), "int8"), Buffer).shape == (2, 3)
    for wrong in (np.zeros(5, "int8"), np.zeros(6, "uint8")):
        with pytest.raises(ValueError, match=r"data is .*the kernel takes int8\[2, 3\]"):
            kernels._fit(wrong, Buffer)
