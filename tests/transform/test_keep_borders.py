"""KeepBorders: which paddings move into the tensor before, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax

import topi_int8
from tests.graphs import build
from topi_int8 import op
from topi_int8.target import isa_target, named, runs_here
from topi_int8.transform import keep_borders
from topi_int8.transform.keep_borders import KeepBorders
from topi_int8.transform.pipeline import integer_passes

NN, OP = relax.op.nn, relax.op
SHAPE = (1, 32, 13, 14)


def conv(
    emit: Callable, x: Any, oc: int = 32, kernel: int = 3, padding: Any = 1, strides: int = 1,
    groups: int = 1, relu: bool = True, seed: int = 0,
) -> Any:  # fmt: skip
    rng, ic = np.random.default_rng(seed), int(x.ty.shape[1])
    weight = rng.normal(0, 0.1, (oc, ic // groups, kernel, kernel)).astype("float32")
    padding = padding if kernel > 1 else 0
    y = NN.conv2d(x, relax.const(weight), padding=padding, strides=strides, groups=groups)
    return emit(NN.relu(emit(y)) if relu else y)


def chain(emit: Callable, x: Any) -> Any:
    """Three in a row, the one in the middle both a reader and a writer; negative values, so that
    the border's zero point is not 0.
    """
    y = conv(emit, conv(emit, x, relu=False), relu=False)
    return conv(emit, y, relu=False, padding=(2, 0, 1, 1))


def block(emit: Callable, x: Any) -> Any:
    """What ResNet-18 consists of: a tensor is read with a border, and added."""
    x = conv(emit, x)
    y = conv(emit, conv(emit, x), relu=False)
    x = emit(NN.relu(emit(OP.add(y, x))))
    return conv(emit, x, kernel=1)


def bottleneck(emit: Callable, x: Any) -> Any:
    y = conv(emit, conv(emit, conv(emit, x, 32, 1)), 32, 1, relu=False)
    return emit(NN.relu(emit(OP.add(y, x))))


def read_twice(emit: Callable, x: Any) -> Any:
    y = conv(emit, x)
    return OP.add(conv(emit, y, seed=1), conv(emit, y, kernel=1))


def pooled(emit: Callable, x: Any) -> Any:
    return conv(emit, emit(NN.max_pool2d(conv(emit, x), (3, 3), padding=(1, 1))))


def depthwise(emit: Callable, x: Any) -> Any:
    return conv(emit, conv(emit, conv(emit, x), groups=32), 32, 1)


def strided(emit: Callable, x: Any) -> Any:
    return conv(emit, conv(emit, x), strides=2)


# Networks, and how many of their convolutions write a border.
NETS = {
    "chain": (chain, 2), "block": (block, 2), "bottleneck": (bottleneck, 1),
    "read_twice": (read_twice, 0), "pooled": (pooled, 0), "depthwise": (depthwise, 0),
}  # fmt: skip
ISAS = ("avx_vnni", "avx512_vnni", "amx_int8")


def prepared(net: Callable, isa: str) -> tvm.IRModule:
    x = np.random.default_rng(1).normal(size=SHAPE).astype("float32")
    mod = topi_int8.quantize(build(SHAPE, net), [x], progress=False)
    target = isa_target(isa)
    with target:
        return tvm.transform.Sequential(integer_passes(target))(mod)


def convolutions(mod: tvm.IRModule) -> list[dict[str, Any]]:
    values = [b.value for block in mod["main"].body.blocks for b in block.bindings]
    return [op.attrs_of(value) for value in values if op.is_op(value, "conv2d")]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NETS)
def test_which_paddings_move(name, isa) -> None:
    net, moved = NETS[name]
    mod = prepared(net, isa)
    before = mod.script(show_meta=True)
    new = KeepBorders(isa_target(isa))(mod)
    relax.analysis.well_formed(new)
    assert mod.script(show_meta=True) == before
    found, old = convolutions(new), convolutions(mod)
    assert sum("out_border" in attrs for attrs in found) == moved
    changed = [(a, b) for a, b in zip(old, found, strict=True) if a["padding"] != b["padding"]]
    assert len(changed) == moved and not any(any(b["padding"]) for _, b in changed)
    borders = [tuple(a["out_border"]) for a in found if "out_border" in a]
    assert borders == [tuple(a["padding"]) for a, _ in changed]


def test_a_residual_with_a_border_is_said_to_have_one() -> None:
    found = convolutions(KeepBorders(isa_target("avx_vnni"))(prepared(block, "avx_vnni")))
    [adder] = [attrs for attrs in found if "residual_border" in attrs]
    assert tuple(adder["residual_border"]) == (1, 1, 1, 1) and "out_border" not in adder


@pytest.mark.parametrize(("isa", "moved"), [("avx512_vnni", 1), ("amx_int8", 0)])
def test_amx_copies_for_strides_whatever_the_border(isa, moved) -> None:
    """It splits 7x7 images by the strides' phases; the broadcast dot products read them as are."""
    found = convolutions(KeepBorders(isa_target(isa))(prepared(strided, isa)))
    assert sum("out_border" in attrs for attrs in found) == moved


@pytest.mark.parametrize("name", ["avx2", "generic", "cortex-a72"])
def test_kernels_that_copy_in_any_case_get_no_border(name) -> None:
    """Winograd and vpmaddwd on AVX2, a plain loop, ARM's."""
    target = isa_target(name) if name != "cortex-a72" else named(name)
    mod = topi_int8.quantize(build(SHAPE, chain), [np.ones(SHAPE, "float32")], progress=False)
    with target:
        mod = tvm.transform.Sequential(integer_passes(target))(mod)
    assert convolutions(mod)
    assert tvm_ffi.structural_equal(KeepBorders(target)(mod), mod)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [*NETS, "strided"])
def test_results_are_the_same(name, isa, monkeypatch) -> None:
    if not runs_here(isa):
        pytest.skip(f"this CPU lacks {isa}")
    net = strided if name == "strided" else NETS[name][0]
    x = np.random.default_rng(1).normal(size=SHAPE).astype("float32")
    mod = topi_int8.quantize(build(SHAPE, net), [x], progress=False)

    def run() -> np.ndarray:
        machine = relax.VirtualMachine(tvm.compile(mod, isa_target(isa)), tvm.cpu())
        return machine["main"](tvm.runtime.tensor(x)).numpy()

    got = run()
    monkeypatch.setattr(keep_borders, "_moves", lambda _graph, _feats: [])
    np.testing.assert_array_equal(got, run())
