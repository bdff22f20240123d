"""load: a library that `topi_int8.save` wrote, checked before its first instruction, then callable.

The library carries its metadata as a text among its constants: found in the file without loading
it, on whatever machine, and from any language as the result of the VM's function `FUNCTION`. That
text is one line of JSON whose first key is `MARK`.

Nothing here needs TVM's compiler.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine

from . import _host, isa_check
from .isa_check import WrongMachineError
from .signature import TensorInfo

FORMAT = 1
MARK = "topi_int8 artifact"
FUNCTION = "topi_int8_metadata"
WEIGHTS_ID = "topi_int8.json"  # in the folder of weights: whose they are
_END = "\n"
_CPU = 1  # kDLCPU


class Artifact:
    """A compiled network: ``artifact(*arrays)`` runs it.

    Attributes
    ----------
    path : Path
        The library.
    metadata : dict
        What `topi_int8.save` wrote: target, arch, isa, needs (LLVM features), versions, layout.
    inputs, outputs : tuple of TensorInfo
    """

    def __init__(self, path: Path, metadata: dict[str, Any], machine: VirtualMachine) -> None:
        self.path, self.metadata = path, metadata
        self.inputs, self.outputs = (
            tuple(TensorInfo.from_dict(entry) for entry in metadata[name])
            for name in ("inputs", "outputs")
        )
        self._machine = machine
        self._main = machine["main"]

    def __call__(self, *arrays: Any) -> np.ndarray | tuple[np.ndarray, ...]:
        """Run the network once.

        Parameters
        ----------
        *arrays : array_like
            One for each of `inputs`, of its shape and type.

        Returns
        -------
        numpy.ndarray or tuple of numpy.ndarray
            A tuple where `outputs` has several.

        Raises
        ------
        ValueError
            For another number of arrays, or another shape or type.
        """
        if len(arrays) != len(self.inputs):
            names = ", ".join(map(str, self.inputs))
            raise ValueError(f"arrays are {len(arrays)}; allowed: {len(self.inputs)} ({names})")
        given = [info.accept(value) for info, value in zip(self.inputs, arrays, strict=True)]
        result = self._main(*(tvm.runtime.tensor(array) for array in given))
        found = tuple(_arrays(result))
        return found[0] if len(self.outputs) == 1 else found

    def __repr__(self) -> str:
        sides = (", ".join(map(str, side)) for side in (self.inputs, self.outputs))
        return f"<{self.path.name} for {self.metadata['isa']}: {' -> '.join(sides)}>"


def _arrays(result: Any) -> list[np.ndarray]:
    """Return the tensors of a result, tuples of tuples flattened."""
    if hasattr(result, "numpy"):
        return [result.numpy()]
    return [array for part in result for array in _arrays(part)]


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a library without loading it: it may be another machine's.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It carries no metadata, or of a format that this version does not know.
    """
    path = Path(path)
    metadata = json.loads(_find_text(path))
    if metadata[MARK] != FORMAT:
        raise ValueError(
            f"path is {str(path)!r}, of format {metadata[MARK]!r} (topi_int8 "
            f"{metadata.get('topi_int8', '?')}); allowed: {FORMAT}. Compile it again."
        )
    return metadata


def _find_text(path: Path) -> bytes:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                start = content.find(f'{{"{MARK}": '.encode())
                end = content.find(_END.encode(), start)
                if 0 <= start < end:
                    return content[start:end]
    raise ValueError(
        f"path is {str(path)!r}, which carries no metadata; allowed: a library that topi_int8.save "
        "(topi-int8 compile) wrote"
    )


def load(
    path: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None
) -> Artifact:
    """Load a library that `topi_int8.save` wrote, if this machine can run it.

    Parameters
    ----------
    path : path
        Of the library.
    weights : path, optional
        Of its folder of weights, where it has one and that is no longer beside it.

    Raises
    ------
    FileNotFoundError
        Without the library, or its weights.
    ValueError
        For a library without metadata, of another format or another TVM, or for weights that are
        not its own.
    WrongMachineError
        A ValueError: for a library of another architecture, or one that needs instructions which
        this CPU lacks.
    """
    path = Path(path)
    metadata = read_metadata(path)
    _check_tvm(path, metadata)
    check_machine(path, metadata)
    _load_weights(path, metadata, weights)
    library = tvm.runtime.load_module(str(path.absolute()))
    return Artifact(path, metadata, VirtualMachine(library, tvm.cpu()))


def _check_tvm(path: Path, metadata: dict[str, Any]) -> None:
    built, here = metadata["tvm"], tvm.__version__
    # The VM's bytecode and the runtime's interface may change with a minor version.
    if built.split(".")[:2] != here.split(".")[:2]:
        raise ValueError(
            f"path is {str(path)!r}, compiled by TVM {built}; allowed: TVM {here}, which is "
            "installed here"
        )


def check_machine(path: Path, metadata: dict[str, Any]) -> None:
    """Raise WrongMachineError where this machine cannot run a library.

    Where a machine does not say what its CPU can do, a warning says what the library needs.
    """
    arch, here = metadata["arch"], _host.machine()
    compiled = f"path is {str(path)!r}, compiled for {metadata['isa']} ({metadata['target']})"
    if arch != here:
        raise WrongMachineError(f"{compiled}: that is {arch}, this machine is {here}")
    needs = metadata["needs"]
    if needs and not isa_check.flags_are_told():
        warnings.warn(
            f"{compiled}: it needs {', '.join(needs)}, and this machine does not say what its CPU "
            "has; if that is less, it will end in an illegal instruction",
            stacklevel=3,
        )
        return
    if missing := isa_check.lacking_here(needs):
        raise WrongMachineError(
            f"{compiled}: this CPU lacks {', '.join(missing)}. Compile it for this machine, with "
            "topi_int8.host_target() (topi-int8 compile --target host)"
        )


def _load_weights(
    path: Path, metadata: dict[str, Any], given: str | os.PathLike[str] | None
) -> None:
    """Read the weights of a library into TVM's tensor cache, if they are apart from it."""
    apart = metadata["weights"]
    if apart is None:
        if given is not None:
            raise ValueError(f"weights is {os.fspath(given)!r}; allowed: none, for {str(path)!r} "
                             "holds its own")  # fmt: skip
        return
    folder = path.parent / apart["folder"] if given is None else Path(given)
    try:
        found = json.loads((folder / WEIGHTS_ID).read_text(encoding="utf-8"))["id"]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"weights is {str(folder)!r}, which is no folder of weights; allowed: the one that was "
            f"written with {str(path)!r}"
        ) from None
    if found != apart["id"]:
        raise ValueError(f"weights is {str(folder)!r}, another library's; allowed: the folder that "
                         f"was written with {str(path)!r}")  # fmt: skip
    tvm.get_global_func("vm.builtin.tensor_cache.load")(str(folder), _CPU, 0)
