"""The command ``parity``: the same quantized ONNX files in onnxruntime and here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from . import report, site
from .command import Cpu, Isa, Note, Rounds, TargetText, app, cpu_numbers, fail, make_console
from .rivals import Unavailable


@app.command("parity")
def parity_command(
    network: Annotated[
        list[str] | None,
        typer.Option(help="A torchvision classifier, or encoder; repeat. Default: thirteen."),
    ] = None,
    form: Annotated[
        list[str] | None, typer.Option(help="QDQ or QOperator; repeat. Default: both.")
    ] = None,
    isa: Isa = "host",
    target: TargetText = None,
    cpu: Cpu = "",
    image: Annotated[int, typer.Option(help="Side of the input image.")] = 224,
    inputs: Annotated[int, typer.Option(help="Inputs to compare on.")] = 64,
    calibration: Annotated[int, typer.Option(help="Inputs to calibrate on.")] = 16,
    min_time: Annotated[
        float, typer.Option(help="Seconds each engine is sampled; 0 times nothing.")
    ] = 1.0,
    rounds: Rounds = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all of it here.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the table here, as docs/parity.md.")
    ] = None,
    rows: Annotated[
        list[Path] | None,
        typer.Option(
            "--with", help="An earlier --json whose rows to show; without --network nothing else."
        ),
    ] = None,
    note: Note = "",
) -> None:
    """Quantized ONNX files in onnxruntime and here: outputs, classes, time."""
    console = make_console()
    try:
        from . import parity  # imports torch's frontend

        options = parity.Options(
            tuple(network or (() if rows else parity.NETWORKS)), tuple(form or parity.FORMS),
            image, inputs, calibration, min_time, rounds,
        )  # fmt: skip
        old = [
            row for path in rows or () for row in parity.from_document(json.loads(path.read_text()))
        ]
        request = site.Request("", "", "", isa, target, 1, cpu_numbers(cpu))
        head, found, failed = parity.run(request, options, note, console)
    except ImportError as error:
        raise fail(f"parity needs the extras `torch` and `onnx`: {error}") from None
    except Unavailable as error:
        raise fail(f"onnxruntime: {error}") from None
    except (ValueError, OSError) as error:
        raise fail(error) from None
    about, found = head["options"], parity.merged(old, found)
    title = f"{head['machine']['cpu']} | {about['isa']} | {about['onnxruntime']} | 1 thread"
    console.print(parity.table(found, title))
    for one in found:
        for name in dict.fromkeys(one.names):
            console.print(f"{one.network} {one.form}, not in integers: {name}", markup=False)
    document = parity.to_document(found, head)
    if json_path is not None:
        json_path.write_text(report.to_text(document))
    if markdown is not None:
        markdown.write_text(parity.to_markdown(document, found))
    for words in failed:
        console.print(words, markup=False)
    if failed:
        raise fail(f"{len(failed)} networks failed (see above)", code=1)
