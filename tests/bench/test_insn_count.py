"""bench/emulated.py, bench/insn_count.py and the QEMU plugin: counts that are known beforehand."""

import json

import pytest
from typer.testing import CliRunner

from bench import arm_core, cli, emulated, insn_count, mca
from bench.rivals import ort_arm
from bench.shape_lines import parse_line

CONV = 'mb1ic32ih8oc32oh8kh3ph1n"tiny"'
TENSORS = ["1:8:16"]


@pytest.fixture(autouse=True)
def _needs_qemu():
    try:
        mca.command()
        emulated.plugin()
        emulated._runner()
    except (mca.McaError, emulated.EmulatorError) as error:
        pytest.skip(str(error))


def kernel(passes: int, inside: str = "add x8, x8, #1") -> str:
    return f"""
	.text
	.globl	__tvm_ffi_main
	.type	__tvm_ffi_main,@function
__tvm_ffi_main:
	mov	x9, #{passes}
	.p2align	4, , 8
.LBB0_1:
	{inside}
	subs	x9, x9, #1
	b.ne	.LBB0_1
	cbz	x9, .LBB0_3
	mov	w0, #1
	ret
.LBB0_3:
	mov	w0, wzr
	ret
"""


def test_counts_are_exact():
    ten, thousand = (emulated.execute(kernel(n), TENSORS).instructions for n in (10, 1000))
    assert thousand - ten == 3 * 990
    assert ten == emulated.execute(kernel(10), TENSORS).instructions


def test_blocks():
    found = emulated.execute(kernel(7), TENSORS, blocks=True)
    name = "__tvm_ffi_main"
    assert found.blocks[name, name] == 1 and found.blocks[name, ".LBB0_1"] == 7
    assert found.blocks[name, ".LBB0_3"] == 1
    # The block behind cbz is never reached.
    assert len(found.blocks) == 4


def test_cycles_of_a_whole_kernel():
    asm = kernel(65_000, "smlal v0.8h, v1.8b, v2.8b\n\tsmlal v3.8h, v1.8b, v2.8b")
    found = emulated.execute(asm, TENSORS, blocks=True)
    whole = emulated.predict_cycles(asm, found, "cortex-a72")
    assert whole.instructions == found.instructions
    assert whole.cycles == pytest.approx(130_000, rel=0.02)  # one multiply a cycle
    assert whole.inner > 0.99 and whole.modelled > 0.99


def test_a_missing_instruction_ends_the_run():
    asm = kernel(2, "sdot v0.4s, v1.16b, v2.16b")
    assert emulated.execute(asm, TENSORS, "neoverse-n1").instructions > 0
    with pytest.raises(emulated.EmulatorError, match="signal 4"):
        emulated.execute(asm, TENSORS, "cortex-a72")


def test_a_kernel_that_fails_is_said():
    with pytest.raises(emulated.EmulatorError, match=r"qemu-aarch64 failed \(1\)"):
        emulated.execute(kernel(1).replace("mov\tw0, wzr", "mov\tw0, #1"), TENSORS)


def test_a_layer_of_ours(tmp_path):
    target = arm_core.choose("cortex-a72")
    (found,), version = insn_count.count_layers([parse_line(CONV)], target, rival=False)
    assert version == "" and found.ort is None and found.ratio is None
    macs = found.shape.macs
    assert macs / 16 < found.instructions < 4 * macs
    # The borders alone: the same work on an image without them executes fewer.
    inside = parse_line("mb1ic32ih10oc32oh8kh3ph0")
    (without,), _ = insn_count.count_layers([inside], target, rival=False)
    assert without.instructions < found.instructions


def test_command(tmp_path):
    out = tmp_path / "a.json"
    args = ["count", "--shape", CONV, "--rivals", "none", "--json", str(out)]
    done = CliRunner().invoke(cli.app, [*args, "--target", "neoverse-n1"], terminal_width=200)
    assert done.exit_code == 0, done.output
    document = json.loads(out.read_text())
    assert document["options"]["cpu"] == "neoverse-n1" and document["geomean"] is None
    assert document["layers"][0]["instructions"] > 0
    for wrong in (["--target", "rpi2"], ["--target", "rpi4", "--dtype", "f32"]):
        done = CliRunner().invoke(cli.app, [*args, *wrong])
        assert done.exit_code == 2, done.output


def test_geomean():
    rows = [
        insn_count.LayerCount(parse_line(CONV), "s", a, b) for a, b in ((1, 2), (8, 1), (3, None))
    ]
    assert insn_count.geomean(rows) == pytest.approx(2)
    assert insn_count.geomean(rows[2:]) is None


@pytest.mark.slow_emulator
def test_beside_onnxruntime():
    if reason := ort_arm.unavailable():
        pytest.skip(reason)
    target = arm_core.choose("cortex-a72")
    big = parse_line("mb1ic32ih16oc32oh16kh3ph1")
    (small, large), version = insn_count.count_layers([parse_line(CONV), big], target)
    assert version == ort_arm.VERSION
    assert not small.error and not large.error
    # Four times the pixels: about four times the instructions, in both.
    for a, b in ((small.ort, large.ort), (small.instructions, large.instructions)):
        assert 2.5 < b / a < 5
    assert small.ratio == small.instructions / small.ort


@pytest.mark.slow_emulator
def test_a_layer_that_onnxruntime_refuses(monkeypatch):
    if reason := ort_arm.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(
        ort_arm, "save_model", lambda _work, path: path.write_bytes(b"no model at all")
    )
    target = arm_core.choose("cortex-a72")
    (found,), _ = insn_count.count_layers([parse_line(CONV)], target)
    assert found.ort is None and found.error and found.instructions


def test_onnxruntime_that_is_not_there(tmp_path):
    with pytest.raises(emulated.EmulatorError, match=r"not set up|no aarch64 Python"):
        ort_arm.count([], "max", tmp_path)
