"""Runs a whole network by another engine: ``python -m bench.rivals.network_worker NAME``.

Answers requests (`bench.worker`) in the interpreter that has the engine, which need not have TVM.
`bench.rivals.networks` asks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.timing import evaluator_sampler
from bench.worker import memory_status, serve

INPUT, OUTPUT, BATCH = "x", "y", "batch"  # names in the ONNX file


class Engine(Protocol):
    """An engine of whole networks."""

    version: str

    def quantize(self, source: Path, images: np.ndarray, target: Path) -> None:
        """Write the int8 form, calibrated on float32 images (N, 3, H, W) one by one."""
        ...

    def load(self, path: Path, data: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
        """Return one run on `data`, float32 (batch, 3, H, W), which gives its logits.

        It may read `data` in place: the caller keeps the array.
        """
        ...


class OpenVino:
    """OpenVINO: int8 by NNCF's post-training quantization, the latency hint."""

    def __init__(self) -> None:
        # It would report its use over the network, from forks that outlive this process. What
        # cannot be imported is left out.
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        import openvino

        self._openvino = openvino
        self.version = f"OpenVINO {openvino.__version__.split('-')[0]}"

    def quantize(self, source: Path, images: np.ndarray, target: Path) -> None:
        """See `Engine`."""
        import nncf

        model = self._openvino.Core().read_model(source)
        model.reshape([1, *images.shape[1:]])
        quantized = nncf.quantize(
            model, nncf.Dataset([image[None] for image in images]), subset_size=len(images),
            preset=nncf.QuantizationPreset.PERFORMANCE,
        )  # fmt: skip
        self._openvino.save_model(quantized, target)

    def load(self, path: Path, data: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
        """See `Engine`."""
        core = self._openvino.Core()
        model = core.read_model(path)
        model.reshape(list(data.shape))
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            # Who started this process has pinned it.
            "ENABLE_CPU_PINNING": False,
            # Its default where there is AMX is bfloat16 for what is left in float.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        request.set_input_tensor(self._openvino.Tensor(data, shared_memory=True))

        def run() -> np.ndarray:
            request.infer()
            return request.get_output_tensor().data

        return run


class OnnxRuntime:
    """onnxruntime: static QDQ quantization, uint8 activations and int8 weights by channel."""

    def __init__(self) -> None:
        import onnxruntime

        self._onnxruntime = onnxruntime
        self.version = f"onnxruntime {onnxruntime.__version__}"

    def quantize(
        self, source: Path, images: np.ndarray, target: Path, form: str = "QDQ"
    ) -> None:
        """See `Engine`; `form` is onnxruntime's QuantFormat, QDQ or QOperator."""
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Images(quantization.CalibrationDataReader):
            def __init__(self) -> None:
                self._left = iter(images)

            def get_next(self) -> dict[str, np.ndarray] | None:
                image = next(self._left, None)
                return None if image is None else {INPUT: image[None]}

        prepared = target.with_suffix(".prepared.onnx")
        quant_pre_process(source, prepared)
        quantization.quantize_static(
            prepared, target, Images(), quant_format=quantization.QuantFormat[form],
            per_channel=True, activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )  # fmt: skip

    def outputs(self, path: Path, inputs: np.ndarray, level: str) -> np.ndarray:
        """Return the network's outputs for inputs one by one, at an optimisation level of
        onnxruntime's, as ORT_DISABLE_ALL.
        """
        options = self._onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = getattr(
            self._onnxruntime.GraphOptimizationLevel, level
        )
        session = self._onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        return np.concatenate([session.run(None, {INPUT: x[None]})[0] for x in inputs])

    def load(self, path: Path, data: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
        """See `Engine`."""
        options = self._onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_free_dimension_override_by_name(BATCH, len(data))
        session = self._onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        binding.bind_cpu_input(INPUT, data)
        binding.bind_output(OUTPUT)

        def run() -> np.ndarray:
            session.run_with_iobinding(binding)
            return binding.get_outputs()[0].numpy()

        return run


class Torch:
    """PyTorch: eager float32, channels last, which its convolutions run fastest in."""

    def __init__(self) -> None:
        import torch

        from topi_int8.frontend.torchvision import import_torchvision

        import_torchvision()  # the classes of the networks
        self._torch = torch
        self.version = f"torch {torch.__version__}"

    def quantize(self, source: Path, images: np.ndarray, target: Path) -> None:
        """Refuse: it is the float32 beside the others."""
        raise ValueError("engine is torch; allowed for int8: openvino, ort")

    def load(self, path: Path, data: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
        """See `Engine`."""
        torch = self._torch
        torch.set_num_threads(threads)
        # A file that the asking process has just written.
        module = torch.load(path, weights_only=False).to(memory_format=torch.channels_last)
        x = torch.from_numpy(data).contiguous(memory_format=torch.channels_last)

        def run() -> np.ndarray:
            with torch.inference_mode():
                return module(x).numpy()

        return run


ENGINES: Mapping[str, Callable[[], Engine]] = {
    "openvino": OpenVino,
    "ort": OnnxRuntime,
    "torch": Torch,
}


class Handler:
    """What the worker of an engine can be asked.

    Parameters
    ----------
    make : callable
        Returns the engine; called at the first request, so that what it lacks is an answer.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._engine: Engine | None = None
        # Each run with the array that it reads.
        self._runs: dict[str, tuple[Callable[[], np.ndarray], np.ndarray]] = {}

    def version(self) -> str:
        """Return the engine's name and version."""
        if self._engine is None:
            self._engine = self._make()
        return self._engine.version

    def quantize(self, source: str, images: str, target: str, **options: Any) -> None:
        """Write a network's int8 form; `images` is an .npy file, options are the engine's own."""
        self.version()
        self._engine.quantize(Path(source), np.load(images), Path(target), **options)

    def outputs(self, path: str, data: str, target: str, level: str) -> None:
        """Write onnxruntime's outputs, an .npy file, for an .npy file of inputs."""
        self.version()
        np.save(target, self._engine.outputs(Path(path), np.load(data), level))

    def load(self, key: str, path: str, data: str, threads: int) -> list[list[float]]:
        """Load a network for an .npy file of input, run it once, and return its logits."""
        self.version()
        images = np.load(data)
        run = self._engine.load(Path(path), images, threads)
        logits = run().tolist()
        self._runs[key] = run, images
        return logits

    def drop(self, key: str) -> None:
        """Forget a network."""
        self._runs.pop(key, None)

    def sample(self, key: str, seconds: float) -> list[float]:
        """Return microseconds of runs that take about `seconds` together."""
        run, _ = self._runs[key]

        def evaluate(number: int, repeat: int) -> list[float]:
            means = []
            for _ in range(repeat):
                start = time.perf_counter()
                for _ in range(number):
                    run()
                means.append((time.perf_counter() - start) / number)
            return means

        return evaluator_sampler(evaluate)(seconds)

    def memory(self, path: str, data: str, threads: int) -> dict[str, int]:
        """Return, of a fresh process, resident bytes before a network is loaded, and their peak."""
        self.version()
        images = np.load(data)
        before = memory_status("VmRSS")
        self._engine.load(Path(path), images, threads)()
        return {"before": before, "peak": memory_status("VmHWM")}


def main(arguments: list[str]) -> Any:
    """Serve the engine that the command line names."""
    [name] = arguments
    serve(Handler(ENGINES[name]))


if __name__ == "__main__":
    main(sys.argv[1:])
