"""Accuracy report: how far each layer's int8 output is from its float32 one, and through whom."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..progress import track
from ..target import host_target
from .accuracy import Accuracy, AccuracyReport, Channel, LayerAccuracy, Stored
from .calibrate import Instrumented, run_instrumented
from .chains import chains_of, isolate, pairs_of, tensors_read
from .graph import Graph
from .noise import Noise, Rounding
from .preparation import prepare_like

_WORST = 3  # channels that are named


@dataclass(frozen=True)
class LayerError:
    """Error of one layer's stored output, over all inputs, after dequantization.

    Attributes
    ----------
    name : str
        The layer, as `list_layers` and `topi_int8.explain` name it.
    tensor : str
        The fp32 tensor that its kernel stores: after bias, residual and activation.
    sqnr : float
        Signal to quantization noise ratio, dB: ``10 log10(sum r^2 / sum (r - v)^2)``.
    max_error : float
        Largest absolute difference.
    """

    name: str
    tensor: str
    sqnr: float
    max_error: float


def stored_tensors(qdq: tvm.IRModule) -> dict[str, str]:
    """Return layer name -> name of the float32 tensor that holds what its kernel stores.

    For every conv2d and matmul of a module from `quantize`; a quantized output is named as the
    dequantize after it, ``<fp32 name>_dq``.
    """
    graph = Graph(qdq)
    return {chain.name: chain.stored for chain in chains_of(graph, pairs_of(graph))}


def layer_errors(
    mod: tvm.IRModule,
    qdq: tvm.IRModule,
    inputs: Iterable[Any],
    *,
    target: tvm.target.Target | None = None,
) -> list[LayerError]:
    """Return the error of each conv2d and matmul, both graphs compiled and run on the same inputs.

    The short form of `accuracy_report`.

    Parameters
    ----------
    mod : tvm.IRModule
        The fp32 module given to `quantize`.
    qdq : tvm.IRModule
        What `quantize` returned for it.
    inputs : iterable
        As for `quantize`.
    target : tvm.target.Target, optional
        This machine by default.
    """
    stored = stored_tensors(qdq)
    tensors = [name.removesuffix("_dq") for name in stored.values()]
    errors = [Noise() for _ in stored]
    inputs = list(inputs)
    wanted = run_instrumented(prepare_like(mod, qdq), tensors, inputs, target)
    got = run_instrumented(qdq, list(stored.values()), inputs, target)
    for reference, values in zip(wanted, got, strict=True):
        for error, r, v in zip(errors, reference, values, strict=True):
            error.update(r, v)
    return [
        LayerError(name, tensor, error.sqnr, error.max_error)
        for name, tensor, error in zip(stored, tensors, errors, strict=True)
    ]


def accuracy_report(
    fp32: tvm.IRModule,
    int8: tvm.IRModule,
    data: Iterable[Any],
    *,
    target: tvm.target.Target | None = None,
    progress: bool = True,
) -> AccuracyReport:
    """Compare an int8 network with its fp32 one, layer by layer, on inputs.

    Three modules are compiled: fp32, int8, and every int8 layer by itself on the fp32 network's
    tensors, which tells a layer's own error from what it was handed (`LayerAccuracy.own_sqnr`). One
    pass over the inputs; the tensors of one input at a time are held. The modules are left alone.

    Parameters
    ----------
    fp32 : tvm.IRModule
        The module given to `quantize`.
    int8 : tvm.IRModule
        What `quantize` returned for it.
    data : iterable
        Inputs as for `quantize`, at least one: others than it was calibrated on, to be honest.
    target : tvm.target.Target, optional
        Where all three run; this machine by default.
    progress : bool
        Show a progress bar.

    Returns
    -------
    AccuracyReport

    Raises
    ------
    TypeError, ValueError
        An argument is not what is allowed; the message names it.
    """
    for name, mod in (("fp32", fp32), ("int8", int8)):
        if not isinstance(mod, tvm.IRModule):
            raise TypeError(f"{name} is {type(mod).__name__}; allowed: a tvm.IRModule")
    comparison = _Comparison(prepare_like(fp32, int8), int8)
    comparison.compile(target or host_target(), progress)
    for item in track(data, "comparing with fp32", progress):
        comparison.update(item)
    return comparison.report()


class _Comparison:
    """The modules of a report, and the sums over the inputs so far."""

    def __init__(self, reference: tvm.IRModule, qdq: tvm.IRModule) -> None:
        self.reference, self.qdq = reference, qdq
        graph = Graph(qdq)
        by_var = pairs_of(graph)
        self.chains = chains_of(graph, by_var)
        self.alone = [chain for chain in self.chains if chain.is_int8]
        self.pairs = {pair.tensor: pair for pair in by_var.values()}
        tensors = [chain.tensor for chain in self.chains] + list(self.pairs)
        tensors += tensors_read(graph, self.alone).values()
        _check_same_network(Graph(reference), tensors)
        self.isolated, self.handed = isolate(reference, graph, self.alone)
        inputs = [param.name for param in reference["main"].params]
        self.watched = list(dict.fromkeys(tensors + inputs))
        self.layers = [Noise(chain.channel_axis) for chain in self.chains]
        self.own = {chain.name: Noise(chain.channel_axis) for chain in self.alone}
        self.stored = {name: Rounding(pair.params) for name, pair in self.pairs.items()}
        self.outputs = self._outputs(graph)
        self.items = 0

    def _outputs(self, graph: Graph) -> list[tuple[str, Noise]]:
        """Return (fp32 tensor, its sums) of each result of ``main``."""
        axes = {chain.stored: chain.channel_axis for chain in self.chains}
        source = {pair.dequantized: pair.tensor for pair in self.pairs.values()}
        found = []
        for result in _results(graph, graph.func.body.body):
            name = result.name if isinstance(result, relax.Var) else "constant"
            # Channels of what no layer makes: the second axis, as in (N, classes) and NCHW.
            axis = axes.get(name, 1 if int(result.ty.ndim) > 1 else None)
            found.append((source.get(name, name), Noise(axis)))
        return found

    def compile(self, target: tvm.target.Target, progress: bool) -> None:
        """Compile the three modules."""
        stored = [chain.stored for chain in self.chains]
        stored += [pair.dequantized for pair in self.pairs.values()]
        work = [
            lambda: Instrumented(self.reference, self.watched, target),
            lambda: Instrumented(self.qdq, list(dict.fromkeys(stored)), target),
            lambda: relax.VirtualMachine(tvm.compile(self.isolated, target), tvm.cpu())["main"],
        ]
        made = [build() for build in track(work, "compiling fp32, int8, layers alone", progress)]
        self.run_fp32, self.run_int8, self.run_alone = made

    def update(self, item: Any) -> None:
        """Run one input and add to the sums.

        Raises
        ------
        ValueError
            For an input that does not fit, or makes a tensor infinite or NaN.
        """
        what = f"data item {self.items}"
        arguments = self.run_fp32.arguments(item, what)
        wanted, fp32 = self.run_fp32(arguments)
        got, int8 = self.run_int8(arguments)
        for tensors in (fp32, int8):
            for name, tensor in tensors.items():
                if not np.isfinite(tensor).all():
                    raise ValueError(f"{what} makes {name} infinite or NaN")
        for chain, noise in zip(self.chains, self.layers, strict=True):
            noise.update(fp32[chain.tensor], int8[chain.stored])
        # What the layers alone read: the fp32 tensors, or those rounded, by the QDQ graph's names.
        handed = dict(fp32)
        for name, pair in self.pairs.items():
            handed[pair.dequantized] = self.stored[name].update(fp32[name], int8[pair.dequantized])
        for (_, noise), reference, values in zip(self.outputs, wanted, got, strict=True):
            noise.update(reference, values)
        results = self.run_alone(*(tvm.runtime.tensor(handed[name]) for name in self.handed))
        for chain, result in zip(self.alone, results, strict=True):
            self.own[chain.name].update(fp32[chain.tensor], result.numpy())
        self.items += 1

    def report(self) -> AccuracyReport:
        """Return what was found."""
        if self.items == 0:
            raise ValueError("data is empty; allowed: an iterable of at least one input")
        stored = {name: _stored(name, rounding) for name, rounding in self.stored.items()}
        layers = []
        for chain, noise in zip(self.chains, self.layers, strict=True):
            own = self.own.get(chain.name)
            output = stored[chain.output.tensor] if chain.output else None
            layers.append(
                LayerAccuracy(
                    **_common(chain.name, chain.tensor, noise, output),
                    op=chain.op,
                    own_sqnr=math.inf if own is None else own.sqnr,
                    own_noisiest=None if own is None else _noisiest(own),
                    inputs=tuple(stored[pair.tensor] for pair in chain.inputs),
                    is_int8=chain.is_int8,
                )
            )
        outputs = [
            Accuracy(**_common(f"output {index}", name, noise, stored.get(name)))
            for index, (name, noise) in enumerate(self.outputs)
        ]
        return AccuracyReport(tuple(layers), tuple(outputs), self.items)


def _check_same_network(reference: Graph, tensors: Iterable[str]) -> None:
    """Refuse an int8 module that was not made from the fp32 one."""
    known = {var.name for var in [*reference.func.params, *reference.order]}
    if unknown := sorted(set(tensors) - known):
        raise ValueError(
            f"int8 has the tensors {', '.join(unknown)}, which fp32 lacks; "
            "allowed: what quantize returned for fp32"
        )


def _results(graph: Graph, result: Any) -> list[Any]:
    """Return the tensors of a result, those of tuples one after the other."""
    value = graph.values.get(result) if isinstance(result, relax.Var) else result
    if isinstance(value, relax.Tuple):
        return [tensor for field in value.fields for tensor in _results(graph, field)]
    return [result]


def _common(name: str, tensor: str, noise: Noise, stored: Stored | None) -> dict[str, Any]:
    """Return the fields that layers and outputs share."""
    worst = tuple(Channel(*channel) for channel in noise.worst(_WORST))
    return {
        "name": name, "tensor": tensor, "sqnr": noise.sqnr, "cosine": noise.cosine,
        "max_error": noise.max_error, "stored": stored, "worst_channels": worst,
    }  # fmt: skip


def _noisiest(own: Noise) -> Channel | None:
    found = own.noisiest()
    return None if found is None else Channel(*found)


def _stored(tensor: str, rounding: Rounding) -> Stored:
    params = rounding.params
    return Stored(
        tensor, params.dtype, params.scale, params.zero_point, rounding.low, rounding.high,
        rounding.saturated, rounding.sqnr,
    )  # fmt: skip
