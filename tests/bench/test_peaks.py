"""bench/peaks.py: each loop holds its instruction, encoded, and nothing that would dilute it."""

import re
import shutil
import subprocess

import pytest

from bench import peaks
from tests import emulator
from topi_int8 import target as targets

IDS = [loop.name for loop in peaks.LOOPS]


def loop_of(asm: str) -> list[str]:
    """Return the instructions between the aligned label and the jump back to it."""
    found = re.search(r"\.p2align\s+5\n(\S+):\n(.*?)\n\s*jg\s+(\S+)\n", asm, re.DOTALL)
    assert found.group(1) == found.group(3)
    body = found.group(2)
    return [line.strip() for line in body.splitlines() if line.strip()]


@pytest.mark.parametrize("loop", peaks.LOOPS, ids=IDS)
def test_loop_is_its_step_and_the_counter(loop):
    asm = peaks.build(loop).mod.inspect_source("asm")
    body = loop_of(asm)
    assert len(body) == loop.accumulators * len(loop.step) + 1
    assert sum(loop.instruction in line for line in body) == loop.accumulators
    assert body[-1].startswith("decq")
    # Operands in registers: no memory in the loop.
    assert not [line for line in body if "(" in line]


@pytest.mark.parametrize("loop", peaks.LOOPS, ids=IDS)
def test_accumulators_are_independent(loop):
    written = [line.rsplit(",", 1)[1].strip() for line in loop.lines()]
    accumulators = written[-loop.accumulators :]
    assert len(set(accumulators)) == loop.accumulators
    read_only = {f"{{}}{number}" for number in ("a", "b")}
    assert not read_only & set(written)


@pytest.mark.parametrize("loop", peaks.LOOPS, ids=IDS)
def test_loop_assembles(loop, tmp_path):
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed")
    path = tmp_path / "peak.o"
    peaks.build(loop).mod.write_to_file(str(path))
    text = subprocess.run([objdump, "-d", str(path)], capture_output=True, text=True).stdout
    assert len(re.findall(rf"\b{loop.instruction}\b", text)) == loop.accumulators
    assert "(bad)" not in text
    if "vex" in loop.step[0]:
        # C4 opens a three-byte VEX prefix, 62 would be EVEX: AVX-512, which AVX-VNNI CPUs lack.
        encodings = re.findall(r":\t([0-9a-f]{2}) [^\n]*\bvpdpbusd\b", text)
        assert set(encodings) == {"c4"}


def test_every_isa_has_the_loop_of_its_kernels():
    chosen = {
        isa.name: [
            getattr(peaks.loop_for(isa.name, "int8", "dot_1x8x2_s16s16s32_"), "name", None),
            getattr(peaks.loop_for(isa.name, "int8", "dot_1x8x4_u8s8s32_"), "name", None),
            getattr(peaks.loop_for(isa.name, "float32"), "name", None),
        ]
        for isa in targets.X86_ISAS
    }
    amx, vnni, fma512 = "AMX tdpbusd", "AVX512-VNNI vpdpbusd zmm", "AVX512 vfmadd231ps zmm"
    avx_vnni, fma256 = "AVX-VNNI vpdpbusd ymm", "AVX2 vfmadd231ps ymm"
    assert chosen == {
        "amx_int8": [amx, amx, fma512],
        "avx512_vnni": [vnni, vnni, fma512],
        "avx_vnni": [avx_vnni, avx_vnni, fma256],
        "avx512_bw": ["AVX512-BW vpmaddwd zmm", "AVX512-BW vpmaddubsw zmm", fma512],
        "avx2": ["AVX2 vpmaddwd ymm", "AVX2 vpmaddubsw ymm", fma256],
        "generic": [None, None, None],
    }
    assert peaks.loop_for("neon") is None


def test_measures_what_runs_here_and_refuses_the_rest():
    for loop in peaks.LOOPS:
        if targets.runs_here(loop.isa):
            # Between one product every 100 cycles of a 1 GHz core and 8 a cycle at 8 GHz.
            bound = 2e-9 * loop.macs
            assert 1e9 / 100 * bound < peaks.measure(loop, 0.01) < 64e9 * bound
        else:
            with pytest.raises(ValueError, match=re.escape(repr(loop.name))):
                peaks.Meter(loop)


def test_meter_keeps_the_best():
    here = peaks.runnable("int8")
    if not here:
        pytest.skip("no int8 loop runs on this CPU")
    meter = peaks.Meter(here[0])
    first = meter.sample(0.005)
    assert meter.sample(0.0) >= first


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [("bits", 128, "bits is 128"), ("accumulators", 15, "accumulators is 15")],
)
def test_loop_validates_itself(field, value, what):
    good = next(loop for loop in peaks.LOOPS if loop.name == "AVX2 vpmaddwd ymm")
    with pytest.raises(ValueError, match=what):
        peaks.PeakLoop(**{**good.__dict__, field: value})


@pytest.mark.parametrize(
    ("name", "isa", "feature", "mnemonic"),
    [
        ("AMX tdpbusd", "amx_int8_avx2", "amx", "tdpbusd"),
        ("AVX-VNNI vpdpbusd ymm", "avx_vnni", "avxvnni", "vpdpbusd"),
    ],
)
def test_loop_runs_as_often_as_it_is_told(name, isa, feature, mnemonic):
    if not targets.runs_here("avx2"):
        pytest.skip("the SIGILL emulator needs AVX2")
    loop = next(loop for loop in peaks.LOOPS if loop.name == name)
    run = peaks.build(loop, targets.isa_target(isa))["main"]
    emulator.install([feature])
    emulator.reset()
    run(7)
    if feature in emulator.native_features():
        pytest.skip(f"this CPU runs {mnemonic} itself: nothing is counted")
    assert emulator.counts()[mnemonic] == 7 * loop.accumulators
