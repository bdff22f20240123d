"""The layers of a network by name, and which of them a skip list means."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import tvm
from tvm import relax

from ..op import op_name
from .graph import LAYER_STEMS, Graph, constant, prepare
from .plan import make_plan

SkipEntry = str | re.Pattern[str] | int


@dataclass(frozen=True)
class Layer:
    """A layer that can be quantized.

    Attributes
    ----------
    name : str
        What `quantize`'s ``skip`` takes, e.g. "conv2d_3".
    op : str
        Relax operator, e.g. "relax.nn.conv2d".
    shape : tuple of int
        Output shape; -1 where symbolic.
    weight_shape : tuple of int or None
    """

    name: str
    op: str
    shape: tuple[int, ...]
    weight_shape: tuple[int, ...] | None


def list_layers(mod: tvm.IRModule) -> list[Layer]:
    """Return the layers of a module's ``main`` in order, named as `quantize` names them."""
    return layers_of(Graph(prepare(mod)))


def layers_of(graph: Graph) -> list[Layer]:
    """Return the layers of a prepared function, in order."""
    layers = []
    for var in graph.order:
        call = graph.values[var]
        if op_name(call) not in LAYER_STEMS or not var.name.startswith(LAYER_STEMS[op_name(call)]):
            continue
        weight = constant(call.args[1]) if len(call.args) > 1 else None
        shape = tuple(int(d.value) if hasattr(d, "value") else -1 for d in call.ty.shape)
        layers.append(
            Layer(var.name, op_name(call), shape, None if weight is None else weight.shape)
        )
    return layers


def select_layers(
    graph: Graph, skip: Iterable[SkipEntry], first: bool = False, last: bool = False
) -> set[relax.Var]:
    """Return the variables of the layers that stay float32.

    Parameters
    ----------
    graph : Graph
        Of a prepared function.
    skip : iterable of str, re.Pattern or int
        Layer names, patterns that match a whole name, operators ("relax.nn.conv2d": all of them),
        or positions among the convolutions and matmuls, negative ones from the end.
    first, last : bool
        The first, the last convolution or matmul too.

    Raises
    ------
    TypeError, ValueError
        An entry is of another type, or means no layer; the message lists what would.
    """
    if isinstance(skip, (str, re.Pattern)) or not isinstance(skip, Iterable):
        raise TypeError(
            f"skip is {skip!r}; allowed: a sequence of names, patterns, operators or positions"
        )
    layers = layers_of(graph)
    by_name = {var.name: var for var in graph.order}
    computes = list(make_plan(graph).computes)
    skipped: set[relax.Var] = set()
    for entry in skip:
        if isinstance(entry, (str, re.Pattern)):
            skipped.update(by_name[name] for name in _named(entry, layers))
        else:
            skipped.add(computes[_position(entry, [var.name for var in computes])])
    if first:
        skipped.update(computes[:1])
    if last:
        skipped.update(computes[-1:])
    return skipped


def _named(entry: str | re.Pattern[str], layers: Sequence[Layer]) -> list[str]:
    """Return the names of the layers that a name, pattern or operator means."""
    if isinstance(entry, re.Pattern):
        matched = [layer.name for layer in layers if entry.fullmatch(layer.name)]
    else:
        matched = [layer.name for layer in layers if entry in (layer.name, layer.op)]
    if not matched:
        names = ", ".join(layer.name for layer in layers)
        operators = ", ".join(sorted({layer.op for layer in layers}))
        raise ValueError(f"skip holds {entry!r}; allowed: {names}; operators {operators}")
    return matched


def _position(entry: object, names: Sequence[str]) -> int:
    """Return a position among the convolutions and matmuls, counted from 0."""
    try:
        if isinstance(entry, bool):
            raise TypeError
        position = operator.index(entry)
    except TypeError:
        raise TypeError(
            f"skip holds {entry!r}; allowed: names, patterns, operators and positions (int)"
        ) from None
    if not -len(names) <= position < len(names):
        raise ValueError(
            f"skip holds the position {position}; allowed: {-len(names)} .. {len(names) - 1}, "
            f"of {', '.join(names) or 'no layer'}"
        )
    return position
