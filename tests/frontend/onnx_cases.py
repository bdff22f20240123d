"""ONNX graphs for the tests of `topi_int8.frontend.onnx`, and what they are to compute, in numpy.

The reference is the operators' definition in float64: (q - zero point) * scale, the float operator,
round half to even, saturate. Nothing of this package is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import helper, numpy_helper
from tvm import relax

import topi_int8
from topi_int8 import op
from topi_int8.frontend.onnx import from_onnx
from topi_int8.transform.fuse_elementwise import FuseElementwise
from topi_int8.transform.fuse_qdq import FuseQDQ

MICROSOFT = "com.microsoft"
OF_MICROSOFT = (
    "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "QLinearAdd", "QLinearAveragePool",
    "QLinearConcat", "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMul",
    "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax", "QLinearWhere",
)  # fmt: skip
RANGE = {"uint8": (0, 255), "int8": (-128, 127)}


@dataclass
class Builder:
    """An ONNX graph of independent nodes: each output is a graph output, with its expected value.

    One model checks a whole grid in one compile.
    """

    opset: int = 17
    nodes: list = field(default_factory=list)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    constants: list = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    expected: list[np.ndarray] = field(default_factory=list)

    def input(self, array: Any) -> str:
        """Return the name of a new graph input of that value."""
        name = f"in{len(self.inputs)}"
        self.inputs[name] = np.asarray(array)
        return name

    def constant(self, array: Any) -> str:
        """Return the name of a new initializer."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op: str, inputs: Sequence[str], outputs: int = 1, name: str = "", **attrs: Any):
        """Add a node; return its output's name, or a list of several."""
        name = name or f"{op}_{len(self.nodes)}"
        made = [f"{name}:{i}" for i in range(outputs)]
        domain = attrs.pop("domain", MICROSOFT if op in OF_MICROSOFT else "")
        self.nodes.append(helper.make_node(op, list(inputs), made, name, domain=domain, **attrs))
        return made[0] if outputs == 1 else made

    def output(self, name: str, expected: np.ndarray) -> None:
        """Make a tensor a graph output."""
        self.outputs.append(name)
        self.expected.append(expected)

    def model(self) -> onnx.ModelProto:
        """Return the model."""
        graph = helper.make_graph(
            self.nodes,
            "test",
            [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
                )
                for name, array in self.inputs.items()
            ],
            [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
                )
                for name, array in zip(self.outputs, self.expected, strict=True)
            ],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def compiled(mod: tvm.IRModule, *inputs: np.ndarray) -> list[np.ndarray]:
    """Return the outputs of ``main``, compiled for this machine."""
    executable = tvm.compile(mod, topi_int8.host_target(num_cores=1))
    found = relax.VirtualMachine(executable, tvm.cpu())["main"](*map(tvm.runtime.tensor, inputs))
    return [found.numpy()] if isinstance(found, tvm.runtime.Tensor) else [t.numpy() for t in found]


def onnxruntime_outputs(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list | None:
    """Return what onnxruntime computes; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


def close(got: np.ndarray, want: np.ndarray, exact: bool = False, what: str = "") -> None:
    """Assert equality; of 8-bit tensors up to 1 in four of a thousand values (one in small ones).

    float32 is equal to 1e-5 of its largest value.
    """
    assert got.shape == want.shape and got.dtype == want.dtype, (what, got.dtype, want.dtype)
    if got.dtype == np.float32 and not exact:
        scale = float(np.abs(want).max(initial=0)) or 1.0
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale, err_msg=what)
        return
    difference = np.abs(got.astype("int64") - want.astype("int64"))
    few = 0 if exact else max(1, int(0.004 * want.size))
    assert difference.max(initial=0) <= (0 if exact else 1), (what, difference.max())
    assert np.count_nonzero(difference) <= few, (what, np.count_nonzero(difference), want.size)


def check(builder: Builder, exact: bool = False, rival: bool = True) -> tvm.IRModule:
    """Compile a graph; compare it with numpy's values and onnxruntime's; return the module."""
    model = builder.model()
    onnx.checker.check_model(model)
    mod = from_onnx(model)
    theirs = onnxruntime_outputs(model, builder.inputs) if rival else None
    found = compiled(mod, *builder.inputs.values())
    assert len(found) == len(builder.expected)
    for i, (name, got) in enumerate(zip(builder.outputs, found, strict=True)):
        close(got, builder.expected[i], exact, f"{name} beside numpy")
        if theirs is not None:
            close(got, theirs[i], exact, f"{name} beside onnxruntime")
    return mod


def fused(mod: tvm.IRModule) -> list[tuple[str, str]]:
    """Return (operator, its name) of what FuseQDQ leaves; a name only where `explain` has one."""
    found = []
    mod = tvm.transform.Sequential([FuseElementwise(), FuseQDQ()])(mod)

    def visit(expr: relax.Expr) -> None:
        if op.op_name(expr):
            ours = op.op_name(expr).startswith("topi_int8.")
            found.append((op.op_name(expr), op.attrs_of(expr).get("name", "") if ours else ""))

    relax.analysis.post_order_visit(mod["main"], visit)
    return found


def integer_names(mod: tvm.IRModule) -> list[str]:
    """Return the names of the convolutions and matmuls that become integer."""
    return [name for kind, name in fused(mod) if kind in ("topi_int8.conv2d", "topi_int8.matmul")]


# ---------------------------------------------------------------- the reference


def along(vector: Any, rank: int, axis: int) -> np.ndarray:
    """Return a vector that broadcasts along an axis; a scalar as it is."""
    vector = np.asarray(vector)
    if vector.size == 1:
        return vector.reshape(())
    return vector.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def real(q: np.ndarray, scale: Any, zero_point: Any, axis: int = 0) -> np.ndarray:
    """Return DequantizeLinear in float64."""
    scale, zero_point = (along(v, q.ndim, axis) for v in (scale, zero_point))
    return (q.astype("int64") - zero_point.astype("int64")) * scale.astype("float64")


def stored(value: np.ndarray, scale: Any, zero_point: Any, axis: int = 0) -> np.ndarray:
    """Return QuantizeLinear of float64 values, in the zero point's type."""
    zero_point = np.asarray(zero_point)
    low, high = RANGE[str(zero_point.dtype)]
    q = np.rint(value / along(scale, value.ndim, axis)) + along(zero_point, value.ndim, axis)
    return np.clip(q, low, high).astype(zero_point.dtype)


def conv(
    x: np.ndarray, w: np.ndarray, strides: tuple = (1, 1), pads: tuple = (0, 0, 0, 0),
    dilations: tuple = (1, 1), group: int = 1,
) -> np.ndarray:  # fmt: skip
    """Return a convolution of float64 or int64, padded with zeros; pads are ONNX's."""
    top, left, bottom, right = pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    kh, kw = w.shape[2:]
    reach = (kh - 1) * dilations[0] + 1, (kw - 1) * dilations[1] + 1
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    size, each = x.shape[1] // group, w.shape[0] // group
    parts = [
        np.einsum(
            "nchwij,ocij->nohw",
            windows[:, g * size : (g + 1) * size], w[g * each : (g + 1) * each],
        )
        for g in range(group)
    ]  # fmt: skip
    return np.concatenate(parts, 1)


def same_pads(
    image: tuple, kernel: tuple, strides: tuple, dilations: tuple, upper: bool
) -> tuple[int, ...]:
    """Return the pads of auto_pad SAME_UPPER or SAME_LOWER."""
    before, after = [], []
    for size, k, s, d in zip(image, kernel, strides, dilations, strict=True):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        less, more = total // 2, total - total // 2
        before.append(less if upper else more)
        after.append(more if upper else less)
    return (*before, *after)


def average_pool(
    x: np.ndarray, kernel: tuple, strides: tuple, pads: tuple, ceil: bool, include: bool
) -> np.ndarray:
    """Return AveragePool of float64, window by window, as the operator's text has it.

    A window that begins beyond the image and its first border is none; what hangs over the last
    border is not counted.
    """
    n, c, *image = x.shape
    outs = []
    for size, k, s, first, last in zip(image, kernel, strides, pads[:2], pads[2:], strict=True):
        steps = (size + first + last - k) / s
        count = int(np.ceil(steps) if ceil else np.floor(steps)) + 1
        outs.append(count - ((count - 1) * s >= size + first))
    found = np.zeros((n, c, *outs))
    for y in range(outs[0]):
        for at in range(outs[1]):
            starts = y * strides[0] - pads[0], at * strides[1] - pads[1]
            spans, counted = [], 1
            for start, k, size, last in zip(starts, kernel, image, pads[2:], strict=True):
                low, high = max(start, 0), min(start + k, size)
                spans.append(slice(low, high))
                counted *= min(start + k, size + last) - start if include else high - low
            found[:, :, y, at] = x[:, :, spans[0], spans[1]].sum((2, 3)) / counted
    return found


def draw(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Return integers over the whole range of a type."""
    low, high = RANGE[dtype]
    return rng.integers(low, high + 1, shape).astype(dtype)


def scale_for(value: np.ndarray) -> np.float32:
    """Return a scale that spreads values over 8 bits, some of them saturating."""
    return np.float32(np.abs(value).max() / 100 or 1.0)


