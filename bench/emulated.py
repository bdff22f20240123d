"""Kernels under qemu-user with an instruction counter: exact counts, no times.

The kernel's assembly and ``tests/emulator/insn_runner.c`` become one static aarch64 program;
``tests/emulator/insn_count.c``, a plugin of QEMU, counts what it executes between two marks. Needs
Debian's qemu-user, gcc, gcc-aarch64-linux-gnu and llvm-19.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from . import arm_asm, mca

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = REPOSITORY / "tests" / "emulator"
BUILD = REPOSITORY / "build" / "emulator" / "insn_count"
CROSS = "aarch64-linux-gnu-gcc"
# Debian's packages of the programs, for the message that one is missing.
_PACKAGES = {
    "qemu-aarch64": "qemu-user", "gcc": "gcc", CROSS: "gcc-aarch64-linux-gnu",
    "aarch64-linux-gnu-nm": "binutils-aarch64-linux-gnu",
}  # fmt: skip
# QEMU's CPU with an instruction set and nothing beyond it.
CPUS = {
    "generic": "cortex-a72",
    "neon": "cortex-a72",
    "neon_dotprod": "neoverse-n1",
    "neon_i8mm": "max,sve=off,sme=off",
}
# Its "max" has SVE of 512 bits, which onnxruntime would use and no core of ours has: vectors of 128
# bits, or of what the core has.
_SVE_CPU = "max,sme=off,sve-max-vq={quadwords}"
_SVE_QUADWORDS = {"neoverse-v1": 2}
SECONDS = 600


def cpu_for(isa: str, features: Collection[str], mcpu: str = "") -> str:
    """Return QEMU's CPU for code of an ISA with further LLVM features, such as sve."""
    if "sve" in features:
        return _SVE_CPU.format(quadwords=_SVE_QUADWORDS.get(mcpu, 1))
    return CPUS[isa]


class EmulatorError(RuntimeError):
    """A program is missing or failed; the message says which and how to get it."""


def _require(*programs: str) -> None:
    missing = [_PACKAGES[name] for name in programs if shutil.which(name) is None]
    if missing:
        raise EmulatorError(f"not installed: apt-get install {' '.join(missing)}")


def _run(*command: str, **options: Any) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, **options
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise EmulatorError(f"{command[0]} took longer than {SECONDS} s") from None
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip())[-600:]
        raise EmulatorError(f"{Path(command[0]).name} failed ({done.returncode}): {words}")
    return done.stdout


@cache
def plugin() -> Path:
    """Return the built plugin.

    Raises
    ------
    EmulatorError
        When QEMU or gcc is missing.
    """
    _require("qemu-aarch64", "gcc")
    found = re.search(r"version (\d+)", _run("qemu-aarch64", "--version"))
    # QEMU 9 dropped version 1 of the interface; what we use is the same in version 2.
    api = 1 if found and int(found.group(1)) < 9 else 2
    out = BUILD / f"libinsn_count-{api}.so"
    source = SOURCES / "insn_count.c"
    return _built(
        out, source, "gcc", "-O2", "-shared", "-fPIC", "-fvisibility=hidden",
        f"-DQEMU_PLUGIN_VERSION={api}",
    )  # fmt: skip


@cache
def _runner() -> Path:
    _require(CROSS, "aarch64-linux-gnu-nm")
    return _built(BUILD / "insn_runner.o", SOURCES / "insn_runner.c", CROSS, "-O2", "-c")


def _built(out: Path, source: Path, *command: str) -> Path:
    """Compile `source` unless `out` is newer; another process may be doing the same."""
    if not out.exists() or out.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / out.name
            _run(*command, str(source), "-o", str(made))
            made.replace(out)
    return out


def qemu(
    cpu: str, out: Path, program: Sequence[str], *, blocks: bool = False, **options: Any
) -> str:
    """Run an aarch64 program under QEMU with the counter writing to `out`."""
    text = f"{plugin()},out={out}" + (",blocks=on" if blocks else "")
    return _run("qemu-aarch64", "-cpu", cpu, "-plugin", text, *program, **options)


def read_counts(out: Path) -> list[int]:
    """Return the instructions between each pair of marks."""
    return [int(line.split()[1]) for line in out.read_text().splitlines() if line[:5] == "count"]


# ---------------------------------------------------------------- a kernel


@dataclass(frozen=True)
class Executed:
    """What one call of a kernel executes.

    Attributes
    ----------
    instructions : int
        All of them, the C library's memset and the like included.
    blocks : dict of (str, str) to int
        Executions of each basic block of the kernel, by function and label.
    """

    instructions: int
    blocks: dict[tuple[str, str], int] = field(default_factory=dict)


def tensor_arguments(func: Any) -> list[str]:
    """Return the runner's arguments for the tensors of a PrimFunc."""
    codes = {"int": 0, "uint": 1, "float": 2}
    arguments = []
    for buffer in func.params:
        kind, bits = re.fullmatch(r"([a-z]+)(\d+)", str(buffer.dtype)).groups()
        dims = "x".join(str(int(dim)) for dim in buffer.shape)
        arguments.append(f"{codes[kind]}:{bits}:{dims}")
    return arguments


def execute(asm: str, tensors: Sequence[str], cpu: str = "max", blocks: bool = False) -> Executed:
    """Run the kernel of an assembly file once under QEMU and count.

    Parameters
    ----------
    asm : str
        What ``inspect_source("asm")`` returns for aarch64.
    tensors : sequence of str
        See `tensor_arguments`.
    cpu : str
        A CPU of qemu-aarch64; an instruction that it lacks ends the run.
    blocks : bool
        Whether to say how often each basic block ran.

    Raises
    ------
    EmulatorError
        When a program is missing, or the kernel fails.
    """
    assembler = mca.command().replace("llvm-mca", "llvm-mc")
    with tempfile.TemporaryDirectory(prefix="insn_count") as name:
        folder = Path(name)
        # Labels that the assembler drops (.L...) become symbols: they tell where a block lies.
        (folder / "kernel.s").write_text(re.sub(r"\.L(BB|__tvm)", r"L\1", asm))
        _run(
            assembler, "-filetype=obj", "-triple=aarch64-linux-gnu", f"-mattr={mca.FEATURES}",
            str(folder / "kernel.s"), "-o", str(folder / "kernel.o"),
        )  # fmt: skip
        program, out = folder / "program", folder / "counts"
        _run(
            CROSS, "-static", "-no-pie", str(folder / "kernel.o"), str(_runner()), "-lm",
            "-o", str(program),
        )  # fmt: skip
        qemu(cpu, out, [str(program), "1", *tensors], blocks=blocks)
        (total,) = read_counts(out)
        if not blocks:
            return Executed(total)
        symbols = _run("aarch64-linux-gnu-nm", str(program))
        return Executed(total, _by_block(asm, symbols, out.read_text()))


def _by_block(asm: str, symbols: str, counts: str) -> dict[tuple[str, str], int]:
    """Return the executions of each basic block of the assembly."""
    at = {}
    for line in symbols.splitlines():
        parts = line.split()
        if len(parts) == 3:
            at[parts[2]] = int(parts[0], 16)
    # QEMU's blocks begin where control arrived and reach over the labels on their way.
    executed: Counter[int] = Counter()
    for line in counts.splitlines():
        if line.startswith("block "):
            start, length, times = (int(word, 0) for word in line.split()[1:])
            for index in range(length):
                executed[start + 4 * index] += times
    found = {}
    for function in arm_asm.parse(asm):
        address: int | None = None
        for block in function.blocks:
            # A block without a symbol follows the one before it; padding stands before labels only.
            address = at.get(re.sub(r"^\.L(BB|__tvm)", r"L\1", block.label), address)
            if address is not None and block.instructions:
                if times := executed[address]:
                    found[function.name, block.label] = times
                address += 4 * len(block.instructions)
    return found


# ---------------------------------------------------------------- cycles of a whole kernel


@dataclass(frozen=True)
class WholeKernel:
    """Predicted cycles of one call: executions from QEMU times llvm-mca's cycles of each block.

    Attributes
    ----------
    cycles : float
    instructions : int
    modelled : float
        Share of the instructions in blocks that llvm-mca was asked about; the rest (rare blocks,
        the C library) counts at their average cycles an instruction.
    inner : float
        Share of the cycles in blocks that multiply.
    """

    cycles: float
    instructions: int
    modelled: float
    inner: float


_ENOUGH = 0.995  # of the instructions; the blocks beyond are many and short


def predict_cycles(asm: str, executed: Executed, mcpu: str) -> WholeKernel:
    """Return the predicted cycles of a kernel on one core: no cache misses, no branch misses.

    Each block repeats in the model, as it does in a loop; what overlaps between a loop and its
    surroundings on an out-of-order core is not modelled.
    """
    blocks = []
    for function in arm_asm.parse(asm):
        for block in function.blocks:
            times = executed.blocks.get((function.name, block.label), 0)
            if times and block.instructions:
                blocks.append((times * len(block.instructions), times, block))
    blocks.sort(key=lambda entry: -entry[0])
    cycles = inner = 0.0
    covered = 0
    for size, times, block in blocks:
        if covered >= _ENOUGH * executed.instructions:
            break
        text = "\n".join(i.text for i in block.instructions) + "\n"
        spent = times * mca.cycles(text, mcpu)
        cycles += spent
        covered += size
        if any(map(arm_asm.macs, block.instructions)):
            inner += spent
    if not covered:
        raise EmulatorError("no block of the kernel was executed")
    total = cycles * executed.instructions / covered
    return WholeKernel(total, executed.instructions, covered / executed.instructions, inner / total)
