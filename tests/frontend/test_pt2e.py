"""PT2E programs: quantized_decomposed operators have torch's semantics, and networks run in int8.

The semantics are tested on modules that call the operators by hand, which needs torch alone;
networks are quantized by torchao's quantizers, where that is installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tvm import relax

import topi_int8
from tests import graphs
from topi_int8.frontend.batch import with_batch
from topi_int8.frontend.pt2e import register_operators
from topi_int8.frontend.torch import from_torch
from topi_int8.quantize import instrument
from topi_int8.transform.fuse_qdq import FuseQDQ

torch = pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
simulate = pytest.importorskip("tests.simulate").simulate

register_operators()
OPS = torch.ops.quantized_decomposed
DTYPES = {"uint8": (torch.uint8, 0, 255), "int8": (torch.int8, -128, 127)}


class Module(torch.nn.Module):
    """A function of tensors as a module, with buffers that the function takes after its inputs."""

    def __init__(self, function: Callable[..., Any], *buffers: torch.Tensor) -> None:
        super().__init__()
        self.function, self.count = function, len(buffers)
        for i, buffer in enumerate(buffers):
            self.register_buffer(f"b{i}", buffer)

    def forward(self, *x: torch.Tensor) -> Any:
        return self.function(*x, *(getattr(self, f"b{i}") for i in range(self.count)))


def imported(function: Callable[..., Any], *x: torch.Tensor, buffers: tuple = ()) -> tvm.IRModule:
    return from_torch(Module(function, *buffers).eval(), x)


def compiled(mod: tvm.IRModule) -> Callable[..., np.ndarray]:
    """Return a module's main, compiled for this machine, from and to numpy."""
    executable = tvm.compile(mod, target=topi_int8.host_target())
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    return lambda *x: main(*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in x)).numpy()


def quantized(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, low: int, high: int
) -> np.ndarray:
    """Return torch's quantize as its source states it, in numpy; the parameters broadcast."""
    inverse = (1.0 / scale.astype("float64")).astype("float32")
    return np.clip(np.rint(x * inverse) + zero_point, low, high)


def assert_same_steps(
    got: np.ndarray, want: np.ndarray, x: np.ndarray, scale: np.ndarray
) -> None:
    """Equal, but for one step where x / scale is half an integer to a float32's precision."""
    exact = x.astype("float64") / scale.astype("float64")
    tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5) <= 4 * np.finfo("float32").eps * (
        1 + np.abs(exact)
    )
    difference = np.abs(got.astype(int) - want.astype(int))
    assert difference.max(initial=0) <= 1 and not np.any(difference[~tie])


# ---------------------------------------------------------------- semantics, by torch alone

scales = st.floats(2.0**-13, 1024, width=32)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """Draw (dtype, quant_min, quant_max, zero_point): whole ranges, narrow ones and any."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    _, least, most = DTYPES[dtype]
    low, high = draw(
        st.one_of(
            st.just((least, most)),
            st.just((least + 1, most)),
            st.just((0, 127)),
            st.tuples(st.integers(least, most), st.integers(least, most)),
        )
    )
    assume(low < high)
    return dtype, low, high, draw(st.integers(low, high))


def values(scale: np.ndarray, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return reals over and beyond the range of 8 bits; one in three is half an integer of steps.
    """
    rng = np.random.default_rng(seed)
    steps = rng.uniform(-300, 300, shape)
    steps = np.where(rng.random(shape) < 0.3, np.floor(steps) + 0.5, steps)
    return (steps * scale).astype("float32")


# An example costs a torch.export.
@settings(max_examples=8)
@given(scales, ranges())
def test_per_tensor(scale: float, to: tuple[str, int, int, int]) -> None:
    dtype, low, high, zero_point = to
    x = values(np.asarray(scale), (3, 50))
    every = np.arange(256, dtype="uint8").view(dtype)
    params = scale, zero_point, low, high, DTYPES[dtype][0]

    def run(x: torch.Tensor, q: torch.Tensor) -> tuple:
        return OPS.quantize_per_tensor(x, *params), OPS.dequantize_per_tensor(q, *params)

    inputs = torch.from_numpy(x), torch.from_numpy(every)
    got, real = simulate(imported(run, *inputs), x, every)
    in_torch, real_in_torch = run(*inputs)
    assert got.dtype == dtype
    want = quantized(x, np.asarray(scale), np.asarray(zero_point), low, high)
    np.testing.assert_array_equal(in_torch.numpy(), want)  # the reference is torch's
    assert_same_steps(got, want, x, np.asarray(scale))
    np.testing.assert_array_equal(real, real_in_torch.numpy())


def test_ties_go_to_even_and_ends_of_the_range_hold() -> None:
    x = np.array([-1e9, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 1e9], "float32")

    def run(x: torch.Tensor) -> torch.Tensor:
        return OPS.quantize_per_tensor(x * 0.25, 0.25, 3, 1, 127, torch.uint8)

    want = [1, 1, 1, 3, 3, 5, 5, 127, 127, 127]
    mod = imported(run, torch.from_numpy(x))
    np.testing.assert_array_equal(run(torch.from_numpy(x)).numpy(), want)
    np.testing.assert_array_equal(compiled(mod)(x), want)


@settings(max_examples=8)
@given(st.data(), ranges(), st.sampled_from([0, 1, -1]))
def test_per_channel_of_an_activation(
    data: st.DataObject, to: tuple[str, int, int, int], axis: int
) -> None:
    dtype, low, high, _ = to
    scale = np.array(data.draw(st.lists(scales, min_size=4, max_size=4)), "float32")
    zero = np.array(data.draw(st.lists(st.integers(low, high), min_size=4, max_size=4)), "int64")
    along = (4, 1) if axis == 0 else (1, 4)
    x = values(scale.reshape(along), (4, 4))
    buffers = torch.from_numpy(scale), torch.from_numpy(zero)

    def run(x: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> tuple:
        q = OPS.quantize_per_channel(x, s, z, axis, low, high, DTYPES[dtype][0])
        return q, OPS.dequantize_per_channel(q, s, z, axis, low, high, DTYPES[dtype][0])

    got, real = simulate(imported(run, torch.from_numpy(x), buffers=buffers), x)
    want = quantized(x, scale.reshape(along), zero.reshape(along), low, high)
    assert_same_steps(got, want, x, scale.reshape(along))
    exact = (got.astype(int) - zero.reshape(along)).astype("float32") * scale.reshape(along)
    np.testing.assert_array_equal(real, exact)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("low", [-128, -127, 0])
def test_per_channel_of_a_parameter_is_computed_at_import(axis: int, low: int) -> None:
    rng = np.random.default_rng(axis)
    weight = torch.from_numpy(rng.normal(size=(4, 4)).astype("float32"))
    scale = torch.from_numpy(rng.uniform(0.001, 0.02, 4).astype("float32"))
    zero = torch.zeros(4, dtype=torch.int64)
    x = rng.normal(size=(2, 4)).astype("float32")

    def run(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        q = OPS.quantize_per_channel(w, s, z, axis, low, 127, torch.int8)
        return x @ OPS.dequantize_per_channel(q, s, z, axis, low, 127, torch.int8)

    mod = imported(run, torch.from_numpy(x), buffers=(weight, scale, zero))
    assert graphs.count(mod)["quantize"] == 0 and graphs.count(mod)["dequantize"] == 1
    want = run(torch.from_numpy(x), weight, scale, zero).numpy()
    np.testing.assert_allclose(simulate(mod, x), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["tensor", "tensor2"])
def test_parameters_that_are_tensors(variant: str) -> None:
    x = values(np.asarray(0.03), (4, 60))
    scale, zero = torch.tensor([0.03]), torch.tensor([7])
    low, high = (torch.tensor(v) if variant == "tensor2" else v for v in (0, 127))
    buffers = (scale, zero, low, high) if variant == "tensor2" else (scale, zero)
    quantize = getattr(OPS.quantize_per_tensor, variant)
    dequantize = getattr(OPS.dequantize_per_tensor, variant)

    def run(x: torch.Tensor, s: torch.Tensor, z: torch.Tensor, *ends: torch.Tensor) -> torch.Tensor:
        ends = ends or (low, high)
        q = quantize(x, s, z, *ends, torch.uint8)
        return dequantize(q, s, z, *ends, torch.uint8)

    mod = imported(run, torch.from_numpy(x), buffers=buffers)
    want = run(torch.from_numpy(x), *buffers).numpy()
    difference = np.abs(simulate(mod, x) - want)
    assert difference.max() <= 0.03 * 1.001 and np.mean(difference > 1e-6) < 0.3
    assert simulate(mod, x).max() == np.float32((127 - 7) * np.float32(0.03))


@pytest.mark.parametrize(
    ("dtype", "low", "high", "symmetric"),
    [("uint8", 0, 255, False), ("uint8", 0, 127, True), ("int8", -127, 127, False)],
)
def test_dynamic_quantization(dtype: str, low: int, high: int, symmetric: bool) -> None:
    choose = (OPS.choose_qparams_symmetric if symmetric else OPS.choose_qparams).tensor
    torch_type = DTYPES[dtype][0]

    def run(x: torch.Tensor) -> tuple:
        scale, zero = choose(x, low, high, 1e-7, torch_type)
        params = scale, zero, low, high, torch_type
        q = OPS.quantize_per_tensor.tensor(x, *params)
        return scale, zero, q, OPS.dequantize_per_tensor.tensor(q, *params)

    mod = imported(run, torch.ones(3, 40))
    executable = tvm.compile(mod, target=topi_int8.host_target())
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    for x in (
        np.random.default_rng(0).normal(size=(3, 40)),
        np.random.default_rng(1).uniform(2, 5, (3, 40)),  # zero is not among the values
        np.random.default_rng(2).uniform(-7, -1, (3, 40)),
        np.zeros((3, 40)),
    ):
        x = x.astype("float32")
        got = [out.numpy() for out in main(tvm.runtime.tensor(x))]
        want = [out.numpy() for out in run(torch.from_numpy(x))]
        assert [a.dtype for a in got] == [a.dtype for a in want]
        np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
        np.testing.assert_array_equal(got[1], want[1])
        assert_same_steps(got[2], want[2], x, want[0])
        np.testing.assert_allclose(got[3], want[3], atol=float(want[0][0]) * 1.001)


def test_a_computed_scale_with_a_zero_point_that_is_none() -> None:
    x = values(np.asarray(0.03), (2, 64))

    def run(x: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        scale = x.abs().max().reshape(1) / 100
        q = OPS.quantize_per_tensor.tensor(x, scale, zero, -100, 100, torch.int8)
        return OPS.dequantize_per_channel(
            q, scale.repeat(2), None, 0, -100, 100, torch.int8
        )

    zero = torch.zeros(1, dtype=torch.int64)
    got = compiled(imported(run, torch.from_numpy(x), buffers=(zero,)))(x)
    want = run(torch.from_numpy(x), zero).numpy()
    difference = np.abs(got - want)
    assert difference.max() <= np.abs(x).max() / 100 * 1.01 and np.mean(difference > 1e-6) < 0.3


def test_half_precision_is_computed_in_float32() -> None:
    x = values(np.asarray(0.05), (2, 64))

    def run(x: torch.Tensor) -> torch.Tensor:
        half = x.to(torch.float16)
        q = OPS.quantize_per_tensor(half, 0.05, 3, 0, 255, torch.uint8)
        return OPS.dequantize_per_tensor(q, 0.05, 3, 0, 255, torch.uint8, out_dtype=torch.float16)

    got, want = compiled(imported(run, torch.from_numpy(x)))(x), run(torch.from_numpy(x)).numpy()
    assert got.dtype == want.dtype == np.float16
    assert np.mean(np.abs(got - want) > 0.01) < 0.01


def test_what_cannot_be_said_is_refused() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="a tensor is quantized to int16"):
        imported(
            lambda x: OPS.quantize_per_tensor(x, 0.1, 0, -32768, 32767, torch.int16), x
        )
    with pytest.raises(ValueError, match=r"a zero point is \[300\].*allowed: a value of uint8"):
        imported(lambda x: OPS.quantize_per_tensor(x, 0.1, 300, 0, 255, torch.uint8), x)
    with pytest.raises(NotImplementedError, match="quantize_per_token"):
        imported(
            lambda x: OPS.quantize_per_token(
                x, torch.ones(2, 1), torch.zeros(2, 1), -128, 127, torch.int8
            ),
            x,
        )


# ---------------------------------------------------------------- fusion, by torch alone


def pair(x: torch.Tensor, scale: float, zero_point: int, high: int = 255) -> torch.Tensor:
    q = OPS.quantize_per_tensor(x, scale, zero_point, 0, high, torch.uint8)
    return OPS.dequantize_per_tensor(q, scale, zero_point, 0, high, torch.uint8)


def weights(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (int8 weight, scale a channel, zero points) as PT2E folds them."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, shape).astype("int8")
    scale = rng.uniform(0.0005, 0.002, shape[0]).astype("float32")
    return torch.from_numpy(weight), torch.from_numpy(scale), torch.zeros(shape[0]).to(torch.int64)


@pytest.mark.parametrize(
    ("activation", "high"), [("relu", 127), ("hardtanh", 255), ("hardtanh", 127), ("none", 127)]
)
def test_a_convolution_is_one_operator(activation: str, high: int) -> None:
    functions = {
        "relu": torch.relu,
        "hardtanh": lambda x: torch.nn.functional.hardtanh(x, 0.0, 6.0),
        "none": lambda x: x,
    }
    bias = torch.from_numpy(np.random.default_rng(5).normal(size=16).astype("float32"))

    def run(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, z: torch.Tensor, b: torch.Tensor):
        w = OPS.dequantize_per_channel(w, s, z, 0, -128, 127, torch.int8)
        y = torch.nn.functional.conv2d(pair(x, 0.03, 60, high), w, b, padding=1)
        return pair(functions[activation](y), 0.04, 0 if activation != "none" else 70, high)

    x = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 16, 7, 7)).astype("float32"))
    held = (*weights(16, 16, 3, 3), bias)
    mod = imported(run, x, buffers=held)
    fused = graphs.count(FuseQDQ()(mod))
    assert fused["topi_int8.conv2d"] == 1 and fused["dequantize"] == 1
    assert not {"nn.conv2d", "add", "nn.relu"} & set(fused)
    # Only the input's own quantize may clip in float.
    assert fused["clip"] == (high != 255) and fused["quantize"] == 1
    got, want = compiled(mod)(x.numpy()), run(x, *held).numpy()
    difference = np.abs(got - want) / 0.04
    # A sum beside half a step falls either way: bias is rounded to a step of the int32 sum.
    assert difference.max() < 1.01 and np.mean(difference > 0.5) < 0.01
    assert np.unique(want).size > 20


@pytest.mark.parametrize(("shape", "bias"), [((3, 32), False), ((2, 5, 32), True)])
def test_a_linear_layer_is_one_operator(shape: tuple[int, ...], bias: bool) -> None:
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.normal(size=shape).astype("float32"))
    shift = (torch.from_numpy(rng.normal(size=24).astype("float32")),) if bias else ()

    def run(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, z: torch.Tensor, *b: torch.Tensor):
        w = OPS.dequantize_per_channel(w, s, z, 0, -128, 127, torch.int8)
        return pair(torch.nn.functional.linear(pair(x, 0.03, 110), w, *b), 0.03, 120)

    held = (*weights(24, 32), *shift)
    mod = imported(run, x, buffers=held)
    fused = graphs.count(FuseQDQ()(mod))
    assert fused["topi_int8.matmul"] == 1 and not {"matmul", "add"} & set(fused)
    assert fused["dequantize"] == fused["quantize"] == 1
    difference = np.abs(compiled(mod)(x.numpy()) - run(x, *held).numpy()) / 0.03
    assert difference.max() < 1.01 and np.mean(difference > 0.5) < 0.02


def test_a_tensor_quantized_for_each_reader_is_quantized_once() -> None:
    def run(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        w = OPS.dequantize_per_channel(w, s, z, 0, -128, 127, torch.int8)
        y = torch.relu(torch.nn.functional.conv2d(pair(x, 0.03, 60, 127), w))
        first = torch.nn.functional.conv2d(pair(y, 0.04, 0, 127), w)
        return pair(torch.relu(first + pair(y, 0.04, 0, 127)), 0.05, 0, 127)

    x = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 16, 6, 6)).astype("float32"))
    mod = imported(run, x, buffers=weights(16, 16, 1, 1))
    assert graphs.count(mod)["quantize"] == 3
    fused = graphs.count(FuseQDQ()(mod))
    assert fused["topi_int8.conv2d"] == 2 and fused["quantize"] == 1
    assert not {"add", "nn.relu", "topi_int8.add"} & set(fused)


# ---------------------------------------------------------------- networks, by torchao


def quantizer(name: str, dynamic: bool = False) -> Any:
    """Return a quantizer of torchao's: X86InductorQuantizer, or XNNPACK's (int8, symmetric)."""
    if name == "x86":
        module = pytest.importorskip(
            "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer",
            reason="torchao is not installed (extra `test`)",
        )
        made = module.X86InductorQuantizer()
        config = module.get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
    else:
        module = pytest.importorskip(
            "torchao.testing.pt2e._xnnpack_quantizer",
            reason="torchao is not installed (extra `test`), or has no XNNPACKQuantizer",
        )
        made = module.XNNPACKQuantizer()
        config = module.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    made.set_global(config)
    return made


def pt2e(
    net: torch.nn.Module,
    batches: list[torch.Tensor],
    by: Any,
    dynamic_shapes: Any = None,
) -> torch.nn.Module:
    """Return a network quantized as torchao's tutorial does, calibrated on batches."""
    flow = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    # X86InductorQuantizer does not tell apart two uses of one ReLU without strict.
    exported = torch.export.export(
        net, (batches[0],), dynamic_shapes=dynamic_shapes, strict=True
    ).module()
    prepared = flow.prepare_pt2e(exported, by)
    for batch in batches:
        prepared(batch)
    return flow.convert_pt2e(prepared)


@dataclass(frozen=True)
class Parity:
    """How a converted module's results here differ from its results in torch."""

    steps: dict[str, float]  # of each quantized tensor: how many elements differ, by 1 step
    fp32: np.ndarray
    torch: np.ndarray
    here: np.ndarray
    explanation: Any


def parity(net: torch.nn.Module, converted: torch.nn.Module, x: np.ndarray) -> Parity:
    """Compile a converted module and run it on x, each quantized tensor held against torch's
    arithmetic on the tensors that were computed here before it.

    Raises
    ------
    AssertionError
        A quantized tensor is off by more than one step.
    """
    mod = from_torch(converted, torch.from_numpy(x))
    names = [v.name for v, value in graphs.bindings(mod) if graphs.op_name(value) == "quantize"]
    executable = tvm.compile(instrument(mod, names), target=topi_int8.host_target())
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    here, *stored = (out.numpy() for out in main(tvm.runtime.tensor(x)))
    actual = dict(zip(names, stored, strict=True))
    _, computed = simulate(mod, x, trace=True, forced=actual)
    steps = {}
    for name, value in actual.items():
        difference = np.abs(value.astype(int) - computed[name].astype(int))
        assert difference.max() <= 1, f"{name}: off by {difference.max()}"
        steps[name] = float(np.mean(difference > 0))
    with torch.no_grad():
        fp32, in_torch = (f(torch.from_numpy(x)).numpy() for f in (net, converted))
    explanation = topi_int8.explain(mod, topi_int8.host_target(), show=False)
    return Parity(steps, fp32, in_torch, here, explanation)


def all_int8(explanation: Any, convolutions: int, matmuls: int) -> bool:
    """Whether that many layers run on 8-bit integers, and nothing is named SLOW."""
    counts = Counter(type(row.work).__name__ for row in explanation)
    assert counts == {"Conv2dWorkload": convolutions, "MatmulWorkload": matmuls}
    assert not [other for other in explanation.others if "SLOW" in other.note]
    return all(row.work.data_dtype in ("uint8", "int8") for row in explanation)


# How many elements of a tensor may differ by one step. A float bias is rounded to a step of the
# int32 sum, s_x * s_w, which moves every sum by up to half of one. In MobileNetV2's depthwise
# layers, whose sums are short, that is 0.02 steps of the output: so many elements lie so near to a
# tie.
OFF_BY_ONE = 1e-2


@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "by", "batch", "convolutions"),
    [("resnet18", "x86", 1, 20), ("mobilenet_v2", "xnnpack", 3, 52)],
)
def test_networks_are_torchs(
    name: str, by: str, batch: int, convolutions: int, record_property: Any
) -> None:
    models = pytest.importorskip("bench.models")
    net, _ = models.load(name, image=64)
    images = models.calibration_images(4 * batch, 64, batch)
    converted = pt2e(net, [torch.from_numpy(x) for x in images], quantizer(by))
    found = parity(net, converted, models.unseen_images(batch, 64, batch)[0])
    assert all_int8(found.explanation, convolutions, 1)
    # An average of a few pixels is often an exact half of a step, which either side may round.
    off = sorted(found.steps.values())
    assert off[-2] <= OFF_BY_ONE and off[-1] <= 0.05
    # Free running, steps lost on the way add up; they stay below what quantization itself costs.
    quantization = graphs.sqnr(found.fp32, found.torch)
    execution = graphs.sqnr(found.torch, found.here)
    line = f"{name}: here against torch {execution:.1f} dB, torch against fp32 {quantization:.1f}"
    record_property("parity", line)
    print(line, f"off by one: {off[-2]:.2%}, {off[-1]:.2%}")
    assert execution > quantization
    assert np.mean(found.here.argmax(1) == found.torch.argmax(1)) > 0.6


class Attention(torch.nn.Module):
    """One block of a transformer, and an MLP's activation that is no clip."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(2))
        self.heads = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(3))
        self.out = torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 64), torch.nn.Linear(64, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norms[0](x)
        q, k, v = (f(normed).unflatten(-1, (4, -1)).transpose(1, 2) for f in self.heads)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norms[1](x))))


class Cnn(torch.nn.Module):
    """A residual sum, a max pool, an average and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 16, 1)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.nn.functional.max_pool2d(torch.relu(self.conv(x) + x), 2)
        return self.head(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def seeded(net: type[torch.nn.Module]) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return net().eval().requires_grad_(False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype("float32"))


def test_a_transformer_is_torchs() -> None:
    net = seeded(Attention)
    converted = pt2e(net, [random(3, 5, 32, seed=i) for i in range(3)], quantizer("x86"))
    found = parity(net, converted, random(3, 5, 32, seed=9).numpy())
    # Each linear layer; the two products of attention are not quantized and stay float.
    int8 = [row for row in found.explanation if row.work.data_dtype != "float32"]
    assert len(int8) == 6 and all(row.strategy.startswith("matmul_") for row in int8)
    assert max(found.steps.values()) <= OFF_BY_ONE
    assert graphs.sqnr(found.torch, found.here) > graphs.sqnr(found.fp32, found.torch) + 6


@pytest.mark.parametrize("by", ["x86", "xnnpack"])
def test_dynamically_quantized_linear_layers_are_integer_products(by: str) -> None:
    net = torch.nn.Sequential(
        torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 20)
    ).eval()
    converted = pt2e(net, [random(2, 7, 32)], quantizer(by, dynamic=True))
    x = random(2, 7, 32, seed=3)
    mod = from_torch(converted, x)
    rows = list(topi_int8.explain(mod, topi_int8.host_target(), show=False))
    assert len(rows) == 2
    assert all(row.work.data_dtype in ("uint8", "int8") for row in rows)
    with torch.no_grad():
        want = converted(x).numpy()
    # Integer sums are exact and float ones nearly: what differs is a step of a tie, at most.
    np.testing.assert_allclose(compiled(mod)(x.numpy()), want, atol=1e-3 * np.abs(want).max())


def test_a_symbolic_batch() -> None:
    net, shapes = seeded(Cnn), ({0: torch.export.Dim("batch")},)
    batches = [random(2, 3, 12, 12, seed=i) for i in range(3)]
    converted = pt2e(net, batches, quantizer("x86"), shapes)
    mod = from_torch(converted, random(2, 3, 12, 12), dynamic_shapes=shapes)
    # Symbolic: TVM's own path, in float, said aloud.
    explanation = topi_int8.explain(mod, topi_int8.host_target(), show=False)
    assert not list(explanation) and sum("SLOW" in o.note for o in explanation.others) == 2
    main = compiled(mod)
    for batch in (1, 2, 5):
        x = random(batch, 3, 12, 12, seed=batch)
        symbolic = main(x.numpy())
        if batch > 1:  # torch's own program refuses 1
            np.testing.assert_allclose(symbolic, converted(x).detach().numpy(), atol=1e-5)
        if batch == 2:
            continue
        one = with_batch(mod, batch)
        assert all_int8(topi_int8.explain(one, topi_int8.host_target(), show=False), 2, 1)
        np.testing.assert_allclose(
            compiled(one)(x.numpy()), symbolic, atol=0.01 * np.abs(symbolic).max()
        )
