"""The command line: ``python -m bench conv | dense | peaks | shapes``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from . import machine, peaks, report, targets, workloads
from .results import LayerResult, with_best_peaks
from .run import RIVALS, Options, make_rivals, run_layers
from .shape_lines import SHAPES_DIR, Shape, find_batch, parse_line, read_shapes

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Per-layer micro-benchmarks of topi_int8, beside the peak of this core and the rivals.",
)

NARROWEST_TABLE = 160  # columns, where the output is no terminal that says its width

Batch = Annotated[
    list[str] | None,
    typer.Option(help="Shape file in benchdnn's syntax; a bare name is looked up in bench/shapes."),
]
Line = Annotated[
    list[str] | None, typer.Option("--shape", help="Shape line, as 'ic64ih56oc64kh3ph1n\"a*3\"'.")
]
Isa = Annotated[str, typer.Option(help=f"Instruction set: {', '.join(targets.ISAS)}.")]
TargetText = Annotated[
    str | None, typer.Option("--target", help="TVM Target (JSON or tag) instead of --isa.")
]
Threads = Annotated[int, typer.Option(help="Threads of every kernel and rival.")]
Cpu = Annotated[
    str, typer.Option(help="Cores to pin to, as 1 or 0,1. Default: the last ones allowed.")
]
MinTime = Annotated[float, typer.Option(help="Seconds each engine is sampled a layer.")]
Rounds = Annotated[int, typer.Option(help="Alternations between ours and the rivals.")]
RivalNames = Annotated[str, typer.Option("--rivals", help=f"Of {', '.join(RIVALS)}; or none.")]
TvmLimit = Annotated[
    float, typer.Option(help="Skip TVM's default where one run is estimated longer, seconds.")
]
Dtype = Annotated[str, typer.Option(help=f"Data and weight: {', '.join(workloads.DTYPES)}.")]
WeightBits = Annotated[
    int, typer.Option(help="8, or 7: weights that vpmaddubsw cannot saturate on.")
]
EpilogueText = Annotated[
    str, typer.Option(help="As bias+relu+u8 (the default), bias+sum+relu+s8, s32.")
]
Mb = Annotated[int, typer.Option(help="Batch of every convolution; 0 keeps the lines' own.")]
Csv = Annotated[Path | None, typer.Option(help="Write the rows here as CSV.")]
Json = Annotated[Path | None, typer.Option(help="Write the rows, machine and options as JSON.")]
Check = Annotated[
    bool, typer.Option("--check", help="Compare each result with the numpy reference first.")
]
Why = Annotated[
    bool, typer.Option("--why", help="Print why faster strategies declined each layer.")
]


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, NARROWEST_TABLE))


def _fail(message: object, code: int = 2) -> typer.Exit:
    Console(stderr=True, soft_wrap=True).print(f"error: {message}", markup=False)
    return typer.Exit(code)


def _shapes(kind: str, batches: list[str] | None, lines: list[str] | None, mb: int) -> list[Shape]:
    """Return the shapes asked for, all of one kind; ValueError or OSError otherwise."""
    if mb < 0:
        raise ValueError(f"mb is {mb}; allowed: 0 or more")
    shapes = [shape for name in batches or [] for shape in read_shapes(find_batch(name), mb)]
    shapes += [_with_batch(parse_line(line), mb) for line in lines or []]
    if not shapes:
        known = ", ".join(sorted(path.name for path in SHAPES_DIR.iterdir()))
        raise ValueError(f"nothing to run: give --batch FILE ({known}) or --shape LINE")
    for shape in shapes:
        if shape.kind != kind:
            raise ValueError(f"{shape.format()} is a {shape.kind} line: use `bench {shape.kind}`")
    return shapes


def _with_batch(shape: Shape, mb: int) -> Shape:
    return type(shape)(**{**shape.__dict__, "mb": mb}) if mb and shape.kind == "conv" else shape


def _cpus(text: str) -> tuple[int, ...]:
    if text and not all(part.isdigit() for part in text.split(",")):
        raise ValueError(f"cpu is {text!r}; allowed: core numbers, as 1 or 0,1")
    return tuple(int(part) for part in text.split(",") if part)


def _bench(
    kind: str, batch: list[str] | None, shape: list[str] | None, isa: str, target: str | None,
    threads: int, cpu: str, min_time: float, rounds: int, rivals: str, tvm_limit: float,
    dtype: str, epilogue: str, weight_bits: int, mb: int, csv: Path | None,
    json_path: Path | None, check: bool, why: bool,
) -> None:  # fmt: skip
    console = _console()
    try:
        shapes = _shapes(kind, batch, shape, mb)
        cpus = _cpus(cpu)
        opponents = make_rivals(rivals, tvm_limit)
        with machine.pinned(threads, cpus) as cores:
            chosen = targets.choose(isa, target, threads)
            options = Options(
                chosen, dtype, epilogue, weight_bits, threads, min_time, rounds, check
            )
            results = with_best_peaks(_run(console, shapes, options, opponents))
    except (ValueError, OSError) as error:
        raise _fail(error) from None
    titles = {rival.name: rival.title for rival in opponents}
    run = {
        "machine": machine.describe(),
        "options": {
            "target": str(chosen), "dtype": dtype, "epilogue": epilogue or "default",
            "weight_bits": weight_bits,
            "threads": threads, "cores": list(cores), "min_time_s": min_time, "rounds": rounds,
            "mb": mb, "batch": batch or [], "shape": shape or [],
        },
        "rivals": {rival.name: getattr(rival, "version", "") for rival in opponents},
    }  # fmt: skip
    title = (
        f"{run['machine']['cpu']} | {targets.isa_of(chosen)} | {dtype} | "
        f"{threads} thread{'s'[: threads > 1]} on {','.join(map(str, cores))}"
    )
    console.print(report.table(results, title, titles, _caption(options, titles)))
    if why:
        _print_why(console, results)
    if csv is not None:
        csv.write_text(report.to_csv(results, titles))
    if json_path is not None:
        json_path.write_text(report.to_json(results, run))
    failed = [result for result in results if result.error]
    if failed:
        raise _fail(f"{len(failed)} of {len(results)} layers failed (see the table)", code=1)


def _caption(options: Options, titles: dict[str, str]) -> str:
    """Return what a reader must know to compare: whose products saturate."""
    without_vnni = targets.isa_of(options.target) in ("avx512_bw", "avx2")
    if "onednn" not in titles or not without_vnni or options.dtype == "f32":
        return ""
    exact = "ours is exact" if options.weight_bits == 8 else "on these 7-bit weights both are exact"
    return f"oneDNN without VNNI uses vpmaddubsw, which saturates on full-range weights; {exact}."


def _run(
    console: Console, shapes: list[Shape], options: Options, opponents: list[Any]
) -> list[LayerResult]:
    results: list[LayerResult] = []
    try:
        with console.status("") as status:
            status.update(f"1/{len(shapes)} {shapes[0].format()}")
            for result in run_layers(shapes, options, opponents):
                results.append(result)
                if len(results) < len(shapes):
                    following = shapes[len(results)].format()
                    status.update(f"{len(results) + 1}/{len(shapes)} {following}")
    finally:
        for rival in opponents:
            rival.close()
    return results


def _print_why(console: Console, results: list[LayerResult]) -> None:
    for result in results:
        console.print(f"{result.shape.format()}: {result.strategy or 'none'}", markup=False)
        for name, reason in result.declined:
            console.print(f"    not {name}: {reason}", markup=False)


def _command(kind: str, name: str, what: str) -> None:
    """Register one of the two commands: they differ in the kind of line they take."""

    @app.command(name, help=what)
    def command(
        batch: Batch = None,
        shape: Line = None,
        isa: Isa = "host",
        target: TargetText = None,
        threads: Threads = 1,
        cpu: Cpu = "",
        min_time: MinTime = 0.1,
        rounds: Rounds = 5,
        rivals: RivalNames = "tvm,onednn",
        tvm_limit: TvmLimit = 1.0,
        dtype: Dtype = "u8s8",
        epilogue: EpilogueText = "",
        weight_bits: WeightBits = 8,
        mb: Mb = 0,
        csv: Csv = None,
        json: Json = None,
        check: Check = False,
        why: Why = False,
    ) -> None:
        _bench(
            kind, batch, shape, isa, target, threads, cpu, min_time, rounds, rivals, tvm_limit,
            dtype, epilogue, weight_bits, mb, csv, json, check, why,
        )  # fmt: skip


_command("conv", "conv", "Convolution layers.")
_command("dense", "dense", "Dense layers and batched matmuls (lines as 128x768:768x3072).")


@app.command("peaks")
def peaks_command(
    cpu: Cpu = "",
    min_time: MinTime = 0.25,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write them as JSON.")] = None,
) -> None:
    """Measured peaks of one core: our own loops, every operand in registers."""
    console = _console()
    here, found = peaks.runnable(), {}
    try:
        with machine.pinned(1, _cpus(cpu)) as cores:
            for loop in here:
                found[loop.name] = peaks.measure(loop, min_time)
    except ValueError as error:
        raise _fail(error) from None
    about = machine.describe()
    out = Table(title=f"{about['cpu']} | core {cores[0]}", title_justify="left")
    out.add_column("loop")
    out.add_column("GOP/s", justify="right")
    for loop in peaks.LOOPS:
        note = "" if loop.exact else " (products may saturate)"
        value = f"{found[loop.name]:,.1f}" if loop.name in found else "not on this CPU"
        out.add_row(loop.name + note, value)
    console.print(out)
    if json_path is not None:
        document = {"machine": about, "core": cores[0], "gops": found}
        json_path.write_text(json.dumps(document, indent=2) + "\n")


@app.command("shapes")
def shapes_command() -> None:
    """The shape files of bench/shapes."""
    out = Table("file", "kind", "lines", "layers", "GMACs")
    for path in sorted(SHAPES_DIR.iterdir()):
        shapes = read_shapes(path)
        kinds = "+".join(sorted({shape.kind for shape in shapes}))
        layers = sum(shape.count for shape in shapes)
        gmacs = sum(shape.macs * shape.count for shape in shapes) / 1e9
        out.add_row(path.name, kinds, str(len(shapes)), str(layers), f"{gmacs:.3f}")
    _console().print(out)


def main() -> None:
    """Run the command line."""
    sys.exit(app(prog_name="python -m bench"))
