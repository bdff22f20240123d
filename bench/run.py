"""A run over layers: our kernel and the rivals of each, sampled in turn, on pinned cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from tvm.target import Target

from . import kernels, peaks, targets, workloads
from .place import HERE, Place, first_line
from .results import LayerResult, RivalResult
from .rivals import Rival, Unavailable
from .rivals.onednn import OneDnn
from .rivals.tvm_default import TvmDefault
from .shape_lines import Shape
from .timing import Sampler, Timing, interleave

OURS = "ours"


@dataclass(frozen=True)
class Options:
    """How layers are run.

    Parameters
    ----------
    target : Target
    dtype, epilogue : str
        See `workloads.make`.
    weight_bits : int
        8; 7: weights in [-64, 64], which vpmaddubsw cannot saturate on; 4, 2: in [-7, 7], [-1, 1].
    threads : int
    min_time : float
        Seconds each engine is sampled a layer, over all rounds.
    rounds : int
        Alternations between the engines.
    check : bool
        Compare our result with the reference first.
    place : Place
        Where they run.
    """

    target: Target
    dtype: str = "u8s8"
    epilogue: str = ""
    weight_bits: int = 8
    threads: int = 1
    min_time: float = 0.1
    rounds: int = 5
    check: bool = False
    place: Place = HERE

    def __post_init__(self) -> None:
        if self.dtype not in workloads.DTYPES:
            allowed = ", ".join(workloads.DTYPES)
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {allowed}")
        if self.epilogue:
            workloads.parse_epilogue(self.epilogue)
        if self.weight_bits not in workloads.WEIGHT_RANGES:
            allowed = ", ".join(map(str, workloads.WEIGHT_RANGES))
            raise ValueError(f"weight_bits is {self.weight_bits}; allowed: {allowed}")
        if not self.min_time > 0:
            raise ValueError(f"min_time is {self.min_time}; allowed: seconds > 0")
        for name in ("threads", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")


RIVALS: dict[str, Callable[[float], Rival]] = {
    "tvm": lambda tvm_limit: TvmDefault(tvm_limit),
    "onednn": lambda _tvm_limit: OneDnn(),
}


def make_rivals(names: str, tvm_limit: float) -> list[Rival]:
    """Return the rivals of a comma-separated list; "none" is none.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    chosen = [name for name in names.split(",") if name and name != "none"]
    for name in chosen:
        if name not in RIVALS:
            raise ValueError(f"rivals has {name!r}; allowed: {', '.join(RIVALS)}, none")
    return [RIVALS[name](tvm_limit) for name in dict.fromkeys(chosen)]


PEAK_SECONDS = 0.03  # beside every layer; the best of them all is what counts


_meter = cache(peaks.Meter)


def peak_of(options: Options, intrinsic: str) -> tuple[float | None, str]:
    """Return (GOP/s, loop): the measured peak of the cores used for the kernel's instruction.

    None on a board, where none is measured.
    """
    if options.place.remote:
        return None, ""
    kind = "float32" if options.dtype == "f32" else "int8"
    loop = peaks.loop_for(targets.isa_of(options.target), kind, intrinsic)
    if loop is None or loop not in peaks.runnable():
        return None, ""
    return _meter(loop).sample(PEAK_SECONDS) * options.threads, loop.name


def run_layer(shape: Shape, options: Options, rivals: list[Rival]) -> LayerResult:
    """Measure one layer. What fails is said in the result, not raised."""
    if lost := options.place.lost():
        return LayerResult(shape=shape, error=lost)
    result = _measure(shape, options, rivals)
    # A kernel that crashes on a board shows as a broken connection.
    if result.error and (lost := options.place.lost()):
        return replace(result, error=lost)
    return result


def _measure(shape: Shape, options: Options, rivals: list[Rival]) -> LayerResult:
    try:
        workload = workloads.make(shape, options.dtype, options.epilogue, options.weight_bits)
        kernel = kernels.build(workload, options.target, place=options.place)
    except Exception as error:
        return LayerResult(shape=shape, error=_words(error))
    chosen = {
        "strategy": kernel.strategy,
        "intrinsic": kernel.intrinsic,
        "declined": kernel.declined,
    }
    try:
        if options.check:
            kernel.check()
    except Exception as error:
        return LayerResult(shape=shape, error=_words(error), **chosen)
    samplers: dict[str, Sampler] = {OURS: kernel.sampler()}
    notes: dict[str, str] = {}
    for rival in rivals:
        try:
            samplers[rival.name], notes[rival.name] = rival.prepare(
                workload, options.target, options.place
            )
        except Exception as error:
            notes[rival.name] = _words(error)
    timings = interleave(samplers, options.rounds, options.min_time / options.rounds)
    ours = timings.pop(OURS)
    others = {
        rival.name: _rival_result(timings.get(rival.name), notes[rival.name]) for rival in rivals
    }
    if isinstance(ours, Exception):
        return LayerResult(shape=shape, error=_words(ours), rivals=others, **chosen)
    peak, loop = peak_of(options, kernel.intrinsic)
    return LayerResult(
        shape=shape, ours=ours, peak_gops=peak, peak_loop=loop, rivals=others,
        checked=options.check, **chosen,
    )  # fmt: skip


def _rival_result(timing: Timing | Exception | None, note: str) -> RivalResult:
    if isinstance(timing, Timing):
        return RivalResult(timing, note)
    return RivalResult(None, note if timing is None else _words(timing))


def _words(error: Exception) -> str:
    """Return an error's message on one line, with its type where that says more."""
    text = first_line(error)
    if isinstance(error, Unavailable | ValueError | RuntimeError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}"


def run_layers(shapes: list[Shape], options: Options, rivals: list[Rival]) -> Iterator[LayerResult]:
    """Yield each layer's result as it is measured; the caller pins the cores and closes rivals."""
    for shape in shapes:
        yield run_layer(shape, options, rivals)
