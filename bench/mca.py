"""Cycles of a kernel's inner loop, predicted by llvm-mca from the assembly alone.

``python -m bench.mca file.s --mcpu cortex-a72`` prints every loop that multiplies, the one with
most multiply-accumulates first. A prediction: LLVM's scheduling model of the core, every load a hit
in the first cache, branches foreseen. Nothing is executed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

from . import arm_asm
from .arm_asm import Function, Instruction, Loop

COMMANDS = ("llvm-mca-19", "llvm-mca-20", "llvm-mca-21", "llvm-mca")
OLDEST = 19  # the models before it lack cores that are wanted here

# LLVM schedules these cores with another core's model; a better one than its own choice where there
# is one: it takes the A57's, which has no dot products, for the A76 family, and Neoverse N1 is the
# server version of the A76. The A72's own pipes are the A57's.
MODELS = {
    "cortex-a76": "neoverse-n1",
    "cortex-a77": "neoverse-n1",
    "cortex-a78": "neoverse-n1",
    "cortex-x1": "neoverse-v1",
}
# Scheduling does not depend on them, parsing does.
FEATURES = "+neon,+dotprod,+i8mm,+bf16,+fullfp16,+sve2"
ARM32_FEATURES = "+neon,+dotprod,+vfp4"

# The instructions of each kind of kernel at their best: what a core's peak is stated for.
PEAK_STREAMS = {
    "neon": ("smull v{0}.8h, v24.8b, v25.8b", "smlal v{1}.8h, v26.8b, v27.8b",
             "sadalp v{2}.4s, v28.8h"),
    "neon_dotprod": ("sdot v{0}.4s, v24.16b, v25.4b[0]",),
    "neon_i8mm": ("smmla v{0}.4s, v24.16b, v25.16b",),
    "float32": ("fmla v{0}.4s, v24.4s, v25.s[0]",),
    "armv7_neon": ("vmull.s8 q{0}, d20, d21", "vmlal.s8 q{1}, d22, d23", "vpadal.s16 q{2}, q12"),
    "armv7_float32": ("vmla.f32 q{0}, q10, q11",),
}  # fmt: skip


class McaError(RuntimeError):
    """llvm-mca is missing, or would not have the code."""


@cache
def command() -> str:
    """Return the path of an llvm-mca that is new enough.

    Raises
    ------
    McaError
        When there is none.
    """
    for name in COMMANDS:
        path = shutil.which(name)
        if path is None:
            continue
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"LLVM version (\d+)", text)
        if version and int(version.group(1)) >= OLDEST:
            return path
    raise McaError(f"no llvm-mca {OLDEST} or later: apt-get install llvm-{OLDEST}")


@cache
def version() -> str:
    """Return the version of LLVM that predicts."""
    text = subprocess.run([command(), "--version"], capture_output=True, text=True).stdout
    return re.search(r"LLVM version ([\d.]+)", text).group(1)


def model_of(mcpu: str) -> str:
    """Return words for whose model stands for a core."""
    return f"LLVM {version()}, -mcpu={MODELS.get(mcpu, mcpu)}"


def _is_arm32(triple: str) -> bool:
    return triple.startswith(("arm", "thumb"))


@lru_cache(maxsize=4096)
def cycles(code: str, mcpu: str, triple: str = "aarch64") -> float:
    """Return the cycles one pass over `code` takes in a long run of passes.

    The difference of two runs, so that filling and draining the pipeline cost nothing.

    Raises
    ------
    McaError
        When the core's model does not know an instruction.
    """
    lines = max(code.count("\n"), 1)
    passes = max(10, 800 // lines)
    short = _summary(code, mcpu, triple, passes)["TotalCycles"]
    return (_summary(code, mcpu, triple, 3 * passes)["TotalCycles"] - short) / (2 * passes)


def _summary(code: str, mcpu: str, triple: str, passes: int) -> dict[str, float]:
    features = ARM32_FEATURES if _is_arm32(triple) else FEATURES
    done = subprocess.run(
        [
            command(), f"-mtriple={triple}", f"-mcpu={MODELS.get(mcpu, mcpu)}",
            f"-mattr={features}", f"-iterations={passes}", "-json",
            "-resource-pressure=false", "-instruction-info=false", "-",
        ],
        input=code, capture_output=True, text=True,
    )  # fmt: skip
    if "unable to find instruction-level scheduling" in done.stderr:
        raise McaError(f"LLVM has no model of {mcpu} on {triple.split('-')[0]}")
    if done.returncode != 0:
        words = [line for line in done.stderr.splitlines() if "error" in line or "note" in line]
        raise McaError(f"llvm-mca on {mcpu}: {'; '.join(words[:2]) or done.stderr.strip()}")
    found = json.loads(done.stdout[done.stdout.index("{") :])
    return found["CodeRegions"][0]["SummaryView"]


# ---------------------------------------------------------------- peaks


def _independent(instruction: Instruction, number: int, triple: str, written: int = 24) -> str:
    """Return the instruction with registers that make it wait for nothing written nearby.

    It writes one of `written` registers in turn and reads the 8 that nothing writes (32-bit ARM: 10
    of 16 q registers, and 6).
    """
    arm32 = _is_arm32(triple)
    written = 10 if arm32 else written
    destination, *sources = re.split(r",\s*(?![^{\[]*[}\]])", instruction.operands)
    target = number % written
    if arm32:
        kind = destination[0]
        target = target * 2 if kind == "d" else target
        fixed = [f"{s[0]}{20 if s[0] == 'd' else 10}{s[len(re.match(r'[a-z]+[0-9]+', s)[0]):]}"
                 for s in sources]  # fmt: skip
        # A scalar operand's register is d0-d7 for 16 bits, d0-d15 for 32.
        fixed = [re.sub(r"^d20\[", "d7[", s) for s in fixed]
        return f"{instruction.mnemonic} {kind}{target}, {', '.join(fixed)}"
    destination = re.sub(r"^([vqdsh])\d+", rf"\g<1>{target}", destination)
    # A 16-bit element is taken from v0-v15 only.
    fixed = []
    for position, source in enumerate(sources):
        by_half = re.search(r"\.h\[", source)
        number_of = 15 if by_half else 24 + position % 8
        fixed.append(re.sub(r"^([vqdsh])\d+", rf"\g<1>{number_of}", source))
    return f"{instruction.mnemonic} {', '.join([destination, *fixed])}"


def stream_cycles(mix: Sequence[Instruction], mcpu: str, triple: str = "aarch64") -> float:
    """Return the cycles of these instructions when none waits for another: the mix's own bound."""
    repeats = max(1, -(-96 // len(mix)))
    lines = [
        _independent(instruction, r * len(mix) + i, triple)
        for r in range(repeats)
        for i, instruction in enumerate(mix)
    ]
    return cycles("\n".join(lines) + "\n", mcpu, triple) / repeats


_VECTOR_REGISTER = re.compile(r"\b([vqdsh])(\d+)(?=$|[.\s,}])")


def _freed(instruction: Instruction, number: int) -> str:
    """Return any aarch64 instruction so that it waits for no vector; see `_independent`."""
    name, operands = instruction.mnemonic, instruction.operands
    moves = arm_asm.access(instruction)
    written = 0 if moves == "store" else 2 if name.startswith("ldp") else 1
    if moves == "load" and operands.startswith("{"):
        written = operands[: operands.index("}")].count(".")
    # Lists are of consecutive registers; v0 to v15 are the multiplies'.
    base, seen = 16 + number * 2 % 8 if written < 3 else 16, 0

    def rename(match: re.Match[str]) -> str:
        nonlocal seen
        seen += 1
        if seen <= written:
            return f"{match.group(1)}{base + seen - 1}"
        return f"{match.group(1)}{24 + (seen - written) % 8}"

    return f"{instruction.mnemonic} {_VECTOR_REGISTER.sub(rename, operands)}"


def issue_cycles(code: Sequence[Instruction], mcpu: str, triple: str = "aarch64") -> float:
    """Return the cycles of a whole loop body when no instruction waits for a vector.

    What ports and issue width allow, with the loads and the counting in between.
    """
    if _is_arm32(triple):
        text = "\n".join(i.text for i in code) + "\n"
        return float(_summary(text, mcpu, triple, 1)["BlockRThroughput"])
    works = 0
    lines = []
    for instruction in code:
        if arm_asm.macs(instruction) or arm_asm.is_sum(instruction):
            lines.append(_independent(instruction, works, triple, written=16))
            works += 1
        else:
            lines.append(_freed(instruction, len(lines)))
    real = "\n".join(i.text for i in code) + "\n"
    # Freed registers may still collide by chance; the code as it is shows what is possible.
    return min(cycles("\n".join(lines) + "\n", mcpu, triple), cycles(real, mcpu, triple))


@cache
def core_peak(kind: str, mcpu: str, triple: str = "aarch64") -> float:
    """Return MACs a cycle of a core's best stream for a kind of kernel (`PEAK_STREAMS`)."""
    if _is_arm32(triple) and kind == "float32":
        kind = "armv7_float32"
    mix = tuple(Instruction(text.format(0, 1, 2)) for text in PEAK_STREAMS[kind])
    return sum(map(arm_asm.macs, mix)) / stream_cycles(mix, mcpu, triple)


# ---------------------------------------------------------------- a loop


@dataclass(frozen=True)
class LoopReport:
    """One loop, predicted.

    Attributes
    ----------
    function, label : str
    kind : str
        "loop"; or "straight line", the multiplying part of a loop that also requantizes: its
        reduction is unrolled whole.
    instructions, macs : int
        Of one pass.
    cycles : float
        Of one pass, all loads hitting the first cache.
    peak_cycles : float
        Of its multiply and add-up instructions alone, independent of each other.
    issue_cycles : float
        Of all its instructions, none waiting for another's vector: what is above it is waiting.
    mix : dict of str to int
        Those instructions.
    loads, stores, load_bytes : int
    spills : tuple of str
        Its accesses to the stack.
    """

    function: str
    label: str
    kind: str
    instructions: int
    macs: int
    cycles: float
    peak_cycles: float
    issue_cycles: float
    mix: dict[str, int]
    loads: int
    stores: int
    load_bytes: int
    spills: tuple[str, ...]
    text: tuple[str, ...] = ()

    @property
    def macs_per_cycle(self) -> float:
        """Predicted MACs a cycle."""
        return self.macs / self.cycles

    @property
    def peak_macs_per_cycle(self) -> float:
        """MACs a cycle of the same multiplies, if nothing held them up."""
        return self.macs / self.peak_cycles

    @property
    def percent(self) -> float:
        """Share of that bound, in percent."""
        return 100 * self.peak_cycles / self.cycles

    @property
    def issue_percent(self) -> float:
        """Share of what ports and issue width allow for the whole body, in percent."""
        return 100 * self.issue_cycles / self.cycles

    def record(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return {
            **asdict(self), "macs_per_cycle": self.macs_per_cycle,
            "peak_macs_per_cycle": self.peak_macs_per_cycle, "percent": self.percent,
            "issue_percent": self.issue_percent,
        }  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """The multiplying loops of a kernel, the one with most MACs a pass first."""

    mcpu: str
    loops: tuple[LoopReport, ...]

    @property
    def inner(self) -> LoopReport:
        """The inner loop."""
        return self.loops[0]

    @property
    def spills(self) -> int:
        """Stack accesses in all multiplying loops."""
        return sum(len(loop.spills) for loop in self.loops)


# The epilogue converts and narrows; a reduction does not.
_EPILOGUE = re.compile(r"scvtf|fcvt\w+|frint\w|[su]qxt\w+|vcvt\S*|vqmov\S*")


def _body(loop: Loop) -> tuple[str, tuple[Instruction, ...]]:
    """Return the kind and the instructions of a loop that are its reduction."""
    code = loop.instructions
    if not any(_EPILOGUE.fullmatch(i.mnemonic) for i in code):
        return "loop", code
    works = [n for n, i in enumerate(code) if arm_asm.macs(i) or arm_asm.is_sum(i)]
    # The epilogue multiplies by its scales as well: those stand behind its first conversion.
    first = next(n for n, i in enumerate(code) if _EPILOGUE.fullmatch(i.mnemonic))
    before = [n for n in works if n < first]
    works = before if len(before) * 2 > len(works) else [n for n in works if n > first]
    start, end = works[0], works[-1] + 1
    # The loads in front of the first product belong to it.
    while start > 0 and (
        arm_asm.access(code[start - 1]) == "load" or code[start - 1].mnemonic == "movi"
    ):
        start -= 1
    return "straight line", code[start:end]


def analyse_loop(
    function: Function, loop: Loop, mcpu: str, triple: str = "aarch64"
) -> LoopReport | None:
    """Return the prediction for a loop, or None where it multiplies nothing."""
    if not any(arm_asm.macs(i) for i in loop.instructions):
        return None
    kind, code = _body(loop)
    mix = tuple(i for i in code if arm_asm.macs(i) or arm_asm.is_sum(i))
    if any(i.mnemonic in ("fmla", "fmls") for i in mix):
        mix = tuple(i for i in mix if i.mnemonic != "fmul")
    accesses = Counter(arm_asm.access(i) for i in code)
    frame = arm_asm.has_frame_pointer(function)
    text = "\n".join(i.text for i in code) + "\n"
    return LoopReport(
        function=function.name,
        label=loop.header,
        kind=kind,
        instructions=len(code),
        macs=sum(map(arm_asm.macs, mix)),
        cycles=cycles(text, mcpu, triple),
        peak_cycles=stream_cycles(mix, mcpu, triple),
        issue_cycles=issue_cycles(code, mcpu, triple),
        mix=dict(Counter(i.mnemonic for i in mix)),
        loads=accesses["load"],
        stores=accesses["store"],
        load_bytes=sum(arm_asm.moved_bytes(i) for i in code if arm_asm.access(i) == "load"),
        spills=tuple(i.text for i in code if arm_asm.on_stack(i, frame)),
        text=tuple(i.text for i in code),
    )


def analyse_asm(
    asm: str,
    mcpu: str,
    triple: str = "aarch64",
    function: str | None = None,
    is_float: bool | None = None,
) -> Analysis:
    """Return the predictions for the multiplying loops of an assembly file.

    Parameters
    ----------
    asm : str
        What ``module.inspect_source("asm")`` of a kernel returns, or a fragment of it.
    mcpu : str
        A core as LLVM calls it, such as "cortex-a72".
    triple : str
        "aarch64", or "armv7a" for 32 bits.
    function : str, optional
        Look at functions with this in their names only.
    is_float : bool, optional
        Whether the kernel multiplies floats; by default, whether no loop multiplies integers. An
        int8 kernel's float loops are epilogues, and left out.

    Raises
    ------
    McaError
        When llvm-mca is missing, the core is unknown or its model lacks an instruction.
    ValueError
        When nothing there multiplies.
    """
    reports: list[LoopReport] = []
    for each in arm_asm.parse(asm):
        if function is not None and function not in each.name:
            continue
        for loop in each.innermost:
            report = analyse_loop(each, loop, mcpu, triple)
            if report is not None and report.macs:
                reports.append(report)
    if not reports:
        reports = _straight_lines(asm, mcpu, triple, function)
    if not reports:
        raise ValueError("nothing in this assembly multiplies vectors")
    if is_float is None:
        is_float = not any(map(_is_int8, reports))
    reports = [report for report in reports if _is_int8(report) != is_float]
    if not reports:
        raise ValueError(
            f"nothing in this assembly multiplies {'floats' if is_float else 'integers'}"
        )
    reports.sort(key=lambda report: report.macs, reverse=True)
    return Analysis(mcpu, tuple(reports))


def _straight_lines(asm: str, mcpu: str, triple: str, function: str | None) -> list[LoopReport]:
    """Return a report of each multiplying block that lies in no loop at all."""
    reports = []
    for each in arm_asm.parse(asm):
        if function is None or function in each.name:
            for block in each.blocks:
                report = analyse_loop(each, Loop(block.label, (block,)), mcpu, triple)
                if report is not None and report.macs:
                    reports.append(report)
    return reports


def _is_int8(report: LoopReport) -> bool:
    """Whether a loop multiplies integers: an int8 kernel's float loops are epilogues."""
    return any(not name.startswith(("f", "vfm")) for name in report.mix)


def describe(report: LoopReport) -> str:
    """Return a loop's prediction in one paragraph."""
    mix = ", ".join(f"{count} {name}" for name, count in report.mix.items())
    spilled = "".join(f"\n    spill: {text}" for text in report.spills)
    return (
        f"{report.function or '(fragment)'} {report.label} ({report.kind}): "
        f"{report.instructions} instructions, {report.macs} MACs ({mix})\n"
        f"    predicted {report.cycles:.1f} cycles = {report.macs_per_cycle:.2f} MACs/cycle, "
        f"{report.percent:.0f}% of this mix's {report.peak_macs_per_cycle:.2f} "
        f"({report.issue_percent:.0f}% of what issue allows); "
        f"{report.loads} loads ({report.load_bytes} bytes), {report.stores} stores, "
        f"{len(report.spills)} spills{spilled}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the predictions for an assembly file."""
    parser = argparse.ArgumentParser(prog="python -m bench.mca", description=__doc__)
    parser.add_argument("file", type=Path, help="assembly; - is standard input")
    parser.add_argument("--mcpu", required=True, help="a core, as cortex-a72")
    parser.add_argument("--triple", default="aarch64")
    parser.add_argument("--function", help="only functions with this in their names")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.add_argument("--text", action="store_true", help="print the inner loop's instructions")
    given = parser.parse_args(arguments)
    asm = sys.stdin.read() if str(given.file) == "-" else given.file.read_text()
    try:
        found = analyse_asm(asm, given.mcpu, given.triple, given.function)
    except (McaError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if given.json:
        print(json.dumps([loop.record() for loop in found.loops], indent=2))
        return 0
    for loop in found.loops:
        print(describe(loop))
    if given.text:
        print("\n".join(found.inner.text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
