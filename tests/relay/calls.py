"""One Relay call a workload: its module, its operands, and how each executor runs it.

>>> call = Call(SHAPES["ic17_oc33"], "NHWC", constant=True)
>>> operands = call.operands()
>>> run(call.module(operands), operands, "llvm -mcpu=haswell", "graph")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import relay
from tvm.contrib import graph_executor

import topi_int8
from tests import reference
from topi_int8.target import runs_here
from topi_int8.workload import Conv2dWorkload, Epilogue, MatmulWorkload

Workload = Conv2dWorkload | MatmulWorkload

# Instruction set -> the target as people write it; LLVM 10 knows neither AVX-VNNI nor AMX.
X86: Mapping[str, str] = {
    "generic": "llvm",
    "avx2": "llvm -mcpu=haswell",
    "avx512_bw": "llvm -mcpu=skylake-avx512",
    "avx512_vnni": "llvm -mcpu=cascadelake",
}
# The target of the best instruction set of these that this machine executes.
HERE = next(X86[isa] for isa in reversed(X86) if runs_here(isa))

# Data layout -> the weight's, and that of depthwise convolutions.
KERNEL_LAYOUTS = {"NCHW": ("OIHW", "OIHW"), "NHWC": ("HWIO", "HWOI")}


def raw(work: Workload) -> Workload:
    """Return a workload as Relay's plain operators compute it: int32 sums, no zero points."""
    return replace(
        work, data_zero_point=0, weight_zero_point=0, weight_range=None, epilogue=Epilogue("int32")
    )


@dataclass(frozen=True)
class Call:
    """A convolution, dense or batched matmul of Relay, alone or with an epilogue of QNN's.

    Parameters
    ----------
    work : Conv2dWorkload or MatmulWorkload
        Its zero points and epilogue are ignored.
    layout : str
        "NCHW" or "NHWC", of a convolution.
    constant : bool
        Whether the weight is a constant, and not an input.
    requantized : bool
        Whether the sums, a bias added, are requantized to uint8 by channel.
    """

    work: Workload
    layout: str = "NCHW"
    constant: bool = True
    requantized: bool = False

    @property
    def plain(self) -> Workload:
        """The workload of the call alone."""
        return raw(self.work)

    def operands(self, seed: int = 0, extreme: bool = False) -> reference.Operands:
        """Return data and weight as the reference takes them."""
        return reference.random_operands(self.plain, seed, extreme)

    def expected(self, ops: reference.Operands) -> np.ndarray:
        """Return the int32 sums as the call shapes them, by the reference."""
        if isinstance(self.work, MatmulWorkload):
            out = reference.matmul(self.plain, ops.data, ops.weight)
            return out if self.work.batch > 1 else out.reshape(self.work.m, self.work.n)
        out = reference.conv2d(self.plain, ops.data, ops.weight)
        return out.transpose(["NCHW".index(letter) for letter in self.layout])

    @property
    def channel_axis(self) -> int:
        """The output's dimension of channels."""
        if isinstance(self.work, MatmulWorkload):
            return 2 if self.work.batch > 1 else 1
        return self.layout.index("C")

    def arrays(self, ops: reference.Operands) -> dict[str, np.ndarray]:
        """Return the operands by the names and in the layouts of Relay's call."""
        w = self.work
        if isinstance(w, MatmulWorkload):
            if w.batch > 1:
                return {"data": ops.data, "weight": ops.weight}
            weight = ops.weight if w.transpose_b else ops.weight.T
            return {"data": ops.data.reshape(w.m, w.k), "weight": weight.reshape(w.n, w.k)}
        order = self.kernel_layout
        return {
            "data": ops.data.transpose(["NCHW".index(letter) for letter in self.layout]),
            "weight": ops.weight.transpose(["OIHW".index(letter) for letter in order]),
        }

    @property
    def kernel_layout(self) -> str:
        """The weight's layout."""
        w = self.work
        return KERNEL_LAYOUTS[self.layout][w.groups > 1 and w.groups == w.ic == w.oc]

    def module(self, ops: reference.Operands) -> tvm.IRModule:
        """Return the module; `inputs` are its variables."""
        arrays = self.arrays(ops)
        data, weight = (
            relay.var(name, shape=array.shape, dtype=str(array.dtype))
            for name, array in arrays.items()
        )
        variables = [data] if self.constant else [data, weight]
        if self.constant:
            weight = relay.const(np.ascontiguousarray(arrays["weight"]))
        out = self._sums(data, weight)
        if self.requantized:
            out = self.requantize(out)
        return relay.transform.InferType()(tvm.IRModule.from_expr(relay.Function(variables, out)))

    def inputs(self, ops: reference.Operands) -> dict[str, np.ndarray]:
        """Return the module's inputs."""
        arrays = self.arrays(ops)
        if self.constant:
            del arrays["weight"]
        return arrays

    def _sums(self, data: Any, weight: Any) -> Any:
        w = self.work
        if isinstance(w, MatmulWorkload):
            if w.batch == 1:
                return relay.nn.dense(data, weight, units=w.n, out_dtype="int32")
            return relay.nn.batch_matmul(
                data, weight, out_dtype="int32", transpose_a=False, transpose_b=w.transpose_b
            )
        return relay.nn.conv2d(
            data, weight, strides=w.strides, padding=w.padding, dilation=w.dilation,
            groups=w.groups, channels=w.oc, kernel_size=(w.kh, w.kw), data_layout=self.layout,
            kernel_layout=self.kernel_layout, out_dtype="int32",
        )  # fmt: skip

    def requantize(self, sums: Any) -> Any:
        """Return sums, a bias added, requantized to uint8 by channel."""
        channels = self.work.n if isinstance(self.work, MatmulWorkload) else self.work.oc
        rng = np.random.default_rng(channels)
        bias = rng.integers(-3000, 3000, channels).astype("int32")
        scales = rng.uniform(0.0005, 0.004, channels).astype("float32")
        axis = self.channel_axis
        biased = relay.nn.bias_add(sums, relay.const(bias), axis=axis)
        return relay.qnn.op.requantize(
            biased, relay.const(scales), relay.const(0, "int32"), relay.const(np.float32(1.0)),
            relay.const(11, "int32"), axis=axis, out_dtype="uint8",
        )  # fmt: skip


# ---------------------------------------------------------------- executors


def _graph(mod: tvm.IRModule, target: Any, level: int, params: Any) -> Callable:
    with tvm.transform.PassContext(opt_level=level):
        built = relay.build(mod, target=target, params=params)
    made = graph_executor.GraphModule(built["default"](tvm.cpu()))

    def call(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        made.set_input(**{name: np.ascontiguousarray(array) for name, array in inputs.items()})
        made.run()
        return [made.get_output(at).numpy() for at in range(made.get_num_outputs())]

    return call


def _vm(mod: tvm.IRModule, target: Any, level: int, params: Any) -> Callable:
    with tvm.transform.PassContext(opt_level=level):
        built = relay.vm.compile(mod, target=target, params=params)
    machine = tvm.runtime.vm.VirtualMachine(built, tvm.cpu())

    def call(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        out = machine.invoke("main", **{k: tvm.nd.array(v) for k, v in inputs.items()})
        several = isinstance(out, tvm.runtime.container.ADT)
        return [one.numpy() for one in (out if several else [out])]

    return call


def _aot(mod: tvm.IRModule, target: Any, level: int, params: Any) -> Callable:
    with tvm.transform.PassContext(opt_level=level):
        built = relay.build(
            mod, target=target, params=params, executor=relay.backend.Executor("aot"),
            runtime=relay.backend.Runtime("cpp"),
        )  # fmt: skip
    made = tvm.runtime.executor.AotModule(built["default"](tvm.cpu()))

    def call(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        for name, array in inputs.items():
            made.set_input(name, np.ascontiguousarray(array))
        made.run()
        return [made.get_output(at).numpy() for at in range(made.get_num_outputs())]

    return call


EXECUTORS: dict[str, Callable[..., Callable]] = {"graph": _graph, "vm": _vm, "aot": _aot}


def executable(
    mod: tvm.IRModule, target: Any, executor: str = "graph", level: int = 3,
    params: Mapping[str, Any] | None = None,
) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:  # fmt: skip
    """Return a built module as a function from inputs by name to outputs."""
    return EXECUTORS[executor](mod, target, level, dict(params or {}))


def run(
    mod: tvm.IRModule, inputs: Mapping[str, np.ndarray], target: Any, executor: str = "graph",
    level: int = 3,
) -> list[np.ndarray]:  # fmt: skip
    """Return the outputs of a module."""
    return executable(mod, target, executor, level)(inputs)


def in_float32() -> Any:
    """Return a context in which QNN requantizes in float32, as it does for CPUs from SSE4.1 on.

    For plain ``llvm`` it multiplies integers: ties are rounded otherwise.
    """
    return relay.qnn.op.qnn.requantize_config(compute_dtype="float32")


def upstream(mod: tvm.IRModule, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return what upstream computes of a module for plain ``llvm``, where no sum saturates."""
    with topi_int8.disabled(), in_float32():
        return run(mod, inputs, "llvm")
