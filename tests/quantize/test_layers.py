"""Skip lists: names, patterns, operators, positions; what is said of entries that mean nothing."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests import graphs
from tests.quantize import networks
from topi_int8.quantize import quantize
from topi_int8.quantize.graph import Graph, prepare
from topi_int8.quantize.layers import select_layers

MOD = graphs.build(networks.SHAPE, networks.bare)


def _selected(skip, **options) -> list[str]:
    graph = Graph(prepare(MOD))
    return sorted(var.name for var in select_layers(graph, skip, **options))


@pytest.mark.parametrize(
    "skip, names",
    [
        ([], []),
        (["conv2d_1"], ["conv2d_1"]),
        ((re.compile(r"conv2d_[02]"),), ["conv2d_0", "conv2d_2"]),
        (["relax.nn.conv2d"], ["conv2d_0", "conv2d_1", "conv2d_2"]),
        ({"relax.matmul", "relax.mean"}, ["matmul_0", "mean_0"]),
        ([0, -1], ["conv2d_0", "matmul_0"]),
        ([np.int64(1), -4], ["conv2d_0", "conv2d_1"]),
        ([2, "conv2d_2", "add_0"], ["add_0", "conv2d_2"]),
    ],
)
def test_every_form(skip, names: list[str]) -> None:
    assert _selected(skip) == names


def test_first_and_last_come_on_top() -> None:
    assert _selected([1], first=True, last=True) == ["conv2d_0", "conv2d_1", "matmul_0"]


def test_an_operator_and_a_position_stay_float() -> None:
    qdq = quantize(MOD, networks.inputs(1), skip=["relax.matmul", 0], progress=False)
    assert networks.float_layers(qdq) == ["conv2d_0", "matmul_0"]


@pytest.mark.parametrize(
    "entry, error, message",
    [
        ("conv2d_9", ValueError, "skip holds 'conv2d_9'; allowed: conv2d_0, .*; operators rela"),
        ("relax.nn.conv3d", ValueError, "allowed: .*operators relax.add, relax.matmul, relax.mean"),
        (re.compile("dense.*"), ValueError, "skip holds re.compile.*allowed: conv2d_0"),
        (4, ValueError, r"skip holds the position 4; allowed: -4 \.\. 3, of conv2d_0, .*matmul_0"),
        (-5, ValueError, r"skip holds the position -5; allowed: -4 \.\. 3"),
        (True, TypeError, "skip holds True; allowed: names, patterns, operators and positions"),
        (1.0, TypeError, "skip holds 1.0; allowed: names, patterns"),
        (None, TypeError, "skip holds None; allowed: names, patterns"),
    ],
)
def test_entries_that_mean_nothing(entry, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        _selected([entry])


@pytest.mark.parametrize("skip", ["conv2d_0", re.compile("conv"), 3])
def test_what_is_no_list(skip) -> None:
    with pytest.raises(TypeError, match=r"skip is .*; allowed: a sequence of names"):
        _selected(skip)
