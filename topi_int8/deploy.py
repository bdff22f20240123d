"""quantize_model and deploy_quantized_model: two calls from a model to what runs.

The shape that int8 quantization in TVM was first proposed in (2018): a module with its parameters
apart, a data set, and two methods of calibration. `quantize` and ``tvm.compile`` do the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.target import Target

from .quantize import OBSERVERS, quantize
from .transform.pipeline import pipeline

# Calibration -> `quantize`'s method.
_CALIBRATIONS = {"naive": "minmax", "kl": "kl"}


def quantize_model(
    mod: tvm.IRModule,
    params: Mapping[str, Any] | None,
    dataset: Iterable[Any],
    calibration: str = "naive",
    **options: Any,
) -> tvm.IRModule:
    """Return an fp32 Relax module, its parameters bound, as a QDQ one.

    Parameters
    ----------
    mod : tvm.IRModule
        With a float32 ``main``. Left alone.
    params : mapping of str to array, or None
        Parameters of ``main`` that are constants: numpy arrays or TVM tensors by name. Those that
        are bound already are in the module.
    dataset : iterable
        Representative inputs for the other parameters, as `quantize`'s ``calibration``.
    calibration : str
        How the ranges of activations are found: "naive", the smallest and largest value seen; or
        "kl", by least Kullback-Leibler divergence.
    **options
        Of `quantize`.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is allowed; the message names it.
    """
    method = _CALIBRATIONS.get(calibration)
    usable = [name for name, observer in _CALIBRATIONS.items() if observer in OBSERVERS]
    if method not in OBSERVERS:
        why = "" if method is None else f" (this version has no observer {method!r})"
        raise ValueError(f"calibration is {calibration!r}; allowed: {', '.join(usable)}{why}")
    if "method" in options:
        raise TypeError("method is given; allowed: calibration, which says it here")
    return quantize(_bound(mod, params or {}), dataset, method=method, **options)


def _bound(mod: tvm.IRModule, params: Mapping[str, Any]) -> tvm.IRModule:
    """Return the module with parameters of ``main`` bound to constants."""
    if not params:
        return mod
    if not isinstance(mod, tvm.IRModule):
        raise TypeError(f"mod is {type(mod).__name__}; allowed: a tvm.IRModule")
    declared = {param.name: param.ty for param in mod["main"].params}
    unknown = sorted(set(params) - set(declared))
    if unknown:
        raise ValueError(f"params has {unknown}; allowed: {list(declared)}")
    arrays = {
        name: np.ascontiguousarray(
            value.numpy() if hasattr(value, "numpy") else value, str(declared[name].dtype)
        )
        for name, value in params.items()
    }
    return relax.transform.BindParams("main", arrays)(mod)


def deploy_quantized_model(
    mod: tvm.IRModule, target: Target | str | dict[str, Any]
) -> relax.VMExecutable:
    """Compile a module by this package's pipeline, whether the override is enabled or not.

    Parameters
    ----------
    mod : tvm.IRModule
        What `quantize_model` returned.
    target : Target or str or dict
        An ``llvm`` CPU target: `host_target()`, ``target("rpi4")``, ..

    Returns
    -------
    relax.VMExecutable
        For ``relax.VirtualMachine(executable, tvm.cpu())``, or its ``export_library``.
    """
    return tvm.compile(mod, target, relax_pipeline=pipeline(target))
