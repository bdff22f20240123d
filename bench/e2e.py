"""Whole networks: int8 beside other engines and fp32, on this machine or on a board.

int8 is quantized here, as `bench.demo` does it; fp32 is the same network through this package's
fp32 schedules, and "tvm" through stock TVM, which schedules nothing on CPUs. The engines of
`rivals.networks` get the same weights and the same images.
"""

from __future__ import annotations

import math
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tvm
from rich.console import Console
from rich.table import Table
from tvm.target import Target

import topi_int8
from topi_int8.frontend.torch import from_torch

from . import demo, models, report, site, targets
from .place import HERE, Graph, Place, first_line
from .results import RivalResult
from .rivals import Unavailable
from .rivals.networks import NETWORK_RIVALS, NetworkFiles, prepare
from .rivals.tvm_default import TvmDefault
from .timing import Sampler, Timing, interleave

RIVALS = (*NETWORK_RIVALS, "fp32", "tvm")
# Another instruction set may round a requantized value the other way, which leaves the logits far
# above this, dB; a wrong kernel leaves them far below.
CHECK_DECIBEL = 40
TITLES = {
    "int8": "int8",
    **{rival.name: rival.title for rival in NETWORK_RIVALS.values()},
    "fp32": "fp32, ours",
    "tvm": "fp32, stock TVM",
}


class CheckError(Exception):
    """int8 differs from this machine's result."""


@dataclass(frozen=True)
class NetworkOptions:
    """What networks are run, and beside whom.

    Parameters
    ----------
    target : Target
    threads, batch : int
        Of every engine; the process is pinned already (`site.opened`).
    image : int
        Side of the square input.
    calibration : int
        Images to calibrate on.
    weight_bits : int
        7 or 8; 0 is what the target multiplies fastest.
    rivals : tuple of str
        Of `known`.
    tvm_limit : float
        Seconds of one run beyond which stock TVM is not run.
    """

    known: ClassVar[tuple[str, ...]] = RIVALS
    counts: ClassVar[tuple[str, ...]] = ("threads", "batch", "image", "calibration")

    target: Target
    threads: int = 1
    batch: int = 1
    image: int = 224
    calibration: int = 16
    weight_bits: int = 0
    rivals: tuple[str, ...] = RIVALS
    tvm_limit: float = 5.0

    def __post_init__(self) -> None:
        for name in self.counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.weight_bits not in (0, 7, 8):
            raise ValueError(f"weight_bits is {self.weight_bits}; allowed: 7, 8, or 0 (choose)")
        for name in self.rivals:
            if name not in self.known:
                raise ValueError(f"rivals has {name!r}; allowed: {', '.join(self.known)}, none")

    @property
    def bits(self) -> int:
        """The weight bits, chosen."""
        return self.weight_bits or models.default_weight_bits(self.target)


@dataclass(frozen=True)
class Options(NetworkOptions):
    """How networks are timed.

    Parameters
    ----------
    place : Place
    inputs : int
        Images to compare int8 with torch's fp32 on.
    min_time : float
        Seconds each engine is sampled a network, over all rounds.
    rounds : int
        Alternations between the engines.
    layers : bool
        Time every distinct layer of the int8 network, too.
    check : bool
        Compare int8 with what this machine computes of the same quantized network.
    folder : Path or None
        Where the rivals' forms of the networks are kept; None: nowhere.
    """

    counts: ClassVar[tuple[str, ...]] = (*NetworkOptions.counts, "inputs", "rounds")

    place: Place = HERE
    inputs: int = 4
    min_time: float = 2.0
    rounds: int = 5
    layers: bool = True
    check: bool = False
    folder: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_time", "tvm_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: seconds > 0")


@dataclass(frozen=True)
class NetworkResult:
    """One network.

    Attributes
    ----------
    engines : dict of str to RivalResult
        Timings of "int8" and the rivals, or why there is none.
    compile_seconds : float
        Of int8, here.
    sqnr : float or None
        int8's logits beside torch's fp32, dB; None where int8 did not run.
    checked : bool
        Whether int8 was compared with this machine's result.
    top1 : (int, int)
        Inputs of how many on which int8 and torch agree.
    rows : tuple
        `topi_int8.explain`'s rows.
    layer_us : dict
        {workload: µs of its kernel alone}.
    threads, batch : int
    versions : dict of str to str
        Of the rivals in processes of their own.
    rival_sqnr : dict of str to float
        Their logits beside torch's fp32, dB: that they computed the same network.
    """

    name: str
    macs: int
    engines: dict[str, RivalResult]
    compile_seconds: float = 0.0
    sqnr: float | None = None
    top1: tuple[int, int] = (0, 0)
    rows: tuple[Any, ...] = ()
    layer_us: dict[Any, float] | None = None
    checked: bool = False
    threads: int = 1
    batch: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    rival_sqnr: dict[str, float] = field(default_factory=dict)

    def speedup(self, rival: str) -> float | None:
        """Return a rival's minimum over int8's; None where either is missing."""
        ours, other = self.engines["int8"].timing, self.engines.get(rival)
        if ours is None or other is None or other.timing is None:
            return None
        return other.timing.min / ours.min

    @property
    def error(self) -> str:
        """Why int8 did not run; empty when it did."""
        return "" if self.engines["int8"].timing else self.engines["int8"].note

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        times = self.layer_us or {}
        decibels = {"int8": self.sqnr, **self.rival_sqnr}
        return {
            "name": self.name,
            "threads": self.threads,
            "batch": self.batch,
            "macs": self.macs,
            "engines": {
                name: {
                    "min_ms": engine.timing and engine.timing.min / 1e3,
                    "median_ms": engine.timing and engine.timing.median / 1e3,
                    "per_image_ms": engine.timing and engine.timing.min / 1e3 / self.batch,
                    "over_int8": self.speedup(name),
                    "sqnr_db": _finite(decibels.get(name)),
                    "version": self.versions.get(name, ""),
                    "note": engine.note,
                }
                for name, engine in self.engines.items()
            },
            "compile_s": round(self.compile_seconds, 2),
            "sqnr_db": _finite(self.sqnr),
            "top1_same": self.top1[0],
            "top1_of": self.top1[1],
            "checked": self.checked,
            "error": self.error,
            "layers": [
                {
                    "name": row.name, "op": row.op, "shape": row.shape, "types": row.dtypes,
                    "strategy": row.strategy, "intrinsic": row.intrinsic, "macs": row.macs,
                    "min_us": times.get(row.work),
                }
                for row in self.rows
            ],
        }  # fmt: skip


def _finite(decibel: float | None) -> float | str | None:
    """Return decibels as a JSON value."""
    return decibel if decibel is None or math.isfinite(decibel) else "inf"


def run_network(name: str, options: Options, console: Console) -> NetworkResult:
    """Quantize, compile, compare and time one network. What fails is said in the result.

    Raises
    ------
    ValueError
        For a name that torchvision does not know.
    """
    import torch

    module, example = models.load(name, batch=options.batch, image=options.image)
    with console.status(f"{name}: quantize"):
        mod = from_torch(module, example)
        qdq = models.quantize(
            mod, options.image, options.calibration, options.bits, options.batch
        )
        rows = tuple(topi_int8.explain(qdq, options.target, show=False))
    macs = sum(row.macs for row in rows)
    common = {"rows": rows, "threads": options.threads, "batch": options.batch}
    if lost := options.place.lost():
        return NetworkResult(name, macs, {"int8": RivalResult(None, lost)}, **common)
    inputs = models.unseen_images(options.inputs, options.image, options.batch)
    with torch.inference_mode():
        wanted = np.concatenate([module(torch.from_numpy(x)).numpy() for x in inputs])
    calibration = models.calibration_images(options.calibration, options.image)
    try:
        start = time.perf_counter()
        with console.status(f"{name}: compile"):
            executable = tvm.compile(qdq, target=options.target)
        seconds = time.perf_counter() - start
        with console.status(f"{name}: run"):
            int8 = Graph(executable, options.place)
            got = np.concatenate([int8(x) for x in inputs])
        if options.check:
            _check(got, qdq, inputs)
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder or Path(temporary)
            files = NetworkFiles(folder, name, module, example, calibration)
            measured = _timings(mod, int8, inputs[0], files, macs, options, console)
        layer_us = None
        if options.layers:
            with console.status(f"{name}: layers"):
                layer_us = demo.layer_times(rows, options.target, options.place)
    except (RuntimeError, CheckError) as error:
        why = options.place.lost() or first_line(error) or type(error).__name__
        return NetworkResult(name, macs, {"int8": RivalResult(None, why)}, **common)
    return NetworkResult(
        name,
        macs,
        measured.engines,
        seconds,
        demo.decibel(wanted, got),
        (int(np.sum(wanted.argmax(1) == got.argmax(1))), len(got)),
        layer_us=layer_us,
        checked=options.check,
        versions=measured.versions,
        rival_sqnr={
            rival: demo.decibel(wanted[: options.batch], logits)
            for rival, logits in measured.logits.items()
        },
        **common,
    )


def _check(got: np.ndarray, qdq: tvm.IRModule, inputs: list[np.ndarray]) -> None:
    """Compare logits with this machine's of the same quantized network.

    Raises
    ------
    CheckError
        When they differ by more than roundings can explain.
    """
    here = Graph(tvm.compile(qdq, target=topi_int8.host_target(num_cores=1)))
    wanted = np.concatenate([here(x) for x in inputs])
    close = demo.decibel(wanted, got)
    if not close >= CHECK_DECIBEL:
        raise CheckError(
            f"differs from this machine's result: {close:.1f} dB; allowed: {CHECK_DECIBEL} or more"
        )


@dataclass
class _Measured:
    """Timings by engine, and of those in other processes the version and the logits."""

    engines: dict[str, RivalResult] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    logits: dict[str, np.ndarray] = field(default_factory=dict)


def _timings(
    mod: tvm.IRModule, int8: Graph, x: np.ndarray, files: NetworkFiles, macs: int,
    options: Options, console: Console,
) -> _Measured:  # fmt: skip
    """Return the timings of int8 and the rivals on one input, sampled in turn."""
    samplers: dict[str, Sampler] = {"int8": int8.sampler(x)}
    notes: dict[str, str] = {}
    measured = _Measured()
    with ExitStack() as stack:
        for name in options.rivals:
            try:
                with console.status(f"prepare {TITLES[name]}"):
                    if name not in NETWORK_RIVALS:
                        samplers[name], notes[name] = _rival(name, mod, x, macs, options)
                        continue
                    if options.place.remote:
                        raise Unavailable("on this machine only")
                    isa = targets.isa_of(options.target)
                    prepared = prepare(NETWORK_RIVALS[name], files, x, options.threads, isa)
            except (Unavailable, RuntimeError) as error:
                notes[name] = first_line(error) or type(error).__name__
                continue
            stack.callback(prepared.close)
            samplers[name] = prepared.sampler
            measured.versions[name], measured.logits[name] = prepared.version, prepared.logits
        with console.status("time"):
            timings = interleave(samplers, options.rounds, options.min_time / options.rounds)
    if isinstance(timings["int8"], Exception):
        raise timings["int8"]
    for name in ("int8", *options.rivals):
        timing = timings.get(name)
        if isinstance(timing, Timing):
            measured.engines[name] = RivalResult(timing, notes.get(name, ""))
        else:
            measured.engines[name] = RivalResult(None, notes.get(name) or first_line(timing))
    return measured


def _rival(
    name: str, mod: tvm.IRModule, x: np.ndarray, macs: int, options: Options
) -> tuple[Sampler, str]:
    if name == "tvm":
        stock = TvmDefault(options.tvm_limit)
        stock.refuse(macs)
        return stock.prepare_module(mod, [x], options.target, options.place)
    return Graph(tvm.compile(mod, target=options.target), options.place).sampler(x), ""


@dataclass(frozen=True)
class Plan:
    """What is run at each count of threads.

    Parameters
    ----------
    networks : tuple of str
    batches : tuple of int
    settings : dict
        Further fields of `Options`, by name.
    """

    networks: tuple[str, ...]
    batches: tuple[int, ...]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("networks", "batches"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; allowed: one or more")


@dataclass(frozen=True)
class Part:
    """What was found with one count of threads.

    Attributes
    ----------
    head : dict
        How a JSON file begins (`site.Site.record`).
    target, isa, where, caveat : str
    cores : tuple of int
    bits : int
        Of the weights.
    results : tuple of NetworkResult
    """

    head: dict[str, Any]
    target: str
    isa: str
    where: str
    caveat: str
    cores: tuple[int, ...]
    bits: int
    results: tuple[NetworkResult, ...]


def run(request: site.Request, plan: Plan, note: str, console: Console | None = None) -> Part:
    """Run a plan in this process, with one count of threads.

    Raises
    ------
    ValueError
        When the plan, or the place that is asked for, is none.
    """
    console = console or Console()
    with site.opened(request) as where:
        options = Options(where.target, request.threads, place=where.place, **plan.settings)
        found = [
            run_network(name, replace(options, batch=batch), console)
            for name in plan.networks
            for batch in plan.batches
        ]
        return Part(
            where.record("e2e", note), str(where.target), targets.isa_of(where.target),
            where.where, where.caveat, where.cores, options.bits, tuple(found),
        )  # fmt: skip


def run_each(
    request: site.Request, threads: Sequence[int], plan: Plan, note: str, console: Console
) -> list[Part]:
    """Run a plan with each count of threads.

    One count is run in this process. Several have a process each: TVM's thread pool keeps the size
    that it starts with.
    """
    requests = [replace(request, threads=count) for count in threads]
    with tempfile.TemporaryDirectory() as folder:
        # The rivals' forms of a network depend on neither threads nor batch.
        plan = replace(plan, settings={"folder": Path(folder), **plan.settings})
        if len(requests) == 1:
            return [run(requests[0], plan, note, console)]
        return [_run_apart(one, plan, note) for one in requests]


def _run_apart(request: site.Request, plan: Plan, note: str) -> Part:
    """`run` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, request, plan, note).result()


def table(
    results: Sequence[NetworkResult], title: str, rivals: tuple[str, ...], caveat: str = ""
) -> Table:
    """Return one row a network, count of threads and batch: ms of each engine and its ratio to
    int8, and int8 beside torch's fp32. Why an engine has no time is said below.
    """
    out = Table(title=title, title_justify="left", caption_justify="left", pad_edge=False)
    out.add_column("network", no_wrap=True)
    for column in ("threads", "batch", "GMAC", "int8\nms", "int8\nms/image"):
        out.add_column(column, justify="right", no_wrap=True)
    for name in rivals:
        out.add_column(f"{TITLES[name]}\nms (over int8)", justify="right", no_wrap=True)
    for column in ("SQNR\ndB", "same\ntop-1", "compile\ns"):
        out.add_column(column, justify="right", no_wrap=True)
    words: dict[str, None] = {}
    for result in results:
        cells = [result.name, str(result.threads), str(result.batch), f"{result.macs / 1e9:.2f}"]
        ours = result.engines["int8"]
        if ours.timing is None:
            cells += ["-", "-"]
            words[f"{result.name}: {ours.note}"] = None
        else:
            cells += [
                f"{ours.timing.min / 1e3:,.2f}", f"{ours.timing.min / 1e3 / result.batch:,.2f}"
            ]  # fmt: skip
        for name in rivals:
            engine = result.engines.get(name)
            if engine is None or engine.timing is None:
                cells.append("-")
                if engine is not None:
                    words[f"{TITLES[name]}: {engine.note}"] = None
            else:
                few = "~" if engine.note == "~" else ""
                speedup = result.speedup(name)
                cells.append(f"{few}{engine.timing.min / 1e3:,.2f} ({speedup:.2f}x)")
        if result.sqnr is not None:
            same, of = result.top1
            cells += [f"{result.sqnr:.1f}", f"{same} of {of}", f"{result.compile_seconds:.1f}"]
        out.add_row(*cells)
    caption = [*filter(None, [caveat]), *words]
    caption.append(
        "ms: the fastest of alternating runs. SQNR and top-1: int8's logits beside torch's fp32, "
        "weights seeded."
    )
    out.caption = "\n".join(map(report.escape, caption))
    return out


def to_document(parts: Sequence[Part], options: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON values of a run: the machine and the options, then the networks."""
    first = parts[0]
    return {
        **first.head,
        "options": {
            "target": first.target, "isa": first.isa, "cores": [list(p.cores) for p in parts],
            "weight_bits": first.bits, **options,
        },
        "networks": [result.record() for part in parts for result in part.results],
    }  # fmt: skip
