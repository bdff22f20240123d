"""The command line: ``topi-int8`` (or ``python -m topi_int8``) and the name of a command below.

Exit status: 0; 2 where something is refused, with the argument, its value and what is allowed; 1
where something went wrong since.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

import topi_int8

from . import artifact, cli_text, images, samples
from .frontend import files
from .frontend.quantized import is_quantized
from .images import Preprocessing
from .quantize import OBSERVERS
from .quantize.qparams import WEIGHT_MAX
from .save import inputs_of
from .signature import TensorInfo
from .target_names import TARGETS
from .target_text import HOST, parse_target

_BITS = ", ".join(map(str, sorted(WEIGHT_MAX, reverse=True)))
_TRACE = "TOPI_INT8_TRACEBACK"
# What our own functions raise at their edge, or Python for a file: nothing went wrong.
_REFUSALS = (ValueError, TypeError, ImportError, OSError)


class _Commands(typer.core.TyperGroup):
    """Says errors in words, in one place for all commands."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run a command; an exception becomes a line and a status."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if type(error).__module__.startswith(("click", "typer")):
                raise  # a usage error, which says itself
            if os.environ.get(_TRACE):
                traceback.print_exc()
            refused = isinstance(error, _REFUSALS)
            told = str(error) if refused else f"{type(error).__name__}: {error}"
            hint = "" if refused else f" (set {_TRACE}=1 to see where)"
            Console(stderr=True, soft_wrap=True).print(
                f"error: {told}{hint}", markup=False, highlight=False
            )
            raise typer.Exit(2 if refused else 1) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="int8 networks on CPUs: quantize a model, compile it into one .so, run it.",
)

Model = Annotated[Path, typer.Argument(help="Model: .onnx, .json (Relax) or .pt2 (torch.export).")]
TargetText = Annotated[
    str,
    typer.Option(
        "--target", help=f"{HOST}; 'llvm -mcpu=...'; TVM's JSON; or a name: {', '.join(TARGETS)}."
    ),
]
ShapeText = Annotated[
    list[str] | None,
    typer.Option("--shape", help="NAME=1,3,224,224: of an input that an .onnx leaves open."),
]
LayoutText = Annotated[
    str, typer.Option("--layout", help="Of pictures: NCHW or NHWC. Default: as the shape tells.")
]
Size = Annotated[
    str, typer.Option("--size", help="Of pictures, as 224 or 224x320. Default: the input's.")
]
Mean = Annotated[
    str,
    typer.Option("--mean", help="Of pixels in [0, 1], as 0.5 or 0.5,0.5,0.5. Default of 3 "
                 "channels: ImageNet's, else 0."),
]  # fmt: skip
Std = Annotated[str, typer.Option("--std", help="As --mean. Default: ImageNet's, else 1.")]
Crop = Annotated[
    float, typer.Option("--crop", help="Share of a resized picture that is cut out of its middle.")
]


def _chooser(
    layout: str, size: str, mean: str, std: str, crop: float
) -> Callable[[TensorInfo], Preprocessing]:
    """Return what gives an input its preprocessing, by the options."""
    wanted = cli_text.size(size), cli_text.numbers("mean", mean), cli_text.numbers("std", std)

    def choose(info: TensorInfo) -> Preprocessing:
        return Preprocessing.for_shape(info.shape, layout, *wanted, crop)

    return choose


def _writable(name: str, path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse, before any work, what cannot be written."""
    if path.suffix not in suffixes:
        raise ValueError(f"{name} is {str(path)!r}; allowed: {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name} is {str(path)!r}; allowed: in a folder that exists")


@app.command("quantize")
def quantize_command(
    model: Model,
    calib: Annotated[
        Path, typer.Option(help="Folder of pictures or .npy files; or an .npy or .npz file.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help=".json (Relax), or .onnx (QDQ) of an .onnx.")
    ],
    method: Annotated[
        str, typer.Option(help=f"How ranges are found: {', '.join(OBSERVERS)}.")
    ] = "minmax",
    skip: Annotated[
        list[str] | None, typer.Option(help="Layer that stays float32, as conv2d_3; repeatable.")
    ] = None,
    skip_first: Annotated[
        bool, typer.Option("--skip-first", help="The first layer stays float32.")
    ] = False,
    skip_last: Annotated[
        bool, typer.Option("--skip-last", help="The last layer stays float32.")
    ] = False,
    weight_bits: Annotated[
        int, typer.Option(help=f"Of {_BITS}. 7 is faster on CPUs without VNNI.")
    ] = 8,
    shape: ShapeText = None,
    layout: LayoutText = "",
    size: Size = "",
    mean: Mean = "",
    std: Std = "",
    crop: Crop = images.IMAGENET_CROP,
) -> None:
    """Quantize a float32 model after training: weights and activations to int8, as QDQ pairs."""
    _writable("output", output, (".json", ".onnx"))
    if output.suffix == ".onnx" and model.suffix != ".onnx":
        raise ValueError(f"output is {str(output)!r}; allowed: .json, {str(model)!r} is no .onnx")
    shapes = cli_text.shapes(shape)
    mod = files.read_model(model, shapes)
    if is_quantized(mod):
        raise ValueError(f"model is {str(model)!r}, quantized already; allowed: float32")
    items = samples.calibration(calib, inputs_of(mod), _chooser(layout, size, mean, std, crop))
    quantized = topi_int8.quantize(
        mod, items, method=method, skip=skip or (), skip_first=skip_first, skip_last=skip_last,
        weight_bits=weight_bits,
    )  # fmt: skip
    if output.suffix == ".json":
        files.write_module(quantized, output)
    else:
        from .frontend import write_onnx

        write_onnx.write(files.load_onnx(model), mod, quantized, items[0], output, shapes)
    how = f"calibrated on {len(items)} inputs by {method}, {weight_bits}-bit weights"
    cli_text.say(f"{output}: {how}")


@app.command("compile")
def compile_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Library to write, .so.")],
    target: TargetText = HOST,
    weights: Annotated[
        Path | None,
        typer.Option(help="Folder for the weights: loading then holds them once, not four times."),
    ] = None,
    shape: ShapeText = None,
    cc: Annotated[
        str, typer.Option(help="C compiler that links. Default: this machine's or a cross gcc.")
    ] = "",
) -> None:
    """Compile a model into one library that says what it is and needs TVM's runtime alone."""
    _writable("output", output, (".so",))
    chosen = parse_target(target)
    mod = files.read_model(model, cli_text.shapes(shape))
    start = time.perf_counter()
    metadata = topi_int8.save(mod, chosen, output, weights, cc=cc)
    seconds = time.perf_counter() - start
    size = output.stat().st_size / 2**20
    cli_text.say(
        f"{output}: for {metadata['isa']}, {size:.1f} MiB, compiled in {seconds:.1f} s"
    )
    if weights is not None:
        cli_text.say(f"{weights}: its weights")
    for name in ("inputs", "outputs"):
        for entry in metadata[name]:
            cli_text.say(f"  {name[:-1]} {TensorInfo.from_dict(entry)}")
    found = topi_int8.explain(mod, chosen, show=False)
    for strategy, count in sorted(found.strategies().items()):
        cli_text.say(f"  {count} x {strategy}")
    for line in cli_text.slow(found):
        cli_text.say(f"  {line}")


@app.command("run")
def run_command(
    library: Annotated[Path, typer.Argument(help="What `topi-int8 compile` wrote.")],
    given: Annotated[
        list[Path],
        typer.Option("--input", help="Picture, .npy or .npz; once for each of the inputs."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Write the result: .npy, or .npz by the outputs' names.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of weights, if no longer where it was written.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file, a class a line.")] = None,
    layout: LayoutText = "",
    size: Size = "",
    mean: Mean = "",
    std: Std = "",
    crop: Crop = images.IMAGENET_CROP,
) -> None:
    """Run a library once; of a classifier the five likeliest classes are printed."""
    if output is not None:
        _writable("output", output, (".npy", ".npz"))
    names = None if labels is None else labels.read_text(encoding="utf-8").splitlines()
    network = topi_int8.load(library, weights)
    if output is not None and output.suffix == ".npy" and len(network.outputs) > 1:
        raise ValueError(f"output is {str(output)!r}; allowed: .npz, for {len(network.outputs)} "
                         "outputs")  # fmt: skip
    arrays = samples.one(given, network.inputs, _chooser(layout, size, mean, std, crop))
    result = network(*arrays)
    results = result if isinstance(result, tuple) else (result,)
    for info, array in zip(network.outputs, results, strict=True):
        cli_text.show(info, array, names)
    if output is None:
        return
    if output.suffix == ".npy":
        np.save(output, results[0])
    else:
        np.savez(output, **dict(zip((o.name for o in network.outputs), results, strict=True)))


@app.command("explain")
def explain_command(
    model: Model,
    target: TargetText = HOST,
    shape: ShapeText = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which strategy each operator of a model gets, and why the faster ones declined.

    Of a library it says what it carries.
    """
    if model.suffix == ".so":
        told = artifact.read_metadata(model)
        cli_text.say(json.dumps(told, indent=2))
        return
    chosen = parse_target(target)
    mod = files.read_model(model, cli_text.shapes(shape))
    found = topi_int8.explain(mod, chosen, show=not as_json)
    if as_json:
        cli_text.say(json.dumps(cli_text.as_dict(found), indent=2))


@app.command(
    "bench",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench_command(context: typer.Context) -> None:
    """Benchmarks: what follows goes to `python -m bench`."""
    try:
        from bench.cli import app as bench_app
    except ImportError as error:
        raise ImportError(f"bench needs {error.name}: pip install 'topi_int8[bench]'") from error
    bench_app(args=context.args, prog_name="topi-int8 bench")


def main() -> None:
    """Run the command line."""
    sys.exit(app(prog_name="topi-int8"))
