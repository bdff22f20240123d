"""bench/results.py and bench/report.py: ratios, totals, and the three forms of output."""

import csv
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from bench import report
from bench.results import LayerResult, RivalResult, totals, with_best_peaks
from bench.shape_lines import parse_line
from bench.timing import Timing

RIVALS = {"tvm": "TVM", "onednn": "oneDNN"}


def results():
    """Two layers measured, one failed; the second without TVM."""
    big = LayerResult(
        shape=parse_line('ic64ih56oc64kh3ph1n"big*3"'), strategy="conv2d_x", intrinsic="dot[x]",
        declined=(("conv2d_y", "target lacks y"),), ours=Timing((100.0, 120.0, 110.0)),
        peak_gops=4000.0, peak_loop="loop", checked=True,
        rivals={
            "tvm": RivalResult(Timing((800.0,)), "~"),
            "onednn": RivalResult(Timing((50.0, 60.0)), "jit"),
        },
    )  # fmt: skip
    small = LayerResult(
        shape=parse_line("ic64ih56oc64kh1"), strategy="conv2d_x", ours=Timing((10.0,)),
        peak_gops=5000.0, peak_loop="loop",
        rivals={
            "tvm": RivalResult(note="skipped: est. 9.0 s"),
            "onednn": RivalResult(Timing((40.0,)), "jit"),
        },
    )  # fmt: skip
    broken = LayerResult(shape=parse_line('ic8ih5oc8kh3n"broken"'), error="it broke [here]")
    return [big, small, broken]


def test_ratios():
    big, small, broken = results()
    assert big.gops == pytest.approx(2 * 115.605504e6 / 100e-6 / 1e9)
    assert big.peak_percent == pytest.approx(big.gops / 40)
    assert (big.speedup("tvm"), big.speedup("onednn"), big.speedup("mkl")) == (8, 0.5, None)
    assert (small.speedup("tvm"), small.speedup("onednn")) == (None, 4)
    assert broken.gops is None and broken.speedup("tvm") is None


def test_totals():
    sums = totals(results())
    assert (sums.layers, sums.us) == (4, 310)
    assert sums.macs == 3 * 115_605_504 + 12_845_056
    assert sums.rival_us == {"tvm": 2400, "onednn": 190}
    # A rival is compared on the rows it has.
    assert sums.ratio == {"tvm": pytest.approx(8), "onednn": pytest.approx(190 / 310)}
    assert sums.geomean["onednn"] == pytest.approx(2**0.5)
    assert sums.rows == {"tvm": 1, "onednn": 2}
    assert totals([]).gops is None


def test_peaks_are_the_best_of_the_run():
    assert [r.peak_gops for r in with_best_peaks(results())] == [5000, 5000, None]


def test_a_result_without_number_needs_words():
    with pytest.raises(ValueError, match="error"):
        LayerResult(shape=parse_line("ic8ih5oc8kh3"))
    with pytest.raises(ValueError, match="note"):
        RivalResult()


def text_of(found) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(report.table(found, "the title", RIVALS, "the caption"))
    return console.file.getvalue()


def test_table():
    text = text_of(results())
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    big = [cell.strip() for cell in rows["big"].split("│")]
    assert big[1:] == [
        "big", "3", "115.6", "conv2d_x", "100.0", "110.0", "2,312.1", "57.8",
        "~800.0", "~8.00x", "50.0", "0.50x", "",
    ]  # fmt: skip
    assert "dot[x] ✓" in text and "it broke [here]" in text and "skipped: est. 9.0 s" in text
    total = [cell.strip() for cell in rows["total (count x min)"].split("│")]
    assert total[2] == "4" and total[5] == "310.0" and total[10] == "8.00x"
    assert "1.41x" in rows["geomean"]
    assert "the title" in text and "the caption" in text


def test_table_marks_a_rival_without_kernel():
    big = results()[0]
    slow = replace(big, rivals={"onednn": RivalResult(Timing((9000.0,)), "ref:any")})
    assert "9,000.0 ref" in text_of([slow])


def test_table_of_failures_alone():
    assert "total" not in text_of(results()[2:])


def test_csv():
    rows = list(csv.DictReader(io.StringIO(report.to_csv(results(), RIVALS))))
    assert [row["name"] for row in rows] == ["big", "", "broken"]
    big, small, broken = rows
    assert parse_line(big["line"]) == results()[0].shape
    assert float(big["min_us"]) == 100 and float(big["onednn_min_us"]) == 50
    assert float(big["tvm_speedup"]) == 8 and big["tvm_note"] == "~"
    assert small["tvm_min_us"] == "" and small["tvm_note"] == "skipped: est. 9.0 s"
    assert broken["min_us"] == "" and broken["error"] == "it broke [here]"


def test_json():
    document = json.loads(report.to_json(results(), {"machine": {"cpu": "a cpu"}}))
    assert document["machine"] == {"cpu": "a cpu"}
    big = document["layers"][0]
    assert big["declined"] == [["conv2d_y", "target lacks y"]]
    assert big["rivals"]["onednn"] == {
        "min_us": 50, "median_us": 55, "speedup": 0.5, "note": "jit",
    }  # fmt: skip
    assert document["totals"]["rows"] == {"tvm": 1, "onednn": 2}
