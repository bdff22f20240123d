"""The instructions of linked ARM libraries: what they are made of, and what is beyond an ISA."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .arm import MACHINES

_DOT = r"[su]dot|usdot|sudot|bfdot"
_MMLA = r"u?smmla|ummla|bfmmla"
_SVE = r"ptrue|whilelo|cntb|st1b\s+\{z"

# Mnemonics of an instruction set's dense integer kernels.
MADE_OF = {
    "neon": r"smlal2?|smull2?",
    "neon_dotprod": r"[su]dot",
    "neon_i8mm": r"u?smmla|ummla",
    "armv7_neon": r"vmlal\.[su]8|vmull\.[su]8",
}
# What its libraries must not hold.
_BEYOND = {
    "neon": rf"{_DOT}|{_MMLA}|{_SVE}",
    "neon_dotprod": rf"usdot|sudot|bfdot|{_MMLA}|{_SVE}",
    "neon_i8mm": _SVE,
    # VFPv4 and the integer divide came with the Cortex-A15.
    "armv7_neon": r"v[su]dot|vfm[as]|[su]div",
}


def disassembled(isa: str, library: Path) -> list[str]:
    """Return the instructions of a linked library, without addresses."""
    objdump = MACHINES[isa].compiler.replace("g++", "objdump")
    command = [objdump, "-d", "--no-show-raw-insn", str(library)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return re.findall(r"^ *[0-9a-f]+:\s+(\S.*)$", done.stdout, re.M)


def made_of(isa: str, lines: Sequence[str]) -> list[str]:
    """Return the instructions that an ISA's integer kernels stand on."""
    return [line for line in lines if re.match(rf"({MADE_OF[isa]})\s", line)]


def beyond(isa: str, lines: Sequence[str]) -> list[str]:
    """Return the instructions that a CPU with just this ISA lacks."""
    return [line for line in lines if re.match(rf"({_BEYOND[isa]})(\.\w+)*\s", line)]
