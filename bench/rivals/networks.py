"""Other engines on whole networks: OpenVINO and onnxruntime in int8, PyTorch in float32.

Each runs in a process of its own (`network_worker`), stopped while others are timed, on the cores
and with the threads that ours has. The first two live in a Python of their own, for their packages
must not disturb ours: ``make openvino`` (``python -m bench.rivals.networks``) makes it in
build/openvino.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from topi_int8.target import host_target

from ..targets import isa_of
from ..timing import Sampler
from ..worker import ROOT, Worker, WorkerError
from . import Unavailable
from .network_worker import BATCH, INPUT, OUTPUT
from .onednn import MAX_CPU_ISA

if TYPE_CHECKING:
    import torch

PYTHON = "TOPI_INT8_OPENVINO_PYTHON"  # the environment's variable
VENV = ROOT / "build" / "openvino"
PACKAGES = (
    "openvino==2026.4.1", "nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.32.0",
    "sympy",  # of onnxruntime's quantization, which does not name it
)  # fmt: skip
_OPSET = 13  # the first with quantization by channel


def setup(venv: Path = VENV) -> Path:
    """Make the virtual environment of OpenVINO and onnxruntime; return its interpreter.

    Raises
    ------
    RuntimeError
        With the failing command's last words.
    """
    python = venv / "bin" / "python"
    commands = [] if python.exists() else [(sys.executable, "-m", "venv", str(venv))]
    commands.append((
        str(python), "-m", "pip", "install", "--quiet", "--no-input",
        "--disable-pip-version-check", *PACKAGES,
    ))  # fmt: skip
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command[:4])} ...: {done.stderr.strip()[-800:]}")
    return python


def openvino_python() -> str:
    """Return the interpreter that has OpenVINO and onnxruntime.

    Raises
    ------
    Unavailable
        When there is none.
    """
    path = Path(os.environ.get(PYTHON) or VENV / "bin" / "python")
    if not path.exists():
        raise Unavailable("not installed; make openvino")
    return str(path)


@dataclass(frozen=True)
class NetworkRival:
    """An engine of whole networks.

    Parameters
    ----------
    name : str
        A key of `network_worker.ENGINES`.
    title : str
    python : callable
        Returns its interpreter, or raises `Unavailable`.
    int8 : bool
        Whether it is given the quantized network.
    suffix : str
        Of the file it loads.
    held : bool
        Whether ONEDNN_MAX_CPU_ISA holds it to an instruction set.
    """

    name: str
    title: str
    python: Callable[[], str]
    int8: bool
    suffix: str
    held: bool = True

    def start(self, isa: str = "") -> Worker:
        """Start its worker, held to the instruction set of that name unless it is empty or this
        machine's own.

        Raises
        ------
        Unavailable
            When its interpreter, or the engine in it, is not there, or cannot be held.
        """
        env = {}
        if isa and isa != isa_of(host_target()):
            if not self.held:
                raise Unavailable(f"cannot be held to {isa}")
            env["ONEDNN_MAX_CPU_ISA"] = MAX_CPU_ISA[isa]
        worker = Worker([self.python(), "-m", "bench.rivals.network_worker", self.name], env)
        try:
            worker.ask("version")
        except WorkerError as error:
            worker.close()
            raise Unavailable(f"does not start: {error}") from None
        return worker


NETWORK_RIVALS = {
    rival.name: rival
    for rival in (
        NetworkRival("openvino", "OpenVINO int8", openvino_python, True, ".xml"),
        NetworkRival("ort", "onnxruntime int8", openvino_python, True, ".onnx", held=False),
        NetworkRival("torch", "torch fp32", lambda: sys.executable, False, ".pt"),
    )
}


class NetworkFiles:
    """One network in the forms that the rivals read, each written when it is first asked for.

    Parameters
    ----------
    folder : Path
        Files there that an earlier call wrote are taken as they are.
    name : str
        Of the network: with the seeded weights of `bench.models` it says all of it.
    module : torch.nn.Module
    example : torch.Tensor
    calibration : sequence of ndarray
        What int8 is calibrated on.
    """

    def __init__(
        self, folder: Path, name: str, module: torch.nn.Module, example: torch.Tensor,
        calibration: list[np.ndarray],
    ) -> None:  # fmt: skip
        image = "x".join(map(str, example.shape[2:]))
        self._stem = folder / f"{name}-{image}"
        self._module, self._example, self._calibration = module, example, calibration

    def path(self, ending: str) -> Path:
        """Return the path of one of its files."""
        # Not with_suffix: names of networks have dots.
        return self._stem.with_name(self._stem.name + ending)

    def onnx(self) -> Path:
        """Return the float32 network in ONNX; its batch is symbolic."""
        import torch

        path = self.path(".fp32.onnx")
        if not path.exists():
            with warnings.catch_warnings():
                # That the TorchScript exporter is the old one; the new one writes another opset.
                warnings.simplefilter("ignore", DeprecationWarning)
                torch.onnx.export(
                    self._module, (self._example[:1],), path, input_names=[INPUT],
                    output_names=[OUTPUT], dynamic_axes={INPUT: {0: BATCH}, OUTPUT: {0: BATCH}},
                    opset_version=_OPSET, dynamo=False,
                )  # fmt: skip
        return path

    def torch(self) -> Path:
        """Return the module, pickled."""
        import torch

        path = self.path(".pt")
        if not path.exists():
            torch.save(self._module, path)
        return path

    def array(self, ending: str, array: np.ndarray) -> Path:
        """Return a file of an array."""
        path = self.path(ending)
        np.save(path, array)
        return path

    def model(self, rival: NetworkRival, worker: Worker) -> Path:
        """Return what a rival loads.

        Raises
        ------
        WorkerError
            When it cannot quantize the network.
        """
        if not rival.int8:
            return self.torch()
        path = self.path(f".{rival.name}{rival.suffix}")
        if not path.exists():
            images = self.array(".calibration.npy", np.concatenate(self._calibration))
            worker.ask(
                "quantize", source=str(self.onnx()), images=str(images), target=str(path)
            )
        return path


@dataclass(frozen=True)
class Prepared:
    """A rival with a network loaded.

    Attributes
    ----------
    sampler : Sampler
    logits : ndarray
        Of the input it was loaded for.
    version : str
    close : callable
        Ends its process.
    """

    sampler: Sampler
    logits: np.ndarray
    version: str
    close: Callable[[], None]


def prepare(
    rival: NetworkRival, files: NetworkFiles, data: np.ndarray, threads: int, isa: str = ""
) -> Prepared:
    """Start a rival on an input, float32 (batch, 3, H, W), held to `isa` (see `NetworkRival`).

    Raises
    ------
    Unavailable
        With the reason.
    """
    worker = rival.start(isa)
    try:
        version = worker.ask("version")
        path = files.model(rival, worker)
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            np.save(file.name, data)
            logits = worker.ask(
                "load", key=rival.name, path=str(path), data=file.name, threads=threads
            )
    except WorkerError as error:
        worker.close()
        raise Unavailable(str(error)) from None
    except BaseException:
        worker.close()
        raise
    worker.stop()
    return Prepared(
        worker.sampler(rival.name), np.array(logits, "float32"), version, worker.close
    )


if __name__ == "__main__":
    try:
        print(f"OpenVINO and onnxruntime: {setup()}")
    except (OSError, RuntimeError) as failure:
        sys.exit(f"OpenVINO could not be set up: {failure}")
