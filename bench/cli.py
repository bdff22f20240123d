"""The command line: ``python -m bench`` and the name of a command below."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from . import (
    arm_core,
    cli_accuracy,
    cli_bits,
    cli_networks,
    cli_parity,
    cli_reports,
    compare,
    emulated,
    insn_count,
    machine,
    mca,
    peaks,
    predict,
    predict_report,
    report,
    roofline,
    seed_table,
    site,
    targets,
)
from .command import (
    Batch,
    Cc,
    Check,
    Compare,
    Cpu,
    Csv,
    Dtype,
    EpilogueText,
    ForcedName,
    Isa,
    Json,
    Key,
    Line,
    Mb,
    MinTime,
    Model,
    Note,
    RivalNames,
    Rounds,
    Rpc,
    TargetText,
    Threads,
    Threshold,
    TvmLimit,
    WeightBits,
    Whole,
    Why,
    app,
    cpu_numbers,
    fail,
    layer_run,
    layer_title,
    make_console,
    measure_layers,
    print_comparison,
    read_kind,
)
from .published import run as published
from .published import tables as published_tables
from .published.workers import WorkerError
from .run import Options, make_rivals
from .shape_lines import SHAPES_DIR, read_shapes

# Importing them registers their commands.
__all__ = [
    "app", "cli_accuracy", "cli_bits", "cli_networks", "cli_parity", "cli_reports", "main"
]  # fmt: skip


def _bench(
    kind: str, batch: list[str] | None, shape: list[str] | None, isa: str, target: str | None,
    threads: int, cpu: str, min_time: float, rounds: int, rivals: str, tvm_limit: float,
    dtype: str, epilogue: str, weight_bits: int, mb: int, csv: Path | None,
    json_path: Path | None, check: bool, why: bool, rpc: str, key: str, cc: str, note: str,
    compare_with: Path | None, threshold: float, picture: Path | None,
) -> None:  # fmt: skip
    console = make_console()
    try:
        old = None if compare_with is None else compare.read(compare_with, "layers")
        shapes = read_kind(kind, batch, shape, mb)
        request = site.Request(rpc, key, cc, isa, target, threads, cpu_numbers(cpu))
        opponents = make_rivals(rivals, tvm_limit)
        if rpc:
            opponents = [rival for rival in opponents if rival.name != "onednn"]
        with site.opened(request) as where:
            options = Options(
                where.target, dtype, epilogue, weight_bits, threads, min_time, rounds, check,
                where.place,
            )  # fmt: skip
            results = measure_layers(console, shapes, options, opponents)
            speeds = {}
            if picture is not None and not rpc:
                speeds = roofline.bandwidths(threads, where.cores[0])
    except (ValueError, OSError) as error:
        raise fail(error) from None
    titles = {rival.name: rival.title for rival in opponents}
    run = layer_run(kind, where, options, note)
    run["options"] |= {"mb": mb, "batch": batch or [], "shape": shape or []}
    run["rivals"] = {rival.name: getattr(rival, "version", "") for rival in opponents}
    run["bandwidth_gbs"] = speeds
    caption = " ".join(filter(None, (where.caveat, _caption(options, titles))))
    console.print(report.table(results, layer_title(where, options), titles, caption))
    if why:
        _print_why(console, results)
    if csv is not None:
        csv.write_text(report.to_csv(results, titles))
    document = report.to_document(results, run)
    if json_path is not None:
        json_path.write_text(report.to_text(document))
    if picture is not None:
        try:
            roofline.draw(picture, document)
        except (ValueError, ImportError) as error:
            raise fail(error, code=1) from None
    if old is not None:
        print_comparison(console, old, document, threshold)
    failed = [result for result in results if result.error]
    if failed:
        raise fail(f"{len(failed)} of {len(results)} layers failed (see the table)", code=1)


def _predict(
    kind: str, batch: list[str] | None, shape: list[str] | None, model: str, target: str | None,
    dtype: str, epilogue: str, weight_bits: int, mb: int, csv: Path | None,
    json_path: Path | None, why: bool, whole: bool, force: str,
) -> None:  # fmt: skip
    """Predict instead of measure."""
    console = make_console()
    try:
        if model not in predict.MODELS:
            raise ValueError(f"model is {model!r}; allowed: {', '.join(predict.MODELS)}")
        shapes = read_kind(kind, batch, shape, mb)
        chosen = arm_core.choose(target)
        options = {"dtype": dtype, "epilogue": epilogue, "weight_bits": weight_bits}
        Options(chosen.target, **options)  # refuses what is not allowed
        found = list(predict.predict_layers(shapes, chosen, whole=whole, force=force, **options))
        console.print(predict_report.table(found, chosen, dtype))
    except (ValueError, OSError, mca.McaError) as error:
        raise fail(error) from None
    if why:
        _print_why(console, found)
    if csv is not None:
        csv.write_text(predict_report.to_csv(found))
    if json_path is not None:
        run = {"machine": machine.describe(), "options": {"target": str(chosen.target), **options}}
        json_path.write_text(predict_report.to_json(found, run))
    failed = [prediction for prediction in found if prediction.error]
    if failed:
        raise fail(f"{len(failed)} of {len(found)} layers failed (see the table)", code=1)


def _caption(options: Options, titles: dict[str, str]) -> str:
    """Return what a reader must know to compare: whose products saturate."""
    without_vnni = targets.isa_of(options.target) in ("avx512_bw", "avx2")
    if options.place.remote:
        return "No peak is measured on a board, and oneDNN does not run there."
    if "onednn" not in titles or not without_vnni or options.dtype == "f32":
        return ""
    exact = "ours is exact" if options.weight_bits == 8 else "on these 7-bit weights both are exact"
    return f"oneDNN without VNNI uses vpmaddubsw, which saturates on full-range weights; {exact}."


def _print_why(console: Console, results: list[Any]) -> None:
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
        model: Model = "",
        whole: Whole = False,
        force: ForcedName = "",
        rpc: Rpc = "",
        key: Key = "",
        cc: Cc = "",
        note: Note = "",
        compare_with: Compare = None,
        threshold: Threshold = compare.THRESHOLD,
        picture: Annotated[
            Path | None,
            typer.Option("--roofline", help="Draw GOP/s beside the bounds here: .png, .svg, .pdf."),
        ] = None,
    ) -> None:
        if model and rpc:
            raise fail(f"rpc is {rpc!r}; allowed without --model, which runs nothing")
        if model:
            _predict(kind, batch, shape, model, target, dtype, epilogue, weight_bits, mb, csv,
                     json, why, whole, force)  # fmt: skip
            return
        _bench(
            kind, batch, shape, isa, target, threads, cpu, min_time, rounds, rivals, tvm_limit,
            dtype, epilogue, weight_bits, mb, csv, json, check, why, rpc, key, cc, note,
            compare_with, threshold, picture,
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
    console = make_console()
    here, found = peaks.runnable(), {}
    try:
        with machine.pinned(1, cpu_numbers(cpu)) as cores:
            for loop in here:
                found[loop.name] = peaks.measure(loop, min_time)
    except ValueError as error:
        raise fail(error) from None
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


@app.command("count")
def count_command(
    batch: Batch = None,
    shape: Line = None,
    target: TargetText = "cortex-a72",
    dtype: Dtype = "u8s8",
    cpu: Annotated[str, typer.Option(help="qemu's CPU; by default one with that ISA.")] = "",
    rivals: Annotated[str, typer.Option(help="ort, or none.")] = "ort",
    mb: Mb = 0,
    csv: Csv = None,
    json: Json = None,
) -> None:
    """Instructions of whole convolution layers under qemu, beside onnxruntime's."""
    console = make_console()
    try:
        if rivals not in ("ort", "none"):
            raise ValueError(f"rivals is {rivals!r}; allowed: ort, none")
        shapes = read_kind("conv", batch, shape, mb)
        chosen = arm_core.choose(target)
        cpu = cpu or chosen.qemu_cpu
        found, version = insn_count.count_layers(shapes, chosen, dtype, cpu, rivals == "ort")
    except (ValueError, OSError, mca.McaError, emulated.EmulatorError) as error:
        raise fail(error) from None
    title = f"instructions under qemu -cpu {cpu} | compiled for {target} | {dtype}"
    console.print(insn_count.table(found, f"{title} | onnxruntime {version or 'not run'}"))
    if csv is not None:
        csv.write_text(insn_count.to_csv(found))
    if json is not None:
        options = {"target": str(chosen.target), "cpu": cpu, "dtype": dtype, "onnxruntime": version}
        json.write_text(insn_count.to_json(found, {"options": options}))
    if any(count.instructions is None for count in found):
        raise fail("some layers failed (see the table)", code=1)


@app.command("seed-table")
def seed_table_command() -> None:
    """Published Cortex-A72 numbers beside our strategies' predictions (takes minutes)."""
    try:
        found, peak = seed_table.predict_all()
    except (OSError, mca.McaError) as error:
        raise fail(error) from None
    make_console().print(seed_table.table(found, peak))


@app.command("tables")
def tables_command(
    only: Annotated[
        list[str] | None, typer.Option("--table", help=f"Of {', '.join(published.TABLES)}.")
    ] = None,
    threads: Threads = 1,
    min_time: MinTime = 0.5,
    rounds: Rounds = 5,
    batch: Annotated[list[int] | None, typer.Option(help="Batches of the third table.")] = None,
    predict_board: Annotated[
        bool, typer.Option("--predict/--no-predict", help="Predict the published board's cells.")
    ] = True,
    json: Json = None,
) -> None:
    """The published tables again: TVM 0.17 with Relay beside Relax (takes about half an hour)."""
    console = make_console()
    try:
        options = published.Options(
            threads, min_time, rounds, tuple(batch or published_tables.BATCHES), predict_board
        )
        found = published.run(only or (), options, console)
    except (ValueError, OSError, WorkerError) as error:
        raise fail(error) from None
    if json is not None:
        json.write_text(published.to_json(found))


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
    make_console().print(out)


def main() -> None:
    """Run the command line."""
    sys.exit(app(prog_name="python -m bench"))
