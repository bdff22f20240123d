"""The layers of a QDQ graph as kernels: what each reads, computes and stores; and each one alone.

A chain is a conv2d or matmul with the bias, residual and activation that its kernel's epilogue
computes. `isolate` builds a module that runs every int8 chain on fp32 values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from ..op import op_name
from ..qparams import QParams
from .graph import Graph, constant

LAYERS = ("relax.nn.conv2d", "relax.matmul")
# What a kernel's epilogue consists of, from its sum to what it stores.
_EPILOGUE = frozenset(("relax.add", "relax.nn.relu", "relax.nn.relu6", "relax.clip"))


@dataclass(frozen=True)
class Pair:
    """A quantize/dequantize pair: the fp32 tensor, the dequantized one's name, the parameters."""

    tensor: str
    dequantized: str
    params: QParams


@dataclass(frozen=True)
class Chain:
    """One layer.

    Attributes
    ----------
    name : str
        As `list_layers` names it.
    op : str
        "conv2d" or "matmul".
    steps : tuple of relax.Var
        From its sum to the last float tensor before it is stored.
    inputs : tuple of Pair
        The quantized tensors that it reads: data, a matmul's second operand, a residual.
    output : Pair or None
        How it is stored; None: as float32.
    channel_axis : int
        Of the output channels in `tensor`.
    is_int8 : bool
        Whether both operands of the product are quantized.
    """

    name: str
    op: str
    steps: tuple[relax.Var, ...]
    inputs: tuple[Pair, ...]
    output: Pair | None
    channel_axis: int
    is_int8: bool

    @property
    def tensor(self) -> str:
        """The fp32 tensor that it stores: after bias, residual and activation."""
        return str(self.steps[-1].name)

    @property
    def stored(self) -> str:
        """The float32 tensor of the QDQ graph that holds what it stores."""
        return self.output.dequantized if self.output else self.tensor


def pairs_of(graph: Graph) -> dict[relax.Var, Pair]:
    """Return dequantized variable -> its pair, for every tensor quantized as a whole."""
    pairs = {}
    for var in graph.order:
        source = quantized_tensor(graph, var)
        if source is None:
            continue
        quantize = graph.values[graph.values[var].args[0]]
        scale, zero_point = (constant(arg) for arg in quantize.args[1:3])
        if scale is None or zero_point is None or scale.size != 1:
            continue
        params = QParams(float(scale.item()), int(zero_point.item()), str(quantize.ty.dtype))
        pairs[var] = Pair(source.name, var.name, params)
    return pairs


def quantized_tensor(graph: Graph, var: Any) -> relax.Var | None:
    """Return the tensor of which a variable is the dequantized form; None for other variables."""
    call = graph.values.get(var)
    if op_name(call) != "relax.dequantize":
        return None
    quantize = graph.values.get(call.args[0]) if isinstance(call.args[0], relax.Var) else None
    is_pair = op_name(quantize) == "relax.quantize" and isinstance(quantize.args[0], relax.Var)
    return quantize.args[0] if is_pair else None


def chains_of(graph: Graph, pairs: dict[relax.Var, Pair]) -> list[Chain]:
    """Return the layers of a QDQ graph from `quantize`, in order."""
    consumer = {used: var for var in graph.order for used in graph.tensors(graph.values[var])}
    outputs = {pair.tensor: pair for pair in pairs.values()}
    chains = []
    for var in graph.order:
        call = graph.values[var]
        if op_name(call) not in LAYERS:
            continue
        steps = [var]
        while graph.single_use(steps[-1]) and steps[-1] in consumer:
            following = consumer[steps[-1]]
            if op_name(graph.values[following]) not in _EPILOGUE:
                break
            steps.append(following)
        read = [arg for step in steps for arg in graph.values[step].args]
        is_int8 = all(op_name(graph.values.get(arg)) == "relax.dequantize" for arg in call.args[:2])
        chains.append(
            Chain(
                var.name, op_name(call).split(".")[-1], tuple(steps),
                tuple(pairs[arg] for arg in read if arg in pairs),
                outputs.get(steps[-1].name), _channel_axis(call), is_int8,
            )
        )  # fmt: skip
    return chains


def _channel_axis(call: relax.Call) -> int:
    if op_name(call) == "relax.matmul":
        return int(call.ty.ndim) - 1
    return str(call.attrs.out_layout or call.attrs.data_layout).index("C")


def isolate(
    reference: tvm.IRModule, graph: Graph, chains: Sequence[Chain]
) -> tuple[tvm.IRModule, list[str]]:
    """Return a module that runs each chain by itself, and the names of its parameters.

    Its parameters are fp32 tensors. Each chain reads them through the pairs that it has in the QDQ
    graph, computes with its int8 weights, and returns its float32 result before it is stored: a
    tuple in the order of the chains. So no chain sees what another one rounded.

    Parameters
    ----------
    reference : tvm.IRModule
        The prepared fp32 module: where the types of the tensors come from.
    graph : Graph
        Of the QDQ module.
    chains : sequence of Chain
        Of that graph.
    """
    func = Graph(reference)
    types = {var.name: var.ty for var in [*func.func.params, *func.order]}
    # main's own come first: they define the symbolic dimensions.
    names = [param.name for param in func.func.params]
    names += [name for name in tensors_read(graph, chains) if name not in names]
    params = {name: relax.Var(name, types[name]) for name in names}
    builder = relax.BlockBuilder()
    with builder.function("main", list(params.values())):
        with builder.dataflow():
            writer = _Writer(builder, graph, params)
            results = [writer.chain(chain) for chain in chains]
            out = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(out)
    return builder.get(), names


def tensors_read(graph: Graph, chains: Sequence[Chain]) -> list[str]:
    """Return the names of the fp32 tensors behind what chains read, each once."""
    names: dict[str, None] = {}
    for chain in chains:
        own = frozenset(chain.steps)
        for step in chain.steps:
            for arg in graph.tensors(graph.values[step]):
                if arg not in own and not _is_weight(graph, arg):
                    source = quantized_tensor(graph, arg)
                    names[(arg if source is None else source).name] = None
    return list(names)


def _is_weight(graph: Graph, var: relax.Var) -> bool:
    """Return whether a variable is a dequantized constant: a weight or a bias."""
    call = graph.values.get(var)
    return op_name(call) == "relax.dequantize" and constant(call.args[0]) is not None


class _Writer:
    """Copies chains into another function, cut off from one another."""

    def __init__(
        self, builder: relax.BlockBuilder, graph: Graph, params: dict[str, relax.Var]
    ) -> None:
        self.builder, self.graph, self.params = builder, graph, params
        self._shared: dict[relax.Var, relax.Var] = {}

    def chain(self, chain: Chain) -> relax.Var:
        """Write one; return its last tensor."""
        own: dict[relax.Var, relax.Var] = {}
        for step in chain.steps:
            call = self.graph.values[step]
            args = [self._operand(arg, own) for arg in call.args]
            own[step] = self._emit(call, args, step.name)
        return own[chain.steps[-1]]

    def _operand(self, arg: Any, own: dict[relax.Var, relax.Var]) -> Any:
        if not isinstance(arg, relax.Var):
            return arg
        if arg in own:
            return own[arg]
        if arg not in self._shared:
            self._shared[arg] = self._fresh(arg)
        return self._shared[arg]

    def _fresh(self, arg: relax.Var) -> relax.Var:
        call = self.graph.values.get(arg)
        if _is_weight(self.graph, arg):
            return self._emit(call, list(call.args), arg.name)
        source = quantized_tensor(self.graph, arg)
        if source is None:
            return self.params[arg.name]
        quantize = self.graph.values[call.args[0]]
        q = self._emit(quantize, [self.params[source.name], *quantize.args[1:]], f"{source.name}_q")
        return self._emit(call, [q, *call.args[1:]], arg.name)

    def _emit(self, call: relax.Call, args: list[Any], name: str) -> relax.Var:
        return self.builder.emit(relax.Call(call.op, args, call.attrs, call.ty_args), name)
