"""The worker on a TVM with Relax, and of PyTorch: ``python -m bench.published.relax_worker``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax

import topi_int8
from bench import models
from bench.place import Graph
from topi_int8.frontend.torch import from_torch
from topi_int8.frontend.torchvision import import_torchvision

from .engine import Engine
from .served import serve

_IMAGE = 224
_LIBRARY = "net.so"


class _Network:
    """A network on Relax's VM."""

    def __init__(self, executable: Any, data: np.ndarray) -> None:
        self._executable, self._graph = executable, Graph(executable)
        self._graph(data)

    def evaluate(self, number: int, repeat: int) -> list[float]:
        return self._graph.evaluate(number, repeat)

    def output(self, data: np.ndarray) -> np.ndarray:
        return self._graph(data)

    def export(self, folder: Path) -> None:
        self._executable.export_library(str(folder / _LIBRARY))

    def counts(self) -> dict[str, dict[str, int]]:
        return vars(topi_int8.library_counts(self._executable))


class _Eager:
    """A network in PyTorch."""

    def __init__(self, module: Any, data: np.ndarray) -> None:
        self._module, self._data = module, torch.from_numpy(data)

    def evaluate(self, number: int, repeat: int) -> list[float]:
        means = []
        with torch.inference_mode():
            for _ in range(repeat):
                start = time.perf_counter()
                for _ in range(number):
                    self._module(self._data)
                means.append((time.perf_counter() - start) / number)
        return means

    def output(self, data: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self._module(torch.from_numpy(data)).numpy()

    def export(self, folder: Path) -> None:
        raise ValueError("tvm is 'torch'; allowed: relay, relax, for memory")

    def counts(self) -> dict[str, dict[str, int]]:
        raise ValueError("tvm is 'torch'; allowed: relay, relax, for counts")


def _module(engine: Engine, weights: Mapping[str, np.ndarray]) -> Any:
    module = import_torchvision().models.get_model(engine.network, weights=None).eval()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return module.requires_grad_(False)


def build(engine: Engine, weights: Mapping[str, np.ndarray]) -> _Network | _Eager:
    """Return an engine, built, its input set."""
    module = _module(engine, weights)
    data = models.images(engine.batch, _IMAGE)
    if engine.tvm == "torch":
        return _Eager(module, data)
    mod = from_torch(module, (torch.from_numpy(data),))
    target = (
        topi_int8.host_target()
        if not engine.cpu
        else tvm.target.Target({"kind": "llvm", "mcpu": engine.cpu})
    )
    if engine.precision == "int8":
        mod = topi_int8.quantize(mod, [data], progress=False)
    if engine.layout == "NHWC":
        mod = relax.transform.ConvertLayout({"relax.nn.conv2d": ["NHWC", "OHWI"]})(mod)
    if not engine.ours:
        with topi_int8.disabled():
            return _Network(tvm.compile(mod, target=target), data)
    pipeline = topi_int8.pipeline(target, layout="NHWC") if engine.kept else None
    chosen = {"relax_pipeline": pipeline} if pipeline is not None else {}
    return _Network(tvm.compile(mod, target=target, **chosen), data)


def load(folder: Path, batch: int) -> Callable[[], None]:
    """Return one run of an exported network."""
    module = tvm.runtime.load_module(str(folder / _LIBRARY))
    machine = relax.VirtualMachine(module, tvm.cpu())
    data = np.zeros((batch, 3, _IMAGE, _IMAGE), "float32")
    machine.set_input("main", tvm.runtime.tensor(data))

    def run() -> None:
        machine.invoke_stateful("main")

    return run


if __name__ == "__main__":
    serve(build, load)
