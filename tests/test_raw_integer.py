"""Raw integer Relax (no quantize, no dequantize) through `tvm.compile`: exact int32, every layout.

The convolutions of one layout are the outputs of one module: one compile checks the whole grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.target import Target

import topi_int8
from tests import emulator, reference
from tests.transform import interpret
from topi_int8.layout import Layout
from topi_int8.target import isa_target
from topi_int8.transform.pipeline import integer_passes
from topi_int8.workload import Conv2dWorkload


@dataclass(frozen=True)
class Shape:
    """One convolution; (top, left, bottom, right) padding."""

    ic: int
    oc: int
    kernel: tuple[int, int] = (3, 3)
    image: tuple[int, int] = (9, 11)
    n: int = 1
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def work(self, data_dtype: str, weight_dtype: str) -> Conv2dWorkload:
        """Return the workload of this convolution without an epilogue."""
        return Conv2dWorkload(
            n=self.n, ic=self.ic, ih=self.image[0], iw=self.image[1], oc=self.oc,
            kh=self.kernel[0], kw=self.kernel[1], strides=self.strides, padding=self.padding,
            dilation=self.dilation, groups=self.groups, data_dtype=data_dtype,
            weight_dtype=weight_dtype,
        )  # fmt: skip


SHAPES = {
    "plain": Shape(16, 32),
    "odd_channels": Shape(17, 5, n=2),
    "one_channel": Shape(1, 1, (2, 3), padding=(0, 0, 0, 0)),
    "stem": Shape(3, 16, (7, 7), (21, 23), strides=(2, 2), padding=(3, 3, 3, 3)),
    "pointwise": Shape(35, 48, (1, 1), padding=(0, 0, 0, 0)),
    "pointwise_strided": Shape(16, 32, (1, 1), strides=(2, 3), padding=(0, 0, 0, 0)),
    "dilated": Shape(16, 16, dilation=(2, 3), padding=(2, 3, 2, 3)),
    "asymmetric": Shape(8, 24, (3, 2), strides=(2, 1), padding=(0, 1, 2, 3)),
    "grouped": Shape(16, 32, groups=4),
    "grouped_whole_blocks": Shape(64, 32, groups=2),
    "depthwise": Shape(19, 19, strides=(2, 2), groups=19),
    "multiplier": Shape(6, 12, groups=6),
}
# Blocks must divide the channels of a packed Relax convolution.
PACKED = {
    "plain": Shape(16, 32),
    "batch": Shape(48, 16, n=2, strides=(2, 2)),
    "pointwise": Shape(32, 16, (1, 1), padding=(0, 0, 0, 0)),
    "dilated": Shape(16, 16, dilation=(2, 2), padding=(2, 2, 2, 2)),
}
DTYPES = [("uint8", "int8"), ("int8", "int8"), ("uint8", "uint8"), ("int8", "uint8")]


def target_of(name: str) -> Target:
    """Return this machine's target, or that of an instruction set, emulated where needed."""
    if name == "host":
        return topi_int8.host_target(num_cores=1)
    if name.startswith("amx"):
        emulator.install(["amx"])
    return isa_target(name)


def run(mod: tvm.IRModule, target: Target, *inputs: np.ndarray) -> list[np.ndarray]:
    """Compile a module with `tvm.compile` and return the outputs of ``main``."""
    assert topi_int8.is_enabled()
    vm = relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())
    out = vm["main"](*(tvm.runtime.tensor(x) for x in inputs))
    return [out.numpy()] if isinstance(out, tvm.runtime.Tensor) else [t.numpy() for t in out]


def pack_kernel(oihw: np.ndarray, layout: str) -> np.ndarray:
    """Return an OIHW weight in a Relax kernel layout such as HWIO, OIHW16o or OIHW16i16o."""
    if len(layout) == 4:
        return np.ascontiguousarray(oihw.transpose(["OIHW".index(axis) for axis in layout]))
    o, i, h, w = oihw.shape
    inner_i = 16 if "i" in layout else 1
    blocks = oihw.reshape(o // 16, 16, i // inner_i, inner_i, h, w).transpose(0, 2, 4, 5, 3, 1)
    blocks = np.ascontiguousarray(blocks)
    return blocks if inner_i > 1 else blocks[..., 0, :]


def conv2d_module(
    works: list[Conv2dWorkload], layout: str, kernel_layout: str, constant: bool
) -> tuple[tvm.IRModule, list[np.ndarray], list[np.ndarray]]:
    """Return (module of these convolutions, its inputs, its expected outputs)."""
    bb = relax.BlockBuilder()
    act = Layout.parse(layout)
    params, inputs, expected, calls = [], [], [], []

    def operand(array: np.ndarray, const: bool = False) -> Any:
        if const:
            return relax.const(array)
        params.append(relax.Var(f"p{len(params)}", relax.TensorType(array.shape, str(array.dtype))))
        inputs.append(array)
        return params[-1]

    for seed, work in enumerate(works):
        ops = reference.random_operands(work, seed)
        expected.append(act.pack(reference.conv2d(work, **ops.named())))
        data = operand(act.pack(ops.data))
        weight = operand(pack_kernel(ops.weight, kernel_layout), constant)
        calls.append(
            relax.op.nn.conv2d(
                data, weight, strides=work.strides, padding=work.padding, dilation=work.dilation,
                groups=work.groups, data_layout=layout, kernel_layout=kernel_layout,
                out_dtype="int32",
            )
        )  # fmt: skip
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(relax.Tuple([bb.emit(call) for call in calls]))
        bb.emit_func_output(out)
    return bb.get(), inputs, expected


def ours(mod: tvm.IRModule, target: Target, name: str) -> int:
    """Return how many operators ``topi_int8.<name>`` our passes make of a module."""
    passes = tvm.transform.Sequential(integer_passes(target))
    return interpret.count(passes(mod)).get(f"topi_int8.{name}", 0)


def check_convs(
    shapes: dict[str, Shape], dtypes: tuple[str, str], layouts: tuple[str, str], constant: bool,
    target_name: str = "host",
) -> None:  # fmt: skip
    target = target_of(target_name)
    works = [shape.work(*dtypes) for shape in shapes.values()]
    mod, inputs, expected = conv2d_module(works, *layouts, constant)
    assert ours(mod, target, "conv2d") == len(works)
    results = run(mod, target, *inputs)
    assert len(results) == len(works)
    for name, got, want in zip(shapes, results, expected, strict=True):
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want, err_msg=name)


# Every pair of (types, layouts, constant or not) once, not every triple.
@pytest.mark.parametrize(
    "dtypes, layouts, constant",
    [
        (("uint8", "int8"), ("NCHW", "OIHW"), True),
        (("uint8", "int8"), ("NHWC", "HWIO"), False),
        (("int8", "int8"), ("NCHW", "OIHW"), False),
        (("int8", "int8"), ("NHWC", "HWIO"), True),
    ],
)
def test_conv2d(dtypes: tuple, layouts: tuple, constant: bool) -> None:
    check_convs(SHAPES, dtypes, layouts, constant)


@pytest.mark.parametrize("dtypes, constant", [(DTYPES[2], True), (DTYPES[3], False)])
def test_conv2d_unsigned_weights(dtypes: tuple, constant: bool) -> None:
    few = {k: SHAPES[k] for k in ("odd_channels", "stem", "grouped", "depthwise", "pointwise")}
    check_convs(few, dtypes, ("NCHW", "OIHW"), constant)


@pytest.mark.parametrize(
    "layouts, constant", [(("NHWC", "OHWI"), False), (("NHWC", "OHWI"), True),
                          (("NCHW", "HWIO"), True)],
)  # fmt: skip
def test_conv2d_other_kernel_layouts(layouts: tuple, constant: bool) -> None:
    few = {k: SHAPES[k] for k in ("odd_channels", "asymmetric", "grouped", "depthwise")}
    check_convs(few, ("uint8", "int8"), layouts, constant)


@pytest.mark.parametrize(
    "dtypes, kernel_layout, constant",
    [
        (("uint8", "int8"), "OIHW16o", True),
        (("uint8", "int8"), "OIHW16i16o", False),
        (("int8", "int8"), "OIHW16o", False),
        (("int8", "int8"), "OIHW16i16o", True),
    ],
)
def test_conv2d_packed(dtypes: tuple, kernel_layout: str, constant: bool) -> None:
    check_convs(PACKED, dtypes, ("NCHW16c", kernel_layout), constant)


def test_conv2d_generic() -> None:
    check_convs(SHAPES, ("uint8", "int8"), ("NCHW", "OIHW"), True, "generic")


@pytest.mark.slow_emulator
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_conv2d_amx(dtypes: tuple) -> None:
    constant = dtypes != ("int8", "int8")  # one of the four packs its weights at run time
    few = {k: replace(SHAPES[k], image=(9, 7)) for k in ("odd_channels", "grouped", "depthwise")}
    few["stem"] = replace(SHAPES["stem"], image=(13, 13))
    few["pointwise"] = SHAPES["pointwise"]
    check_convs(few, dtypes, ("NCHW", "OIHW"), constant, "amx_int8_avx2")


# ---- matmul


def matmul_module(
    pairs: list[tuple[np.ndarray, np.ndarray]], constant: bool
) -> tuple[tvm.IRModule, list[np.ndarray], list[np.ndarray]]:
    """Return (module of ``relax.op.matmul`` of these pairs, its inputs, its expected outputs)."""
    bb = relax.BlockBuilder()
    params, inputs, calls = [], [], []

    def operand(array: np.ndarray, const: bool) -> Any:
        if const:
            return relax.const(array)
        params.append(relax.Var(f"p{len(params)}", relax.TensorType(array.shape, str(array.dtype))))
        inputs.append(array)
        return params[-1]

    for a, b in pairs:
        calls.append(relax.op.matmul(operand(a, False), operand(b, constant), out_dtype="int32"))
    with bb.function("main", params):
        with bb.dataflow():
            out = bb.emit_output(relax.Tuple([bb.emit(call) for call in calls]))
        bb.emit_func_output(out)
    return bb.get(), inputs, [a.astype("int32") @ b.astype("int32") for a, b in pairs]


def random_pairs(shapes: list[tuple], dtypes: tuple[str, str]) -> list[tuple]:
    rng = np.random.default_rng(5)

    def draw(shape: tuple, dtype: str) -> np.ndarray:
        low, high = (0, 256) if dtype == "uint8" else (-128, 128)
        return rng.integers(low, high, shape).astype(dtype)

    return [(draw(a, dtypes[0]), draw(b, dtypes[1])) for a, b in shapes]


FLAT = [((4, 32), (32, 16)), ((1, 20), (20, 10)), ((7, 33), (33, 17)), ((2, 5, 24), (24, 40))]
BATCHED = [((3, 5, 32), (3, 32, 16)), ((2, 4, 7, 16), (2, 4, 16, 9)), ((2, 3, 5), (2, 5, 7)),
           ((1, 6, 12), (1, 12, 8))]  # fmt: skip


def check_matmuls(
    shapes: list, dtypes: tuple, constant: bool, target_name: str = "host", count: int | None = None
) -> None:
    target = target_of(target_name)
    mod, inputs, expected = matmul_module(random_pairs(shapes, dtypes), constant)
    assert ours(mod, target, "matmul") == (len(shapes) if count is None else count)
    for (a, b), got, want in zip(shapes, run(mod, target, *inputs), expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=f"{a} by {b}")


@pytest.mark.parametrize("dtypes, constant", [*((d, False) for d in DTYPES), (DTYPES[0], True),
                                              (DTYPES[3], True)])  # fmt: skip
def test_matmul(dtypes: tuple, constant: bool) -> None:
    check_matmuls(FLAT + BATCHED, dtypes, constant)


def test_matmul_generic() -> None:
    check_matmuls(FLAT + BATCHED, ("int8", "int8"), False, "generic")


@pytest.mark.slow_emulator
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "parameter"])
def test_matmul_amx(constant: bool) -> None:
    check_matmuls(FLAT + BATCHED, ("uint8", "int8"), constant, "amx_int8_avx2")


def test_matmul_of_broadcast_batches_is_left_to_tvm_and_right() -> None:
    shapes = [((2, 3, 5, 8), (3, 8, 4)), ((5, 8), (3, 8, 4)), ((3, 5, 8), (1, 8, 4)),
              ((8,), (8, 4)), ((3, 8), (8,))]  # fmt: skip
    check_matmuls(shapes, ("uint8", "int8"), False, count=0)


# ---- less a zero point, in int32: as ConvInteger and MatMulInteger are imported


def test_operands_less_zero_points() -> None:
    rng = np.random.default_rng(6)
    image, kernel = rng.integers(0, 256, (1, 5, 7, 6)), rng.integers(-128, 128, (4, 5, 3, 3))
    rows, columns = rng.integers(-128, 128, (3, 12)), rng.integers(0, 256, (12, 8))
    operands = [
        (image.astype("uint8"), 200), (kernel.astype("int8"), 0), (rows.astype("int8"), -9),
        (columns.astype("uint8"), 131),
    ]  # fmt: skip
    bb = relax.BlockBuilder()
    params = [
        relax.Var(f"p{i}", relax.TensorType(operands[i][0].shape, str(operands[i][0].dtype)))
        for i in (0, 2)
    ]
    given = [params[0], relax.const(operands[1][0]), params[1], relax.const(operands[3][0])]
    with bb.function("main", params):
        with bb.dataflow():
            wide = [bb.emit(relax.op.astype(each, "int32")) for each in given]
            less = [
                bb.emit(relax.op.subtract(each, relax.const(zero, "int32"))) if zero else each
                for each, (_, zero) in zip(wide, operands, strict=True)
            ]
            conv = bb.emit(relax.op.nn.conv2d(less[0], less[1], padding=(1, 0, 2, 1)))
            product = bb.emit(relax.op.matmul(less[2], less[3], out_dtype="int32"))
            # A zero point that no 8-bit integer is: TVM's own int32 product, and right.
            beyond = bb.emit(relax.op.subtract(wide[2], relax.const(300, "int32")))
            other = bb.emit(relax.op.matmul(beyond, less[3], out_dtype="int32"))
            out = bb.emit_output(relax.Tuple([conv, product, other]))
        bb.emit_func_output(out)
    mod, target = bb.get(), target_of("host")
    assert ours(mod, target, "conv2d") == 1 and ours(mod, target, "matmul") == 1
    padded = np.pad(image - 200, ((0, 0), (0, 0), (1, 2), (0, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    want = [
        np.einsum("nchwij,ocij->nohw", windows, kernel), (rows + 9) @ (columns - 131),
        (rows - 300) @ (columns - 131),
    ]  # fmt: skip
    for got, value in zip(run(mod, target, operands[0][0], operands[2][0]), want, strict=True):
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, value)


# ---- packed layouts that no kernel reads


@pytest.mark.parametrize("block", [3, 8])
@pytest.mark.parametrize("isa", ["host", "generic"])
def test_conv2d_in_odd_blocks_goes_through_the_target_s_own(block: int, isa: str) -> None:
    work = Shape(2 * block, 3 * block).work("uint8", "int8")
    ops = reference.random_operands(work)
    act = Layout.packed(block)
    o, i, h, w = ops.weight.shape
    kernel = ops.weight.reshape(o // block, block, i, h, w).transpose(0, 2, 3, 4, 1)
    bb = relax.BlockBuilder()
    data = act.pack(ops.data)
    x = relax.Var("x", relax.TensorType(data.shape, "uint8"))
    with bb.function("main", [x]):
        with bb.dataflow():
            weight = relax.const(np.ascontiguousarray(kernel))
            conv = bb.emit(
                relax.op.nn.conv2d(x, weight, padding=1, data_layout=act.name,
                                   kernel_layout=f"OIHW{block}o", out_dtype="int32")
            )  # fmt: skip
            pooled = bb.emit(relax.op.nn.max_pool2d(conv, (3, 3), layout=act.name))
            both = bb.emit(relax.op.concat([conv, conv], axis=1))
            out = bb.emit_output(relax.Tuple([pooled, both]))
        bb.emit_func_output(out)
    pooled, both = run(bb.get(), target_of(isa), data)
    want = reference.conv2d(work, **ops.named())
    np.testing.assert_array_equal(both, act.pack(np.concatenate([want, want], axis=1)))
    windows = np.lib.stride_tricks.sliding_window_view(want, (3, 3), axis=(2, 3))
    np.testing.assert_array_equal(pooled, act.pack(windows.max(axis=(4, 5))))


# ---- symbolic batch: by TVM's own path, or refused


def symbolic_module(
    layout: str, kernel_layout: str, constant: bool
) -> tuple[tvm.IRModule, Conv2dWorkload, np.ndarray]:
    """Return (conv2d of a symbolic batch, its workload for batch 3, its OIHW weight)."""
    work = Shape(16, 16, n=3, strides=(2, 1)).work("uint8", "int8")
    ops = reference.random_operands(work)
    bb = relax.BlockBuilder()
    _, *rest = Layout.parse(layout).shape(3, work.ic, work.ih, work.iw)
    kernel = pack_kernel(ops.weight, kernel_layout)
    x = relax.Var("x", relax.TensorType((tvm.tirx.Var("n", "int64"), *rest), "uint8"))
    w = relax.Var("w", relax.TensorType(kernel.shape, "int8"))
    with bb.function("main", [x] if constant else [x, w]):
        with bb.dataflow():
            out = bb.emit_output(
                relax.op.nn.conv2d(
                    x, relax.const(kernel) if constant else w, padding=1, strides=work.strides,
                    data_layout=layout, kernel_layout=kernel_layout, out_dtype="int32",
                )
            )  # fmt: skip
        bb.emit_func_output(out)
    return bb.get(), work, ops.weight


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "parameter"])
@pytest.mark.parametrize(
    "layouts", [("NCHW", "OIHW"), ("NHWC", "HWIO"), ("NHWC", "OHWI")], ids="-".join
)
def test_symbolic_batch(layouts: tuple[str, str], constant: bool) -> None:
    mod, work, weight = symbolic_module(*layouts, constant)
    vm = relax.VirtualMachine(tvm.compile(mod, target_of("host")), tvm.cpu())
    act = Layout.parse(layouts[0])
    for batch in (1, 3):
        data = reference.random_operands(work, seed=batch).data[:batch]
        want = act.pack(reference.conv2d(replace(work, n=batch), data, weight))
        args = [act.pack(data)] + ([] if constant else [pack_kernel(weight, layouts[1])])
        got = vm["main"](*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in args)).numpy()
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kernel_layout", ["OIHW16o", "OIHW16i16o"])
def test_symbolic_batch_in_packed_layouts_is_refused(kernel_layout: str) -> None:
    mod, _, _ = symbolic_module("NCHW16c", kernel_layout, True)
    with pytest.raises(ValueError, match=r"conv2d in NCHW16c has data .*n, 1.*static shapes"):
        tvm.compile(mod, target_of("host"))


def test_symbolic_batch_of_matmul() -> None:
    rng = np.random.default_rng(2)
    weight = rng.integers(-127, 128, (24, 10)).astype("int8")
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((tvm.tirx.Var("n", "int64"), 24), "uint8"))
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(relax.op.matmul(x, relax.const(weight), out_dtype="int32"))
        bb.emit_func_output(out)
    vm = relax.VirtualMachine(tvm.compile(bb.get(), target_of("host")), tvm.cpu())
    for batch in (1, 3):
        data = rng.integers(0, 256, (batch, 24)).astype("uint8")
        got = vm["main"](tvm.runtime.tensor(data)).numpy()
        np.testing.assert_array_equal(got, data.astype("int32") @ weight.astype("int32"))


def test_symbolic_batch_of_a_quantized_net() -> None:
    rng = np.random.default_rng(1)
    bb, nn = relax.BlockBuilder(), relax.op.nn

    def weight(*shape: int) -> relax.Expr:
        return relax.const(rng.normal(0, 0.2, shape).astype("float32"))

    x = relax.Var("x", relax.TensorType((tvm.tirx.Var("n", "int64"), 3, 12, 12), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            y = bb.emit(nn.relu(bb.emit(nn.conv2d(x, weight(8, 3, 3, 3), padding=1))))
            z = bb.emit(nn.conv2d(y, weight(8, 8, 3, 3), padding=1))
            z = bb.emit(nn.relu(bb.emit(relax.op.add(z, y))))
            z = bb.emit(relax.op.mean(z, [2, 3]))
            out = bb.emit_output(relax.op.matmul(z, weight(8, 5)))
        bb.emit_func_output(out)
    mod = bb.get()
    images = rng.normal(size=(3, 3, 12, 12)).astype("float32")
    quantized = topi_int8.quantize(mod, [images], progress=False)
    assert interpret.count(quantized)["relax.quantize"] >= 3
    target = target_of("host")
    with topi_int8.disabled():
        float_vm = relax.VirtualMachine(tvm.compile(mod, target), tvm.cpu())
        stock_vm = relax.VirtualMachine(tvm.compile(quantized, target), tvm.cpu())
    vm = relax.VirtualMachine(tvm.compile(quantized, target), tvm.cpu())
    for batch in (1, 3):
        data = tvm.runtime.tensor(images[:batch])
        got, stock, want = (m["main"](data).numpy() for m in (vm, stock_vm, float_vm))
        assert got.shape == (batch, 5)
        np.testing.assert_allclose(got, stock, atol=1e-4 + 0.02 * np.abs(want).max())
        noise = np.mean((got - want) ** 2)
        assert 10 * np.log10(np.mean(want**2) / noise) > 25
