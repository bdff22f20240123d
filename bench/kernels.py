"""Our kernel of a workload: chosen, compiled, given operands, checked, timed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm.target import Target

from topi_int8.workload import Conv2dWorkload, with_known_bounds

from .place import HERE, Place
from .timing import Sampler, evaluator_sampler
from .workloads import Operands, Workload, random_operands, shapes_of


@dataclass(frozen=True)
class OurKernel:
    """A compiled kernel with its operands in place.

    Attributes
    ----------
    strategy, intrinsic : str
        What was chosen; the intrinsic is empty where there is none.
    declined : tuple of (str, str)
        The strategies before it and why they said no.
    """

    workload: Workload
    operands: Operands
    strategy: str
    intrinsic: str
    declined: tuple[tuple[str, str], ...]
    _kernel: Any
    _module: Any
    _place: Place
    _args: tuple[Any, ...]

    def sampler(self) -> Sampler:
        """Return the sampler of this kernel, operands warm in cache."""
        device = self._place.device

        def evaluate(number: int, repeat: int) -> list[float]:
            timer = self._module.time_evaluator("main", device, number=number, repeat=repeat)
            return list(timer(*self._args).results)

        return evaluator_sampler(evaluate)

    def call(self) -> None:
        """Run the kernel once."""
        self._module["main"](*self._args)

    def run(self) -> np.ndarray:
        """Return the output in logical form: NCHW, or (B, M, N)."""
        self.call()
        out = self._args[-1].numpy()
        _, _, out_shape, channels = shapes_of(self.workload)
        layout = getattr(self._kernel, "out_layout", None)
        if layout is not None and isinstance(self.workload, Conv2dWorkload):
            out = layout.unpack(out, channels)
        return out.reshape(out_shape)

    def check(self) -> None:
        """Compare one run with the numpy reference of the tests.

        Raises
        ------
        ValueError
            When int32 results differ at all, requantized ones by more than 1, or float ones by
            more than 1e-4 of the largest.
        RuntimeError
            Outside a checkout, where the reference is not installed.
        """
        try:
            reference = importlib.import_module("tests.reference")
        except ImportError:
            raise RuntimeError("--check needs tests/reference.py: run it in the checkout") from None
        name = "conv2d" if isinstance(self.workload, Conv2dWorkload) else "matmul"
        wanted = getattr(reference, name)(self.workload, **self.operands.__dict__)
        got = self.run()
        error = np.abs(got.astype("float64") - wanted.reshape(got.shape)).max()
        out_dtype = self.workload.epilogue.out_dtype
        allowed = {"int32": 0.0, "uint8": 1.0, "int8": 1.0}.get(out_dtype)
        if allowed is None:
            allowed = 1e-4 * max(1.0, float(np.abs(wanted).max()))
        if not error <= allowed:
            raise ValueError(f"differs from the reference by {error:g}; allowed: {allowed:g}")


def build(workload: Workload, target: Target, seed: int = 0, place: Place = HERE) -> OurKernel:
    """Choose, compile and set up the kernel of `workload` for `target`, at `place`."""
    # By name: the table of strategies imports every schedule, and only this needs it.
    strategy = importlib.import_module("topi_int8.strategy")
    conv = isinstance(workload, Conv2dWorkload)
    operands = random_operands(workload, seed)
    workload = with_known_bounds(workload, operands.weight, operands.bias, operands.scale)
    decision = (strategy.conv2d if conv else strategy.matmul)(workload, target)
    kernel = decision.kernel()
    func = kernel.func.with_attr("global_symbol", "main")
    executable = tvm.compile(tvm.IRModule({"main": func}), target=target)
    args = tuple(map(place.tensor, _arguments(func, kernel, workload, operands)))
    return OurKernel(
        workload=workload,
        operands=operands,
        strategy=decision.strategy,
        intrinsic=decision.intrinsic or "",
        declined=tuple(decision.declined),
        _kernel=kernel,
        _module=place.load(executable),
        _place=place,
        _args=args,
    )


def _arguments(func: Any, kernel: Any, workload: Workload, operands: Operands) -> list[np.ndarray]:
    """Return the kernel's operands: data, weight, [bias], [scale], [residual], out."""
    buffers = list(func.params)
    conv = isinstance(workload, Conv2dWorkload)
    weight = operands.weight
    arrays = [operands.data, kernel.pack_weight(weight)]
    # A zero point's compensation needs a bias even where the workload has none.
    bias = kernel.pack_bias(operands.bias, weight) if kernel.takes_bias else None
    scale = None if operands.scale is None else kernel.pack_scale(operands.scale)
    arrays += [array for array in (bias, scale, operands.residual) if array is not None]
    if conv:
        arrays[0] = kernel.data_layout.pack(arrays[0], workload.data_zero_point)
        if operands.residual is not None:
            arrays[-1] = kernel.out_layout.pack(arrays[-1])
    out = buffers[-1]
    arrays.append(np.zeros([int(dim) for dim in out.shape], str(out.dtype)))
    if len(arrays) != len(buffers):
        raise ValueError(f"kernel takes {len(buffers)} tensors; packing gave {len(arrays)}")
    return [_fit(array, buffer) for array, buffer in zip(arrays, buffers, strict=True)]


def _fit(array: np.ndarray, buffer: Any) -> np.ndarray:
    """Return `array` in the shape of `buffer`: broadcast dimensions of 1 come and go."""
    shape = tuple(int(dim) for dim in buffer.shape)
    if array.size != np.prod(shape) or str(buffer.dtype) != str(array.dtype):
        raise ValueError(
            f"{buffer.name} is {array.dtype}{list(array.shape)}; "
            f"the kernel takes {buffer.dtype}{list(shape)}"
        )
    return np.ascontiguousarray(array.reshape(shape))
