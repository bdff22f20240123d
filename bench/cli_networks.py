"""The commands about whole networks: ``e2e`` and ``rss``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import compare, demo, report, site, targets
from .command import (
    Cc,
    Compare,
    Cpu,
    Isa,
    Key,
    Note,
    Rounds,
    Rpc,
    TargetText,
    Threads,
    Threshold,
    TvmLimit,
    app,
    counts,
    cpu_numbers,
    fail,
    make_console,
    print_comparison,
)

Image = Annotated[int, typer.Option(help="Side of the input image.")]
Calibration = Annotated[int, typer.Option(help="Images to calibrate on.")]
WeightBits = Annotated[int, typer.Option(help="7 or 8. Default: the target's faster.")]


def _names(rivals: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in rivals.split(",") if name and name != "none"))


@app.command("e2e")
def e2e_command(
    network: Annotated[
        list[str] | None,
        typer.Option(help="A torchvision classifier; repeat for more. Default: resnet18."),
    ] = None,
    isa: Isa = "host",
    target: TargetText = None,
    threads: Annotated[
        list[str] | None, typer.Option(help="Threads of every engine; repeat, or 1,2. Default: 1.")
    ] = None,
    batch: Annotated[
        list[str] | None, typer.Option(help="Images a run; repeat, or 1,64. Default: 1.")
    ] = None,
    cpu: Cpu = "",
    image: Image = 224,
    calibration: Calibration = 16,
    inputs: Annotated[int, typer.Option(help="Images to compare with torch's fp32 on.")] = 4,
    weight_bits: WeightBits = 0,
    rivals: Annotated[
        str,
        typer.Option(
            help="Of openvino, ort (int8), torch, fp32 (our schedules), tvm (stock); or none."
        ),
    ] = "openvino,ort,torch,fp32,tvm",
    tvm_limit: TvmLimit = 5.0,
    min_time: Annotated[float, typer.Option(help="Seconds each engine is sampled.")] = 2.0,
    rounds: Rounds = 5,
    layers: Annotated[bool, typer.Option(help="Time every layer of int8, too.")] = True,
    check: Annotated[
        bool, typer.Option("--check", help="Compare int8 with this machine's own result.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all of it here.")] = None,
    compare_with: Compare = None,
    threshold: Threshold = compare.THRESHOLD,
    rpc: Rpc = "",
    key: Key = "",
    cc: Cc = "",
    note: Note = "",
) -> None:
    """Whole networks: int8 beside OpenVINO, onnxruntime, torch and TVM."""
    from . import e2e  # imports torch's frontend

    console = make_console()
    names = _names(rivals)
    try:
        old = None if compare_with is None else compare.read(compare_with, "networks")
        thread_counts = counts("threads", threads or ["1"])
        batches = counts("batch", batch or ["1"])
        request = site.Request(rpc, key, cc, isa, target, thread_counts[0], cpu_numbers(cpu))
        settings = {
            "image": image, "calibration": calibration, "inputs": inputs,
            "weight_bits": weight_bits, "rivals": names, "tvm_limit": tvm_limit,
            "min_time": min_time, "rounds": rounds, "layers": layers, "check": check,
        }  # fmt: skip
        plan = e2e.Plan(tuple(network or ["resnet18"]), batches, settings)
        parts = e2e.run_each(request, thread_counts, plan, note, console)
    except ImportError as error:
        raise fail(f"e2e needs the extra `torch`: {error}") from None
    except (ValueError, OSError) as error:
        raise fail(error) from None
    first, results = parts[0], [result for part in parts for result in part.results]
    for result in results:
        if layers and not result.error:
            title = f"{result.name}, batch {result.batch}" if result.batch > 1 else result.name
            console.print(demo.layer_table(title, result.rows, result.layer_us, {}))
    where = "; ".join(f"{count} thread{'s'[: count > 1]} {part.where}"
                      for count, part in zip(thread_counts, parts, strict=True))  # fmt: skip
    title = f"{first.head['machine']['cpu']} | {first.isa} | {first.bits}-bit weights | {where}"
    console.print(e2e.table(results, title, names, first.caveat))
    document = e2e.to_document(
        parts,
        {
            "threads": list(thread_counts), "batch": list(batches), "image": image,
            "calibration": calibration, "inputs": inputs, "min_time_s": min_time,
            "rounds": rounds,
        },
    )  # fmt: skip
    if json_path is not None:
        json_path.write_text(report.to_text(document))
    failed = [result for result in results if result.error]
    if old is not None:
        print_comparison(console, old, document, threshold)
    if failed:
        raise fail(f"{len(failed)} of {len(results)} networks failed (see the table)", code=1)


@app.command("rss")
def rss_command(
    network: Annotated[
        list[str] | None,
        typer.Option(help="A torchvision classifier; repeat for more. Default: resnet50."),
    ] = None,
    isa: Isa = "host",
    target: TargetText = None,
    threads: Threads = 1,
    batch: Annotated[int, typer.Option(help="Images a run.")] = 1,
    cpu: Cpu = "",
    image: Image = 224,
    calibration: Calibration = 16,
    weight_bits: WeightBits = 0,
    rivals: Annotated[
        str,
        typer.Option(
            help="Of openvino, ort (int8), fp32 (our schedules), tvm, "
            "library (int8, weights inside); or none."
        ),
    ] = "openvino,ort,fp32,tvm,library",
    tvm_limit: TvmLimit = 10.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all of it here.")] = None,
    note: Note = "",
) -> None:
    """Peak resident memory of a fresh process that loads a network and runs it once."""
    console = make_console()
    try:
        from . import rss  # imports torch's frontend

        request = site.Request("", "", "", isa, target, threads, cpu_numbers(cpu))
        with site.opened(request) as where:
            options = rss.Options(
                where.target, threads, batch, image, calibration, weight_bits,
                _names(rivals), tvm_limit,
            )  # fmt: skip
            found = {
                name: rss.measure(name, options, console) for name in network or ["resnet50"]
            }
    except ImportError as error:
        raise fail(f"rss needs the extra `torch`: {error}") from None
    except (ValueError, OSError) as error:
        raise fail(error) from None
    console.print(rss.table(found, f"{where.about['cpu']} | {targets.isa_of(where.target)}"))
    if json_path is not None:
        settings = {
            "target": str(where.target), "isa": targets.isa_of(where.target), "threads": threads,
            "batch": batch, "image": image, "calibration": calibration,
            "weight_bits": options.bits,
        }  # fmt: skip
        run = {**where.record("rss", note), "options": settings}
        json_path.write_text(report.to_text(rss.to_document(found, run)))
    if failed := [name for name, engines in found.items() if engines["int8"].peak is None]:
        raise fail(f"{', '.join(failed)}: int8 did not run (see the table)", code=1)
