"""The demo: real networks quantized, compiled and run in int8, with torch's fp32 beside them.

Calibrated and tested on real photographs where the extra `images` is installed, else on synthetic
ones.

python -m bench.demo [--models resnet18 resnet50] [--weights DEFAULT] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from . import machine, models, photos, timing
from .place import HERE, Place

WIDTH = 132  # columns where the output is no terminal
COMPARED = 3  # images that layers are compared on: one of each test photograph
WORST = 5  # layers whose accuracy is shown


@dataclass
class Clock:
    """Seconds each stage took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, console: Console, name: str) -> Iterator[None]:
        """Show a stage while it runs; remember how long it took."""
        start = time.perf_counter()
        with console.status(f"{name} ..."):
            yield
        self.seconds[name] = time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Run the demo for the models the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"], metavar="NAME")
    parser.add_argument("--weights", help="DEFAULT: torchvision's pretrained (downloads)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--image", type=int, default=224, help="image size")
    parser.add_argument("--calibration", type=int, default=16, help="calibration images")
    parser.add_argument("--inputs", type=int, default=8, help="images to compare on")
    parser.add_argument(
        "--weight-bits", type=int, choices=(7, 8), help="default: 8 with VNNI or AMX, else 7"
    )
    args = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    with machine.pinned(args.threads):
        import torch

        import topi_int8

        torch.set_num_threads(args.threads)
        target = topi_int8.host_target()
        if args.weight_bits is None:
            args.weight_bits = models.default_weight_bits(target)
        console.print(
            f"[bold]{machine.model_name()}[/bold], {args.threads} thread(s), "
            f"{topi_int8.features(target).isas[0]}, {args.weight_bits}-bit weights"
        )
        images, words = _images()
        console.print(words, style="dim")
        summaries = []
        for name in args.models:
            try:
                module, example = models.load(name, args.weights, image=args.image)
            except (RuntimeError, ValueError) as error:  # a name or weights that cannot be had
                parser.exit(2, f"{parser.prog}: {error}\n")
            summaries.append(_run_model(console, name, module, example, images, args, target))
    console.print(_summary_table(summaries))


def _images() -> tuple[Any, str]:
    """Return who has images to calibrate and test on, and that in words."""
    try:
        found = photos.find()
    except photos.NoPhotographs as error:
        return models, f"seeded synthetic images: {error}"
    return found, str(found)


@dataclass(frozen=True)
class Summary:
    """One line of the closing table; times in ms, ratios in dB."""

    name: str
    int8_ms: float
    fp32_ms: float
    compile_seconds: float
    sqnr: float
    top1: tuple[int, int]


def _run_model(
    console: Console, name: str, module: Any, example: Any, images: Any, args: argparse.Namespace,
    target: Any,
) -> Summary:  # fmt: skip
    import torch
    import tvm
    from tvm import relax

    import topi_int8
    from topi_int8.frontend.torch import from_torch

    clock = Clock()
    console.rule(f"[bold]{name}[/bold]")
    with clock.stage(console, "import"):
        mod = from_torch(module, example)
    start = time.perf_counter()
    calibration = images.calibration_images(args.calibration, args.image)
    qdq = topi_int8.quantize(mod, calibration, weight_bits=args.weight_bits)
    clock.seconds["quantize"] = time.perf_counter() - start
    with clock.stage(console, "compile"):
        executable = tvm.compile(qdq, target=target)
    run = relax.VirtualMachine(executable, tvm.cpu())["main"]

    inputs = images.unseen_images(args.inputs, args.image)
    with clock.stage(console, "run"), torch.inference_mode():
        fp32 = np.concatenate([module(torch.from_numpy(x)).numpy() for x in inputs])
        int8 = np.concatenate([run(tvm.runtime.tensor(x)).numpy() for x in inputs])
    start = time.perf_counter()
    accuracy = topi_int8.accuracy_report(mod, qdq, inputs[:COMPARED], target=target)
    clock.seconds["compare layers"] = time.perf_counter() - start
    with clock.stage(console, "time layers"):
        rows = topi_int8.explain(qdq, target, show=False)
        times = layer_times(rows, target)
    console.print(layer_table(name, rows, times, {layer.name: layer for layer in accuracy.layers}))
    console.print(accuracy.table(worst=WORST))
    for line in skip_lines(accuracy.layers_to_skip(limit=WORST)):
        console.print(line, markup=False, highlight=False)
    counts = topi_int8.library_counts(executable)
    console.print("in the library: " + _counts(counts.instructions), style="dim")

    x, tensor = torch.from_numpy(inputs[0]), tvm.runtime.tensor(inputs[0])
    with clock.stage(console, "time the network"), torch.inference_mode():
        int8_ms, fp32_ms = _alternate(lambda: run(tensor), lambda: module(x))
    stages = "  ".join(f"{stage} {seconds:.1f} s" for stage, seconds in clock.seconds.items())
    console.print(stages, style="dim")
    return Summary(
        name,
        int8_ms,
        fp32_ms,
        clock.seconds["compile"],
        decibel(fp32, int8),
        (int(np.sum(fp32.argmax(1) == int8.argmax(1))), len(inputs)),
    )


def skip_lines(skips: Sequence[Any]) -> list[str]:
    """Return what `AccuracyReport.layers_to_skip` found, a line each."""
    found = [f"skip {one.name}: {one.reason}" for one in skips]
    return found or ["no layer stands out by its own error: none is worth leaving in float32"]


def _counts(instructions: dict[str, int]) -> str:
    """Return "123 vpdpbusd, 4 tdpbusd", the most frequent first."""
    ranked = sorted(instructions.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {name}" for name, count in ranked) or "no dot-product instruction"


def layer_times(rows: Any, target: Any, place: Place = HERE) -> dict[Any, float]:
    """Return µs of each distinct workload's kernel at a place, alone and warm."""
    from . import kernels

    workloads = {row.work for row in rows if not row.work.is_float}
    return {
        work: timing.Timing(tuple(kernels.build(work, target, place=place).sampler()(0.03))).min
        for work in workloads
    }


def _alternate(*calls: Callable[[], Any], rounds: int = 10) -> list[float]:
    """Return the fastest run of each, ms; they take turns, so that a slow moment meets all."""
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], (time.perf_counter() - start) * 1e3)
    return best


def decibel(reference: np.ndarray, value: np.ndarray) -> float:
    """Return the signal-to-noise ratio of `value` beside its reference, dB."""
    noise = np.sum((reference.astype("float64") - value) ** 2)
    return (
        float(10 * np.log10(np.sum(reference.astype("float64") ** 2) / noise)) if noise else np.inf
    )


def layer_table(name: str, rows: Any, times: dict[Any, float], errors: dict[str, Any]) -> Table:
    """Return the table of a network's layers: strategy, time, and error where there is one."""
    table = Table(title=f"{name}: its convolutions and matmuls in int8", title_justify="left")
    for column in ("layer", "shape", "strategy", "intrinsic"):
        table.add_column(column, no_wrap=True)
    for column in ("MMAC", "µs", "GOP/s", "SQNR dB"):
        table.add_column(column, justify="right", no_wrap=True)
    total = 0.0
    for row in rows:
        us, error = times.get(row.work), errors.get(row.name)
        total += us or 0.0
        table.add_row(
            row.name, row.shape, row.strategy, row.intrinsic, f"{row.macs / 1e6:.1f}",
            "-" if us is None else f"{us:.0f}",
            "-" if us is None else f"{2 * row.macs / us / 1e3:.0f}",
            "-" if error is None else f"{error.sqnr:.1f}",
        )  # fmt: skip
    macs = sum(row.macs for row in rows)
    table.add_section()
    gops = 2 * macs / total / 1e3 if total else 0.0
    table.add_row("sum", "", "", "", f"{macs / 1e6:.1f}", f"{total:.0f}", f"{gops:.0f}", "")
    table.caption = (
        "µs: the layer's kernel alone, warm, the fastest run. SQNR: int8 output, dequantized, "
        "against the fp32 layer's"
    )
    return table


def _summary_table(summaries: list[Summary]) -> Table:
    table = Table(title="int8 by topi_int8 beside torch eager fp32", title_justify="left")
    table.add_column("network", no_wrap=True)
    for column in ("int8 ms", "torch fp32 ms", "ratio", "SQNR dB", "same top-1", "compile s"):
        table.add_column(column, justify="right")
    for s in summaries:
        table.add_row(
            s.name, f"{s.int8_ms:.2f}", f"{s.fp32_ms:.1f}", f"{s.fp32_ms / s.int8_ms:.1f}x",
            f"{s.sqnr:.1f}", f"{s.top1[0]} of {s.top1[1]}", f"{s.compile_seconds:.1f}",
        )  # fmt: skip
    table.caption = "ms: the fastest of alternating runs, batch 1, the same cores"
    return table


if __name__ == "__main__":
    main()
