"""The layers of a QDQ graph as kernels: what each reads, computes and stores; and each one alone.

A chain is a conv2d or matmul with the bias, residual and activation that its kernel's epilogue
computes. `isolate` builds a module that runs every chain on tensors of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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
    """Return dequantized variable -> its pair, for every quantized tensor.

    Raises
    ------
    ValueError
        A pair's scale is no constant, or not one for the tensor.
    """
    pairs = {}
    for var in graph.order:
        source = quantized_tensor(graph, var)
        if source is None:
            continue
        quantize = graph.values[graph.values[var].args[0]]
        scale, zero_point = (constant(arg) for arg in quantize.args[1:3])
        if scale is None or zero_point is None or scale.size != 1:
            raise ValueError(
                f"int8 quantizes {source.name} with another scale than one constant; allowed: one "
                "scale a tensor, as quantize writes it"
            )
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

    Each chain reads parameters of the module alone, so that none sees what another one rounded, and
    returns its float32 result before it is stored: a tuple in the order of the chains. Weights and
    biases are those of the QDQ graph, dequantized here: so it is a float module, which compiles in
    a fraction of the time and is as far from the integers' result as float32 rounds.

    Parameters
    ----------
    reference : tvm.IRModule
        The prepared fp32 module: where the types of the tensors come from.
    graph : Graph
        Of the QDQ module.
    chains : sequence of Chain
        Of that graph.

    Returns
    -------
    mod : tvm.IRModule
    names : list of str
        Tensors to hand to it. A name of the QDQ graph's dequantized tensors stands for the fp32
        tensor rounded to that pair; the others are fp32 tensors.
    """
    func = Graph(reference)
    types = {var.name: var.ty for var in [*func.func.params, *func.order]}
    # main's own come first: they define the symbolic dimensions.
    handed = {param.name: param.name for param in func.func.params}
    handed |= tensors_read(graph, chains)
    params = {name: relax.Var(name, types[tensor]) for name, tensor in handed.items()}
    builder = relax.BlockBuilder()
    with builder.function("main", list(params.values())):
        with builder.dataflow():
            results = [_copy(builder, graph, params, chain) for chain in chains]
            out = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(out)
    return builder.get(), list(handed)


def tensors_read(graph: Graph, chains: Sequence[Chain]) -> dict[str, str]:
    """Return tensors that chains read -> the fp32 tensor behind each; no weights, no biases."""
    names: dict[str, str] = {}
    for chain in chains:
        own = frozenset(chain.steps)
        for step in chain.steps:
            for arg in graph.tensors(graph.values[step]):
                if arg not in own and dequantized_constant(graph, arg) is None:
                    source = quantized_tensor(graph, arg)
                    names[arg.name] = (arg if source is None else source).name
    return names


def _copy(
    builder: relax.BlockBuilder, graph: Graph, params: dict[str, relax.Var], chain: Chain
) -> relax.Var:
    """Write a chain that reads parameters; return its last tensor."""
    own: dict[relax.Var, relax.Var] = {}

    def operand(arg: Any) -> Any:
        if not isinstance(arg, relax.Var):
            return arg
        if arg in own:
            return own[arg]
        weight = dequantized_constant(graph, arg)
        return params[arg.name] if weight is None else relax.const(weight)

    for step in chain.steps:
        call = graph.values[step]
        args = [operand(arg) for arg in call.args]
        own[step] = builder.emit(relax.Call(call.op, args, call.attrs, call.ty_args), step.name)
    return own[chain.steps[-1]]


def dequantized_constant(graph: Graph, var: Any) -> np.ndarray | None:
    """Return the float32 value of a dequantized constant; None for anything else."""
    call = graph.values.get(var)
    q = constant(call.args[0]) if op_name(call) == "relax.dequantize" else None
    if q is None:
        return None
    along = [1] * q.ndim
    along[int(call.attrs.axis)] = -1
    scale, zero_point = (
        x.reshape(along) if x.size > 1 else x.item() for x in map(constant, call.args[1:3])
    )
    # In float64: an int32 bias has more bits than a float32.
    return ((q.astype("float64") - zero_point) * scale).astype("float32")
