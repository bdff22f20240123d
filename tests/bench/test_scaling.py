"""bench/scaling.py: which layers are run, the table, the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import scaling
from tests.bench.test_bench_cli import FAST, bench

BY_NAME = {base.name: base for base in scaling.BASES}


@pytest.mark.parametrize(
    ("name", "axis", "value", "line"),
    [
        ("3x3", "batch", 256, "mb256ic64ih56oc64oh56kh3ph1"),
        ("3x3", "image", 7, "mb1ic64ih7oc64oh7kh3ph1"),
        ("3x3", "channels", 17, "mb1ic17ih56oc17oh56kh3ph1"),
        ("1x1", "channels", 33, "mb1ic33ih14oc132oh14kh1ph0"),
        ("depthwise", "channels", 100, "g100mb1ic100ih28oc100oh28kh3ph1"),
    ],
)
def test_cases(name, axis, value, line):
    shape = scaling.Case(BY_NAME[name], axis, value).shape
    assert shape.format() == f'{line}n"{name}"'


def test_defaults():
    cases = scaling.cases(scaling.AXES)
    assert len(cases) == 3 * sum(map(len, scaling.AXES.values()))
    batches = [case.value for case in cases if case.axis == "batch"]
    assert min(batches) == 1 and max(batches) == 256
    # A base itself is a case of each axis.
    for base in scaling.BASES:
        assert {case.axis for case in cases if case.shape == base} >= {"batch"}


@pytest.mark.parametrize(
    ("axis", "value", "words"), [("depth", 1, "axis is 'depth'"), ("batch", 0, "batch is 0")]
)
def test_refusals(axis, value, words):
    with pytest.raises(ValueError, match=words):
        scaling.Case(scaling.BASES[0], axis, value)


def test_command(tmp_path: Path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    monkeypatch.setattr(
        scaling, "cases",
        lambda axes, real=scaling.cases: real(axes, [BY_NAME["1x1"]]),
    )  # fmt: skip
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    args = ["--batches", "1,2", "--images", "3", "--channels", "5,8", *FAST]
    done = bench("scaling", *args, "--check", "--json", str(out), "--plot", str(picture))
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["scaling"]
    assert [(row["axis"], row["value"]) for row in rows] == [
        ("batch", 1), ("batch", 2), ("image", 3), ("channels", 5), ("channels", 8),
    ]  # fmt: skip
    assert all(row["min_us"] > 0 and row["checked"] for row in rows)
    text = picture.read_text()
    assert all(f"<!-- {word} -->" in text for word in ("batch", "image", "channels", "GOP/s"))


def test_wrong_values_are_refused():
    done = bench("scaling", "--batches", "0", *FAST)
    assert done.exit_code == 2 and "batch is 0; allowed: 1 or more" in done.stderr


def test_nothing_measured_is_no_picture(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    with pytest.raises(ValueError, match="nothing was measured"):
        scaling.draw(tmp_path / "out.png", {"scaling": [{"min_us": None}]})
