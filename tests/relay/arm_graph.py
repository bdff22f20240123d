"""Relay graphs compiled for ARM here and run under qemu: each kernel alone, between guard pages.

A built library's graph is walked in Python. Its kernels run in the program of `tests.emulator.bare`
that they are linked into, all cases of a batch into one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relay

from tests.emulator import HERE as EMULATOR
from tests.emulator import compile_cached
from tests.emulator.arm import MACHINES, link
from tests.emulator.bare import BareProgram

_HERE = Path(__file__).resolve().parent
_CPU = "llvm -keys=arm_cpu,cpu -device=arm_cpu"

# Instruction set -> the target as people write it, and `tests.emulator.arm.MACHINES`' name.
TARGETS: Mapping[str, str] = {
    "neon": f"{_CPU} -mtriple=aarch64-linux-gnu -mattr=+neon",
    "neon_dotprod": f"{_CPU} -mtriple=aarch64-linux-gnu -mattr=+v8.2a,+dotprod",
    "armv7_neon": f"{_CPU} -mtriple=armv7l-linux-gnueabihf -mattr=+neon -mfloat-abi=hard",
}


@dataclass(frozen=True)
class Graph:
    """A module built for the graph executor."""

    json: Mapping[str, Any]
    params: Mapping[str, np.ndarray]
    module: Any

    @property
    def functions(self) -> list[str]:
        """Names of its kernels, in the order of their calls."""
        return [node["attrs"]["func_name"] for node in self.json["nodes"] if node["op"] != "null"]

    def assembly(self) -> str:
        """Return the assembly of its kernels."""
        return self.module.get_source("asm")

    def run(self, program: BareProgram, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs, each kernel run by the program it was linked into.

        Raises
        ------
        tests.emulator.bare.KernelFault
        """
        shapes, dtypes = self.json["attrs"]["shape"][1], self.json["attrs"]["dltype"][1]
        first = self.json["node_row_ptr"]  # of a node's outputs, among all arrays
        arrays: list[np.ndarray | None] = [None] * len(shapes)
        known = {**self.params, **inputs}
        for at, node in enumerate(self.json["nodes"]):
            own = range(first[at], first[at + 1])
            if node["op"] == "null":
                arrays[own[0]] = known[node["name"]]
                continue
            sources = [arrays[first[source] + output] for source, output, *_ in node["inputs"]]
            made = [np.zeros(shapes[entry], dtypes[entry]) for entry in own]
            name = node["attrs"]["func_name"]
            if name == "__nop":  # a reshape
                results = [sources[0].reshape(shapes[own[0]])]
            else:
                before = [array.copy() for array in sources]
                done = program.call(name, [*sources, *made])
                results = done[len(sources) :]
                for old, new in zip(before, done, strict=False):
                    np.testing.assert_array_equal(new, old, f"{name} changed an input")
            for entry, result in zip(own, results, strict=True):
                arrays[entry] = result
        return [arrays[first[node] + output] for node, output, *_ in self.json["heads"]]


def build(name: str, mod: tvm.IRModule, isa: str, options: str = "") -> Graph:
    """Build a module.

    Parameters
    ----------
    name : str
        Keeps its kernels apart from other modules' in one program.
    mod : IRModule
    isa : str
    options : str
        Further ones of the target.
    """
    with tvm.transform.PassContext(opt_level=3):
        built = relay.build(mod, target=f"{TARGETS[isa]} {options}", mod_name=name)
    constants = {key: value.numpy() for key, value in built.get_params().items()}
    return Graph(json.loads(built.get_graph_json()), constants, built.get_lib())


def link_program(graphs: Sequence[Graph], isa: str, folder: Path) -> BareProgram:
    """Link all kernels of the graphs into one program for the ISA's machine."""
    machine = MACHINES[isa]
    include = f"-I{_HERE / 'ffi_shim'}"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", include, "-c"]
    shim = "".join(path.read_text() for path in sorted((_HERE / "ffi_shim").rglob("*.h")))
    runner = compile_cached(machine.compiler, EMULATOR / "bare_runner.cpp", flags, ".o", shim)
    objects, names = [], dict.fromkeys(n for graph in graphs for n in graph.functions)
    for at, graph in enumerate(graphs):
        objects.append(str(folder / f"graph{at}.o"))
        graph.module.save(objects[-1])
    names.pop("__nop", None)
    table = folder / "table.cpp"
    table.write_text(_table(list(names)))
    arguments = ["-std=c++17", include, "-static", str(table), str(runner), *objects, "-lm"]
    return BareProgram(link(machine.compiler, folder / "program", arguments), machine)


def _table(names: Sequence[str]) -> str:
    """The names and functions of the kernels, as bare_runner.cpp declares them."""
    lines = ["#include <tvm/ffi/c_api.h>", 'extern "C" {', "void* __tvm_module_ctx = nullptr;"]
    lines += [f"RelayFunction {name};" for name in names]
    lines += ["}", "struct Kernel { const char* name; TVMFFISafeCallType function; };"]
    lines += ["extern const Kernel kKernels[] = {"]
    lines += [f'  {{"{name}", relay_kernel<{name}>}},' for name in names]
    lines += ["};", f"extern const int kKernelCount = {len(names)};", ""]
    return "\n".join(lines)
