"""The command ``accuracy``: top-1 and top-5 of fp32 and int8 on a user's own ImageNet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import topi_int8
from topi_int8.progress import track
from topi_int8.quantize import AccuracyReport

from . import demo, imagenet, report, site, targets
from .command import Cpu, Isa, Json, Note, TargetText, Threads, app, cpu_numbers, fail, make_console
from .imagenet_folder import find_samples

_REPORT_BATCHES = 4  # that the report of layers looks at


@dataclass(frozen=True)
class Options:
    """What is evaluated, and how it is quantized.

    Parameters
    ----------
    network : str
        A torchvision classifier.
    weights : str or None
        As torchvision names them; None: seeded ones.
    folder : Path
        See `imagenet_folder.find_samples`.
    limit : int
        Images at most; 0: all.
    batch, calibration : int
        Images a run, and images to calibrate on.
    weight_bits : int
        7 or 8; 0: what the target multiplies fastest.
    image : int
        Side of the crop; 0: the weights' own.
    method : str
        `quantize`'s.
    skip : tuple of str
        Layers that stay float32.
    threads : int
        Of torch, too.
    """

    network: str
    weights: str | None
    folder: Path
    limit: int = 0
    batch: int = 8
    calibration: int = 64
    weight_bits: int = 0
    image: int = 0
    method: str = "minmax"
    skip: tuple[str, ...] = ()
    threads: int = 1

    def __post_init__(self) -> None:
        for name, least in (("limit", 0), ("batch", 1), ("calibration", 1), ("image", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {least} or more")
        if self.weight_bits not in (0, 7, 8):
            raise ValueError(f"weight_bits is {self.weight_bits}; allowed: 7, 8, or 0 (choose)")


@dataclass(frozen=True)
class Outcome:
    """What came out: the accuracy, on how many, and the report of layers if one was wanted."""

    found: imagenet.Evaluation
    bits: int
    layers: AccuracyReport | None


def measure(options: Options, target: Any, console: Console, with_layers: bool) -> Outcome:
    """Quantize a network on some images of the folder, evaluate it and fp32 on the others."""
    import torch
    import tvm

    from topi_int8.frontend.torch import from_torch

    from . import models
    from .place import Graph

    torch.set_num_threads(options.threads)
    preprocess = imagenet.preprocess_of(options.network, options.weights, options.image)
    with console.status(f"{options.network}: load"):
        module, example = models.load(
            options.network, options.weights, batch=options.batch, image=preprocess.crop
        )
        with torch.inference_mode():
            classes = module(example).shape[-1]
    samples = find_samples(options.folder, classes)
    held_out, rest = imagenet.split(samples, options.calibration, options.limit)
    with console.status(f"{options.network}: import"):
        mod = from_torch(module, example)
    calibration = [x for x, _ in imagenet.batches(held_out, options.batch, preprocess)]
    bits = options.weight_bits or models.default_weight_bits(target)
    qdq = topi_int8.quantize(
        mod, calibration, method=options.method, skip=options.skip, weight_bits=bits
    )
    with console.status(f"{options.network}: compile"):
        int8 = Graph(tvm.compile(qdq, target=target))

    def fp32(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    count = -(-len(rest) // options.batch)
    data = imagenet.batches(rest, options.batch, preprocess)
    found = imagenet.evaluate(fp32, int8, track(data, "evaluating", total=count))
    layers = None
    if with_layers:
        seen = rest[: options.batch * _REPORT_BATCHES]
        batches = [x for x, _ in imagenet.batches(seen, options.batch, preprocess)]
        layers = topi_int8.accuracy_report(mod, qdq, batches, target=target)
    return Outcome(found, bits, layers)


def table(title: str, found: imagenet.Evaluation) -> Table:
    """Return the table of an evaluation."""
    out = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    out.add_column("")
    for column in ("images", "top-1", "top-5"):
        out.add_column(column, justify="right", no_wrap=True)
    for name, top in (("fp32, torch", found.fp32), ("int8", found.int8)):
        out.add_row(name, str(top.count), f"{top.top1:.2%}", f"{top.top5:.2%}")
    one, five = (
        100 * (getattr(found.int8, name) - getattr(found.fp32, name)) for name in ("top1", "top5")
    )
    out.add_row("int8 - fp32, points", "", f"{one:+.2f}", f"{five:+.2f}")
    out.caption = f"the same top-1 on {found.same} of {found.int8.count} images"
    return out


def to_document(options: Options, outcome: Outcome, head: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON values of a run."""
    found = outcome.found
    settings = {**options.__dict__, "folder": str(options.folder), "weight_bits": outcome.bits}
    accuracy = {
        name: {"images": top.count, "top1": top.top1, "top5": top.top5}
        for name, top in (("fp32", found.fp32), ("int8", found.int8))
    }
    return {**head, "options": settings, "accuracy": accuracy, "same_top1": found.same}


@app.command("accuracy")
def accuracy_command(
    folder: Annotated[
        Path, typer.Option("--imagenet", help="Yours: val/<wnid>/*.JPEG, or flat with a val.txt.")
    ],
    network: Annotated[str, typer.Option(help="A torchvision classifier.")] = "resnet50",
    weights: Annotated[
        str, typer.Option(help="torchvision's, as DEFAULT (downloads). Without: seeded ones.")
    ] = "",
    limit: Annotated[int, typer.Option(help="Evaluate so many images; 0: all.")] = 0,
    batch: Annotated[int, typer.Option(help="Images a run.")] = 8,
    calibration: Annotated[
        int, typer.Option(help="Images to calibrate on, which are not evaluated.")
    ] = 64,
    method: Annotated[str, typer.Option(help="How ranges are observed: quantize's.")] = "minmax",
    skip: Annotated[
        list[str] | None, typer.Option(help="A layer that stays float32; repeat for more.")
    ] = None,
    weight_bits: Annotated[int, typer.Option(help="7 or 8. Default: the target's faster.")] = 0,
    image: Annotated[int, typer.Option(help="Side of the crop; 0: the weights' own.")] = 0,
    isa: Isa = "host",
    target: TargetText = None,
    threads: Threads = 1,
    cpu: Cpu = "",
    layers: Annotated[
        Path | None, typer.Option("--layers", help="Write the accuracy report of layers as JSON.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw that report: .png, .svg, .pdf.")
    ] = None,
    json: Json = None,
    note: Note = "",
) -> None:
    """Top-1 and top-5 of fp32 and int8 on your own ImageNet folder."""
    console = make_console()
    try:
        options = Options(
            network, weights or None, folder, limit, batch, calibration, weight_bits, image,
            method, tuple(skip or ()), threads,
        )  # fmt: skip
        request = site.Request("", "", "", isa, target, threads, cpu_numbers(cpu))
        with site.opened(request) as where:
            outcome = measure(options, where.target, console, bool(layers or picture))
    except ImportError as error:
        raise fail(f"accuracy needs the extras `torch` and `images`: {error}") from None
    except (ValueError, OSError, RuntimeError) as error:
        raise fail(error) from None
    title = (
        f"{network}, {weights or 'seeded'} weights | {where.about['cpu']} | "
        f"{targets.isa_of(where.target)} | {outcome.bits}-bit weights"
    )
    console.print(table(title, outcome.found))
    if not weights:
        console.print(
            "Seeded weights know no classes: only how often int8 agrees with fp32 says something.",
            style="yellow",
        )
    if outcome.layers is not None:
        _write_layers(console, outcome.layers, layers, picture)
    if json is not None:
        head = where.record("accuracy", note)
        json.write_text(report.to_text(to_document(options, outcome, head)))


def _write_layers(
    console: Console, found: AccuracyReport, path: Path | None, picture: Path | None
) -> None:
    console.print(found.table())
    for line in demo.skip_lines(found.layers_to_skip()):
        console.print(line, markup=False, highlight=False)
    if path is not None:
        found.to_json(path)
    if picture is not None:
        try:
            found.plot(picture)
        except (ValueError, ImportError) as error:
            raise fail(error, code=1) from None
