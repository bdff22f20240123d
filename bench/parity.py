"""Parity with onnxruntime: the same quantized ONNX files there and here.

onnxruntime's static quantization writes each network in both of its forms, QDQ and QOperator; its
own CPU kernels run the file, and so does `topi_int8.frontend.onnx` + `tvm.compile`. Beside the
difference between the two stands what onnxruntime differs by from itself, with its optimisations
and without: rounding that is nobody's error.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from rich.console import Console
from rich.table import Table
from tvm.target import Target

import topi_int8
from topi_int8.frontend.onnx import from_onnx

from . import encoder, models, site, targets
from .place import Graph
from .rivals.network_worker import INPUT
from .rivals.networks import NETWORK_RIVALS, NetworkFiles
from .timing import Timing, interleave
from .worker import ROOT, Worker

FOLDER = ROOT / "build" / "parity"
ENCODER = "encoder"
NETWORKS = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1",
    "shufflenet_v2_x1_0", "densenet121", "googlenet", "efficientnet_b0", "regnet_x_400mf", "vgg11",
    "resnext50_32x4d", ENCODER,
)  # fmt: skip
FORMS = ("QDQ", "QOperator")
_LEVELS = ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL")
_CALIBRATION_SEED, _TEST_SEED = 100, 200
_PRODUCTS = ("conv2d", "matmul", "conv1d", "conv3d", "conv2d_transpose")


@dataclass(frozen=True)
class Options:
    """What is compared, and how it is timed.

    Parameters
    ----------
    networks, forms : tuple of str
        Of `NETWORKS` (or another torchvision classifier) and `FORMS`.
    image : int
        Side of the input images.
    inputs, calibration : int
        How many inputs are compared, and calibrated on.
    min_time : float
        Seconds each engine is sampled; 0 times nothing.
    rounds : int
        Alternations between the two.
    folder : Path
        Where networks and their quantized forms are kept from run to run.
    """

    networks: tuple[str, ...] = NETWORKS
    forms: tuple[str, ...] = FORMS
    image: int = 224
    inputs: int = 64
    calibration: int = 16
    min_time: float = 1.0
    rounds: int = 5
    folder: Path = FOLDER

    def __post_init__(self) -> None:
        for name in ("image", "inputs", "calibration", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if not self.min_time >= 0:
            raise ValueError(f"min_time is {self.min_time}; allowed: seconds, 0 times nothing")
        for form in self.forms:
            if form not in FORMS:
                raise ValueError(f"form is {form!r}; allowed: {', '.join(FORMS)}")


@dataclass(frozen=True)
class Difference:
    """How two engines' outputs for the same inputs differ.

    Attributes
    ----------
    largest, mean : float
        Of the absolute differences, in units of `Parity.unit`.
    equal : float
        Share of outputs that are the same, to a thousandth of a unit.
    same_class : int
        Inputs whose largest output is the same one.
    """

    largest: float
    mean: float
    equal: float
    same_class: int

    @staticmethod
    def between(first: np.ndarray, second: np.ndarray, unit: float) -> Difference:
        """Return the difference of outputs (inputs, classes)."""
        steps = np.abs(first.astype("float64") - second.astype("float64")) / unit
        same = int(np.sum(first.argmax(1) == second.argmax(1)))
        return Difference(
            float(steps.max()), float(steps.mean()), float(np.mean(steps < 1e-3)), same
        )


@dataclass(frozen=True)
class Parity:
    """One network in one form, there and here.

    Attributes
    ----------
    network, form : str
    unit : str
        "step", the scale of the output's quantization; or "% of spread", of the outputs' standard
        deviation, where the output is not quantized.
    inputs : int
    ours : Difference
        Between onnxruntime, optimised, and this package.
    theirs : Difference
        Between onnxruntime, optimised, and onnxruntime without optimisations.
    int8, other : int
        Convolutions and matmuls that run in integers here, and that do not.
    names : tuple of str
        Of those that do not.
    us, ort_us : float or None
        Microseconds an input, ours and onnxruntime's.
    compile_seconds : float
    """

    network: str
    form: str
    unit: str
    inputs: int
    ours: Difference
    theirs: Difference
    int8: int
    other: int
    names: tuple[str, ...]
    us: float | None
    ort_us: float | None
    compile_seconds: float


def start_onnxruntime() -> Worker:
    """Return a worker of onnxruntime, in this interpreter where it has that, else in OpenVINO's.

    Raises
    ------
    Unavailable
        When neither has it.
    """
    here = importlib.util.find_spec("onnxruntime") is not None
    rival = NETWORK_RIVALS["ort"]
    return (replace(rival, python=lambda: sys.executable) if here else rival).start()


@dataclass(frozen=True)
class Source:
    """A network: its files, what it is calibrated on, and the inputs that are compared."""

    name: str
    files: NetworkFiles
    calibration: np.ndarray
    inputs: np.ndarray


def source(name: str, options: Options) -> Source:
    """Return a network by name."""
    if name == ENCODER:
        module, example = encoder.load()
        calibration = encoder.tokens(options.calibration, _CALIBRATION_SEED)
        inputs = encoder.tokens(options.inputs, _TEST_SEED)
    else:
        module, example = models.load(name, image=options.image)
        calibration = np.concatenate(
            models.calibration_images(options.calibration, options.image)
        )
        inputs = np.concatenate(models.unseen_images(options.inputs, options.image))
    options.folder.mkdir(parents=True, exist_ok=True)
    files = NetworkFiles(options.folder, name, module, example, [calibration])
    return Source(name, files, calibration, inputs)


def quantized(source: Source, form: str, worker: Worker) -> Path:
    """Return a network's file in one of onnxruntime's quantized forms, written once."""
    files = source.files
    path = files.path(f".{form}{len(source.calibration)}.onnx")
    if not path.exists():
        images = files.array(".calibration.npy", source.calibration)
        # Written under another name first: a run that is stopped leaves nothing half done.
        part = path.with_suffix(".part.onnx")
        worker.ask("quantize", source=str(files.onnx()), images=str(images), target=str(part),
                   form=form)  # fmt: skip
        part.rename(path)
        part.with_suffix(".prepared.onnx").unlink(missing_ok=True)
    return path


def output_step(path: Path) -> float | None:
    """Return the scale with which a model's output was dequantized; None for a float output."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    made = [node for node in graph.node if graph.output[0].name in node.output]
    if not made or made[0].op_type != "DequantizeLinear":
        return None
    scales = [c for c in graph.initializer if c.name == made[0].input[1]]
    return float(numpy_helper.to_array(scales[0]).reshape(())) if scales else None


def outputs(worker: Worker, path: Path, inputs: np.ndarray, level: str) -> np.ndarray:
    """Return onnxruntime's outputs at an optimisation level."""
    with tempfile.TemporaryDirectory() as folder:
        data, target = Path(folder) / "data.npy", Path(folder) / "out.npy"
        np.save(data, inputs)
        worker.ask("outputs", path=str(path), data=str(data), target=str(target), level=level)
        return np.load(target)


def products(mod: tvm.IRModule, target: Target) -> tuple[list[str], list[str]]:
    """Return the names of the convolutions and matmuls that run in integers, and of the others."""
    found = topi_int8.explain(mod, target, show=False)
    integer = [row.name for row in found.rows if row.work.data_dtype != "float32"]
    floats = [row.name for row in found.rows if row.work.data_dtype == "float32"]
    left = [
        f"{other.op}: {other.note}" for other in found.others
        if other.op.rsplit(".", 1)[-1] in _PRODUCTS for _ in range(other.count)
    ]  # fmt: skip
    return integer, floats + left


def measure(
    source: Source, form: str, options: Options, target: Target, worker: Worker
) -> Parity:
    """Return one network in one form, compared and timed."""
    inputs, name = source.inputs, source.name
    path = quantized(source, form, worker)
    theirs, plain = (outputs(worker, path, inputs, level) for level in _LEVELS)
    mod = from_onnx(path, {INPUT: (1, *inputs.shape[1:])})
    integer, other = products(mod, target)
    start = time.perf_counter()
    graph = Graph(tvm.compile(mod, target))
    seconds = time.perf_counter() - start
    ours = np.concatenate([graph(x[None]) for x in inputs])
    step = output_step(path)
    unit = step if step is not None else float(theirs.std()) / 100
    timings: dict[str, Any] = {}
    if options.min_time > 0:
        data = source.files.array(".data.npy", inputs[:1])
        worker.ask("load", key=name, path=str(path), data=str(data), threads=1)
        samplers = {"ours": graph.sampler(inputs[:1]), "ort": worker.sampler(name)}
        timings = interleave(samplers, options.rounds, options.min_time / options.rounds)
        worker.ask("drop", key=name)
    us, ort_us = (
        timings[engine].min if isinstance(timings.get(engine), Timing) else None
        for engine in ("ours", "ort")
    )
    return Parity(
        name, form, "step" if step is not None else "% of spread", len(inputs),
        Difference.between(ours, theirs, unit), Difference.between(plain, theirs, unit),
        len(integer), len(other), tuple(other), us, ort_us, seconds,
    )  # fmt: skip


def run(
    request: site.Request, options: Options, note: str, console: Console
) -> tuple[dict[str, Any], list[Parity], list[str]]:
    """Return (how the JSON file begins, what was found, what failed and why).

    Raises
    ------
    Unavailable
        Without onnxruntime.
    """
    start_onnxruntime().close()
    found, failed = [], []
    with site.opened(request) as where:
        worker = start_onnxruntime()
        head = {
            **where.record("parity", note),
            "options": {
                "target": str(where.target), "isa": targets.isa_of(where.target),
                "cores": list(where.cores), "image": options.image, "inputs": options.inputs,
                "calibration": options.calibration, "min_time_s": options.min_time,
                "rounds": options.rounds, "onnxruntime": worker.ask("version"),
            },
        }  # fmt: skip
        try:
            made: Source | None = None
            for name, form in _progress(options, console):
                try:
                    made = made if made and made.name == name else source(name, options)
                    found.append(measure(made, form, options, where.target, worker))
                except Exception as error:  # said in the table; the next network may do better
                    failed.append(f"{name} {form}: {type(error).__name__}: {error}")
        finally:
            worker.close()
    return head, found, failed


def _progress(options: Options, console: Console) -> Iterator[tuple[str, str]]:
    pairs = [(name, form) for name in options.networks for form in options.forms]
    with console.status("") as status:
        for i, (name, form) in enumerate(pairs):
            status.update(f"{i + 1}/{len(pairs)} {name} {form}")
            yield name, form


# ---------------------------------------------------------------- what is written

COLUMNS = (
    "network", "form", "int8", "not", "largest", "mean", "equal", "top-1", "ORT's largest",
    "ORT's mean", "ORT's equal", "ORT's top-1", "ours ms", "ORT ms", "ORT / ours",
)  # fmt: skip


def cells(parity: Parity) -> list[str]:
    """Return a row of either table, in the order of `COLUMNS`."""
    suffix = "" if parity.unit == "step" else " %"

    def difference(found: Difference) -> list[str]:
        return [
            f"{found.largest:.3g}{suffix}", f"{found.mean:.2g}{suffix}", f"{found.equal:.1%}",
            f"{found.same_class}/{parity.inputs}",
        ]  # fmt: skip

    times = ["-"] * 3
    if parity.us is not None and parity.ort_us is not None:
        times = [
            f"{parity.us / 1e3:.2f}", f"{parity.ort_us / 1e3:.2f}",
            f"{parity.ort_us / parity.us:.2f}x",
        ]  # fmt: skip
    counts = [str(parity.int8), str(parity.other)]
    return [
        parity.network, parity.form, *counts, *difference(parity.ours),
        *difference(parity.theirs), *times,
    ]  # fmt: skip


def table(found: Sequence[Parity], title: str) -> Table:
    """Return a row for each network and form."""
    out = Table(title=title, title_justify="left", pad_edge=False)
    for i, column in enumerate(COLUMNS):
        out.add_column(column, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for parity in found:
        out.add_row(*cells(parity))
    return out


def from_document(document: dict[str, Any]) -> list[Parity]:
    """Return what a JSON file holds."""
    return [
        Parity(**{
            **row, "names": tuple(row["names"]), "ours": Difference(**row["ours"]),
            "theirs": Difference(**row["theirs"]),
        })
        for row in document["networks"]
    ]  # fmt: skip


def merged(old: Sequence[Parity], new: Sequence[Parity]) -> list[Parity]:
    """Return the rows of both, the new ones for those, in the order of `NETWORKS` and `FORMS`."""
    rows = {(parity.network, parity.form): parity for parity in (*old, *new)}
    order = {name: i for i, name in enumerate(NETWORKS)}
    return sorted(
        rows.values(),
        key=lambda p: (order.get(p.network, len(order)), p.network, FORMS.index(p.form)),
    )


def to_document(found: Sequence[Parity], head: dict[str, Any]) -> dict[str, Any]:
    """Return what the JSON file holds."""
    return {**head, "networks": [asdict(parity) for parity in found]}


_PREFACE = """\
# Parity with onnxruntime

Written by `python -m bench parity --markdown docs/parity.md`. The same ONNX files, quantized by
onnxruntime's static quantization (uint8 activations, int8 weights by channel, min-max over
{calibration} seeded images of side {image}), run by onnxruntime's CPU kernels and by this package
({command});
{inputs} other images each. Weights are seeded (bench/models.py): the arithmetic is compared, not
accuracy.

{machine}, `{isa}`, {date}, commit {commit}; {onnxruntime}, one core.

"largest", "mean": of the differences between our outputs and onnxruntime's, in steps of the
output's quantization (`%`: of the outputs' standard deviation, where the model's output is not
quantized); "equal": outputs that are the same. "ORT's": the same between onnxruntime's own levels
ORT_ENABLE_ALL and ORT_DISABLE_ALL. "int8", "not": convolutions and matmuls that run in integers
here, and that do not. Times are minima of alternating runs, batch 1.
"""


def to_markdown(document: dict[str, Any], found: Sequence[Parity]) -> str:
    """Return docs/parity.md."""
    options, machine = document["options"], document["machine"]
    lines = [
        _PREFACE.format(
            **{key: options[key] for key in ("calibration", "image", "inputs", "isa",
                                             "onnxruntime")},
            command="`topi_int8.frontend.onnx.from_onnx`, `tvm.compile`",
            machine=machine["cpu"], date=str(machine["date"])[:10], commit=machine["commit"],
        ),
        *([f"{document['note']}\n"] if document.get("note") else []),
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * 2}{'--:|' * (len(COLUMNS) - 2)}",
        *(f"| {' | '.join(cells(parity))} |" for parity in found),
    ]  # fmt: skip
    left = [parity for parity in found if parity.names]
    if left:
        lines += ["", "Not in integers:", ""]
        lines += [f"- {p.network}, {p.form}: {'; '.join(dict.fromkeys(p.names))}" for p in left]
    return "\n".join(lines) + "\n"

