"""The worker on a TVM with Relay: ``python -m bench.published.relay_worker``, see `served`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relay
from tvm.contrib import graph_executor

import topi_int8

from . import networks
from .engine import Engine
from .served import serve

# What upstream says thousands of times: that nobody tuned this.
for _name in ("te_compiler", "autotvm", "topi", "strategy"):
    logging.getLogger(_name).setLevel(logging.ERROR)

_LIBRARY = "net.so"


# The instruction sets of this machine -> the CPU to name. Upstream asks LLVM about CPUs, not flags,
# and this LLVM knows none of the newer ones.
_CPUS = {
    "amx_int8": "cascadelake", "avx512_vnni": "cascadelake", "avx512_bw": "skylake-avx512",
    "avx_vnni": "haswell", "avx2": "haswell",
}  # fmt: skip


def target(engine: Engine) -> tvm.target.Target:
    """Return the engine's target: the CPU that it names, or one that is like this machine."""
    isas = topi_int8.features(topi_int8.host_target()).isas
    known = (_CPUS[isa] for isa in isas if isa in _CPUS)
    cpu = engine.cpu or next(known, "x86-64")
    return tvm.target.Target(f"llvm -mcpu={cpu}")


class _Graph:
    """A network on the graph or the AOT executor."""

    def __init__(self, factory: Any, engine: Engine) -> None:
        self._factory, self._layout = factory, engine.layout
        aot = engine.executor == "aot"
        wrapper = tvm.runtime.executor.AotModule if aot else graph_executor.GraphModule
        self._module = wrapper(factory["default"](tvm.cpu()))

    def evaluate(self, number: int, repeat: int) -> list[float]:
        timer = self._module.module.time_evaluator("run", tvm.cpu(), number=number, repeat=repeat)
        return list(timer().results)

    def output(self, data: np.ndarray) -> np.ndarray:
        self._module.set_input("data", _in_layout(data, self._layout))
        self._module.run()
        return self._module.get_output(0).numpy()

    def export(self, folder: Path) -> None:
        self._factory.export_library(str(folder / _LIBRARY))

    def counts(self) -> dict[str, dict[str, int]]:
        return vars(topi_int8.library_counts(self._factory))


class _Machine:
    """A network on the VM."""

    def __init__(self, executable: Any, engine: Engine) -> None:
        self._layout = engine.layout
        self._executable = executable
        self._machine = tvm.runtime.vm.VirtualMachine(executable, tvm.cpu())

    def evaluate(self, number: int, repeat: int) -> list[float]:
        found = self._machine.benchmark(tvm.cpu(), number=number, repeat=repeat, end_to_end=False)
        return list(found.results)

    def output(self, data: np.ndarray) -> np.ndarray:
        self._machine.set_input("main", tvm.nd.array(_in_layout(data, self._layout)))
        return self._machine.run().numpy()

    def export(self, folder: Path) -> None:
        raise ValueError("executor is 'vm'; allowed: graph, aot, for memory")

    def counts(self) -> dict[str, dict[str, int]]:
        return vars(topi_int8.library_counts(self._executable))


def _in_layout(data: np.ndarray, layout: str) -> np.ndarray:
    return np.ascontiguousarray(data.transpose(["NCHW".index(letter) for letter in layout]))


_QUANTIZED: dict[tuple, tvm.IRModule] = {}  # quantizing takes as long as building


def _quantized(mod: tvm.IRModule, engine: Engine) -> tvm.IRModule:
    key = (engine.network, engine.layout, engine.batch, engine.activation, engine.stem)
    if key not in _QUANTIZED:
        _QUANTIZED[key] = networks.quantized(mod, engine.activation, engine.stem)
    return _QUANTIZED[key]


def build(engine: Engine, weights: Mapping[str, np.ndarray]) -> _Graph | _Machine:
    """Return an engine, built, its input set."""
    mod = networks.resnet(engine.network, weights, engine.batch, engine.layout)
    switch: Callable[[], Any] = contextlib.nullcontext if engine.ours else topi_int8.disabled
    with switch():
        if engine.precision == "int8":
            mod = _quantized(mod, engine)
        skipped = ["AlterOpLayout"] if engine.kept else []
        with tvm.transform.PassContext(opt_level=engine.level, disabled_pass=skipped):
            made: _Graph | _Machine
            if engine.executor == "vm":
                made = _Machine(relay.vm.compile(mod, target=target(engine)), engine)
            else:
                executor = relay.backend.Executor(engine.executor)
                runtime = relay.backend.Runtime("cpp")
                factory = relay.build(
                    mod, target=target(engine), executor=executor, runtime=runtime
                )
                made = _Graph(factory, engine)
    image = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype("float32")
    made.output(np.repeat(image, engine.batch, 0))
    return made


def load(folder: Path, _batch: int) -> Callable[[], None]:
    """Return one run of an exported network."""
    module = tvm.runtime.load_module(str(folder / _LIBRARY))
    return graph_executor.GraphModule(module["default"](tvm.cpu())).run


if __name__ == "__main__":
    serve(build, load)
