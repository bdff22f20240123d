"""bench/predict.py, bench/seed_table.py and their commands, on small layers."""

import csv
import dataclasses
import json

import pytest
from typer.testing import CliRunner

from bench import arm_core, cli, emulated, mca, predict, seed_table
from bench.shape_lines import parse_line

CONV = 'ic32ih8oc32kh3ph1n"tiny*2"'


@pytest.fixture(autouse=True)
def _needs_llvm_mca():
    try:
        mca.command()
    except mca.McaError as error:
        pytest.skip(str(error))


def bench(*args: str):
    return CliRunner().invoke(cli.app, [*args], terminal_width=200)


def test_conv(tmp_path):
    out_csv, out_json = tmp_path / "a.csv", tmp_path / "a.json"
    done = bench(
        "conv", "--target", "cortex-a72", "--model", "mca", "--shape", CONV, "--why",
        "--csv", str(out_csv), "--json", str(out_json),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "PREDICTED" in done.output and "not measured" in done.output and "tiny" in done.output
    (row,) = csv.DictReader(out_csv.open())
    assert row["count"] == "2" and row["strategy"].startswith("conv2d_") and row["spills"] == "0"
    assert 0 < float(row["percent_of_mix"]) <= 101
    assert float(row["macs_per_cycle"]) == pytest.approx(
        float(row["loop_macs"]) / float(row["predicted_cycles"])
    )
    document = json.loads(out_json.read_text())
    assert document["predicted"] is True and "cortex-a72" in document["options"]["target"]
    assert document["layers"][0]["loops"][0]["text"]


def test_dense_and_float():
    done = bench("dense", "--target", "rpi4", "--model", "mca", "--shape", "1x64:64x32")
    assert done.exit_code == 0, done.output
    found = predict.predict_layer(parse_line(CONV), arm_core.choose("cortex-a72"), "f32")
    assert not found.error and set(found.analysis.inner.mix) == {"fmla"}
    assert found.core_peak == pytest.approx(4, rel=0.02)


def test_each_core_gets_its_own_instructions():
    def mix(name: str) -> set[str]:
        found = predict.predict_layer(parse_line(CONV), arm_core.choose(name))
        assert not found.error, found.error
        return set(found.analysis.inner.mix)

    assert not any("dot" in name or "mmla" in name for name in mix("cortex-a72"))
    assert any("dot" in name for name in mix("neoverse-n1"))
    assert any("mmla" in name for name in mix("neoverse-v1"))


def test_a_strategy_can_be_forced():
    target = arm_core.choose("cortex-a72")
    found = predict.predict_layer(parse_line(CONV), target, force="conv2d_nchwc_generic")
    assert found.strategy == "conv2d_nchwc_generic" and not found.error
    wrong = predict.predict_layer(parse_line(CONV), target, force="conv2d_nchwc_amx_int8")
    assert "target lacks amx_int8" in wrong.error
    assert "strategy is 'x'" in predict.predict_layer(parse_line(CONV), target, force="x").error


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "mca"], "needs --target"),
        (["--model", "gem5", "--target", "cortex-a72"], "model is 'gem5'; allowed: mca"),
        (["--model", "mca", "--target", "haswell"], "allowed with --model mca: ARM targets"),
        (["--model", "mca", "--target", "cortex-a72", "--dtype", "s4"], "dtype is 's4'"),
    ],
)
def test_what_is_refused(args, words):
    done = bench("conv", "--shape", CONV, *args)
    assert done.exit_code == 2 and words in " ".join(done.output.split())


def test_a_core_without_a_model_is_a_failed_row():
    done = bench("conv", "--shape", CONV, "--model", "mca", "--target", "rpi2")
    assert done.exit_code == 1 and "no model of cortex-a7" in " ".join(done.output.split())


def test_goals():
    loop = mca.LoopReport("f", "l", "loop", 10, 64, 10.0, 8.0, 9.0, {"sdot": 4}, 1, 0, 16, ())
    good = predict.Prediction(parse_line(CONV), analysis=mca.Analysis("m", (loop,)))
    assert (loop.percent, loop.issue_percent) == (80, 90)
    assert not predict.misses(good, 80.0) and predict.misses(good, 81.0)
    # Goals are for 1x1 and 3x3 layers; a spill is a miss anywhere.
    stem = predict.Prediction(parse_line("ic3ih9oc16kh3"), analysis=good.analysis)
    assert not predict.misses(stem, 81.0)
    spilled = dataclasses.replace(loop, spills=("str q0, [sp]",))
    stem = dataclasses.replace(stem, analysis=mca.Analysis("m", (loop, spilled)))
    assert predict.misses(stem, None)
    assert predict.misses(predict.Prediction(parse_line(CONV), error="no"), None)


def test_whole_layer():
    try:
        emulated.plugin()
    except emulated.EmulatorError as error:
        pytest.skip(str(error))
    done = bench(
        "conv", "--target", "cortex-a72", "--model", "mca", "--shape", CONV, "--whole",
    )  # fmt: skip
    assert done.exit_code == 0 and "layer kcyc" in done.output, done.output
    found = predict.predict_layer(parse_line(CONV), arm_core.choose("cortex-a72"), whole=True)
    whole, inner = found.whole, found.analysis.inner
    # The whole layer is no faster than its inner loop, and executes at least the multiplies.
    assert whole.cycles > found.shape.macs / inner.macs_per_cycle
    assert whole.instructions > found.shape.macs / 8
    assert 0 < whole.inner < 1 and whole.modelled > 0.9


def test_seed_table(monkeypatch):
    published = {row.label: row.published_ms for row in seed_table.ROWS if row.published_ms}
    assert sorted(published.values()) == [8.27, 11.36, 12.09, 13.29, 35.15]
    floats, int8 = seed_table.ROWS[0], seed_table.ROWS[2]
    results = [
        seed_table.SeedResult(floats, "a", cycles=400e6, macs=1814073344),
        seed_table.SeedResult(int8, "b", cycles=200e6, macs=1814073344),
    ]
    both = seed_table.ratios(results)
    assert both[int8.label] == (pytest.approx(13.29 / 11.36), 2.0)
    assert both[floats.label] == (None, None)
    words = seed_table.caveats(1814073344, 4.0)
    assert "302 ms on one core" in words and "76 ms on 4" in words and "23 MACs/cycle" in words
    target = arm_core.choose("cortex-a72")
    missing = dataclasses.replace(int8, strategies=("conv2d_of_tomorrow",))
    assert "no conv2d_of_tomorrow" in seed_table.predict_row(missing, target).note


def test_every_seed_row_names_what_it_compares_with():
    labels = [row.label for row in seed_table.ROWS]
    assert len(set(labels)) == len(labels)
    assert all(row.base in labels for row in seed_table.ROWS if row.base)


def test_the_core_s_own_model_predicts():
    # Compiled with another core's scheduling (topi_int8.target_names), predicted as itself.
    core = arm_core.choose("rpi3")
    assert core.mcpu == "cortex-a53" and core.isa == "neon" and core.qemu_cpu == "cortex-a72"
    assert core.peak(is_float=False) == pytest.approx(16 / 3, rel=0.02)
    assert "sve-max-vq=2" in arm_core.choose("graviton3").qemu_cpu
    assert arm_core.choose("rk3588").qemu_cpu == "neoverse-n1"
