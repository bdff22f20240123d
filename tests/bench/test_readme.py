"""bench/readme.py: tables from files of runs, written between markers and nowhere else."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import cli, readme
from bench.published import tables

MACHINE = {"cpu": "a cpu", "date": "2026-01-02T03:04:05+00:00", "commit": "abc"}
TEXT = """# Title

before
<!-- bench:layers -->
old layers
<!-- /bench -->
between
<!-- bench:networks -->
<!-- /bench -->
after
"""

LAYERS = {
    "machine": MACHINE, "note": "a board",
    "options": {
        "isa": "amx_int8", "dtype": "u8s8", "weight_bits": 8, "threads": 1,
        "batch": ["resnet18"], "shape": [],
    },
    "rivals": {"onednn": "oneDNN 3.2"},
    "layers": [
        {"name": "fast", "line": "", "min_us": 10.0, "peak_gops": 5000.0,
         "rivals": {"onednn": {"min_us": 40.0}}},
        {"name": "slow", "line": "", "min_us": 10.0, "peak_gops": 4000.0,
         "rivals": {"onednn": {"min_us": 10.0}}},
        {"name": "alone", "line": "", "min_us": 10.0, "peak_gops": None,
         "rivals": {"onednn": {"min_us": None}}},
    ],
    "totals": {"us": 1500.0, "gops": 2500.0, "layers": 3, "rival_us": {"onednn": 2250.0},
               "ratio": {"onednn": 1.5}},
}  # fmt: skip


def engine(ms: float | None, note: str = "", version: str = "") -> dict:
    return {"min_ms": ms, "note": note, "version": version}


NETWORKS = {
    "machine": MACHINE,
    "options": {"isa": "amx_int8", "weight_bits": 8},
    "networks": [
        {"name": "resnet50", "threads": 1, "batch": 1, "engines": {
            "int8": engine(4.0), "openvino": engine(6.0, version="OpenVINO 1"),
            "ort": engine(None, "not installed; make openvino"),
        }},
        {"name": "resnet50", "threads": 2, "batch": 4, "engines": {
            "int8": engine(8.0), "openvino": engine(None, "it broke"),
        }},
    ],
}  # fmt: skip


def block(text: str, name: str) -> str:
    return re.search(rf"<!-- bench:{name} -->\n(.*?)\n?<!-- /bench -->", text, re.DOTALL)[1]


def cells(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_layers():
    made = readme.render([LAYERS])["layers"]
    assert made.startswith("On a cpu (a board), `amx_int8`, 2026-01-02, commit abc; kernels alone")
    assert "; oneDNN 3.2:" in made and "| oneDNN | summed |" in made
    assert cells(made, "resnet18") == [
        "resnet18, u8s8, 8-bit, 3 layers", "1", "1.50 ms", "50%", "2.25 ms", "**1.50x**",
        "**2.00x**", "1.00x (slow)",
    ]  # fmt: skip


def test_networks():
    made = readme.render([NETWORKS])["networks"]
    assert "OpenVINO 1; 8-bit weights" in made
    # A rival without any number is said in words, and has no column.
    assert cells(made, "network") == ["network", "threads", "batch", "int8", "OpenVINO int8"]
    assert cells(made, "resnet50 | 1") == ["resnet50", "1", "1", "**4.00**", "6.00 (1.50x)"]
    assert cells(made, "resnet50 | 2") == ["resnet50", "2", "4", "**2.00**", "-"]
    assert "onnxruntime int8: not installed; make openvino" in made
    assert "OpenVINO int8: it broke" in made


def test_runs_of_two_machines_have_a_table_each():
    other = {**LAYERS, "machine": {**MACHINE, "cpu": "another"}}
    made = readme.render([LAYERS, other, LAYERS])["layers"]
    assert [made.count(f"On {cpu}") for cpu in ("a cpu", "another")] == [1, 1]
    assert made.count("| resnet18,") == 3


def test_goals():
    engines = {tables.FLOAT: 25.0, tables.UPSTREAM: 36.0, tables.OURS: 6.0}
    engines |= {replace(tables.OURS, stem=True): 5.0, replace(tables.UPSTREAM, stem=True): 30.0}
    timings = [
        {"engine": asdict(replace(engine, batch=8)), "threads": 2, "min_us": 1e3 * ms}
        for engine, ms in engines.items()
    ]
    made = readme.render([{"machine": MACHINE, "options": {}, "timings": timings}])["goals"]
    assert cells(made, "8") == [
        "8", "2", "25.00 ms", "36.00 ms", "6.00 ms", "6.0x", "4.2x", "5.00 ms", "6.0x", "-",
    ]  # fmt: skip
    assert "| 1 |" not in made


def test_text_outside_of_markers_is_untouched():
    made = readme.write(TEXT, {"layers": "new\nlayers\n"})
    assert made == TEXT.replace("old layers", "new\nlayers")
    assert readme.write(made, {"layers": "old layers"}) == TEXT
    assert block(readme.write(TEXT, {"networks": r"back\slash \1"}), "networks") == r"back\slash \1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no markers", r"<!-- bench:layers --> .. <!-- /bench --> 0 times; allowed: 1"),
        (TEXT + TEXT, "2 times"),
        (TEXT.replace("bench:networks", "bench:nets"), "block is 'nets'; allowed: networks"),
        (TEXT + "<!-- bench:goals -->\n", "without <!-- /bench -->"),
        (TEXT + "<!-- /bench -->\n", "without <!-- /bench -->"),
        (TEXT.replace("<!-- /bench -->", "", 1), "0 times|without"),
    ],
)
def test_markers_that_are_wrong_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        readme.write(text, {"layers": "new"})


def test_ours_has_the_markers_of_every_block():
    text = readme.README.read_text()
    assert readme.write(text, {}) == text
    names = re.findall(r"<!-- bench:(\w+) -->", text)
    assert sorted(names) == sorted(readme.BLOCKS)
    assert all(block(text, name).count("\n|") > 2 for name in names)


def readme_command(*args: str):
    return CliRunner().invoke(cli.app, ["readme", *args], terminal_width=200)


def test_command(tmp_path: Path):
    path, saved = tmp_path / "README.md", tmp_path / "run.json"
    path.write_text(TEXT)
    saved.write_text(json.dumps(NETWORKS))
    done = readme_command("--readme", str(path), "--json", str(saved))
    assert done.exit_code == 0, done.output
    assert "**4.00**" in block(path.read_text(), "networks")
    assert block(path.read_text(), "layers") == "old layers"


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ("{", "no JSON"),
        ("{}", "has no machine and options"),
        ('{"machine": {}, "options": {}}', "is of no table"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, saved, words):
    path, file = tmp_path / "README.md", tmp_path / "run.json"
    path.write_text(TEXT)
    file.write_text(saved)
    done = readme_command("--readme", str(path), "--json", str(file))
    assert done.exit_code == 2 and words in done.stderr and path.read_text() == TEXT
    assert readme_command("--json", str(file), "--block", "layers").exit_code == 2


def test_benches_run_where_no_file_is_given(tmp_path: Path, monkeypatch):
    args = ("conv", "--shape", "ic8ih4oc8kh1", "--rivals", "none", "--min-time", "0.002")
    block = replace(readme.BLOCKS["layers"], commands=(("one", args),))
    broken = replace(block, commands=(("two", ("conv", "--shape", "ic8"),),))
    monkeypatch.setattr(readme, "BLOCKS", {"layers": block, "networks": broken})
    said: list[str] = []
    [path] = readme.measure(["layers"], said.append, tmp_path)
    assert path == tmp_path / "one.json" and said[0].startswith("python -m bench conv --shape")
    assert "ic8ih4oc8kh1" in readme.render(readme.read([path]))["layers"]
    with pytest.raises(RuntimeError, match="is missing or 0"):
        readme.measure(["networks"], said.append, tmp_path)
    with pytest.raises(ValueError, match="block is 'x'; allowed: layers, networks"):
        readme.measure(["x"], said.append, tmp_path)
