"""quantize's options: method, per_channel, symmetric; what they write and what compiles of it."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

import topi_int8
from tests import graphs
from topi_int8.quantize import Grid, KLDivergence, Observer, Percentile, quantize

simulate = pytest.importorskip(
    "tests.simulate", reason="the float reference needs torch (extra `torch`)"
).simulate

SHAPE = (1, 8, 10, 10)


def _const(seed: int, *shape: int) -> relax.Expr:
    rng = np.random.default_rng(seed)
    return relax.const((rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype("float32"))


def _body(emit, x):
    """Convolution, depthwise, a projection added to the input, and a matmul of two activations."""
    wide = emit(op.nn.conv2d(x, _const(1, 16, 8, 1, 1)))
    wide = emit(op.nn.relu(emit(op.add(wide, _const(2, 1, 16, 1, 1)))))
    deep = emit(op.nn.relu(emit(op.nn.conv2d(wide, _const(3, 16, 1, 3, 3), padding=1, groups=16))))
    narrow = emit(op.add(emit(op.nn.conv2d(deep, _const(4, 8, 16, 1, 1))), x))
    rows = emit(op.reshape(narrow, (8, 100)))
    mixed = emit(op.matmul(rows, emit(op.permute_dims(rows, (1, 0)))))
    return emit(op.matmul(mixed, _const(5, 8, 10)))


@pytest.fixture(scope="module")
def mod() -> tvm.IRModule:
    return graphs.build(SHAPE, _body)


def _inputs(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=SHAPE).astype("float32") for _ in range(count)]


def parameters(qdq: tvm.IRModule) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (scale, zero point) of every quantize."""
    return [
        tuple(arg.value.numpy() for arg in value.args[1:])
        for _, value in graphs.bindings(qdq)
        if graphs.op_name(value) == "quantize"
    ]


def constants(qdq: tvm.IRModule, dtype: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (integers, scale) of every dequantize of a constant of that type."""
    return [
        (value.args[0].value.numpy(), value.args[1].value.numpy())
        for _, value in graphs.bindings(qdq)
        if graphs.op_name(value) == "dequantize"
        and isinstance(value.args[0], tvm.ir.GenericConst)
        and str(value.args[0].ty.dtype) == dtype
    ]


@pytest.mark.parametrize(
    "options",
    [
        dict(per_channel=False),
        dict(symmetric=True, method="mse", per_channel=False),
        dict(symmetric=True, method="kl", activation_dtype="int8"),
        dict(method="percentile"),
        dict(method="moving_average"),
    ],
    ids=str,
)  # fmt: skip
def test_what_compiles_of_it(mod, options: dict) -> None:
    """The compiled integers against the float reference, which takes the graph as it is written."""
    qdq = quantize(mod, _inputs(8), progress=False, **options)
    x = _inputs(1, seed=9)[0]
    vm = relax.VirtualMachine(tvm.compile(qdq, topi_int8.host_target()), tvm.cpu())
    got = vm["main"](tvm.runtime.tensor(x)).numpy()
    # One rounding in thousands goes the other way.
    assert graphs.sqnr(simulate(qdq, x), got) > 40
    # Five int8 layers of white noise: 24 dB and more were seen.
    assert graphs.sqnr(simulate(mod, x), got) > 20


def test_one_scale_for_a_whole_weight(mod) -> None:
    qdq = quantize(mod, _inputs(4), per_channel=False, progress=False)
    weights, biases = constants(qdq, "int8"), constants(qdq, "int32")
    assert len(weights) == 4 and len(biases) == 1
    for values, scale in weights:
        assert scale.shape == () and scale.dtype == "float32" and np.abs(values).max() == 127
    assert biases[0][1].shape == ()


def test_a_scale_for_each_channel_by_default(mod) -> None:
    shapes = [scale.shape for _, scale in constants(quantize(mod, _inputs(1)), "int8")]
    assert shapes == [(16,), (16,), (8,), (10,)]


@pytest.mark.parametrize("dtype, zero_point", [("uint8", 128), ("int8", 0)])
def test_symmetric_activations(mod, dtype: str, zero_point: int) -> None:
    options = dict(method="mse", activation_dtype=dtype, progress=False)
    qdq = quantize(mod, _inputs(4), symmetric=True, **options)
    # The right operand of the matmul of two activations, the one that is always signed, included.
    assert {(int(zero), str(zero.dtype)) for _, zero in parameters(qdq)} == {
        (zero_point, dtype), (0, "int8")
    }  # fmt: skip
    plain = {int(zero) for _, zero in parameters(quantize(mod, _inputs(4), **options))}
    assert plain - {0, 128}


def test_a_method_of_ones_own_decides_the_scales(mod) -> None:
    def scales(method) -> list[float]:
        return [
            float(scale) for scale, _ in parameters(quantize(mod, _inputs(8), method=method))
        ]

    full, same = scales("minmax"), scales(lambda: Percentile(100))
    cut = scales(lambda: Percentile(95))
    assert full == same and all(a < b for a, b in zip(cut, full, strict=True))


def test_an_observer_is_told_its_grid(mod) -> None:
    told: list[Grid] = []

    class Told(KLDivergence):
        def range(self, grid: Grid = Grid()) -> tuple[float, float]:
            told.append(grid)
            return super().range(grid)

    quantize(mod, _inputs(1), method=Told, progress=False)
    assert set(told) == {Grid(), Grid(symmetric=True)}
    told.clear()
    quantize(mod, _inputs(1), method=Told, symmetric=True, progress=False)
    assert set(told) == {Grid(symmetric=True)}


def test_shared_scales_take_the_union_of_ranges(mod) -> None:
    """A concat's operands have one scale: that of the widest."""

    class Named(Observer):
        made = 0

        def __init__(self) -> None:
            Named.made += 1
            self.end = float(Named.made)

        def update(self, values: np.ndarray) -> None:
            pass

        def range(self, grid: Grid = Grid()) -> tuple[float, float]:
            return -self.end, 1.0

    def body(emit, x):
        both = emit(op.concat([emit(op.nn.conv2d(x, _const(i, 8, 8, 1, 1))) for i in (1, 2)], 1))
        return emit(op.nn.conv2d(both, _const(3, 4, 16, 1, 1)))

    qdq = quantize(graphs.build(SHAPE, body), _inputs(1), method=Named, progress=False)
    found = parameters(qdq)
    scales = sorted(float(scale) for scale, _ in found)
    # The image's own, and three times that of the concat and its operands.
    assert len(scales) == 4 and len(set(scales)) == 2
    shared = max(set(scales), key=scales.count)
    ends = np.arange(Named.made - 3, Named.made + 1)
    assert scales.count(shared) == 3 and min(abs(shared * 255 - 1 - ends)) < 1e-4


@pytest.mark.parametrize("name", ["per_channel", "symmetric"])
def test_flags_are_flags(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is 1; allowed: True, False"):
        quantize(None, [], **{name: 1})


def test_an_observer_of_nonsense_is_refused(mod) -> None:
    class Endless(Observer):
        def update(self, values: np.ndarray) -> None:
            pass

        def range(self, grid: Grid = Grid()) -> tuple[float, float]:
            return 0.0, float("inf")

    with pytest.raises(ValueError, match=r"range is \(0.0, inf\)"):
        quantize(mod, _inputs(1), method=Endless, progress=False)
    with pytest.raises(TypeError, match="method is 3; allowed: minmax"):
        quantize(mod, _inputs(1), method=3)
