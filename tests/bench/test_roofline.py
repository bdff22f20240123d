"""bench/roofline.py and bench/bandwidth.py: bytes and bounds, a picture, a loop of loads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import bandwidth, roofline, workloads
from bench.shape_lines import parse_line
from tests.bench.test_bench_cli import FAST, TINY, bench
from topi_int8 import target as targets

LINE = "mb1ic64ih56oc128oh56kh1ph0"


def document(**row) -> dict:
    layer = {
        "name": "a", "line": LINE, "macs": 25_690_112, "gops": 1000.0, "peak_gops": 5000.0,
        "peak_loop": "loop", "rivals": {"onednn": {"min_us": 100.0}, "tvm": {"min_us": None}},
    }  # fmt: skip
    return {
        "machine": {"cpu": "a cpu", "date": "2026-01-02T03:04:05"},
        "options": {"dtype": "u8s8", "epilogue": "default", "weight_bits": 8, "threads": 1},
        "rivals": {"tvm": "", "onednn": "oneDNN 3.2"},
        "bandwidth_gbs": {"L2": 100.0, "memory": 10.0},
        "layers": [layer | row, layer | row | {"peak_gops": 6000.0}],
    }


@pytest.mark.parametrize(
    ("line", "dtype", "epilogue", "wanted"),
    [
        (LINE, "u8s8", "", 56 * 56 * 64 + 64 * 128 + 56 * 56 * 128),
        (LINE, "u8s8", "bias+sum+relu+u8", 56 * 56 * 64 + 64 * 128 + 2 * 56 * 56 * 128),
        (LINE, "u8s8", "s32", 56 * 56 * 64 + 64 * 128 + 4 * 56 * 56 * 128),
        ("g64ic64ih8oc64kh3ph1", "f32", "", 4 * (2 * 64 * 64 + 64 * 9)),
        ("5x24:24x20", "u8s8", "", 5 * 24 + 24 * 20 + 5 * 20),
    ],
)
def test_bytes(line, dtype, epilogue, wanted):
    work = workloads.make(parse_line(line), dtype, epilogue)
    assert roofline.moved_bytes(work) == wanted


def test_points_and_bounds():
    first, _ = roofline.points(document())
    moved = 56 * 56 * 64 + 64 * 128 + 56 * 56 * 128
    assert first.intensity == pytest.approx(2 * 25_690_112 / moved)
    assert first.rivals == {"onednn": pytest.approx(2 * 25_690_112 / 100 / 1e3)}
    assert roofline.bounds(document()) == {"loop": 6000.0}
    # A layer that nobody ran has no place in the picture.
    assert roofline.points(document(gops=None, rivals={})) == []


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_picture(tmp_path: Path, ending, begins):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    path = tmp_path / f"roof.{ending}"
    roofline.draw(path, document())
    assert path.read_bytes().startswith(begins)
    if ending == "svg":
        # Points, bounds and their names are in it, as drawn text.
        assert {"topi_int8", "onednn"} <= set(re.findall(r"<!-- ([\w.]+) -->", path.read_text()))


def test_without_layers_it_is_refused(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    with pytest.raises(ValueError, match="no layer was measured"):
        roofline.draw(tmp_path / "roof.png", document(gops=None, rivals={}))


def test_command(tmp_path: Path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")
    monkeypatch.setattr(bandwidth, "levels", lambda cpu: (bandwidth.Level("L2", 1 << 16),))
    path = tmp_path / "roof.png"
    args = ["conv", "--shape", TINY, "--rivals", "tvm", *FAST]
    done = bench(*args, "--roofline", str(path))
    assert done.exit_code == 0 and path.stat().st_size > 1000, done.output
    done = bench(*args, "--roofline", str(tmp_path / "roof.doc"))
    assert done.exit_code == 1 and "doc" in done.stderr


def test_cache_sizes_are_read(tmp_path: Path):
    for index, (level, kind, size) in enumerate(
        [(1, "Data", "32K"), (1, "Instruction", "64K"), (2, "Unified", "2048K")]
    ):
        folder = tmp_path / "cpu3" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    sizes = [bandwidth.cache_bytes(level, 3, tmp_path) for level in (1, 2, 3)]
    assert sizes == [32 << 10, 2 << 20, None]
    assert bandwidth.cache_bytes(2, 4, tmp_path) is None
    assert all(level.bytes > 0 for level in bandwidth.levels())
    with pytest.raises(ValueError, match="bytes is 0; allowed: 512"):
        bandwidth.Level("none", 0)


@pytest.mark.parametrize("isa, width", [("avx2", 32), ("avx512_bw", 64)])
def test_the_loop_loads_every_byte_of_a_step_and_nothing_else(isa, width):
    asm = bandwidth.build(isa).mod.inspect_source("asm")
    loads = [int(offset or 0) for offset in re.findall(r"vmovups\s+(\d*)\(%rax\)", asm)]
    assert loads == list(range(0, bandwidth._STEP, width))
    assert re.search(rf"addq\s+\${bandwidth._STEP}, %rax", asm)


def test_it_measures():
    if not targets.runs_here("avx2"):
        pytest.skip("this CPU lacks avx2: no loop for it")
    assert bandwidth.measure(bandwidth.Level("small", 1 << 16), 0.01) > 0
