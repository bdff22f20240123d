"""bench/cliffs.py: neighbours, ratios, what counts as a cliff, and the exit status."""

from __future__ import annotations

import json
from math import log2
from pathlib import Path

import pytest

from bench import cliffs
from bench.results import LayerResult
from bench.shape_lines import find_batch, parse_line, read_shapes
from bench.timing import Timing
from tests.bench.test_bench_cli import FAST, bench


def result(shape, percent: float | None) -> LayerResult:
    """A layer that reaches that percentage of a peak of 100 GOP/s."""
    if percent is None:
        return LayerResult(shape=shape, error="it broke")
    us = 2 * shape.macs / percent / 1e3
    return LayerResult(shape=shape, ours=Timing((us,)), peak_gops=100.0, peak_loop="loop")


def test_features():
    shape = parse_line("g2mb2ic8ih20iw6oc4oh10kh3kw1sh2sw1ph1")
    # K = 3 * 4, 4 channels, 2 * 10 * 6 points, a kernel of 3, every second row.
    assert cliffs.features(shape) == (log2(12), 2, log2(120), log2(3), 1)


def test_neighbours():
    plain, grouped = cliffs.neighbours(False), cliffs.neighbours(True)
    assert len(plain) == 23 and all(shape.g == 1 for shape in plain)
    assert len(grouped) > 5 and all(shape.g == shape.ic for shape in grouped)
    for shape in (*plain, *grouped):
        assert cliffs.nearest(shape)[1] == 0


@pytest.mark.parametrize(
    ("line", "neighbour"),
    [
        # A 3x3 lies by a 3x3 of its stride, never by a 1x1 of its K.
        ("ic256ih28oc256kh3ph1", "res3b_branch2b"),
        ("ic256ih56oc256oh28kh3sh2ph1", "res3a_branch2b"),
        ("ic100ih28oc300kh1", "res3a_branch2c"),
        ("ic3ih224oc32oh112kh3sh2ph1", "conv1"),
        ("g96ic96ih112oc96oh56kh3sh2ph1", "features.2.dw"),
    ],
)
def test_nearest(line, neighbour):
    assert cliffs.nearest(parse_line(line))[0].name == neighbour


def test_the_plan_runs_each_shape_and_neighbour_once():
    shapes = [parse_line(line) for line in ("ic64ih7oc64kh1", 'ic64ih7oc64kh1n"again"')]
    neighbour, _ = cliffs.nearest(shapes[0])
    assert cliffs.plan(shapes) == [shapes[0], neighbour]
    with pytest.raises(ValueError, match="allowed: 2-D convolutions"):
        cliffs.plan([parse_line("ic8iw7oc8kw1")])


def test_every_shape_of_the_file_has_a_neighbour_but_those_of_another_kind():
    shapes = read_shapes(find_batch(cliffs.SHAPES))
    planned = cliffs.plan(shapes)
    assert len(planned) > 150
    held = cliffs.hold(shapes, [result(shape, 10) for shape in planned])
    near = [one for one in held if one.neighbour is not None]
    assert all(one.ratio == pytest.approx(1) for one in near)
    alone = held[len(near) :]  # listed after the others
    assert not any(one.is_cliff() or one.is_unknown or one.ratio for one in alone)
    assert min(one.distance for one in alone) > cliffs.MAX_DISTANCE
    names = {one.layer.shape.name for one in alone}
    assert {name.rsplit(".")[-1] for name in names} == {"squeeze", "excite", "conv1", "conv3"}
    assert {name for name in names if "conv" in name} == {"vgg.conv1", "vgg.conv3"}


def test_a_layer_too_far_from_all_is_no_cliff():
    far, near = parse_line('ic32ih1oc8oh1kh1n"far"'), parse_line('ic64ih54oc64kh1n"near"')
    assert cliffs.plan([far]) == [far]
    planned = cliffs.plan([far, near])
    results = [result(shape, 0.1 if shape is far else 50) for shape in planned]
    held = cliffs.hold([far, near], results)
    assert [one.layer.shape.name for one in held] == ["near", "far"]
    table = cliffs.table(held, "title", {}, cliffs.LIMIT)
    assert table.caption.startswith("0 of 2 below 0.4 of their neighbour; 1 are too far from all")
    assert list(table.columns[4].cells)[1] == "no neighbour"
    rows = cliffs.to_document(held, {}, cliffs.LIMIT)["cliffs"]
    assert rows[1]["neighbour"] is None and not rows[1]["is_cliff"]

    planned = cliffs.plan([far], max_distance=20)
    assert len(planned) == 2
    [one] = cliffs.hold([far], [result(planned[0], 0.1), result(planned[1], 50)], 20)
    assert one.is_cliff()
    [one] = cliffs.hold([far], [result(far, None)])
    assert one.is_unknown
    with pytest.raises(ValueError, match="max_distance is -1; allowed: 0 or more"):
        cliffs.plan([far], max_distance=-1)


def test_a_cliff_is_below_the_limit():
    good, bad, broken = (
        parse_line(f'ic64ih{size}oc64kh1n"{name}"')
        for size, name in ((55, "good"), (54, "bad"), (53, "broken"))
    )
    neighbour, _ = cliffs.nearest(good)
    percents = {neighbour: 50, good: 21, bad: 19, broken: None}
    planned = cliffs.plan(percents)
    held = cliffs.hold(
        [broken, good, bad], [result(shape, percents[shape]) for shape in planned]
    )
    assert [one.layer.shape.name for one in held] == ["bad", "good", "broken"]
    assert [one.is_cliff() for one in held] == [True, False, False]
    assert held[0].ratio == pytest.approx(0.38) and held[2].ratio is None
    document = cliffs.to_document(held, {"command": "cliffs"}, cliffs.LIMIT)
    first = document["cliffs"][0]
    assert first["is_cliff"] and first["neighbour"]["name"] == neighbour.name
    table = cliffs.table(held, "title", {}, cliffs.LIMIT)
    assert table.row_count == 3 and table.caption.startswith("1 of 3 below 0.4")
    assert [row.style for row in table.rows] == ["red", None, None]


def test_command(tmp_path: Path):
    out = tmp_path / "out.json"
    args = ["cliffs", "--shape", 'ic64ih7oc64kh1n"tiny"', *FAST, "--json", str(out)]
    done = bench(*args, "--limit", "0")
    assert done.exit_code == 0, done.output
    [row] = json.loads(out.read_text())["cliffs"]
    assert row["ratio"] > 0 and row["neighbour"]["min_us"] > 0 and row["distance"] > 0
    done = bench(*args, "--limit", "1e9")
    assert done.exit_code == 1 and "1 of 1 layers are cliffs" in done.stderr
    assert bench("cliffs", "--batch", "bert_base").exit_code == 2
