"""bench/mca.py: predictions of loops written here, whose answers the cores' manuals tell."""

import json

import pytest

from bench import mca


@pytest.fixture(autouse=True)
def _needs_llvm_mca():
    try:
        mca.command()
    except mca.McaError as error:
        pytest.skip(str(error))


def loop(*lines: str, head: str = "") -> str:
    body = "\n".join(lines)
    return f".type kern,@function\nkern:\n{head}\n.L1:\n{body}\nsubs x9, x9, #1\nb.ne .L1\nret\n"


SMLAL = tuple(
    line
    for n in range(4)
    for line in (
        f"smull v{n}.8h, v16.8b, v17.8b", f"smlal2 v{n}.8h, v16.16b, v17.16b",
        f"sadalp v{20 + n}.4s, v{n}.8h",
    )
)  # fmt: skip


def test_a72_multiplies_eight_a_cycle():
    found = mca.analyse_asm(loop("ldr q16, [x0], #16", *SMLAL), "cortex-a72").inner
    # One pipe multiplies, one 8-byte product a cycle; the other adds up.
    assert found.macs == 64 and found.cycles == pytest.approx(8, abs=0.2)
    assert found.peak_macs_per_cycle == pytest.approx(8, rel=0.02)
    assert found.percent == pytest.approx(100, abs=3)
    assert found.mix == {"smull": 4, "smlal2": 4, "sadalp": 4}
    assert (found.loads, found.stores, found.spills) == (1, 0, ())
    assert found.kind == "loop" and found.label == ".L1" and found.function == "kern"


def test_what_holds_a_loop_up_shows():
    # One accumulator: every sdot waits for the one before (a cycle, in N1's own forwarding).
    chained = mca.analyse_asm(loop(*["sdot v0.4s, v1.16b, v2.16b"] * 8), "neoverse-n1").inner
    free = [f"sdot v{n}.4s, v30.16b, v31.16b" for n in range(8)]
    independent = mca.analyse_asm(loop(*free), "neoverse-n1").inner
    assert independent.percent > 95
    assert chained.percent < 60
    assert chained.macs == independent.macs == 128


def test_waiting_is_told_from_full_ports():
    # Neoverse N1 multiplies on one pipe and loads on two: loads beside products cost nothing.
    body = [f"smull v{n}.8h, v30.8b, v31.8b" for n in range(8)]
    full = mca.analyse_asm(loop("ldr q16, [x0]", *body), "neoverse-n1").inner
    assert full.issue_cycles == pytest.approx(8) and full.issue_percent > 95
    waiting = mca.analyse_asm(loop(*["smlal v0.8h, v0.8b, v31.8b"] * 8), "neoverse-n1").inner
    assert waiting.issue_cycles == pytest.approx(8) and waiting.issue_percent < 50


def test_spills_are_seen():
    spilling = loop(*SMLAL, "str q3, [sp, #16]", "ldr q3, [x29, #-32]", head="mov x29, sp")
    found = mca.analyse_asm(spilling, "cortex-a72")
    assert found.inner.spills == ("str q3, [sp, #16]", "ldr q3, [x29, #-32]")
    assert found.spills == 2 and found.inner.stores == 1


def test_the_epilogue_of_an_unrolled_reduction_is_cut_off():
    body = ("movi v20.2d, #0", "ldr q16, [x0]", *SMLAL, "scvtf v20.4s, v20.4s",
            "fmul v20.4s, v20.4s, v30.4s", "fcvtns v20.4s, v20.4s", "str q20, [x1]")  # fmt: skip
    found = mca.analyse_asm(loop(*body), "cortex-a72").inner
    assert found.kind == "straight line" and found.macs == 64 and found.stores == 0
    assert found.text[-1] == SMLAL[-1] and found.text[0] == "movi v20.2d, #0"


def test_straight_code_without_a_loop():
    found = mca.analyse_asm("\n".join([*SMLAL, "ret"]), "cortex-a72").inner
    assert found.macs == 64


def test_an_int8_kernel_s_float_loops_are_no_inner_loops():
    text = loop(*SMLAL) + loop(*["fmul v0.4s, v1.4s, v2.4s"] * 40).replace("L1", "L2")
    found = mca.analyse_asm(text.replace("kern", "a", 2), "cortex-a72")
    assert [report.macs for report in found.loops] == [64]
    floats = mca.analyse_asm(text, "cortex-a72", is_float=True)
    assert [report.macs for report in floats.loops] == [160]


def test_the_biggest_loop_comes_first():
    text = loop(*SMLAL[:3]) + loop(*SMLAL).replace("L1", "L2").replace("kern", "big")
    found = mca.analyse_asm(text, "cortex-a72")
    assert [report.macs for report in found.loops] == [64, 16]
    only = mca.analyse_asm(text, "cortex-a72", function="kern")
    assert [report.macs for report in only.loops] == [16]


@pytest.mark.parametrize(
    ("kind", "mcpu", "macs"),
    [
        ("neon", "cortex-a72", 8), ("float32", "cortex-a72", 4), ("neon", "cortex-a53", 16 / 3),
        ("neon_dotprod", "cortex-a55", 16), ("neon_dotprod", "neoverse-n1", 32),
        ("neon_i8mm", "neoverse-n2", 64), ("neon_i8mm", "neoverse-v1", 128),
    ],
)  # fmt: skip
def test_peaks(kind, mcpu, macs):
    assert mca.core_peak(kind, mcpu) == pytest.approx(macs, rel=0.02)


def test_a76_is_scheduled_as_the_n1_it_became():
    assert mca.core_peak("neon_dotprod", "cortex-a76") == pytest.approx(32, rel=0.02)
    assert "neoverse-n1" in mca.model_of("cortex-a76")


def test_armv7():
    text = "l:\n vmull.s8 q0, d20, d21\n vmlal.s8 q0, d22, d23\n vpadal.s16 q8, q0\n bne l\n"
    found = mca.analyse_asm(text, "cortex-a57", "armv7a").inner
    assert found.macs == 16 and 0 < found.percent <= 101


def test_what_is_refused():
    with pytest.raises(ValueError, match="nothing in this assembly multiplies"):
        mca.analyse_asm(loop("add x0, x0, #1"), "cortex-a72")
    with pytest.raises(mca.McaError, match="no model of cortex-a7 "):
        mca.analyse_asm("l:\n vmull.s8 q0, d2, d3\n bne l\n", "cortex-a7", "armv7a")
    with pytest.raises(mca.McaError, match="cortex-a72"):
        mca.cycles("frobnicate v0.4s\n", "cortex-a72")


def test_command_line(tmp_path, capsys):
    path = tmp_path / "kernel.s"
    path.write_text(loop(*SMLAL))
    assert mca.main([str(path), "--mcpu", "cortex-a72", "--text"]) == 0
    assert "64 MACs" in (out := capsys.readouterr().out) and SMLAL[0] in out
    assert mca.main([str(path), "--mcpu", "cortex-a72", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["macs"] == 64
    path.write_text("ret\n")
    assert mca.main([str(path), "--mcpu", "cortex-a72"]) == 1
    assert "multiplies" in capsys.readouterr().err


def test_no_llvm_mca_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    mca.command.cache_clear()
    try:
        with pytest.raises(mca.McaError, match="apt-get install llvm-19"):
            mca.command()
    finally:
        mca.command.cache_clear()
