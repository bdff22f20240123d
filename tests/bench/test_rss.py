"""bench/rss.py: a small network in fresh processes; ratios; what cannot be had is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra `torch`)")
from bench import rss
from tests.bench.test_bench_cli import bench

pytestmark = pytest.mark.model


def test_ratios_and_words():
    found = {
        "int8": rss.Resident(100.0, 80.0), "fp32": rss.Resident(250.0, 80.0),
        "openvino": rss.Resident(note="not installed; make openvino"),
    }  # fmt: skip
    assert rss.over(found, "fp32") == 0.4 and rss.over(found, "openvino") is None
    table = rss.table({"r": found}, "title")
    assert table.row_count == 2
    assert "r: OpenVINO int8: not installed; make openvino" in table.caption
    rows = rss.to_document({"r": found}, {"command": "rss"})["memory"]
    assert rows[1] == {
        "network": "r", "engine": "fp32", "peak_mib": 250.0, "before_mib": 80.0,
        "int8_over_this": 0.4, "note": "",
    }  # fmt: skip
    with pytest.raises(ValueError, match="note is ''"):
        rss.Resident()


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed, it links libraries")
def test_command(tmp_path: Path):
    out = tmp_path / "out.json"
    args = ["--network", "squeezenet1_1", "--image", "32", "--calibration", "2"]
    args += ["--rivals", "tvm,openvino,library", "--tvm-limit", "1e-9", "--json", str(out)]
    done = bench("rss", *args)
    assert done.exit_code == 0, done.output
    int8, stock, openvino, library = json.loads(out.read_text())["memory"]
    assert (int8["engine"], int8["int8_over_this"]) == ("int8", 1)
    assert 10 < int8["before_mib"] < int8["peak_mib"] < library["peak_mib"]
    # The runtime alone, without the compiler and torch, which have hundreds.
    assert int8["before_mib"] < 200
    assert stock["peak_mib"] is None and stock["note"].startswith("skipped: est.")
    assert "skipped: est." in done.output
    assert openvino["peak_mib"] or openvino["note"] == "not installed; make openvino"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rivals", "torch"], "rivals has 'torch'; allowed: openvino, ort, fp32, tvm, library"),
        (["--batch", "0"], "batch is 0"),
        (["--weight-bits", "6"], "weight_bits is 6"),
        (["--network", "resnet19", "--rivals", "none"], "name is 'resnet19'"),
    ],
)
def test_refusals(args, words):
    done = bench("rss", *args)
    assert done.exit_code == 2 and words in done.stderr
