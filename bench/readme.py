"""The measured tables of README.md, written from JSON files between markers, never by hand.

A table stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``. NAME is a key of `BLOCKS`,
which says what runs make it and how their files become Markdown.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path
from typing import Any

from .published import tables
from .published.engine import Engine
from .rivals.onednn import OneDnn
from .rivals.tvm_default import TvmDefault
from .worker import ROOT

README = ROOT / "README.md"
SAVED = ROOT / "build" / "bench"  # what the runs wrote
END = "<!-- /bench -->"
_LAYER_RIVALS = {rival.name: rival.title for rival in (OneDnn, TvmDefault)}
_BLOCK = re.compile(r"<!-- bench:(\w+) -->\n(.*?)" + re.escape(END), re.DOTALL)

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Block:
    """A table of the README.

    Parameters
    ----------
    commands : tuple of (str, tuple of str)
        The runs that make it: a file's name in `SAVED`, and the arguments of ``python -m bench``.
    takes : callable
        Whether a document is one of its.
    render : callable
        Returns the Markdown of documents.
    """

    commands: tuple[tuple[str, tuple[str, ...]], ...]
    takes: Callable[[Document], bool]
    render: Callable[[Sequence[Document]], str]


def machine_line(document: Document) -> str:
    """Return "On CPU (note), ISA, date, commit": whose numbers follow."""
    about, options = document["machine"], document["options"]
    words = [f"On {about['cpu']}" + (f" ({document['note']})" if document.get("note") else "")]
    if isa := options.get("isa"):
        words.append(f"`{isa}`")
    commit = about.get("commit")
    words += [about["date"][:10], *([f"commit {commit}"] if commit else [])]
    return ", ".join(words)


def _grouped(documents: Iterable[Document]) -> list[list[Document]]:
    """Return documents of one machine and target together, in the order given."""
    groups: dict[tuple[str, str], list[Document]] = {}
    for document in documents:
        key = document["machine"]["cpu"], document["options"].get("isa", "")
        groups.setdefault(key, []).append(document)
    return list(groups.values())


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rivals(rows: Iterable[Mapping[str, Any]], field: str, key: str) -> list[str]:
    """Return the rivals that any row has a time of."""
    found: dict[str, None] = {}
    for row in rows:
        found |= {name: None for name, one in row[field].items() if one[key]}
    return list(found)


# ---------------------------------------------------------------- networks


def networks(documents: Sequence[Document]) -> str:
    """Return the tables of ``bench e2e``: ms an image, and theirs over ours."""
    return "\n".join(_networks(group) for group in _grouped(documents))


def _networks(group: Sequence[Document]) -> str:
    from .e2e import TITLES  # imports torch's frontend

    rows = [row for document in group for row in document["networks"]]
    rivals = [name for name in _rivals(rows, "engines", "min_ms") if name != "int8"]
    versions = {
        engine["version"]: None for row in rows for engine in row["engines"].values()
        if engine.get("version") and engine["min_ms"]
    }  # fmt: skip
    words = {
        f"{TITLES[name]}: {engine['note']}": None for row in rows
        for name, engine in row["engines"].items() if engine["min_ms"] is None
    }  # fmt: skip
    head = f"{machine_line(group[0])}; {', '.join(versions) or 'no rival'}; "
    head += f"{group[0]['options']['weight_bits']}-bit weights, milliseconds an image, "
    head += "minima of alternating runs, in brackets theirs over ours:\n\n"
    body = []
    for row in rows:
        batch = row["batch"]
        cells = [row["name"], str(row["threads"]), str(batch)]
        ours = row["engines"]["int8"]["min_ms"]
        cells.append("-" if ours is None else f"**{ours / batch:.2f}**")
        for name in rivals:
            theirs = row["engines"].get(name, {"min_ms": None})["min_ms"]
            ratio = "" if not theirs or not ours else f" ({theirs / ours:.2f}x)"
            cells.append("-" if theirs is None else f"{theirs / batch:.2f}{ratio}")
        body.append(cells)
    header = ["network", "threads", "batch", "int8", *(TITLES[name] for name in rivals)]
    return head + _markdown(header, body) + "".join(f"\n{line}\n" for line in words)


# ---------------------------------------------------------------- layers


def layers(documents: Sequence[Document]) -> str:
    """Return the tables of ``bench conv`` and ``bench dense``: kernels alone, one row a run."""
    return "\n".join(_layers(group) for group in _grouped(documents))


def _layers(group: Sequence[Document]) -> str:
    rows = [row for document in group for row in document["layers"]]
    rivals = _rivals(rows, "rivals", "min_us")
    versions = {document["rivals"].get(name) or name: None for document in group for name in rivals}
    head = f"{machine_line(group[0])}; kernels alone, warm, minima of alternating runs"
    head += f"; {', '.join(versions)}:\n\n" if versions else ":\n\n"
    header = ["every convolution or matmul", "threads", "ours", "of the measured peak"]
    for name in rivals:
        header += [_LAYER_RIVALS.get(name, name), "summed", "geomean over shapes", "worst shape"]
    return head + _markdown(header, [_layers_row(document, rivals) for document in group])


def _layers_row(document: Document, rivals: Sequence[str]) -> list[str]:
    options, totals = document["options"], document["totals"]
    what = ", ".join([*options["batch"], *options["shape"]]).replace("|", r"\|")
    what += f", {options['dtype']}, {options['weight_bits']}-bit, {totals['layers']} layers"
    peaks = [row["peak_gops"] for row in document["layers"] if row["peak_gops"]]
    share = f"{100 * totals['gops'] / max(peaks):.0f}%" if peaks and totals["gops"] else "-"
    cells = [what, str(options["threads"]), f"{totals['us'] / 1e3:.2f} ms", share]
    for name in rivals:
        # A ratio stands for the layers that both ran.
        both = [
            (row["rivals"][name]["min_us"] / row["min_us"], row["name"] or row["line"])
            for row in document["layers"]
            if row["min_us"] and row["rivals"].get(name, {}).get("min_us")
        ]
        if not both:
            cells += ["-"] * 4
            continue
        geomean = exp(sum(log(ratio) for ratio, _ in both) / len(both))
        worst, where = min(both)
        cells += [
            f"{totals['rival_us'][name] / 1e3:.2f} ms", f"**{totals['ratio'][name]:.2f}x**",
            f"**{geomean:.2f}x**", f"{worst:.2f}x ({where})",
        ]  # fmt: skip
    return cells


# ---------------------------------------------------------------- Relay


def goals(documents: Sequence[Document]) -> str:
    """Return the tables of ``bench tables --table goals``: a TVM that has Relay, with and without
    our import.
    """
    return "\n".join(map(_goals, documents))


def _goals(document: Document) -> str:
    times = {
        (Engine(**row["engine"]), row["threads"]): row["min_us"] for row in document["timings"]
    }
    header = [
        "batch", "cores", "TVM 0.17 float32", "its int8", "ours", "vs its int8", "vs its float32",
        "ours, stem too", "vs its int8, stem too", "ours, NHWC model",
    ]  # fmt: skip
    body = []
    for batch in tables.GOAL_BATCHES:
        for threads in tables.GOAL_THREADS:

            def us(engine: Engine, batch: int = batch, threads: int = threads) -> float | None:
                return times.get((replace(engine, batch=batch), threads))

            stems = _stems(us)
            cells = [us(tables.FLOAT), us(tables.UPSTREAM), us(tables.OURS)]
            if not any(cells):
                continue
            body.append([
                str(batch), str(threads), *map(_ms, cells), _over(cells[1], cells[2]),
                _over(cells[0], cells[2]), _ms(stems[1]), _over(*stems),
                _ms(us(tables.nhwc(tables.OURS))),
            ])  # fmt: skip
    return f"ResNet-18, 224x224. {machine_line(document)}:\n\n" + _markdown(header, body)


def _stems(us: Callable[[Engine], float | None]) -> tuple[float | None, float | None]:
    """Return (upstream, ours) with the first convolution quantized, too."""
    return us(replace(tables.UPSTREAM, stem=True)), us(replace(tables.OURS, stem=True))


def _ms(us: float | None) -> str:
    return "-" if us is None else f"{us / 1e3:.2f} ms"


def _over(first: float | None, second: float | None) -> str:
    return "-" if not first or not second else f"{first / second:.1f}x"


# ---------------------------------------------------------------- all of them

_NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")


def _kernels(batch: str, command: str = "conv") -> tuple[str, tuple[str, ...]]:
    return batch, (command, "--batch", batch, "--rivals", "onednn")


BLOCKS: Mapping[str, Block] = {
    "networks": Block(
        ((
            "e2e",
            ("e2e", *(part for name in _NETWORKS for part in ("--network", name)), "--threads",
             "1,2", "--rivals", "openvino,ort,torch,fp32", "--no-layers"),
        ),),
        lambda document: "networks" in document,
        networks,
    ),
    "layers": Block(
        (
            _kernels("resnet50_v1_5"), _kernels("resnet18"), _kernels("bert_base", "dense"),
            _kernels("mobilenet_v2"),
        ),
        lambda document: "layers" in document and "totals" in document,
        layers,
    ),
    "goals": Block(
        (("goals", ("tables", "--table", "goals")),),
        lambda document: "timings" in document,
        goals,
    ),
}  # fmt: skip


def write(text: str, rendered: Mapping[str, str]) -> str:
    """Return a README's text with these blocks' contents; what is not in them stays as it is.

    Raises
    ------
    ValueError
        When a block is not there, there twice, not closed, or unknown.
    """
    names = [match[1] for match in _BLOCK.finditer(text)]
    for name in {*rendered, *names}:
        if name not in BLOCKS:
            raise ValueError(f"block is {name!r}; allowed: {', '.join(BLOCKS)}")
        if names.count(name) != 1:
            raise ValueError(
                f"README has <!-- bench:{name} --> .. {END} {names.count(name)} times; allowed: 1"
            )
    if text.count("<!-- bench:") != len(names) or text.count(END) != len(names):
        raise ValueError(f"README has a <!-- bench:.. --> without {END}, or the other way")

    def block(match: re.Match[str]) -> str:
        made = rendered.get(match[1])
        return match[0] if made is None else f"<!-- bench:{match[1]} -->\n{made.strip()}\n{END}"

    return _BLOCK.sub(block, text)


def render(documents: Sequence[Document]) -> dict[str, str]:
    """Return the Markdown of the blocks that these documents are of, by their names.

    Raises
    ------
    ValueError
        When a document is of none.
    """
    found: dict[str, list[Document]] = {}
    for document in documents:
        names = [name for name, block in BLOCKS.items() if block.takes(document)]
        if not names:
            raise ValueError("a file is of no table; allowed: --json of e2e, conv, dense, tables")
        found.setdefault(names[0], []).append(document)
    return {name: BLOCKS[name].render(mine) for name, mine in found.items()}


def measure(names: Sequence[str], say: Callable[[str], Any], saved: Path = SAVED) -> list[Path]:
    """Run the commands of blocks, each in a process of its own; return the files they wrote.

    Raises
    ------
    ValueError
        For an unknown block.
    RuntimeError
        When a command fails, with its last words.
    """
    for name in names:
        if name not in BLOCKS:
            raise ValueError(f"block is {name!r}; allowed: {', '.join(BLOCKS)}")
    saved.mkdir(parents=True, exist_ok=True)
    paths = []
    for file, arguments in [command for name in names for command in BLOCKS[name].commands]:
        path = saved / f"{file}.json"
        command = [*arguments, "--json", str(path)]
        say(f"python -m bench {' '.join(command)}")
        done = subprocess.run(
            [sys.executable, "-m", "bench", *command], cwd=ROOT, text=True, capture_output=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"bench {' '.join(arguments)}: {done.stderr.strip()[-800:]}")
        paths.append(path)
    return paths


def read(paths: Iterable[Path]) -> list[Document]:
    """Return the documents of files.

    Raises
    ------
    ValueError
        When one is no JSON object with a machine and options.
    OSError
    """
    documents = []
    for path in paths:
        try:
            document = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: no JSON: {error}") from None
        if not isinstance(document, dict) or not {"machine", "options"} <= set(document):
            raise ValueError(f"{path}: has no machine and options; allowed: a --json of this bench")
        documents.append(document)
    return documents
