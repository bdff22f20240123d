"""bench/arm_asm.py: functions, loops, and what single instructions do, on assembly written here."""

import pytest

from bench import arm_asm
from bench.arm_asm import Instruction

NEST = """
	.type	kernel,@function
kernel:
	stp	x29, x30, [sp, #-32]!
	mov	x9, #0
.LBB0_1:                                // the outer loop
	mov	x10, #0
	.p2align	4, , 8
.LBB0_2:
	ldr	q0, [x0], #16
.Ltmp7:
	sdot	v1.4s, v0.16b, v2.4b[0]
	cbz	x3, .LBB0_4
	add	x3, x3, #1
.LBB0_4:
	subs	x10, x10, #1
	b.ne	.LBB0_2
	bl	memset
	str	q1, [x1]
	cmp	x9, #3
	b.ne	.LBB0_1
	ret
	.size	kernel, .-kernel
	.type	other,@function
other:
	ret
"""


def test_loops_come_from_the_control_flow():
    kernel, other = arm_asm.parse(NEST)
    assert (kernel.name, other.name) == ("kernel", "other") and not other.loops
    (outer,) = kernel.loops
    assert outer.header == ".LBB0_1" and [child.header for child in outer.children] == [".LBB0_2"]
    (inner,) = kernel.innermost
    assert [i.mnemonic for i in inner.instructions] == [
        "ldr", "sdot", "cbz", "add", "subs", "b.ne",
    ]  # fmt: skip
    # A call does not end a block, and what stands behind the inner loop is not in it.
    assert "memset" not in " ".join(i.text for i in inner.instructions)
    assert len(outer.instructions) == len(inner.instructions) + 5


def test_every_instruction_is_kept_once():
    texts = [i.text for f in arm_asm.parse(NEST) for b in f.blocks for i in b.instructions]
    written = [line.split("//")[0].strip() for line in NEST.splitlines()]
    written = [" ".join(w.split()) for w in written if w and w[0] != "." and w[-1] != ":"]
    assert texts == written


def test_a_fragment_is_one_function():
    (only,) = arm_asm.parse("loop:\n vmlal.s8 q0, d2, d3 @ a comment\n bne loop\n")
    assert only.name == "" and len(only.innermost) == 1
    assert [i.text for i in only.innermost[0].instructions] == ["vmlal.s8 q0, d2, d3", "bne loop"]


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        ("smull v0.8h, v1.8b, v2.8b", 8),
        ("smlal2 v0.8h, v1.16b, v2.16b", 8),
        ("smlal v0.4s, v1.4h, v2.h[3]", 4),
        ("smull x0, w1, w2", 0),  # an address
        ("sdot v0.4s, v1.16b, v2.4b[1]", 16),
        ("udot v0.2s, v1.8b, v2.8b", 8),
        ("usmmla v0.4s, v1.16b, v2.16b", 32),
        ("fmla v0.4s, v1.4s, v2.s[0]", 4),
        ("fmla v0.2s, v1.2s, v2.2s", 2),
        ("fmadd s0, s1, s2, s3", 1),
        ("mul x0, x1, x2", 0),
        ("sadalp v0.4s, v1.8h", 0),
        ("add v0.4s, v1.4s, v2.4s", 0),
        ("vmull.s8 q0, d2, d3", 8),
        ("vmlal.s16 q0, d2, d3[1]", 4),
        ("vmla.f32 q0, q1, d4[0]", 4),
        ("vmla.f32 d0, d1, d2", 2),
        ("vsdot.s8 q0, q1, d2[0]", 16),
    ],
)
def test_macs(text, macs):
    assert arm_asm.macs(Instruction(text)) == macs


@pytest.mark.parametrize(
    ("text", "access", "bytes_", "stack"),
    [
        ("ldr q0, [x0, #16]", "load", 16, False),
        ("ldp q0, q1, [x0], #32", "load", 32, False),
        ("ldrsb w8, [x9]", "load", 1, False),
        ("ldrh w8, [x9]", "load", 2, False),
        ("ld1r { v0.4s }, [x1]", "load", 4, False),
        ("ld1 { v0.s }[2], [x1]", "load", 4, False),
        ("ld1 { v0.16b, v1.16b }, [x1], #32", "load", 32, False),
        ("str q0, [sp, #64]", "store", 16, True),
        ("ldp q4, q5, [sp]", "load", 32, True),
        ("ldr q0, [x29, #16]", "load", 16, True),
        ("st1 { v0.4s }, [x2]", "store", 16, False),
        ("vldr d16, [r0]", "load", 8, False),
        ("add x0, sp, #16", "", 0, False),
        ("sub v0.4s, v1.4s, v2.4s", "", 0, False),
    ],
)
def test_accesses(text, access, bytes_, stack):
    instruction = Instruction(text)
    assert arm_asm.access(instruction) == access
    assert arm_asm.moved_bytes(instruction) == bytes_
    assert arm_asm.on_stack(instruction, frame_pointer=True) == stack


def test_x29_is_the_stack_only_where_it_is_the_frame_pointer():
    load = Instruction("ldr q0, [x29, #16]")
    assert not arm_asm.on_stack(load)
    plain, framed = "f:\n add x29, x8, #1\n ret\n", "f:\n stp x29, x30, [sp, #-16]!\n mov x29, sp\n"
    assert not arm_asm.has_frame_pointer(arm_asm.parse(plain)[0])
    assert arm_asm.has_frame_pointer(arm_asm.parse(framed)[0])
