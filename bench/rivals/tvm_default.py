"""TVM's own default pipeline on the same arithmetic, with our override off.

It schedules nothing on CPUs, so a layer can take seconds: layers estimated beyond a limit are not
run, those that turn out to be beyond it once, and the rest a few times.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.target import Target

from topi_int8 import override
from topi_int8.workload import Conv2dWorkload, Epilogue

from ..place import HERE, Graph, Place
from ..timing import Sampler
from ..workloads import Workload, random_operands
from . import Unavailable

# Measured on 2-core VMs (Sapphire Rapids, Zen 3): 3 to 5 GMAC/s on convolutions. A low guess only
# skips more.
ESTIMATED_MACS_PER_SECOND = 2e9


class TvmDefault:
    """TVM without topi_int8.

    Parameters
    ----------
    limit : float
        Seconds of one run beyond which a layer is not run.
    """

    name = "tvm"
    title = "TVM"

    def __init__(self, limit: float = 1.0) -> None:
        if limit <= 0:
            raise ValueError(f"limit is {limit}; allowed: seconds > 0")
        self.limit = limit

    def prepare(
        self, workload: Workload, target: Target, place: Place = HERE
    ) -> tuple[Sampler, str]:
        """Compile the layer; see `Rival`."""
        self.refuse(workload.macs)
        module, data = relax_module(workload)
        return self.prepare_module(module, data, target, place)

    def refuse(self, macs: int) -> None:
        """Raise Unavailable where that much work is estimated to take longer than the limit."""
        estimate = macs / ESTIMATED_MACS_PER_SECOND
        if estimate > self.limit:
            raise Unavailable(f"skipped: est. {estimate:.1f} s")

    def prepare_module(
        self, module: tvm.IRModule, inputs: list[np.ndarray], target: Target, place: Place
    ) -> tuple[Sampler, str]:
        """Compile a whole Relax module instead of a layer; see `Rival`."""
        with override.disabled():
            graph = Graph(tvm.compile(module, target=target), place)
        [first] = graph.evaluate(1, 1, *inputs)

        def sample(seconds: float) -> list[float]:
            if first > self.limit:
                return [1e6 * first]
            runs = max(1, min(100, round(seconds / first)))
            return [1e6 * run for run in graph.evaluate(1, runs)]

        # "~": few runs of a slow kernel, not a minimum of many.
        return sample, "~" if first > 1e-2 else ""

    def close(self) -> None:
        """Nothing is held."""


def relax_module(workload: Workload) -> tuple[tvm.IRModule, list[np.ndarray]]:
    """Return the layer in plain Relax, constants bound, and the inputs it takes.

    The integer form (u8 x s8 -> s32, then requantize in float32), which is the best case for TVM:
    a QDQ graph would be folded to float32 weights.
    """
    operands = random_operands(workload)
    conv = isinstance(workload, Conv2dWorkload)
    inputs = (
        [operands.data] if conv or workload.weight_constant else [operands.data, operands.weight]
    )
    if operands.residual is not None:
        inputs.append(operands.residual)
    variables = [
        relax.Var(f"x{i}", relax.TensorType(array.shape, str(array.dtype)))
        for i, array in enumerate(inputs)
    ]
    builder = relax.BlockBuilder()
    with builder.function("main", variables):
        with builder.dataflow():
            value = builder.emit(_product(workload, variables, operands.weight))
            shape = (1, -1, 1, 1) if conv else (-1,)
            residual = variables[-1] if operands.residual is not None else None
            value = _epilogue(
                builder, workload.epilogue, value, operands.bias, operands.scale, residual, shape
            )
            value = builder.emit_output(value)
        builder.emit_func_output(value)
    return builder.get(), inputs


def _product(workload: Workload, variables: list[relax.Var], constant: np.ndarray) -> relax.Expr:
    """Return the bare convolution or matmul."""
    acc_dtype = "float32" if workload.is_float else "int32"
    if isinstance(workload, Conv2dWorkload):
        return relax.op.nn.conv2d(
            variables[0], relax.const(constant), strides=workload.strides,
            padding=workload.padding, dilation=workload.dilation, groups=workload.groups,
            out_dtype=acc_dtype,
        )  # fmt: skip
    if workload.weight_constant:
        left, right = variables[0], relax.const(np.ascontiguousarray(constant.swapaxes(-1, -2)))
    else:
        left, right = variables[0], relax.op.permute_dims(variables[1], [0, 2, 1])
    # relax.matmul wants operands of one dtype; what it is given here fuses into the loop.
    if not workload.is_float:
        left, right = (relax.op.astype(value, "int32") for value in (left, right))
    return relax.op.matmul(left, right)


def _epilogue(
    builder: relax.BlockBuilder,
    epilogue: Epilogue,
    value: relax.Expr,
    bias: np.ndarray | None,
    scale: np.ndarray | None,
    residual: relax.Expr | None,
    shape: tuple[int, ...],
) -> relax.Expr:
    """Return the epilogue's arithmetic as `topi_int8.workload` states it."""
    op = relax.op
    if bias is not None:
        value = builder.emit(op.add(value, relax.const(bias.reshape(shape))))
    if scale is not None:
        value = builder.emit(op.astype(value, "float32"))
        value = builder.emit(op.multiply(value, relax.const(scale.reshape(shape))))
    if residual is not None:
        widened = builder.emit(op.astype(residual, "float32"))
        scaled = op.multiply(widened, relax.const(epilogue.residual_scale, "float32"))
        value = builder.emit(op.add(value, builder.emit(scaled)))
    low, high = epilogue.bounds()
    if epilogue.out_dtype in ("uint8", "int8"):
        value = builder.emit(op.round(value))
        value = builder.emit(op.clip(value, float(low), float(high)))
        return builder.emit(op.astype(value, epilogue.out_dtype))
    if epilogue.clip_min is not None and epilogue.out_dtype == "float32":
        return builder.emit(op.maximum(value, relax.const(float(low), "float32")))
    if epilogue.clip_min is not None:
        return builder.emit(op.maximum(value, relax.const(int(low), "int32")))
    return value
