"""How fast one core reads: a loop of vector loads over a buffer of a cache's size, or of memory's.

Built as `peaks` builds its loops, so that nothing of it can be left out. Loads alone, in order:
what prefetchers make of that is part of the answer.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.script import from_source
from tvm.script import tirx as T

from topi_int8 import target as targets

_CACHES = Path("/sys/devices/system/cpu")
# Where the kernel does not say: of every x86-64 server core of the last ten years.
_L2_DEFAULT = 1 << 20
# Beyond every cache that a guest is likely to share.
_MEMORY_BYTES = 512 << 20
_STEP = 512  # bytes of one time around the loop
_LINE = 64
# Some 0.3 ms of the second-level cache: long against the clock and the call.
_SAMPLE_BYTES = 32 << 20


@dataclass(frozen=True)
class Level:
    """A level of memory.

    Parameters
    ----------
    name : str
    bytes : int
        Of the buffer that is read again and again.
    """

    name: str
    bytes: int

    def __post_init__(self) -> None:
        if self.bytes < _STEP:
            raise ValueError(f"bytes is {self.bytes}; allowed: {_STEP} or more")


def cache_bytes(level: int, cpu: int = 0, root: Path = _CACHES) -> int | None:
    """Return the size of a core's data cache of a level; None where the kernel does not say."""
    for index in sorted((root / f"cpu{cpu}" / "cache").glob("index*")):
        try:
            if int((index / "level").read_text()) != level:
                continue
            if (index / "type").read_text().strip() == "Instruction":
                continue
            size = re.fullmatch(r"(\d+)K", (index / "size").read_text().strip())
        except OSError:
            continue
        if size:
            return int(size[1]) << 10
    return None


def levels(cpu: int = 0) -> tuple[Level, ...]:
    """Return the levels a roofline shows: half of the second-level cache, and memory."""
    return (
        Level("L2", (cache_bytes(2, cpu) or _L2_DEFAULT) // 2),
        Level("memory", max(_MEMORY_BYTES, 2 * (cache_bytes(3, cpu) or 0))),
    )


_TIR = """
@T.prim_func(s_tir=True)
def main(address: T.int64, steps: T.int64, passes: T.int64) -> T.int32:
    T.func_attr({{"global_symbol": "main"}})
    T.attr(T.int32(0), "pragma_import_llvm", {ir!r})
    return T.call_extern("int32", "topi_int8_read", address, steps, passes)
"""


def _llvm_ir(isa: str) -> str:
    """Return LLVM IR of `i32 topi_int8_read(i64 address, i64 steps, i64 passes)`.

    A pass is that many steps of loads, each of `_STEP` bytes.
    """
    register, width = ("zmm", 64) if isa == "avx512_bw" else ("ymm", 32)
    loads = [f"vmovups {width * i}(%rax), %{register}{i % 16}" for i in range(_STEP // width)]
    asm = "\\0A\\09".join([
        "2:", "movq $1, %rax", "movq $2, %rcx", ".p2align 5",
        "1:", *loads, f"addq $${_STEP}, %rax", "decq %rcx", "jg 1b",
        "decq $0", "jg 2b", "vzeroupper",
    ])  # fmt: skip
    clobbered = ["rax", "rcx", *(f"{register}{i}" for i in range(16)), "flags", "memory"]
    clobbers = ",".join(f"~{{{name}}}" for name in clobbered)
    features = ",".join(
        "+" + name for name in sorted(targets.features(targets.isa_target(isa)).llvm)
    )
    return f"""
define i32 @topi_int8_read(i64 %address, i64 %steps, i64 %passes) "target-features"="{features}" {{
  %left = call i64 asm sideeffect "{asm}", "=&r,r,r,0,{clobbers}"(i64 %address, i64 %steps, i64 %passes)
  ret i32 0
}}
"""  # noqa: E501


def build(isa: str) -> Any:
    """Return the compiled module of the loop for "avx512_bw" or "avx2"."""
    func = from_source(_TIR.format(ir=_llvm_ir(isa)), {"T": T})
    return tvm.compile(tvm.IRModule({"main": func}), target=targets.isa_target(isa))


def measure(level: Level, seconds: float = 0.25) -> float | None:
    """Return the GB/s at which the calling core reads a level; None on a CPU without AVX2."""
    isa = next((name for name in ("avx512_bw", "avx2") if targets.runs_here(name)), None)
    if isa is None:
        return None
    read = build(isa)["main"]
    # Ones, so that each page is one of its own and not the kernel's page of zeros. Aligned, for a
    # load across two lines counts as two.
    buffer = np.ones(level.bytes + _LINE, "uint8")
    address = buffer.ctypes.data + -buffer.ctypes.data % _LINE
    steps = level.bytes // _STEP
    passes = max(1, _SAMPLE_BYTES // level.bytes)
    best = float("inf")
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        read(address, steps, passes)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() >= end:
            return passes * steps * _STEP / best / 1e9
