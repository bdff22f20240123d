"""save: compile a module into a library that says what it is, for `topi_int8.load`."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import tvm
from tvm import ir, relax
from tvm.target import Target
from tvm_ffi.structural import structural_hash

from . import _version, artifact, cross, isa_check
from .export import export
from .op import op_name
from .qparams import QParams
from .quantize.graph import constant
from .signature import OUTPUT_NAMES, TensorInfo
from .target import features
from .transform.pipeline import pipeline
from .workload import INT8_DTYPES


def save(
    mod: tvm.IRModule,
    target: Target | str | dict[str, Any],
    library: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    layout: str = "NCHWc",
    cc: str = "",
) -> dict[str, Any]:
    """Compile a module and write a library that `topi_int8.load` runs.

    It is `export_library`'s, with metadata in it: the target and what it needs of a CPU, versions,
    inputs and outputs with their quantization. TVM's own loaders take it as any other; the metadata
    is what the VM's function "topi_int8_metadata" returns.

    Parameters
    ----------
    mod : IRModule
        What `tvm.compile` takes: Relax, fp32, QDQ or raw integer, with constant parameters.
    target : Target or str or dict
        An ``llvm`` CPU target, another machine's too.
    library : path
        Of the shared library, overwritten.
    weights : path, optional
        Of a folder for its weights, as `topi_int8.export` writes it: held once, not four times.
        `load` looks for it where it lies as seen from the library.
    layout : str
        Of `pipeline`.
    cc : str
        The C compiler that links, with arguments. Default: this machine's, or the cross compiler.

    Returns
    -------
    dict
        The metadata.

    Raises
    ------
    ValueError
        For a target or layout that `pipeline` refuses, a folder of something else, or where no
        compiler links for the target.
    topi_int8.cross.LinkError
        With the linker's words.
    """
    target = target if isinstance(target, Target) else Target(target)
    feats = features(target)
    library = Path(library)
    command = cross.find(target, cc)
    metadata: dict[str, Any] = {
        artifact.MARK: artifact.FORMAT,
        "topi_int8": _version.__version__,
        "tvm": tvm.__version__,
        "target": str(target),
        "arch": feats.arch,
        "isa": feats.isas[0],
        "needs": list(isa_check.needed(feats)),
        "layout": layout,
        "inputs": [info.to_dict() for info in inputs_of(mod)],
        "outputs": [info.to_dict() for info in outputs_of(mod)],
        "weights": None,
    }
    if weights is not None:
        folder = os.path.relpath(weights, library.parent)
        metadata["weights"] = {"folder": folder, "id": _identity(mod, target, layout)}
    mod = _with_metadata(mod, metadata)
    fcompile = cross.linker(command)
    if weights is None:
        executable = tvm.compile(mod, target, relax_pipeline=pipeline(target, layout))
        executable.export_library(str(library), fcompile=fcompile)
    else:
        export(mod, target, library, weights, layout, fcompile=fcompile)
        text = json.dumps({"id": metadata["weights"]["id"]})
        (Path(weights) / artifact.WEIGHTS_ID).write_text(text, encoding="utf-8")
    return metadata


def _identity(mod: tvm.IRModule, target: Target, layout: str) -> str:
    """Return a digest of all that decides a library's weights."""
    text = f"{structural_hash(mod)} {target} {layout} {_version.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _with_metadata(mod: tvm.IRModule, metadata: dict[str, Any]) -> tvm.IRModule:
    """Return the module with a function that returns the metadata."""
    text = json.dumps(metadata) + "\n"
    result = ir.StringImm(text)
    told = relax.Function([], relax.SeqExpr([], result), relax.ObjectType())
    new = mod.clone()
    new[artifact.FUNCTION] = told.with_attr("global_symbol", artifact.FUNCTION)
    return new


# ---------------------------------------------------------------- what goes in and comes out


def inputs_of(mod: tvm.IRModule) -> tuple[TensorInfo, ...]:
    """Return the parameters of ``main``."""
    func, values = _main(mod)
    readers: dict[relax.Var, list[relax.Call]] = {}
    for value in values.values():
        if op_name(value) in ("relax.quantize", "relax.dequantize"):
            readers.setdefault(value.args[0], []).append(value)
    infos = []
    for param in func.params:
        found = {_qparams(call) for call in readers.get(param, ())}
        infos.append(_info(param.name, param.ty, found.pop() if len(found) == 1 else None))
    return tuple(infos)


def outputs_of(mod: tvm.IRModule) -> tuple[TensorInfo, ...]:
    """Return the results of ``main``, tuples flattened, by the names the model has for them."""
    func, values = _main(mod)
    results = _flat(func.body.body, values)
    names = list(map(str, (func.attrs or {}).get(OUTPUT_NAMES, ())))
    if len(names) != len(results):
        names = [f"output_{i}" for i in range(len(results))]
    return tuple(
        _info(name, ty, _qparams(value)) for name, (value, ty) in zip(names, results, strict=True)
    )


def _main(mod: tvm.IRModule) -> tuple[relax.Function, dict[relax.Var, relax.Expr]]:
    names = [var.name_hint for var in mod.get_global_vars()]
    if "main" not in names or not isinstance(mod["main"], relax.Function):
        raise ValueError(f"mod has the functions {names}; allowed: a Relax function 'main'")
    func = relax.transform.Normalize()(mod)["main"]
    blocks = func.body.blocks
    return func, {b.var: b.value for block in blocks for b in block.bindings}


def _flat(expr: Any, values: dict[relax.Var, relax.Expr]) -> list[tuple[Any, Any]]:
    """Return (what a result is computed by, its type) for each tensor of a result."""
    value = expr
    while isinstance(value, relax.Var) and value in values:
        value = values[value]
    if isinstance(value, relax.Tuple):
        return [found for field in value.fields for found in _flat(field, values)]
    if isinstance(expr.ty, relax.TupleType):
        return [(None, ty) for ty in expr.ty.fields]
    return [(value, expr.ty)]


def _info(name: str, ty: Any, quantization: QParams | None) -> TensorInfo:
    if not isinstance(ty, relax.TensorType) or ty.shape is None:
        raise ValueError(f"{name} is {ty}; allowed: a tensor whose rank is known")
    shape = tuple(int(dim.value) if hasattr(dim, "value") else str(dim) for dim in ty.shape)
    return TensorInfo(name, shape, str(ty.dtype), quantization)


def _qparams(value: Any) -> QParams | None:
    """Return the parameters of a quantize or dequantize by one scale; None for anything else."""
    if op_name(value) not in ("relax.quantize", "relax.dequantize"):
        return None
    scale, zero_point = value.args[1:]
    integers = value if op_name(value) == "relax.quantize" else value.args[0]
    dtype = str(integers.ty.dtype)
    constants = [constant(scale), constant(zero_point)]
    if dtype not in INT8_DTYPES or any(c is None or c.size != 1 for c in constants):
        return None
    return QParams(float(constants[0].item()), int(constants[1].item()), dtype)
