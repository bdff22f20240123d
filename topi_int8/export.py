"""export: a library and, beside it, its weights, to be loaded with little memory.

``export_library`` alone puts the weights into the library; loading that holds them four times
(`transform.detach_weights` says why). Apart from it, they are read in shards and held once.
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.contrib import tvmjs
from tvm.target import Target

from .transform.pipeline import pipeline

# A shard is read whole before its tensors are made of it. A larger tensor has one of its own.
_SHARD_MIB = 1
_INDEX, _SHARDS = "tensor-cache.json", "params_shard_*.bin"  # as `dump_tensor_cache` names them


def export(
    mod: tvm.IRModule,
    target: Target | str | dict[str, Any],
    library: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    layout: str = "NCHWc",
    **link: Any,
) -> relax.VMExecutable:
    """Compile a module and write its library and its weights, apart.

    The process that runs it loads the weights, too, by a function of TVM's own runtime::

        tvm.get_global_func("vm.builtin.tensor_cache.load")(weights, 1, 0)  # 1: kDLCPU
        vm = VirtualMachine(tvm.runtime.load_module(library), tvm.cpu())

    Parameters
    ----------
    mod : IRModule
        What `tvm.compile` takes.
    target : Target or str or dict
        An ``llvm`` CPU target.
    library : path
        Of the shared library, overwritten.
    weights : path
        Of a folder, made where there is none, which gets a tensor cache of TVM's format. A cache
        that is there is overwritten.
    layout : str
        Of `pipeline`.
    **link
        Of ``export_library``, as ``cc="aarch64-linux-gnu-g++"``.

    Returns
    -------
    relax.VMExecutable
        What was exported. It, too, runs only after the weights were loaded.

    Raises
    ------
    ValueError
        For a target or layout that `pipeline` refuses, or where `weights` is a folder of something
        else.
    """
    folder = Path(weights)
    if folder.exists() and not (folder / _INDEX).exists() and any(folder.iterdir()):
        raise ValueError(f"weights is {str(folder)!r}; allowed: a new folder, an empty one, or one "
                         f"that has {_INDEX}")  # fmt: skip
    detached: dict[str, tvm.runtime.Tensor] = {}
    executable = tvm.compile(mod, target, relax_pipeline=pipeline(target, layout, detached))
    executable.export_library(os.fspath(library), **link)
    for old in folder.glob(_SHARDS):
        old.unlink()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the name of each file
        tvmjs.dump_tensor_cache(
            detached, str(folder), encode_format="raw", shard_cap_mb=_SHARD_MIB,
            show_progress=False,
        )  # fmt: skip
    return executable
