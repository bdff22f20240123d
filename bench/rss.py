"""Peak resident memory of a fresh process that loads a network and runs it once.

Each is what its user would start: ours and TVM's are exported libraries in a process that has TVM's
runtime alone (`exported_worker`), the others their own files (`rivals.network_worker`). Ours has
its weights apart (`topi_int8.export`); "library" is the same with the weights in it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import tvm
from rich.console import Console
from rich.table import Table
from tvm.target import Target

from topi_int8 import export, override
from topi_int8.frontend.torch import from_torch

from . import models, report
from .e2e import RIVALS as ENGINES
from .e2e import TITLES as ENGINE_TITLES
from .e2e import NetworkOptions
from .place import first_line
from .rivals import Unavailable
from .rivals.networks import NETWORK_RIVALS, NetworkFiles
from .rivals.tvm_default import TvmDefault
from .worker import Worker, WorkerError

# Torch's worker has TVM in it as well: what it takes is not torch's.
RIVALS = (*(name for name in ENGINES if name != "torch"), "library")
TITLES = {**ENGINE_TITLES, "library": "int8, one file"}
_MIB = 2**20


@dataclass(frozen=True)
class Options(NetworkOptions):
    """How memory is measured."""

    known: ClassVar[tuple[str, ...]] = RIVALS

    rivals: tuple[str, ...] = RIVALS
    tvm_limit: float = 10.0


@dataclass(frozen=True)
class Resident:
    """Memory of one process, or the words for why there is none.

    Attributes
    ----------
    peak : float or None
        The most that was resident (VmHWM), MiB.
    before : float or None
        Resident before the network was loaded: interpreter and engine, MiB.
    note : str
    """

    peak: float | None = None
    before: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.peak is None and not self.note:
            raise ValueError("note is ''; allowed: the reason, when there is no peak")

    @classmethod
    def of(cls, answer: dict[str, int]) -> Resident:
        """Return a worker's answer."""
        return cls(answer["peak"] / _MIB, answer["before"] / _MIB)


Found = dict[str, Resident]


def measure(name: str, options: Options, console: Console) -> Found:
    """Return the memory of int8 and the rivals on one network.

    Raises
    ------
    ValueError
        For a name that torchvision does not know.
    """
    module, example = models.load(name, batch=options.batch, image=options.image)
    calibration = models.calibration_images(options.calibration, options.image)
    mod = from_torch(module, example)

    @cache
    def quantized() -> tvm.IRModule:
        return models.quantize(
            mod, options.image, options.calibration, options.bits, options.batch
        )

    makers: dict[str, Callable[[], Any]] = {
        "library": lambda: tvm.compile(quantized(), target=options.target),
        "fp32": lambda: tvm.compile(mod, target=options.target),
        "tvm": lambda: _stock(mod, name, options),
    }
    found: Found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = NetworkFiles(folder, name, module, example, calibration)
        data = files.array(".data.npy", example.numpy())
        for engine in ("int8", *options.rivals):
            try:
                with console.status(f"{name}: {TITLES[engine]}"):
                    if engine in NETWORK_RIVALS:
                        found[engine] = _rival(engine, files, data, options)
                    elif engine == "int8":
                        found[engine] = _apart(quantized(), options.target, folder, data)
                    else:
                        found[engine] = _exported(makers[engine](), folder / engine, data)
            except (Unavailable, WorkerError, RuntimeError) as error:
                found[engine] = Resident(note=first_line(error) or type(error).__name__)
    return found


def _stock(mod: tvm.IRModule, name: str, options: Options) -> Any:
    """Return stock TVM's executable; raise Unavailable where a run would take too long."""
    from topi_int8 import explain

    rows = explain(mod, options.target, show=False)
    TvmDefault(options.tvm_limit).refuse(sum(row.macs for row in rows))
    with override.disabled():
        return tvm.compile(mod, target=options.target)


def _apart(mod: tvm.IRModule, target: Target, folder: Path, data: Path) -> Resident:
    library, weights = folder / "int8.so", folder / "int8.weights"
    export(mod, target, library, weights)
    return _resident(path=str(library), weights=str(weights), data=str(data))


def _exported(executable: Any, stem: Path, data: Path) -> Resident:
    path = stem.with_suffix(".so")
    executable.export_library(str(path))
    return _resident(path=str(path), data=str(data))


def _resident(**files: str) -> Resident:
    worker = Worker([sys.executable, "-m", "bench.exported_worker"])
    try:
        return Resident.of(worker.ask("memory", **files))
    finally:
        worker.close()


def _rival(name: str, files: NetworkFiles, data: Path, options: Options) -> Resident:
    rival = NETWORK_RIVALS[name]
    worker = rival.start()
    try:
        path = files.model(rival, worker)
    finally:
        worker.close()
    worker = rival.start()  # a fresh one: quantizing takes memory
    try:
        return Resident.of(
            worker.ask("memory", path=str(path), data=str(data), threads=options.threads)
        )
    finally:
        worker.close()


def over(found: Found, name: str) -> float | None:
    """Return int8's peak over a rival's; None where either is missing."""
    ours, theirs = found["int8"].peak, found[name].peak
    return None if ours is None or theirs is None else ours / theirs


def table(found: dict[str, Found], title: str) -> Table:
    """Return the table of networks, one row an engine; why one has no row is said below."""
    out = Table(title=title, title_justify="left", caption_justify="left", pad_edge=False)
    for column in ("network", "engine"):
        out.add_column(column, no_wrap=True)
    for column in ("peak MiB", "before loading", "added", "int8 / this"):
        out.add_column(column, justify="right", no_wrap=True)
    words: dict[str, None] = {}
    for network, engines in found.items():
        for name, resident in engines.items():
            if resident.peak is None or resident.before is None:
                words[f"{network}: {TITLES[name]}: {resident.note}"] = None
                continue
            mib = (resident.peak, resident.before, resident.peak - resident.before)
            out.add_row(
                network, TITLES[name], *(report.number(value, 0) for value in mib),
                report.times(over(engines, name)),
            )  # fmt: skip
        out.add_section()
    words["Fresh processes that load a network and run it once; before: Python, engine."] = None
    out.caption = "\n".join(words)
    return out


def to_document(found: dict[str, Found], run: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON values of a run."""
    return {
        **run,
        "memory": [
            {
                "network": network, "engine": name, "peak_mib": resident.peak,
                "before_mib": resident.before, "int8_over_this": over(engines, name),
                "note": resident.note,
            }
            for network, engines in found.items()
            for name, resident in engines.items()
        ],
    }  # fmt: skip
