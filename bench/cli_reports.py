"""The commands that judge many layers together, and that write the README."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import cliffs, readme, report, scaling, site
from .command import (
    Batch,
    Check,
    Cpu,
    Dtype,
    EpilogueText,
    Isa,
    Json,
    Line,
    MinTime,
    Note,
    Rounds,
    TargetText,
    Threads,
    TvmLimit,
    WeightBits,
    app,
    counts,
    cpu_numbers,
    fail,
    layer_run,
    layer_title,
    make_console,
    measure_layers,
    read_kind,
)
from .run import Options, make_rivals

# Beside the layers of many networks, a rival doubles the time.
Rivals = Annotated[str, typer.Option("--rivals", help="Of tvm, onednn; or none.")]


@app.command("cliffs")
def cliffs_command(
    batch: Batch = None,
    shape: Line = None,
    isa: Isa = "host",
    target: TargetText = None,
    threads: Threads = 1,
    cpu: Cpu = "",
    min_time: MinTime = 0.05,
    rounds: Rounds = 3,
    rivals: Rivals = "none",
    tvm_limit: TvmLimit = 1.0,
    dtype: Dtype = "u8s8",
    epilogue: EpilogueText = "",
    weight_bits: WeightBits = 8,
    check: Check = False,
    limit: Annotated[
        float, typer.Option(help="Share of the neighbour's efficiency below which is a cliff.")
    ] = cliffs.LIMIT,
    max_distance: Annotated[
        float, typer.Option(help="From its nearest, beyond which a layer has no neighbour.")
    ] = cliffs.MAX_DISTANCE,
    json: Json = None,
    note: Note = "",
) -> None:
    """Layers outside ResNet, each against its nearest neighbour there: none may fall off a cliff.

    Exit status 1 where one does.
    """
    console = make_console()
    try:
        batches = batch or ([] if shape else [cliffs.SHAPES])
        shapes = read_kind("conv", batches, shape, 0)
        request = site.Request("", "", "", isa, target, threads, cpu_numbers(cpu))
        opponents = make_rivals(rivals, tvm_limit)
        with site.opened(request) as where:
            options = Options(
                where.target, dtype, epilogue, weight_bits, threads, min_time, rounds, check
            )
            planned = cliffs.plan(shapes, max_distance)
            results = measure_layers(console, planned, options, opponents)
    except (ValueError, OSError) as error:
        raise fail(error) from None
    held = cliffs.hold(shapes, results, max_distance)
    titles = {rival.name: rival.title for rival in opponents}
    console.print(cliffs.table(held, layer_title(where, options), titles, limit))
    if json is not None:
        run = layer_run("cliffs", where, options, note)
        json.write_text(report.to_text(cliffs.to_document(held, run, limit)))
    found = sum(one.is_cliff(limit) for one in held)
    unknown = sum(one.is_unknown for one in held)
    if found or unknown:
        words = f"{found} of {len(held)} layers are cliffs; {unknown} could not be held"
        raise fail(f"{words} (see the table)", code=1)


@app.command("scaling")
def scaling_command(
    batches: Annotated[list[str] | None, typer.Option(help="Batches, as 1,8,64.")] = None,
    images: Annotated[list[str] | None, typer.Option(help="Sides of the image.")] = None,
    channels: Annotated[list[str] | None, typer.Option(help="Input channels.")] = None,
    isa: Isa = "host",
    target: TargetText = None,
    threads: Threads = 1,
    cpu: Cpu = "",
    min_time: MinTime = 0.05,
    rounds: Rounds = 3,
    rivals: Rivals = "none",
    tvm_limit: TvmLimit = 1.0,
    dtype: Dtype = "u8s8",
    check: Check = False,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw the costs: .png, .svg, .pdf.")
    ] = None,
    json: Json = None,
    note: Note = "",
) -> None:
    """The cost of a few layers against batch (1..256), image size and channels."""
    console = make_console()
    asked = {"batch": batches, "image": images, "channels": channels}
    try:
        axes = {
            axis: counts(axis, asked[axis]) if asked[axis] else values
            for axis, values in scaling.AXES.items()
        }
        cases = scaling.cases(axes)
        request = site.Request("", "", "", isa, target, threads, cpu_numbers(cpu))
        opponents = make_rivals(rivals, tvm_limit)
        with site.opened(request) as where:
            options = Options(
                where.target, dtype, threads=threads, min_time=min_time, rounds=rounds,
                check=check,
            )  # fmt: skip
            results = measure_layers(console, [c.shape for c in cases], options, opponents)
    except (ValueError, OSError) as error:
        raise fail(error) from None
    found = list(zip(cases, results, strict=True))
    titles = {rival.name: rival.title for rival in opponents}
    console.print(scaling.table(found, layer_title(where, options), titles))
    document = scaling.to_document(found, layer_run("scaling", where, options, note))
    if json is not None:
        json.write_text(report.to_text(document))
    if picture is not None:
        try:
            scaling.draw(picture, document)
        except (ValueError, ImportError) as error:
            raise fail(error, code=1) from None
    if failed := sum(bool(result.error) for result in results):
        raise fail(f"{failed} of {len(results)} layers failed (see the table)", code=1)


@app.command("readme")
def readme_command(
    json_paths: Annotated[
        list[Path] | None,
        typer.Option("--json", help="Files of earlier runs; repeat. Default: run the benches."),
    ] = None,
    block: Annotated[
        list[str] | None,
        typer.Option(help=f"Without --json: of {', '.join(readme.BLOCKS)}. Default: all."),
    ] = None,
    path: Annotated[Path, typer.Option("--readme", help="The file.")] = readme.README,
) -> None:
    """Refresh the measured tables of README.md, from files or by running the benches."""
    console = make_console()
    try:
        if json_paths and block:
            raise ValueError(f"block is {','.join(block)}; allowed without --json")
        text = path.read_text()
        readme.write(text, {})  # whether its markers are right, before anything runs
        paths = json_paths or readme.measure(block or list(readme.BLOCKS), console.print)
        rendered = readme.render(readme.read(paths))
        path.write_text(readme.write(text, rendered))
    except (ValueError, OSError, RuntimeError) as error:
        raise fail(error) from None
    console.print(f"{path}: {', '.join(rendered)}")
