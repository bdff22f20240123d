"""SplitBatch: pieces of a batch give what the whole gives, where they are worth it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax

import topi_int8
from tests.graphs import build, op_name
from topi_int8 import op
from topi_int8.transform import split_batch
from topi_int8.transform.pipeline import integer_passes
from topi_int8.transform.split_batch import SplitBatch

HOST = topi_int8.host_target(num_cores=1)
NN, OP = relax.op.nn, relax.op


def conv(emit: Callable, x: Any, oc: int, kernel: int = 3, groups: int = 1) -> Any:
    rng, ic = np.random.default_rng(oc), int(x.ty.shape[1])
    weight = rng.normal(0, 0.2, (oc, ic // groups, kernel, kernel)).astype("float32")
    return emit(
        NN.relu(NN.conv2d(x, relax.const(weight), padding=kernel // 2, groups=groups))
    )


def residual(emit: Callable, x: Any) -> Any:
    """A stem, a residual block, a depthwise convolution, a concat, a classifier of eight classes;
    eight, too, are the images of a piece.
    """
    x = conv(emit, x, 16)
    y = emit(OP.add(conv(emit, x, 16), x))
    y = emit(OP.concat([conv(emit, y, 16, groups=16), conv(emit, y, 8, 1)], axis=1))
    y = emit(NN.max_pool2d(y, (2, 2), strides=(2, 2)))
    y = emit(OP.reshape(emit(NN.adaptive_avg_pool2d(y, (1, 1))), (int(x.ty.shape[0]), 24)))
    weight = np.random.default_rng(3).normal(0, 1, (24, 8)).astype("float32")
    return emit(OP.matmul(y, relax.const(weight)))


def two_results(emit: Callable, x: Any) -> Any:
    y = conv(emit, conv(emit, x, 32), 32)
    return OP.concat([emit(OP.mean(y, [2, 3])), emit(OP.max(y, [2, 3]))], axis=1)


def joined_images(emit: Callable, x: Any) -> Any:
    """The mean over the batch, of a tensor that is small beside those before it."""
    y = emit(OP.mean(conv(emit, conv(emit, x, 32), 32), [2, 3]))
    return OP.subtract(y, emit(OP.mean(y, [0], keepdims=True)))


NETS = {"residual": residual, "two_results": two_results, "joined_images": joined_images}


def quantized(net: Callable, batch: int, size: int = 24) -> tvm.IRModule:
    shape = (batch, 3, size, size)
    x = np.random.default_rng(1).normal(size=shape).astype("float32")
    return topi_int8.quantize(build(shape, net), [x], progress=False)


def pieces(mod: tvm.IRModule, target: tvm.target.Target = HOST) -> dict[str, int]:
    """Return the functions that SplitBatch adds, and how often each is called."""
    passes = [*integer_passes(target), SplitBatch(target)]
    with target:
        new = tvm.transform.Sequential(passes)(mod)
    functions = {g.name_hint: f for g, f in new.functions_items() if isinstance(f, relax.Function)}
    called = {name: 0 for name in functions if name != "main"}
    for func in functions.values():
        for block in func.body.blocks:
            for binding in block.bindings:
                callee = getattr(binding.value, "op", None)
                if isinstance(callee, tvm.ir.GlobalVar):
                    called[callee.name_hint] += 1
    return called


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take small networks for large ones."""
    monkeypatch.setattr(split_batch, "FITS", 16 << 10)
    monkeypatch.setattr(split_batch, "LARGE", 16 << 10)


def run(mod: tvm.IRModule, x: np.ndarray, target: tvm.target.Target = HOST) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy()


def whole(mod: tvm.IRModule, x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Return the result without pieces."""
    with monkeypatch.context() as patch:
        patch.setattr(split_batch, "FITS", 1 << 40)
        return run(mod, x)


@pytest.mark.parametrize("batch", [2, 3, 8, 16, 24, 26])
@pytest.mark.parametrize("net", NETS)
def test_pieces_give_what_the_whole_gives(net, batch, tiny, monkeypatch) -> None:
    mod = quantized(NETS[net], batch)
    assert pieces(mod)
    x = np.random.default_rng(2).normal(size=(batch, 3, 24, 24)).astype("float32")
    np.testing.assert_array_equal(run(mod, x), whole(mod, x, monkeypatch))


def test_later_operators_take_a_piece_at_once(tiny) -> None:
    """Large tensors one image at a time, the rest in pieces of eight, 26 in two of thirteen..."""
    assert pieces(quantized(residual, 24)) == {"main_of_8": 3, "main_of_1": 8}
    assert pieces(quantized(residual, 8)) == {"main_of_1": 8}
    assert pieces(quantized(residual, 26)) == {"main_of_2": 13, "main_of_1": 2}
    # ... and a prime number one by one.
    assert pieces(quantized(residual, 11)) == {"main_of_1": 11}


def test_pieces_grow_with_the_cores(tiny) -> None:
    two = topi_int8.host_target(num_cores=2)
    assert pieces(quantized(residual, 24), two) == {"main_of_12": 2, "main_of_2": 6}


def test_small_batches_of_small_tensors_stay_whole() -> None:
    assert not pieces(quantized(residual, 24))
    assert not pieces(quantized(residual, 1, 224))
    assert pieces(quantized(residual, 2, 224)) == {"main_of_1": 2}


def test_what_mixes_images_stays_outside(tiny) -> None:
    mod = quantized(joined_images, 16)
    with HOST:
        new = tvm.transform.Sequential([*integer_passes(HOST), SplitBatch(HOST)])(mod)
    names = [op_name(b.value) for block in new["main"].body.blocks for b in block.bindings]
    assert "subtract" in names and "subtract" not in str(new["main_of_8"])


def test_results_that_are_most_of_the_work_are_not_split(tiny) -> None:
    """Joining them would copy what pieces save."""
    mod = quantized(lambda emit, x: conv(emit, x, 64), 16)
    assert not pieces(mod)


def test_symbolic_batches_and_several_batches_are_left_alone(tiny) -> None:
    n = tvm.tirx.Var("n", "int64")
    symbolic = build((n, 3, 24, 24), lambda emit, x: conv(emit, x, 16))
    assert tvm_ffi.structural_equal(SplitBatch(HOST)(symbolic), symbolic)
    bb = relax.BlockBuilder()
    x, y = (
        relax.Var(f"x{n}", relax.TensorType((n, 3, 24, 24), "float32")) for n in (16, 24)
    )
    with bb.function("main", [x, y]):
        with bb.dataflow():
            out = bb.emit_output(conv(bb.emit, x, 16)), bb.emit_output(conv(bb.emit, y, 16))
        bb.emit_func_output(relax.Tuple(out))
    mod = bb.get()
    assert tvm_ffi.structural_equal(SplitBatch(HOST)(mod), mod)


def test_the_module_is_not_changed(tiny) -> None:
    mod = quantized(residual, 16)
    with HOST:
        mod = tvm.transform.Sequential(integer_passes(HOST))(mod)
    before = mod.script(show_meta=True)
    assert len(SplitBatch(HOST)(mod).functions) > len(mod.functions)
    assert mod.script(show_meta=True) == before


def _two_parameters(other: tuple[int, ...], body: Callable) -> tvm.IRModule:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((16, 32, 12, 12), "float32"))
    y = relax.Var("y", relax.TensorType(other, "float32"))
    with bb.function("main", [x, y]):
        with bb.dataflow():
            z = bb.emit(body(x, y))
            for seed in (32, 33, 34):
                z = conv(bb.emit, z, seed)
            out = bb.emit_output(OP.mean(z, [2, 3]))
        bb.emit_func_output(out)
    return bb.get()


@pytest.mark.parametrize(
    ("other", "body", "splits"),
    [
        ((16, 32, 12, 12), OP.add, True),
        ((16, 32, 1, 1), OP.multiply, True),
        ((16, 32, 1, 1), NN.conv2d, False),  # weights of 16 channels, not 16 images
        ((16, 12), lambda x, y: OP.add(x, OP.reshape(y, (16, 1, 1, 12))), True),
        ((16, 12, 12), lambda x, y: OP.add(x, OP.mean(y, [0])), False),
    ],
)
def test_a_first_axis_of_the_batch_s_length_is_not_always_the_batch(
    other, body, splits, tiny, monkeypatch
) -> None:
    mod = _two_parameters(other, body)
    assert (len(SplitBatch(HOST)(mod).functions) > 1) == splits
    rng = np.random.default_rng(0)
    x, y = (
        tvm.runtime.tensor(rng.normal(size=shape).astype("float32"))
        for shape in ((16, 32, 12, 12), other)
    )

    def run() -> np.ndarray:
        return relax.VirtualMachine(tvm.compile(mod, HOST), tvm.cpu())["main"](x, y).numpy()

    got = run()
    monkeypatch.setattr(split_batch, "FITS", 1 << 40)
    np.testing.assert_allclose(got, run(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("images", "splits"), [(1, True), (16, False)])
@pytest.mark.parametrize("name", ["add", "concat"])
def test_constants_of_the_batch_s_length_are_not_cut(name, images, splits, tiny) -> None:
    """A residual, or a part of a concat, with something else for every image; a concat's parts are
    images, and so never one for all.
    """
    rng = np.random.default_rng(0)
    constant = relax.const(rng.normal(size=(images, 32, 24, 24)).astype("float32"))

    def net(emit: Callable, x: Any) -> Any:
        y = conv(emit, x, 32)
        if name == "add":
            y = emit(OP.add(y, constant))
        else:
            every = relax.const(np.zeros((16 // images, 1, 1, 1), "float32"))
            y = emit(OP.concat([y, emit(OP.add(constant, every))], axis=1))
        return emit(OP.mean(conv(emit, conv(emit, y, 33), 34), [2, 3]))

    mod = build((16, 3, 24, 24), net)
    assert (len(SplitBatch(HOST)(mod).functions) > 1) == (splits and name == "add")


def test_a_constant_residual_is_not_cut(tiny) -> None:
    """Of `topi_int8.conv2d`, which takes it unchecked."""
    rng = np.random.default_rng(0)
    weight = relax.const(rng.integers(-9, 9, (32, 32, 3, 3)).astype("int8"))
    scale = relax.const(np.full(32, 0.01, "float32"))

    def net(residual: Any) -> tvm.IRModule:
        x = relax.Var("x", relax.TensorType((16, 2, 24, 24, 16), "uint8"))
        bb = relax.BlockBuilder()
        with bb.function("main", [x]):
            with bb.dataflow():
                y: Any = x
                for _ in range(3):
                    y = bb.emit(op.conv2d(
                        y, weight, scale=scale, residual=residual if residual else y,
                        padding=(1, 1, 1, 1), data_layout="NCHW16c", channels=32,
                        out_dtype="uint8",
                    ))  # fmt: skip
                out = bb.emit_output(NN.max_pool2d(
                    y, (24, 24), strides=(24, 24), layout="NCHW16c", out_layout="NCHW16c"
                ))  # fmt: skip
            bb.emit_func_output(out)
        return bb.get()

    constant = relax.const(rng.integers(0, 9, (16, 2, 24, 24, 16)).astype("uint8"))
    assert len(SplitBatch(HOST)(net(None)).functions) > 1
    unsplit = net(constant)
    assert tvm_ffi.structural_equal(SplitBatch(HOST)(unsplit), unsplit)


def test_pieces_of_large_batches_are_not_without_number() -> None:
    assert [split_batch._size(batch, 8) for batch in (64, 512, 1024, 11, 997, 2 * 997)] == [
        8, 8, 16, 1, 997, 997,
    ]  # fmt: skip
