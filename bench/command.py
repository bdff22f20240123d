"""What the commands of ``python -m bench`` share: the app, its options, how refusals are said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import compare, site, targets, workloads
from .results import LayerResult, with_best_peaks
from .rivals import Rival
from .run import RIVALS, Options, run_layers
from .shape_lines import SHAPES_DIR, Shape, find_batch, parse_line, read_shapes

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Per-layer micro-benchmarks of topi_int8, beside the peak of this core and the rivals.",
)

NARROWEST_TABLE = 200  # columns, where the output is no terminal that says its width

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
    int, typer.Option(help="8, or 7: weights that vpmaddubsw cannot saturate on; 4, 2.")
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
Model = Annotated[
    str,
    typer.Option(help="mca: predict the kernels of an ARM --target by llvm-mca; run nothing."),
]
ForcedName = Annotated[
    str, typer.Option("--strategy", help="With --model: this row of the table, not the first.")
]
Whole = Annotated[
    bool, typer.Option("--whole", help="With --model: whole layers too, their counts from qemu.")
]
Rpc = Annotated[str, typer.Option(help="HOST:PORT of TVM's RPC tracker: run on a board of it.")]
Key = Annotated[str, typer.Option(help="The board's key at the tracker; may name the target.")]
Cc = Annotated[
    str, typer.Option(help="C compiler that links for the board. Default: Debian's cross gcc.")
]
Note = Annotated[str, typer.Option(help="Words to keep in the JSON: cooling, kernel, who you are.")]
Compare = Annotated[
    Path | None,
    typer.Option("--compare", help="An earlier --json: compare by the ratio to a rival of both."),
]
Threshold = Annotated[
    float, typer.Option(help="With --compare: how many times slower a row counts as a regression.")
]
Why = Annotated[
    bool, typer.Option("--why", help="Print why faster strategies declined each layer.")
]


def make_console() -> Console:
    """Return the console of results: wide enough for a table where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, NARROWEST_TABLE))


def fail(message: object, code: int = 2) -> typer.Exit:
    """Print an error; return what to raise: status 2 for a refusal, 1 for what went wrong since."""
    Console(stderr=True, soft_wrap=True).print(f"error: {message}", markup=False)
    return typer.Exit(code)


def read_kind(
    kind: str, batches: list[str] | None, lines: list[str] | None, mb: int
) -> list[Shape]:
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


def cpu_numbers(text: str) -> tuple[int, ...]:
    """Return the cores of ``0,1``; ValueError for what is none."""
    if text and not all(part.isdigit() for part in text.split(",")):
        raise ValueError(f"cpu is {text!r}; allowed: core numbers, as 1 or 0,1")
    return tuple(int(part) for part in text.split(",") if part)


def counts(name: str, texts: Sequence[str]) -> tuple[int, ...]:
    """Return the different counts of an option that is repeated, or has several joined by commas.

    Raises
    ------
    ValueError
        For what is no integer of 1 or more.
    """
    parts = [part.strip() for text in texts for part in text.split(",")]
    for part in parts:
        if not part.isdigit() or int(part) < 1:
            raise ValueError(f"{name} is {','.join(texts)}; allowed: 1 or more, as 1 or 1,2")
    return tuple(dict.fromkeys(map(int, parts)))


def print_comparison(
    console: Console, old: dict[str, Any], new: dict[str, Any], threshold: float
) -> None:
    """Print two runs of one command compared.

    Raises
    ------
    typer.Exit
        With status 1 when rows became slower.
    """
    found = compare.compare(old, new)
    console.print(compare.table(found, threshold))
    for remark in compare.remarks(found):
        console.print(remark, markup=False, highlight=False)
    if slower := found.regressions(threshold):
        raise fail(f"{len(slower)} of {len(found.pairs)} rows regressed (see the table)", code=1)


def measure_layers(
    console: Console, shapes: Sequence[Shape], options: Options, opponents: list[Rival]
) -> list[LayerResult]:
    """Return the results of layers, saying which is run; the rivals are closed at the end."""
    results: list[LayerResult] = []
    try:
        with console.status("") as status:
            status.update(f"1/{len(shapes)} {shapes[0].format()}")
            for result in run_layers(list(shapes), options, opponents):
                results.append(result)
                if len(results) < len(shapes):
                    following = shapes[len(results)].format()
                    status.update(f"{len(results) + 1}/{len(shapes)} {following}")
    finally:
        for rival in opponents:
            rival.close()
    return with_best_peaks(results)


def layer_title(where: site.Site, options: Options) -> str:
    """Return the title of a table of layers: the machine, the instruction set, the cores."""
    return (
        f"{where.about['cpu']} | {targets.isa_of(where.target)} | {options.dtype} | "
        f"{options.threads} thread{'s'[: options.threads > 1]} {where.where}"
    )


def layer_run(command: str, where: site.Site, options: Options, note: str) -> dict[str, Any]:
    """Return how a JSON file of layers begins."""
    return {
        **where.record(command, note),
        "options": {
            "target": str(where.target), "isa": targets.isa_of(where.target),
            "dtype": options.dtype, "epilogue": options.epilogue or "default",
            "weight_bits": options.weight_bits, "threads": options.threads,
            "cores": list(where.cores), "min_time_s": options.min_time, "rounds": options.rounds,
        },
    }  # fmt: skip
