# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""TVMScript text of intrinsics over a block of accumulators: loop nests, functions, regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import compat


def nest(block: str, extents: Mapping[str, int], reduced: str, statement: str) -> list[str]:
    """Return the loops of a desc around one statement, whose iterators are named v?.

    Iterators of extent 1 are left out: tensorize has moved them outside by the time it compares.

    Parameters
    ----------
    block : str
        Name of the block.
    extents : mapping of str to int
        Loop variable (one letter) -> extent, in order.
    reduced : str
        The letters of the reduction's variables.
    statement : str
    """
    kept = [name for name, extent in extents.items() if extent > 1]
    for name in extents.keys() - set(kept):
        statement = statement.replace(f"v{name}", "0")
    loops = ", ".join(str(extents[name]) for name in kept)
    kinds = "".join("R" if name in reduced else "S" for name in kept)
    variables, iters = ", ".join(kept), ", ".join(f"v{name}" for name in kept)
    return [
        f"for {variables} in T.grid({loops}):",
        f'    with {{block}}("{block}"):',
        f'        {iters} = T.axis.remap("{kinds}", [{variables}])',
        f"        {statement}",
    ]


def region(name: str, shape: Sequence[int]) -> str:
    """Return the text of a whole buffer as a region."""
    return f"{name}[{', '.join(f'0:{extent}' for extent in shape)}]"


def llvm_call(name: str, dtype: str, *args: str) -> str:
    """Return the text of a call of a pure LLVM intrinsic, its name without "llvm."."""
    found = f'T.llvm_lookup_intrinsic_id("llvm.{name}")'
    text = f"{found}, {{NSIG:{len(args)}}} {', '.join(args)}"
    return f'T.call_llvm_pure_intrin({text}, dtype="{dtype}")'


def register(block: Any) -> tuple[str, str, str]:
    """Register the methods zero, dot and store of a block (once); return the intrinsics' names."""
    zero, dot, store = (
        compat.register_intrin(f"topi_int8.{what}_{block.name}", getattr(block, what))
        for what in ("zero", "dot", "store")
    )
    return zero, dot, store


def function(buffers: str, reads: str, writes: str, body: Sequence[str]) -> object:
    """Return the parsed PrimFunc of a root block that reads and writes these regions.

    `buffers` holds lines ``X = T.match_buffer(x, ...)``; x becomes a parameter.
    """
    handles = [line.split("T.match_buffer(")[1].split(",")[0]
               for line in buffers.splitlines() if "T.match_buffer(" in line]  # fmt: skip
    lines = [
        "{PF}",
        f"def func({', '.join(f'{handle}: T.handle' for handle in handles)}) -> None:",
        *(f"    {line}" for line in buffers.splitlines()),
        '    with {block}("root"):',
        f"        T.reads({reads})",
        f"        T.writes({writes})",
        *(f"        {line}" for line in body),
    ]
    return compat.parse_prim_func("\n".join(lines) + "\n")
