"""The command ``bits``: other widths of weights and activations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import site, targets
from .cli_networks import Calibration, Image
from .command import Cpu, Isa, Rounds, TargetText, Threads, app, cpu_numbers, fail, make_console


@app.command("bits")
def bits_command(
    network: Annotated[
        list[str] | None,
        typer.Option(help="A torchvision classifier; repeat for more. Default: resnet18."),
    ] = None,
    isa: Isa = "host",
    target: TargetText = None,
    threads: Threads = 1,
    cpu: Cpu = "",
    image: Image = 224,
    calibration: Calibration = 16,
    inputs: Annotated[int, typer.Option(help="Images to compare with torch's fp32 on.")] = 16,
    rounds: Rounds = 5,
    min_time: Annotated[float, typer.Option(help="Seconds each variant is sampled.")] = 1.0,
    write: Annotated[
        Path | None, typer.Option(help="A page: what is between its marks is replaced.")
    ] = None,
) -> None:
    """Weights of 8, 7, 4, 2 and 1 bits, activations of 8, 16 and 32: works, accuracy, speed."""
    console = make_console()
    blocks = []
    try:
        from . import bits  # imports torch's frontend

        request = site.Request("", "", "", isa, target, threads, cpu_numbers(cpu))
        with site.opened(request) as where:
            for name in network or ["resnet18"]:
                with console.status(name):
                    lines = bits.measure(
                        name, where.target, image=image, calibration=calibration, inputs=inputs,
                        rounds=rounds, min_time=min_time,
                    )  # fmt: skip
                title = (
                    f"{name} on {where.about['cpu']}, {targets.isa_of(where.target)}, "
                    f"{threads} thread{'s'[: threads > 1]}, {where.about['date'][:10]}"
                )
                console.print(bits.table(lines, title))
                blocks.append(f"{title}:\n\n{bits.markdown(lines)}")
        if write is not None:
            write.write_text(bits.put(write.read_text(), "\n".join(blocks)))
    except ImportError as error:
        raise fail(f"bits needs the extra `torch`: {error}") from None
    except (ValueError, OSError) as error:
        raise fail(error) from None
    except RuntimeError as error:
        raise fail(error, code=1) from None
