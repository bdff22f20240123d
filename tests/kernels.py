"""Build, run and compare one workload's kernel on one ISA; read the assembly of any.

>>> check(Conv2dWorkload(1, 64, 14, 14, 64, 3, 3), "avx2")
>>> Assembly.of(build(work, "avx512_vnni").library).mnemonics()["vpdpbusd"]

An ISA runs natively, or in this process by `tests.emulator` (AMX, AVX-VNNI), or not at all:
`executable` says which, `require` skips a test with the reason.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tvm

from intrinsics.compat import IS_RELAX
from tests import emulator, reference
from topi_int8 import strategy, target
from topi_int8.kernel import Blocks, Kernel
from topi_int8.workload import Conv2dWorkload, MatmulWorkload

Workload = Conv2dWorkload | MatmulWorkload

# Every instruction set of the table, and AMX beside AVX2, which only an emulator has.
ISAS = ("generic", "avx2", "avx_vnni", "avx512_bw", "avx512_vnni", "amx_int8_avx2", "amx_int8")
_EMULATED = {"avx_vnni": "avxvnni", "amx_int8_avx2": "amx"}
_ALIGNMENT = 64  # what TVM's kernels may rely on

# TVM 0.17 has them under other names.
compile_module = tvm.compile if IS_RELAX else tvm.build
_from_dlpack = tvm.runtime.from_dlpack if IS_RELAX else tvm.nd.from_dlpack


# ---------------------------------------------------------------- where an ISA runs


@functools.cache
def executable(isa: str) -> tuple[bool, str]:
    """Return (whether kernels for this ISA run in this process, how or why not)."""
    if target.runs_here(isa):
        return True, "native"
    feature = _EMULATED.get(isa)
    if feature is None:
        return False, f"this CPU lacks {isa} and no in-process emulator has it"
    if not target.runs_here("avx2"):
        return False, f"this CPU lacks AVX2, which emulated {isa} stands on"
    try:
        emulator.install([feature])
    except emulator.EmulatorError as error:
        return False, str(error)
    return True, "emulated"


def require(isa: str) -> None:
    """Skip the running test, with the reason, unless kernels for this ISA run here."""
    runs, reason = executable(isa)
    if not runs:
        pytest.skip(reason)
    if reason == "emulated":
        emulator.install([_EMULATED[isa]])  # something else may have taken SIGILL since


# ---------------------------------------------------------------- build


@dataclass(frozen=True)
class Built:
    """A compiled kernel: the decision, its packers, and the library with the function "main"."""

    work: Workload
    decision: strategy.Decision
    kernel: Kernel
    library: tvm.runtime.Executable


def decide(work: Workload, isa: str, layout: str = "NCHWc") -> strategy.Decision:
    """Return the strategy table's decision on the canonical Target of an ISA."""
    if isinstance(work, MatmulWorkload):
        return strategy.matmul(work, target.isa_target(isa))
    return strategy.conv2d(work, target.isa_target(isa), layout)


def build(
    work: Workload, isa: str, blocks: Blocks | None = None, layout: str = "NCHWc"
) -> Built:
    """Compile the kernel that the strategy table chooses."""
    decision = decide(work, isa, layout)
    kernel = decision.kernel(blocks)
    module = tvm.IRModule({"main": kernel.func})
    library = compile_module(module, target=target.isa_target(isa))
    return Built(work, decision, kernel, library)


# ---------------------------------------------------------------- arrays between guard pages


class Fenced:
    """A copy of an array whose end lies at an unreadable page: overruns die or are seen.

    Up to 63 bytes behind the array, which keep it aligned, and all bytes before it in its first
    page hold a pattern that `check` looks for.
    """

    def __init__(self, array: np.ndarray) -> None:
        page, size = mmap.PAGESIZE, array.nbytes
        rounded = -(-size // _ALIGNMENT) * _ALIGNMENT
        usable = -(-rounded // page) * page
        self._memory = mmap.mmap(-1, usable + page)
        whole = np.frombuffer(self._memory, np.uint8)
        _protect(whole.ctypes.data + usable, page)
        start = usable - rounded
        self._edges = (whole[:start], whole[start + size : usable])
        for edge in self._edges:
            edge[:] = 0xA5
        self.array = whole[start : start + size].view(array.dtype).reshape(array.shape)
        self.array[...] = array

    def tensor(self) -> Any:
        """Return a TVM tensor of this very memory."""
        return _from_dlpack(self.array)

    def check(self) -> None:
        """Assert that nothing was written around the array."""
        for edge, where in zip(self._edges, ("before", "behind"), strict=True):
            assert (edge == 0xA5).all(), f"the kernel wrote {where} an array of its own"


def _protect(address: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")


def call(library: Any, inputs: list[np.ndarray], out: np.ndarray) -> np.ndarray:
    """Return what function "main" stores into an array like `out`, its arrays fenced."""
    poison = np.frombuffer(b"\xa5" * out.nbytes, out.dtype).reshape(out.shape)
    arrays = [Fenced(np.ascontiguousarray(array)) for array in (*inputs, poison)]
    library["main"](*(array.tensor() for array in arrays))
    for array, given in zip(arrays, inputs, strict=False):
        array.check()
        assert np.array_equal(array.array, given, equal_nan=given.dtype.kind == "f"), (
            "the kernel changed an input"
        )
    arrays[-1].check()
    return arrays[-1].array.copy()


# ---------------------------------------------------------------- operands in the kernel's layouts


def weight_nk(work: Workload, weight: np.ndarray) -> np.ndarray:
    """Return the weight as the packers take it: OIHW, or (.., N, K)."""
    if isinstance(work, MatmulWorkload) and not work.transpose_b:
        return np.ascontiguousarray(np.swapaxes(weight, -1, -2))
    return weight


def inputs(built: Built, ops: reference.Operands) -> list[np.ndarray]:
    """Return the arrays that the kernel takes before its output."""
    work, kernel = built.work, built.kernel
    weight = weight_nk(work, ops.weight)
    arrays = [_pack(built, ops.data, is_output=False), kernel.pack_weight(weight)]
    if kernel.takes_bias:
        arrays.append(kernel.pack_bias(ops.bias, weight))
    if ops.scale is not None:
        arrays.append(kernel.pack_scale(ops.scale))
    if ops.residual is not None:
        arrays.append(_pack(built, ops.residual, is_output=True))
    return arrays


def pack_output(built: Built, out: np.ndarray) -> np.ndarray:
    """Return an output of the reference in the kernel's layout, padding channels 0."""
    return _pack(built, out, is_output=True)


def _pack(built: Built, array: np.ndarray, is_output: bool) -> np.ndarray:
    work, kernel = built.work, built.kernel
    if isinstance(work, MatmulWorkload):
        return array.reshape(1, work.batch, 1, work.m, -1)
    # Padding channels may hold anything: their weights are zero.
    layout, pad = (kernel.out_layout, 0) if is_output else (kernel.data_layout, 77)
    return _as_kernel_sees(layout.pack(array, pad))


def _as_kernel_sees(array: np.ndarray) -> np.ndarray:
    """Return NHWC as the one block that it is to a kernel."""
    return array[:, None] if array.ndim == 4 else array


def run(built: Built, ops: reference.Operands) -> np.ndarray:
    """Return the kernel's output as the reference shapes it: NCHW, or (.., M, N)."""
    work, out_dtype = built.work, built.work.epilogue.out_dtype
    if isinstance(work, MatmulWorkload):
        lead = () if work.batch == 1 else (work.batch,)
        out = np.empty((1, work.batch, 1, work.m, work.n), out_dtype)
        return call(built.library, inputs(built, ops), out).reshape(*lead, work.m, work.n)
    layout = built.kernel.out_layout
    shape = layout.shape(work.n, work.oc, *work.stored)
    out = _as_kernel_sees(np.empty(shape, out_dtype))
    return layout.unpack(call(built.library, inputs(built, ops), out).reshape(shape), work.oc)


# ---------------------------------------------------------------- compare


def expected(work: Workload, ops: reference.Operands) -> np.ndarray:
    """Return the reference's output."""
    compute = reference.conv2d if isinstance(work, Conv2dWorkload) else reference.matmul
    return compute(work, **ops.named())


def compare(work: Workload, got: np.ndarray, want: np.ndarray) -> None:
    """Assert that int32 is bit-exact, 8 bits within 1 (hardly ever off), float32 by its rounding.

    A requantized value differs where v * scale lies at a tie and the compiler fuses a multiply and
    an add: less than one in a hundred.
    """
    dtype = work.epilogue.out_dtype
    assert got.shape == want.shape and got.dtype == want.dtype == dtype
    if dtype == "int32":
        np.testing.assert_array_equal(got, want)
    elif dtype == "float32":
        scale = float(np.abs(want).max()) if work.is_float else 1.0
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * max(scale, 1.0))
    else:
        off_by_one_rarely(got, want)


def off_by_one_rarely(got: np.ndarray, want: np.ndarray) -> None:
    """Assert that requantized values are the wanted ones, but for less than one in a hundred."""
    assert got.shape == want.shape and got.dtype == want.dtype
    off = np.abs(got.astype("int32") - want.astype("int32"))
    assert off.max() <= 1, f"off by {off.max()}, at {np.argwhere(off > 1)[:5].tolist()}"
    assert np.count_nonzero(off) <= 1 + off.size // 100, "off by one far too often"


def check(
    work: Workload,
    isa: str,
    seed: int = 0,
    extreme: bool = False,
    blocks: Blocks | None = None,
    layout: str = "NCHWc",
) -> Built:
    """Build, run and compare; the test is skipped where the ISA cannot be executed."""
    require(isa)
    built = build(work, isa, blocks, layout)
    ops = reference.random_operands(work, seed, extreme)
    compare(work, run(built, ops), expected(work, ops))
    return built


# ---------------------------------------------------------------- assembly


@dataclass(frozen=True)
class Assembly:
    """The instructions of a library, in AT&T syntax: one tuple of lines for each basic block."""

    blocks: tuple[tuple[str, ...], ...]

    @staticmethod
    def of(library: Any) -> Assembly:
        """Return the instructions of what `build` built."""
        blocks: list[list[str]] = [[]]
        source = library.mod.inspect_source("asm") if IS_RELAX else library.get_source("asm")
        for line in source.splitlines():
            text = line.split("#")[0].strip()
            if re.match(r"[\w.$]+:", text):
                blocks.append([])
            elif text and not text.startswith("."):
                blocks[-1].append(re.sub(r"\s+", " ", text))
                if re.match(r"j[a-z]+\s|ret", text):
                    blocks.append([])
        return Assembly(tuple(tuple(block) for block in blocks if block))

    @property
    def lines(self) -> tuple[str, ...]:
        """All instructions."""
        return tuple(line for block in self.blocks for line in block)

    def mnemonics(self) -> Counter[str]:
        """Return how often each instruction stands there; encoding prefixes are dropped."""
        return Counter(re.sub(r"^\{\w+\} ", "", line).split()[0] for line in self.lines)

    def matching(self, pattern: str) -> list[str]:
        """Return the instructions that a regular expression finds something in."""
        return [line for line in self.lines if re.search(pattern, line)]

    def spills(self, mnemonic: str) -> list[str]:
        """Return the vector stores in the loop body that has most of these instructions.

        Accumulators live in registers over the whole reduction: its body stores nothing.
        """
        loops = [block for block in self.blocks if block[-1].startswith("j")]
        body = max(loops, key=lambda block: sum(mnemonic in line for line in block))
        assert any(mnemonic in line for line in body), f"there is no {mnemonic} in a loop"
        return [line for line in body if re.search(r"%[xyz]mm\d+, [^%]*\(", line)]


_VNNI = r"^(\{\w+\} )?vpdp"
_EVEX = r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b|^\{evex\}"
_TILES = r"%tmm|tilecfg|tilerelease|^tdp"
_VEX = r"^(\{\w+\} )?v[a-z]"
_EVEX_VNNI = rf"^vpdp|{_EVEX}"  # without {vex}, the assembler takes the EVEX encoding

# What a library for an ISA must never execute, as regular expressions over AT&T syntax.
BEYOND: dict[str, str] = {
    "generic": "|".join((_VEX, _EVEX, _TILES)),
    "avx2": "|".join((_VNNI, _EVEX, _TILES)),
    "avx_vnni": "|".join((_EVEX_VNNI, _TILES)),
    "avx512_bw": "|".join((_VNNI, _TILES)),
    "avx512_vnni": "|".join((r"^\{vex\}", _TILES)),
    "amx_int8_avx2": "|".join((_VNNI, _EVEX)),
    "amx_int8": r"tdpbf16|tdpfp16|^tcmm",
}


def check_instructions(built: Built, isa: str, mnemonic: str, register: str) -> None:
    """Assert that the instruction is there, on that register class, and nothing beyond the ISA."""
    assembly = Assembly.of(built.library)
    found = [line for line in assembly.lines if mnemonic in line]
    assert found, f"{built.decision.strategy}: no {mnemonic}"
    assert any(f"%{register}" in line for line in found), f"{mnemonic} not on {register}"
    check_no_more(assembly, isa)


def check_no_more(assembly: Assembly, isa: str) -> None:
    """Assert that a library holds no instruction beyond the ISA."""
    beyond = assembly.matching(BEYOND[isa])
    assert not beyond, f"beyond {isa}: {beyond[:5]}"
