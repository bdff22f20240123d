"""Files as the inputs of a network: pictures, .npy and .npz, into arrays of its shapes."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from . import images
from .images import Preprocessing
from .signature import TensorInfo

Chooser = Callable[[TensorInfo], Preprocessing]
_ARRAYS = (".npy", ".npz")


def calibration(source: Path, inputs: Sequence[TensorInfo], choose: Chooser) -> list[tuple]:
    """Return what a source holds, as the tuples of arrays that `topi_int8.quantize` takes.

    Parameters
    ----------
    source : Path
        A folder of pictures or of .npy files, in the order of their names; one .npy file, its first
        axis the samples; or an .npz file of such arrays by the inputs' names.
    inputs : sequence of TensorInfo
        The network's. More than one need an .npz file.
    choose : callable
        Gives the preprocessing of an input; asked for pictures only.

    Raises
    ------
    FileNotFoundError, ValueError
        There is nothing, or something that does not fit.
    """
    columns = _columns(source, inputs, choose)
    counts = {len(column) for column in columns}
    if len(counts) != 1:
        raise ValueError(f"{source} has {sorted(counts)} samples for its inputs; allowed: as many "
                         "for each")  # fmt: skip
    return list(zip(*columns, strict=True))


def _columns(
    source: Path, inputs: Sequence[TensorInfo], choose: Chooser
) -> list[list[np.ndarray]]:
    """Return, for each input, its arrays."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; allowed: a folder, .npy or .npz")
    if source.suffix == ".npz":
        return [_batches(_named(source, info.name), info, str(source)) for info in inputs]
    if len(inputs) != 1:
        names = ", ".join(info.name for info in inputs)
        raise ValueError(f"{source} is for one input; allowed: an .npz with {names}")
    (info,) = inputs
    if source.is_file():
        return [_batches(_array(source), info, str(source))]
    files = sorted(path for path in source.iterdir() if _kind(path))
    kinds = sorted({_kind(path) for path in files})
    if len(kinds) != 1:
        raise ValueError(
            f"{source} is a folder with {' and '.join(kinds) or 'none'}; allowed: pictures "
            f"({', '.join(images.SUFFIXES)}) or .npy files, one kind"
        )
    if kinds == ["pictures"]:
        prepare = choose(info)
        rows = np.stack([prepare.read(path) for path in files])
        return [_batches(rows, info, str(source))]
    return [[batch for path in files for batch in _batches(_array(path), info, str(path))]]


def one(paths: Sequence[Path], inputs: Sequence[TensorInfo], choose: Chooser) -> list[np.ndarray]:
    """Return the arrays of one run: a file for each input, or one .npz for all.

    Raises
    ------
    FileNotFoundError, ValueError
        There is nothing, or something that does not fit.
    """
    if len(paths) == 1 and paths[0].suffix == ".npz":
        return [_single(_named(paths[0], info.name), info, str(paths[0])) for info in inputs]
    if len(paths) != len(inputs):
        names = ", ".join(map(str, inputs))
        raise ValueError(f"input is given {len(paths)} times; allowed: {len(inputs)} ({names})")
    return [_read(path, info, choose) for path, info in zip(paths, inputs, strict=True)]


def _read(path: Path, info: TensorInfo, choose: Chooser) -> np.ndarray:
    kind = _kind(path)
    if not kind:
        allowed = ", ".join((*images.SUFFIXES, *_ARRAYS))
        raise ValueError(f"input is {str(path)!r}; allowed: {allowed}")
    if not path.exists():
        raise FileNotFoundError(f"input is {str(path)!r}, which does not exist")
    if kind == "arrays":
        return _single(_array(path), info, str(path))
    row = choose(info).read(path)[None]
    if info.dtype != "float32":
        if info.quantization is None:
            raise ValueError(f"{path} is a picture, and {info} has no scale; give .npy instead")
        row = info.quantization.quantize(row)
    return _single(row, info, str(path))


def _kind(path: Path) -> str:
    """Return "pictures" or "arrays" by a file's suffix, "" for another."""
    suffix = path.suffix.lower()
    return "pictures" if suffix in images.SUFFIXES else "arrays" if suffix in _ARRAYS else ""


def _array(path: Path) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array file of numpy: {error}") from None
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{path} is an .npz in the place of an .npy")
    return found


def _named(path: Path, name: str) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not zipfile.is_zipfile(path):  # numpy would take it for a pickle
        raise ValueError(f"{path} is no .npz of numpy")
    with np.load(path, allow_pickle=False) as found:
        if name not in found:
            raise ValueError(f"{path} has {', '.join(found.files)}; allowed: with {name}")
        return found[name]


def _single(array: np.ndarray, info: TensorInfo, where: str) -> np.ndarray:
    """Return an array as an input; one sample may come without its batch axis."""
    array = _of_type(array, info, where)
    if array.ndim == len(info.shape) - 1:
        array = array[None]
    try:
        return info.accept(array)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _of_type(array: np.ndarray, info: TensorInfo, where: str) -> np.ndarray:
    """Return an array in the input's type; float64 becomes float32, nothing else is converted."""
    if str(array.dtype) == info.dtype:
        return array
    if array.dtype.kind == "f" and info.dtype.startswith("float"):
        return array.astype(info.dtype)
    raise ValueError(
        f"{where} is {array.dtype}; allowed: {info.dtype}, the array as the network takes it "
        "(--mean and --std are for pictures)"
    )


def _batches(rows: np.ndarray, info: TensorInfo, where: str) -> list[np.ndarray]:
    """Return samples in the batches that an input takes; the last is filled up from the start."""
    rows = _of_type(rows, info, where)
    if rows.ndim == len(info.shape) - 1:
        rows = rows[None]
    if rows.ndim != len(info.shape) or not len(rows):
        raise ValueError(f"{where} has shape {rows.shape}; allowed: samples of {info}")
    batch = info.shape[0] if isinstance(info.shape[0], int) else 1
    count = -(-len(rows) // batch) * batch
    rows = rows[np.arange(count) % len(rows)]
    found = [rows[i : i + batch] for i in range(0, count, batch)]
    for array in found:
        _single(array, info, where)
    return found
