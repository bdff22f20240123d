"""A model file of any kind that we read, as a Relax module, and a module as a file of TVM's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import tvm
from tvm import ir

from ..signature import OUTPUT_NAMES

if TYPE_CHECKING:
    import onnx

Shapes = Mapping[str, tuple[int, ...]]


def read_model(path: Path, shapes: Shapes | None = None) -> tvm.IRModule:
    """Return the model of a file, its parameters bound as constants.

    Parameters
    ----------
    path : Path
        ``.onnx``; ``.json``, a Relax module as `write_module` saves it; or ``.pt2``, a program that
        ``torch.export.save`` wrote.
    shapes : mapping of str to tuple of int, optional
        Of inputs whose dimensions an ONNX model leaves open.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ImportError
        What reads it is not installed.
    ValueError
        It is of another kind, broken, or has an operator that no importer knows.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"model is {str(path)!r}; allowed: {', '.join(_READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"model is {str(path)!r}, which is no file")
    return reader(path, dict(shapes or {}))


def load_onnx(path: Path) -> onnx.ModelProto:
    """Return an ONNX model with its external data."""
    try:
        import onnx
    except ImportError as error:
        raise ImportError(f"{path} needs onnx: pip install 'topi_int8[onnx]'") from error
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's, which onnx does not name
        raise ValueError(f"model is {str(path)!r}, which onnx does not read: {error}") from None


def import_onnx(model: onnx.ModelProto, shapes: Shapes | None = None) -> tvm.IRModule:
    """Return an ONNX model as a Relax module: the one place that chooses the importer.

    Raises
    ------
    ValueError
        For shapes of no input, or operators without a converter.
    """
    from .onnx import from_onnx

    graph = model.graph
    parameters = {tensor.name for tensor in graph.initializer}
    names = [entry.name for entry in graph.input if entry.name not in parameters]
    for name in shapes or {}:
        if name not in names:
            raise ValueError(f"shape is given for {name!r}; allowed: {', '.join(names)}")
    try:
        mod = from_onnx(model, shapes)
    except tvm.error.OpNotImplemented as error:
        raise ValueError(f"model has operators without an importer: {error}") from None
    return _with_names(mod, [entry.name for entry in graph.output])


def _with_names(mod: tvm.IRModule, outputs: list[str]) -> tvm.IRModule:
    new = mod.clone()
    new[mod.get_global_var("main")] = mod["main"].with_attr(OUTPUT_NAMES, outputs)
    return new


def _read_onnx(path: Path, shapes: Shapes) -> tvm.IRModule:
    return import_onnx(load_onnx(path), shapes)


def _read_module(path: Path, shapes: Shapes) -> tvm.IRModule:
    _refuse_shapes(path, shapes)
    try:
        mod = ir.load_json(path.read_text(encoding="utf-8"))
    except Exception as error:  # of many kinds, down to a TypeError
        raise ValueError(
            f"model is {str(path)!r}, which TVM {tvm.__version__} does not load: {error}"
        ) from None
    if not isinstance(mod, tvm.IRModule):
        raise ValueError(f"model is {str(path)!r}, a {type(mod).__name__}; allowed: an IRModule")
    return mod


def _read_program(path: Path, shapes: Shapes) -> tvm.IRModule:
    _refuse_shapes(path, shapes)
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path} needs torch: pip install 'topi_int8[torch]'") from error
    from .pt2e import register_operators
    from .torch import from_torch

    register_operators()
    try:
        program = torch.export.load(path)
    except Exception as error:  # of many kinds, by what is wrong with the archive
        raise ValueError(
            f"model is {str(path)!r}, which torch.export.load does not read: {error}"
        ) from None
    try:
        mod = from_torch(program)
    except NotImplementedError as error:
        raise ValueError(f"model is {str(path)!r}: {error}") from None
    return _with_names(mod, [str(name) for name in program.graph_signature.user_outputs])


def _refuse_shapes(path: Path, shapes: Shapes) -> None:
    if shapes:
        raise ValueError(f"shape is given for {str(path)!r}; allowed: for .onnx only")


_READERS: Mapping[str, Callable[[Path, Shapes], tvm.IRModule]] = {
    ".onnx": _read_onnx, ".json": _read_module, ".pt2": _read_program,
}  # fmt: skip


def write_module(mod: tvm.IRModule, path: Path) -> None:
    """Write a Relax module as TVM's own JSON, which `read_model` and ``tvm.ir.load_json`` load."""
    text = ir.save_json(mod)
    path.write_text(text, encoding="utf-8")
