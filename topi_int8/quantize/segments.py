"""A network run part by part over many inputs at once, with a correction between the parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.utils import copy_with_new_vars

from ..op import renamed
from ..target import host_target
from .calibrate import arguments
from .graph import Graph

Correct = Callable[[str, list[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Segment:
    """A part of a graph: the function ``name`` from the inputs' tensors to the outputs'.

    It ends at the tensor ``cut``, the last of its outputs.
    """

    name: str
    inputs: tuple[relax.Var, ...]
    outputs: tuple[relax.Var, ...]

    @property
    def cut(self) -> relax.Var:
        """The tensor that is corrected before the next part reads it."""
        return self.outputs[-1]


def sweep(
    qdq: tvm.IRModule,
    cuts: Collection[str],
    inputs: Iterable[Any],
    correct: Correct,
    target: tvm.target.Target | None = None,
) -> None:
    """Run a module over all inputs, stopping at each of some tensors to shift it.

    One compile, one run of each part for each input. What later parts read is held for all inputs.

    Parameters
    ----------
    qdq : tvm.IRModule
        With a single dataflow block, such as `insert_qdq` returns.
    cuts : collection of str
        Names of the tensors, in any order; they come in the graph's.
    inputs : iterable
        As `calibrate`'s.
    correct : callable
        Gets a tensor's name and its values, one array an input, and returns what is added to each.
    target : tvm.target.Target, optional
        This machine by default.
    """
    mod, segments = split(qdq, cuts)
    if not segments:
        return
    machine = relax.VirtualMachine(tvm.compile(mod, target=target or host_target()), tvm.cpu())
    params = list(qdq["main"].params)
    states = [
        dict(zip(params, arguments(item, params, f"calibration item {index}"), strict=True))
        for index, item in enumerate(inputs)
    ]
    for position, segment in enumerate(segments):
        kept = {var for following in segments[position + 1 :] for var in following.inputs}
        kept.add(segment.cut)
        run = machine[segment.name]
        for i, state in enumerate(states):
            results = run(*(state[var] for var in segment.inputs))
            state = state | dict(zip(segment.outputs, results, strict=True))
            states[i] = {var: state[var] for var in state if var in kept}
        values = [state[segment.cut].numpy() for state in states]
        shift = correct(segment.cut.name, values)
        for state, array in zip(states, values, strict=True):
            state[segment.cut] = tvm.runtime.tensor((array + shift).astype(array.dtype))


def split(qdq: tvm.IRModule, cuts: Collection[str]) -> tuple[tvm.IRModule, list[Segment]]:
    """Return a module of functions that together are ``main`` up to its last cut, and their order.

    Raises
    ------
    ValueError
        The graph has a match_cast, or no tensor of such a name.
    """
    bindings = qdq["main"].body.blocks[0].bindings
    if any(isinstance(binding, relax.MatchCast) for binding in bindings):
        raise ValueError("mod has a match_cast; allowed: tensors of inferred shape")
    graph = Graph(qdq)
    unknown = sorted(set(cuts) - {var.name for var in graph.order})
    if unknown:
        raise ValueError(f"cuts is {unknown}; allowed: names of main's tensors")
    parts: list[list[relax.Var]] = [[]]
    for var in graph.order:
        parts[-1].append(var)
        if var.name in cuts:
            parts.append([])
    parts.pop()  # what follows the last cut
    read = [_read(graph, part) for part in parts]
    builder = relax.BlockBuilder()
    segments = []
    for i, part in enumerate(parts):
        later = {var for following in read[i + 1 :] for var in following}
        outputs = [var for var in part[:-1] if var in later] + part[-1:]
        segments.append(Segment(f"segment_{i}", tuple(read[i]), tuple(outputs)))
        _build(builder, graph, part, segments[-1])
    others = {name: func for name, func in qdq.functions_items() if name.name_hint != "main"}
    mod = tvm.IRModule(others, attrs=qdq.attrs)
    for name, func in builder.get().functions_items():
        mod.update_func(name, copy_with_new_vars(func))
    return mod, segments


def _read(graph: Graph, part: list[relax.Var]) -> list[relax.Var]:
    """Return the variables from outside that a part reads, each once."""
    made = set(part)
    used = (var for made_var in part for var in relax.analysis.free_vars(graph.values[made_var]))
    return [var for var in dict.fromkeys(used) if var not in made]


def _build(
    builder: relax.BlockBuilder, graph: Graph, part: list[relax.Var], segment: Segment
) -> None:
    """Add the function of a part to the module."""
    env: dict[relax.Var, relax.Expr] = {
        var: relax.Var(var.name, var.ty) for var in segment.inputs
    }
    with builder.function(segment.name, [env[var] for var in segment.inputs]):
        with builder.dataflow():
            for var in part:
                env[var] = builder.emit(renamed(graph.values[var], env), var.name)
            outputs = [builder.emit_output(env[var]) for var in segment.outputs]
        builder.emit_func_output(relax.Tuple(outputs))

