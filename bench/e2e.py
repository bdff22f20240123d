"""Whole networks: int8 beside fp32, on this machine or on a board.

int8 is quantized here, as `bench.demo` does it; fp32 is the same network through this package's
fp32 schedules, and "tvm" through stock TVM, which schedules nothing on CPUs.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from rich.console import Console
from rich.table import Table
from tvm.target import Target

import topi_int8
from topi_int8.frontend.torch import from_torch

from . import demo, models
from .place import HERE, Graph, Place, first_line
from .results import RivalResult
from .rivals import Unavailable
from .rivals.tvm_default import TvmDefault
from .timing import Sampler, Timing, interleave

RIVALS = ("fp32", "tvm")
# Another instruction set may round a requantized value the other way, which leaves the logits far
# above this, dB; a wrong kernel leaves them far below.
CHECK_DECIBEL = 40
TITLES = {"int8": "int8", "fp32": "fp32, ours", "tvm": "fp32, stock TVM"}


class CheckError(Exception):
    """int8 differs from this machine's result."""


@dataclass(frozen=True)
class Options:
    """How networks are run.

    Parameters
    ----------
    target : Target
    place : Place
    image : int
        Side of the square input.
    calibration, inputs : int
        Images to calibrate on, and to compare int8 with torch's fp32 on.
    weight_bits : int
        7 or 8; 0 is what the target multiplies fastest.
    rivals : tuple of str
        Of `RIVALS`.
    tvm_limit : float
        Seconds beyond which stock TVM is not run.
    min_time : float
        Seconds each engine is sampled a network, over all rounds.
    rounds : int
        Alternations between the engines.
    layers : bool
        Time every distinct layer of the int8 network, too.
    check : bool
        Compare int8 with what this machine computes of the same quantized network.
    """

    target: Target
    place: Place = HERE
    image: int = 224
    calibration: int = 16
    inputs: int = 4
    weight_bits: int = 0
    rivals: tuple[str, ...] = RIVALS
    tvm_limit: float = 5.0
    min_time: float = 2.0
    rounds: int = 5
    layers: bool = True
    check: bool = False

    def __post_init__(self) -> None:
        for name in ("image", "calibration", "inputs", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        for name in ("min_time", "tvm_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: seconds > 0")
        if self.weight_bits not in (0, 7, 8):
            raise ValueError(f"weight_bits is {self.weight_bits}; allowed: 7, 8, or 0 (choose)")
        for name in self.rivals:
            if name not in RIVALS:
                raise ValueError(f"rivals has {name!r}; allowed: {', '.join(RIVALS)}, none")

    @property
    def bits(self) -> int:
        """The weight bits, chosen."""
        return self.weight_bits or models.default_weight_bits(self.target)


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
        return {
            "name": self.name,
            "macs": self.macs,
            "engines": {
                name: {
                    "min_ms": engine.timing and engine.timing.min / 1e3,
                    "median_ms": engine.timing and engine.timing.median / 1e3,
                    "over_int8": self.speedup(name),
                    "note": engine.note,
                }
                for name, engine in self.engines.items()
            },
            "compile_s": round(self.compile_seconds, 2),
            "sqnr_db": self.sqnr if self.sqnr is None or math.isfinite(self.sqnr) else "inf",
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


def run_network(name: str, options: Options, console: Console) -> NetworkResult:
    """Quantize, compile, compare and time one network. What fails is said in the result.

    Raises
    ------
    ValueError
        For a name that torchvision does not know.
    """
    import torch

    module, example = models.load(name, image=options.image)
    with console.status(f"{name}: quantize"):
        mod = from_torch(module, example)
        qdq = models.quantize(mod, options.image, options.calibration, options.bits)
        rows = tuple(topi_int8.explain(qdq, options.target, show=False))
    macs = sum(row.macs for row in rows)
    if lost := options.place.lost():
        return NetworkResult(name, macs, {"int8": RivalResult(None, lost)}, rows=rows)
    inputs = models.unseen_images(options.inputs, options.image)
    with torch.inference_mode():
        wanted = np.concatenate([module(torch.from_numpy(x)).numpy() for x in inputs])
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
        engines = _timings(mod, int8, inputs[0], macs, options, console)
        layer_us = None
        if options.layers:
            with console.status(f"{name}: layers"):
                layer_us = demo.layer_times(rows, options.target, options.place)
    except (RuntimeError, CheckError) as error:
        why = options.place.lost() or first_line(error) or type(error).__name__
        return NetworkResult(name, macs, {"int8": RivalResult(None, why)}, rows=rows)
    same = int(np.sum(wanted.argmax(1) == got.argmax(1)))
    return NetworkResult(
        name,
        macs,
        engines,
        seconds,
        demo.decibel(wanted, got),
        (same, len(inputs)),
        rows,
        layer_us,
        options.check,
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


def _timings(
    mod: tvm.IRModule, int8: Graph, x: np.ndarray, macs: int, options: Options, console: Console
) -> dict[str, RivalResult]:
    """Return the timings of int8 and the rivals, sampled in turn."""
    samplers: dict[str, Sampler] = {"int8": int8.sampler(x)}
    notes: dict[str, str] = {}
    for name in options.rivals:
        try:
            with console.status(f"compile {TITLES[name]}"):
                samplers[name], notes[name] = _rival(name, mod, x, macs, options)
        except (Unavailable, RuntimeError) as error:
            notes[name] = first_line(error) or type(error).__name__
    with console.status("time"):
        timings = interleave(samplers, options.rounds, options.min_time / options.rounds)
    if isinstance(timings["int8"], Exception):
        raise timings["int8"]
    results: dict[str, RivalResult] = {}
    for name in ("int8", *options.rivals):
        timing = timings.get(name)
        if isinstance(timing, Timing):
            results[name] = RivalResult(timing, notes.get(name, ""))
        else:
            results[name] = RivalResult(None, notes.get(name) or first_line(timing))
    return results


def _rival(
    name: str, mod: tvm.IRModule, x: np.ndarray, macs: int, options: Options
) -> tuple[Sampler, str]:
    if name == "tvm":
        stock = TvmDefault(options.tvm_limit)
        stock.refuse(macs)
        return stock.prepare_module(mod, [x], options.target, options.place)
    return Graph(tvm.compile(mod, target=options.target), options.place).sampler(x), ""


def table(
    results: list[NetworkResult], title: str, rivals: tuple[str, ...], caveat: str = ""
) -> Table:
    """Return one row a network: ms of each engine, and int8 beside torch's fp32."""
    out = Table(title=title, title_justify="left", caption_justify="left")
    out.add_column("network", no_wrap=True)
    for column in ("GMAC", "int8 ms", *(TITLES[name] + " ms" for name in rivals)):
        out.add_column(column, justify="right")
    for column in (*(f"{name}/int8" for name in rivals), "SQNR dB", "same top-1", "compile s"):
        out.add_column(column, justify="right", no_wrap=True)
    for result in results:
        cells = [result.name, f"{result.macs / 1e9:.2f}"]
        for name in ("int8", *rivals):
            engine = result.engines.get(name)
            if engine is None or engine.timing is None:
                cells.append("" if engine is None else engine.note.replace("[", r"\["))
            else:
                cells.append(
                    f"{engine.note if engine.note == '~' else ''}{engine.timing.min / 1e3:,.2f}"
                )
        speedups = [result.speedup(name) for name in rivals]
        cells += ["" if value is None else f"{value:.2f}x" for value in speedups]
        if result.sqnr is not None:
            same, of = result.top1
            cells += [f"{result.sqnr:.1f}", f"{same} of {of}", f"{result.compile_seconds:.1f}"]
        out.add_row(*cells)
    out.caption = f"{caveat} " * bool(caveat) + (
        "ms: the fastest of alternating runs, batch 1. SQNR and top-1: int8's logits beside "
        "torch's fp32, weights seeded."
    )
    return out


def to_json(results: list[NetworkResult], run: dict[str, Any]) -> str:
    """Return JSON: `run` (the machine and the options), then the networks."""
    document = {**run, "networks": [result.record() for result in results]}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
