"""What a board is, read over RPC.

TVM's RPC server has no shell and reads no file of /proc for us. So a function of three libc calls
goes to the board, as a kernel does, and reads files there; another asks the dynamic linker for the
kernel's word on the CPU's features, which an emulator answers too.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import tvm
from tvm.script import from_source
from tvm.script import tirx as T
from tvm.target import Target

from topi_int8 import isa_check
from topi_int8 import target as targets
from topi_int8.cross import LinkError

from .board import Board
from .place import first_line

_PATH_BYTES, _TEXT_BYTES = 256, 1 << 18
_READ = """
@T.prim_func
def read_file(
    path: T.Buffer(({path},), "uint8"),
    text: T.Buffer(({text},), "uint8"),
    count: T.Buffer((1,), "{word}"),
):
    T.func_attr({{"global_symbol": "read_file"}})
    file: T.let[T.handle] = T.call_extern("handle", "fopen", path.data, "rb")
    count[0] = T.{word}(0)
    if not T.isnullptr(file):
        count[0] = T.call_extern(
            "{word}", "fread", text.data, T.{word}(1), T.{word}({text}), file)
        T.evaluate(T.call_extern("int32", "fclose", file))
"""
_AUXILIARY = """
@T.prim_func
def auxiliary(values: T.Buffer((2,), "{word}")):
    T.func_attr({{"global_symbol": "auxiliary"}})
    values[0] = T.call_extern("{word}", "getauxval", T.{word}(16))
    values[1] = T.call_extern("{word}", "getauxval", T.{word}(26))
"""

# Flag in /proc/cpuinfo -> (AT_HWCAP or AT_HWCAP2, bit): Linux, arch/arm*/include/uapi/asm/hwcap.h.
HWCAP: dict[str, dict[str, tuple[int, int]]] = {
    "aarch64": {
        "asimd": (0, 1), "atomics": (0, 8), "fphp": (0, 9), "asimdhp": (0, 10), "asimdrdm": (0, 12),
        "asimddp": (0, 20), "sve": (0, 22), "sve2": (1, 1), "i8mm": (1, 13), "bf16": (1, 14),
    },
    "arm": {"neon": (0, 12), "vfpv4": (0, 16), "asimddp": (0, 24), "i8mm": (0, 27)},
}  # fmt: skip

# (implementer, part) of MIDR, as /proc/cpuinfo has them -> the core: util-linux, lscpu-arm.c.
CORES = {
    ("0x41", "0xc07"): "Cortex-A7", ("0x41", "0xc08"): "Cortex-A8", ("0x41", "0xc09"): "Cortex-A9",
    ("0x41", "0xc0f"): "Cortex-A15", ("0x41", "0xc0e"): "Cortex-A17",
    ("0x41", "0xd03"): "Cortex-A53", ("0x41", "0xd04"): "Cortex-A35",
    ("0x41", "0xd05"): "Cortex-A55", ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72", ("0x41", "0xd09"): "Cortex-A73",
    ("0x41", "0xd0a"): "Cortex-A75", ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1", ("0x41", "0xd0d"): "Cortex-A77",
    ("0x41", "0xd40"): "Neoverse-V1", ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd42"): "Cortex-A78AE", ("0x41", "0xd44"): "Cortex-X1",
    ("0x41", "0xd46"): "Cortex-A510", ("0x41", "0xd47"): "Cortex-A710",
    ("0x41", "0xd48"): "Cortex-X2", ("0x41", "0xd49"): "Neoverse-N2",
    ("0x41", "0xd4a"): "Neoverse-E1", ("0x41", "0xd4d"): "Cortex-A715",
    ("0x41", "0xd4e"): "Cortex-X3", ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x41", "0xd80"): "Cortex-A520", ("0x41", "0xd81"): "Cortex-A720",
    ("0x41", "0xd82"): "Cortex-X4", ("0xc0", "0xac3"): "Ampere-1",
}  # fmt: skip


class BoardReader:
    """Reads files, and the kernel's word on the CPU, at a board.

    Parameters
    ----------
    board : Board
    target : Target
        Only its architecture is used: the functions are built for the plainest CPU of it.

    Raises
    ------
    ValueError
        When the board cannot load a library of this architecture.
    """

    def __init__(self, board: Board, target: Target) -> None:
        self._board = board
        self._word = "int32" if targets.features(target).arch == "arm" else "int64"
        sizes = {"path": _PATH_BYTES, "text": _TEXT_BYTES, "word": self._word}
        functions = {
            name: from_source(text.format(**sizes), {"T": T})
            for name, text in (("read_file", _READ), ("auxiliary", _AUXILIARY))
        }
        plain = {key: target.attrs[key] for key in ("mtriple", "mfloat-abi") if key in target.attrs}
        executable = tvm.compile(tvm.IRModule(functions), target=Target({"kind": "llvm", **plain}))
        try:
            self._module = board.load(executable)
        except LinkError as error:
            raise ValueError(f"cc cannot link for {plain.get('mtriple')}: {error}") from None
        except RuntimeError as error:
            raise ValueError(
                f"{board.name} does not load a library for {plain.get('mtriple', 'this machine')} "
                f"(--target says what it is): {first_line(error)}"
            ) from None

    def read(self, path: str) -> str:
        """Return a text file of the board; empty where there is none."""
        name = np.zeros(_PATH_BYTES, "uint8")
        name[: len(path)] = list(path.encode("ascii"))
        text = self._board.tensor(np.zeros(_TEXT_BYTES, "uint8"))
        count = self._board.tensor(np.zeros(1, self._word))
        self._module["read_file"](self._board.tensor(name), text, count)
        found = text.numpy()[: max(0, int(count.numpy()[0]))].tobytes()
        return found.rstrip(b"\0\n").decode("utf-8", "replace")

    def auxiliary(self) -> tuple[int, int]:
        """Return AT_HWCAP and AT_HWCAP2."""
        values = self._board.tensor(np.zeros(2, self._word))
        self._module["auxiliary"](values)
        mask = (1 << int(self._word.removeprefix("int"))) - 1
        first, second = (int(value) & mask for value in values.numpy())
        return first, second


def describe(board: Board, target: Target) -> dict[str, Any]:
    """Return what a table of numbers must say of the board, as JSON values.

    Raises
    ------
    ValueError
        When the board cannot load a library for this target.
    """
    reader = BoardReader(board, target)
    arch = targets.features(target).arch
    processors = [
        dict(re.findall(r"^([^\t:\n]+?)\s*:[ \t]*(.*)$", block, re.MULTILINE))
        for block in re.split(r"\n\s*\n", reader.read("/proc/cpuinfo"))
    ]
    processors = [block for block in processors if "processor" in block]
    # What an emulator's user sees is the file of the machine below it.
    foreign = arch != "x86_64" and any("vendor_id" in block for block in processors)
    listed = {} if foreign else (processors[0] if processors else {})
    features = set((listed.get("Features") or listed.get("flags") or "").split())
    hwcap = reader.auxiliary()
    features |= {
        flag for flag, (word, bit) in HWCAP.get(arch, {}).items() if hwcap[word] >> bit & 1
    }
    clock = "/sys/devices/system/cpu/cpu{}/cpufreq/{}"
    numbers = [block["processor"] for block in processors]
    clocks = [] if foreign else [reader.read(clock.format(n, "cpuinfo_max_freq")) for n in numbers]
    return {
        "cpu": "emulated" if foreign else _core_names(processors),
        "emulated_on": processors[0].get("model name", "?") if foreign else "",
        "board": reader.read("/proc/device-tree/model"),
        "arch": arch,
        "features": sorted(features),
        "hwcap": [f"{value:#x}" for value in hwcap],
        "cores": len(processors),
        "max_mhz": [int(value) // 1000 for value in clocks if value.isdigit()],
        "governor": "" if foreign else reader.read(clock.format(0, "scaling_governor")),
        "kernel": reader.read("/proc/sys/kernel/osrelease"),
    }


def _core_names(processors: list[dict[str, str]]) -> str:
    """Return "4x Cortex-A72 + 4x Cortex-A53", or the model name that x86 kernels give."""
    names: dict[str, int] = {}
    for block in processors:
        part = (block.get("CPU implementer", ""), block.get("CPU part", ""))
        name = CORES.get(part) or block.get("model name") or f"implementer {part[0]} part {part[1]}"
        names[name] = names.get(name, 0) + 1
    return " + ".join(f"{count}x {name}" for name, count in names.items()) or "unknown"


def lacking(machine: dict[str, Any], target: Target) -> list[str]:
    """Return the features that our kernels for `target` may use and this board lacks.

    Running them would be SIGILL, and the end of the board's RPC server.
    """
    needed = isa_check.needed(targets.features(target))
    return isa_check.lacking(needed, machine["features"])
