"""What one core can do: loops of each instruction set's product, all operands in registers.

A row of `LOOPS` is the few instructions of one step; `generate` repeats them over independent
accumulators, enough to hide their latency, closes the loop, and wraps it as LLVM IR in a TIR
function, so that TVM's own compiler builds it for any Target. As assembly, the loop cannot be
hoisted, folded or spilled: what is measured is the instruction.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.script import from_source
from tvm.script import tirx as T
from tvm.target import Target

from topi_int8 import target as targets

# Tile configuration (palette 1): eight tiles of 16 rows by 64 bytes.
_TILECFG = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])


@dataclass(frozen=True)
class PeakLoop:
    """A loop of one ISA's product.

    Parameters
    ----------
    name : str
        What is printed.
    isa : str
        The row of `topi_int8.target` that it needs.
    dtype : str
        "int8" or "float32".
    step : tuple of str
        Assembly of one step, AT&T operand order. ``{v}`` is the register prefix and width
        (``%ymm``), ``{acc}`` the accumulator's number, ``{tmp}`` a temporary's, ``{a}`` and
        ``{b}`` the operands'.
    macs : int
        Multiply-accumulates of one step.
    accumulators : int
        Independent steps in the loop.
    bits : int
        Vector width; 0 for tiles.
    exact : bool
        False when products may saturate.
    """

    name: str
    isa: str
    dtype: str
    step: tuple[str, ...]
    macs: int
    accumulators: int
    bits: int
    exact: bool = True

    def __post_init__(self) -> None:
        last = {0: 8, 256: 16, 512: 32}.get(self.bits)
        if last is None:
            raise ValueError(f"bits is {self.bits}; allowed: 0 (tiles), 256, 512")
        uses_temporary = any("{tmp}" in line for line in self.step)
        used = self.accumulators * (1 + uses_temporary) + (4 if self.bits == 0 else 2)
        if used > last:
            raise ValueError(
                f"accumulators is {self.accumulators}; allowed: what {last} registers hold"
            )

    @property
    def instruction(self) -> str:
        """The mnemonic that multiplies."""
        return self.step[0].removeprefix("{{vex}} ").split()[0]

    def lines(self) -> list[str]:
        """Return the assembly of one iteration: every accumulator's first line, then the second.

        In stages rather than step by step: on Zen 3 that is 5 % faster, the same elsewhere.
        """
        return [
            line.format(
                v={0: "%tmm", 256: "%ymm", 512: "%zmm"}[self.bits], **self._registers(index)
            )
            for line in self.step
            for index in range(self.accumulators)
        ]

    def _registers(self, index: int) -> dict[str, int]:
        """Register numbers of one accumulator's step."""
        if self.bits == 0:
            # 2x2 blocking, as a kernel would: rows in tiles 4 and 5, columns in 6 and 7.
            return {"acc": index, "tmp": 0, "a": 4 + index // 2, "b": 6 + index % 2}
        last = 15 if self.bits == 256 else 31
        return {"acc": index, "tmp": self.accumulators + index, "a": last, "b": last - 1}


def _loops() -> tuple[PeakLoop, ...]:
    dpbusd = "vpdpbusd {v}{b}, {v}{a}, {v}{acc}"
    madd = ("vpmaddwd {v}{b}, {v}{a}, {v}{tmp}", "vpaddd {v}{tmp}, {v}{acc}, {v}{acc}")
    # {a} doubles as the vector of ones: the data do not matter, and registers are scarce.
    maddubs = (
        "vpmaddubsw {v}{b}, {v}{a}, {v}{tmp}",
        "vpmaddwd {v}{tmp}, {v}{a}, {v}{tmp}",
        "vpaddd {v}{tmp}, {v}{acc}, {v}{acc}",
    )
    fma = ("vfmadd231ps {v}{b}, {v}{a}, {v}{acc}",)
    tdp = ("tdpbusd {v}{b}, {v}{a}, {v}{acc}",)
    return (
        PeakLoop("AMX tdpbusd", "amx_int8", "int8", tdp, 16 * 16 * 64, 4, 0),
        PeakLoop("AVX512-VNNI vpdpbusd zmm", "avx512_vnni", "int8", (dpbusd,), 64, 24, 512),
        PeakLoop("AVX-VNNI vpdpbusd ymm", "avx_vnni", "int8", ("{{vex}} " + dpbusd,), 32, 14, 256),
        PeakLoop("AVX512-BW vpmaddwd zmm", "avx512_bw", "int8", madd, 32, 14, 512),
        PeakLoop("AVX512-BW vpmaddubsw zmm", "avx512_bw", "int8", maddubs, 64, 14, 512, False),
        PeakLoop("AVX2 vpmaddwd ymm", "avx2", "int8", madd, 16, 7, 256),
        PeakLoop("AVX2 vpmaddubsw ymm", "avx2", "int8", maddubs, 32, 7, 256, False),
        PeakLoop("AVX512 vfmadd231ps zmm", "avx512_bw", "float32", fma, 16, 24, 512),
        PeakLoop("AVX2 vfmadd231ps ymm", "avx2", "float32", fma, 8, 14, 256),
    )


LOOPS = _loops()


def _llvm_ir(loop: PeakLoop) -> str:
    """Return LLVM IR of `i32 topi_int8_peak(i64 n)`: the loop, n times around."""
    tiles = loop.bits == 0
    prefix = "zmm" if loop.bits == 512 else "ymm"
    count = 32 if loop.bits == 512 else 16
    setup = (
        ["ldtilecfg ($2)", *(f"tilezero %tmm{i}" for i in range(8))]
        if tiles
        else [f"vxorps %xmm{i}, %xmm{i}, %xmm{i}" for i in range(16)]
        # vpxord: the xmm forms above do not reach registers 16..31.
        + [f"vpxord %zmm{i}, %zmm{i}, %zmm{i}" for i in range(16, count)]
    )
    close = ["decq $0", "jg 1b", "tilerelease" if tiles else "vzeroupper"]
    asm = "\\0A\\09".join([*setup, ".p2align 5", "1:", *loop.lines(), *close])
    clobbered = [f"tmm{i}" for i in range(8)] if tiles else [f"{prefix}{i}" for i in range(count)]
    clobbers = ",".join(f"~{{{name}}}" for name in [*clobbered, "flags", "memory"])
    config = "".join(f"\\{byte:02X}" for byte in _TILECFG)
    features = ",".join(
        "+" + name for name in sorted(targets.features(targets.isa_target(loop.isa)).llvm)
    )
    return f"""
@config = private unnamed_addr constant [64 x i8] c"{config}", align 64
define i32 @topi_int8_peak(i64 %n) "target-features"="{features}" {{
  %left = call i64 asm sideeffect "{asm}", "=r,0,r,{clobbers}"(i64 %n, ptr @config)
  ret i32 0
}}
"""


_TIR = """
@T.prim_func(s_tir=True)
def main(n: T.int64) -> T.int32:
    T.func_attr({{"global_symbol": "main"}})
    T.attr(T.int32(0), "pragma_import_llvm", {ir!r})
    return T.call_extern("int32", "topi_int8_peak", n)
"""


def generate(loop: PeakLoop) -> tvm.IRModule:
    """Return the module whose ``main(n: int64)`` runs `loop` n times."""
    func = from_source(_TIR.format(ir=_llvm_ir(loop)), {"T": T})
    return tvm.IRModule({"main": func})


def build(loop: PeakLoop, target: Target | None = None) -> Any:
    """Return the compiled module of `loop`, for its own ISA's Target or another."""
    return tvm.compile(generate(loop), target=target or targets.isa_target(loop.isa))


class Meter:
    """Measures one loop again and again; the best run so far stands.

    A neighbour on a shared machine can slow any one stretch, so a run over many layers samples the
    peak beside each of them.

    Raises
    ------
    ValueError
        When this CPU lacks the loop's ISA (running it would be SIGILL).
    """

    def __init__(self, loop: PeakLoop) -> None:
        if not targets.runs_here(loop.isa):
            raise ValueError(f"loop is {loop.name!r}; allowed here: {[p.name for p in runnable()]}")
        self.loop = loop
        self._run = build(loop)["main"]
        self._best = float("inf")  # seconds an iteration
        self._iterations = 1000
        # 0.2 ms is long against the clock and the call, short against the scheduler's tick.
        while self._timed() < 2e-4:
            self._iterations *= 2

    def sample(self, seconds: float) -> float:
        """Run for that long; return the best GOP/s so far (two operations a MAC, one core)."""
        end = time.perf_counter() + seconds
        while True:
            self._best = min(self._best, self._timed() / self._iterations)
            if time.perf_counter() >= end:
                return 2 * self.loop.macs * self.loop.accumulators / self._best / 1e9

    def _timed(self) -> float:
        start = time.perf_counter()
        self._run(self._iterations)
        return time.perf_counter() - start


def measure(loop: PeakLoop, seconds: float = 0.25) -> float:
    """Return GOP/s of the calling core; see `Meter`."""
    return Meter(loop).sample(seconds)


def runnable(dtype: str | None = None) -> list[PeakLoop]:
    """Return the loops that this CPU runs, fastest ISA first."""
    wanted = [loop for loop in LOOPS if dtype in (None, loop.dtype)]
    return [loop for loop in wanted if targets.runs_here(loop.isa)]


def loop_for(isa: str, dtype: str = "int8", intrinsic: str = "") -> PeakLoop | None:
    """Return the loop a kernel is held against: the one of its ISA and instruction.

    Parameters
    ----------
    isa : str
        Fastest ISA of the Target.
    dtype : str
        "int8" or "float32".
    intrinsic : str
        Name of the kernel's intrinsic. Where it says ``u8s8s32`` on an ISA without VNNI, the
        faster, saturating loop is its bound; else the exact one.

    Returns
    -------
    PeakLoop or None
        None where the ISA has none (generic).
    """
    order = [row.name for row in targets.X86_ISAS]
    if isa not in order:
        return None
    # float32 has loops for two ISAs; the others use the widest at or below them.
    at_or_below = order[order.index(isa) :]
    if dtype == "float32" and isa == "avx_vnni":
        at_or_below = ["avx2"]
    candidates = [loop for loop in LOOPS if loop.dtype == dtype and loop.isa in at_or_below]
    candidates = [loop for loop in candidates if loop.isa == candidates[0].isa]
    saturating = "u8s8s32" in intrinsic
    return next((p for p in candidates if p.exact != saturating), next(iter(candidates), None))
