"""Cross-layer equalisation: channels of a tensor between two layers scaled to be alike.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019),
section 4.1: where ``f(s x) = s f(x)`` for s > 0, as for a relu,

    W2 f(W1 x + b1) = (W2 S) f((S^-1 W1) x + S^-1 b1)    S = diag(s), any s > 0

so that ``s_i = sqrt(r1_i / r2_i)`` gives two quantized tensors equal ranges in channel i, which the
paper shows to be best. Which two is a `MODES`:

- "weights", the paper's: r1, r2 are the largest absolute weights of channel i in W1 and W2, for
  weights with one scale a tensor. No data is needed. Pairs are equalised one after another until
  nothing moves, so that chains (expand, depthwise, project) settle as a whole.
- "activations": with a scale for each output channel it does not matter to W1 what its channels are
  divided by. What has one scale is the tensor between: r1 is its range in channel i over the
  calibration inputs, and r2 the largest weight of channel i in W2, each of W2's output channels
  taken relative to its largest. Of ``s_i = r1_i^a / r2_i^b`` a pair gets the exponents that make
  least noise in W2's output (`_predicted_noise`), with s = 1 among them.

What is sound beyond the paper:

- A clip to [0, B] (relu6) is no such f. But where its input is itself bounded, as a depthwise
  convolution's between two relu6, a channel that provably stays below ``U <= B`` may grow by up to
  B / U without the clip ever being felt, on any input. Other channels of such a tensor keep s = 1.
- "weights": a channel whose weights training killed would have its bias divided by next to nothing:
  no bias grows beyond the largest of its layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from ..op import op_name
from ..transform._qdq_values import clip_of
from .calibrate import run_instrumented
from .graph import Graph, constant
from .plan import Compute, Plan, make_plan
from .rewrite import with_constants
from .weights import grouped, ungrouped

MODES = ("activations", "weights")
# Module attribute: layer name -> what its output channels were divided by, float64.
EQUALIZED = "topi_int8.equalized"
# f(s x) = s f(x) for s > 0, channel by channel; clips are asked for by `clip_of`.
_POOLS = frozenset(f"relax.nn.{name}_pool2d" for name in ("max", "avg", "adaptive_avg"))
_ROUNDS = 50  # MobileNetV2 settles in fewer; chains of a hundred pairs would still end
_SETTLED = 1e-3  # no scale of a round is further from 1
_LEAST = 1e-3  # of channels that are proven to be zero
_GROWTH = 64  # by how much a channel's values may grow next to another's: six of eight bits
# A channel is taken to reach this much more than calibration saw, if no more than the largest one:
# other inputs will, and every channel grown to fill the range would saturate where one did before.
# Without, a seeded MNASNet (8 images of 64x64) gained 1 dB on the images seen and lost 3 on others.
_HEADROOM = 2
# Of r1 and r2 that are tried; the first, s = 1, is kept where none is better.
_EXPONENTS = tuple((a / 4, b / 4) for a in range(5) for b in range(4))
_SLACK = 1e-4  # of its terms, more than float32 rounds a sum of products up by


@dataclass(frozen=True)
class Pair:
    """Two layers, the second the only one to read what the first makes.

    Attributes
    ----------
    first, second : Compute
    bias : relax.Var or None
        The first's bias add.
    bounds : tuple of float
        The narrowest clip between them; infinite without one.
    """

    first: Compute
    second: Compute
    bias: relax.Var | None
    bounds: tuple[float, float] = (-np.inf, np.inf)


def equalized(
    mod: tvm.IRModule,
    mode: str = "weights",
    inputs: Iterable[Any] = (),
    target: tvm.target.Target | None = None,
) -> tvm.IRModule:
    """Return a prepared module that computes the same, its layers' channels equalised.

    The module remembers the scales, for `prepare_like`.

    Parameters
    ----------
    mod : tvm.IRModule
    mode : str
        One of `MODES`. "activations" compiles the module and runs it over the inputs.
    inputs : iterable
        As `calibrate`'s; not read by "weights".
    target : tvm.target.Target, optional
        Where "activations" runs; this machine by default.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")
    equalizer = _Equalizer(mod)
    if not equalizer.pairs:
        return mod
    if mode == "weights":
        scales = equalizer.weight_scales()
    else:
        scales = equalizer.activation_scales(_channel_statistics(equalizer, inputs, target))
    kept = {name: scale for name, scale in scales.items() if (scale != 1).any()}
    if not kept:
        return mod
    attr = {name: tvm.runtime.tensor(scale) for name, scale in kept.items()}
    return with_scales(mod, kept).with_attr(EQUALIZED, attr)


def find_pairs(graph: Graph, plan: Plan) -> list[Pair]:
    """Return the pairs of layers between which channels may be scaled.

    Parameters
    ----------
    graph : Graph
        Of a prepared function.
    plan : Plan
        Of the whole of it, nothing skipped.
    """
    readers = {used: var for var in graph.order for used in graph.tensors(graph.values[var])}
    pairs = (_pair(graph, plan, readers, compute) for compute in plan.computes.values())
    return [pair for pair in pairs if pair is not None]


def _pair(
    graph: Graph, plan: Plan, readers: Mapping[relax.Var, relax.Var], first: Compute
) -> Pair | None:
    """Return the pair that starts at a layer."""
    if first.weight is None:
        return None
    end, bias, low, high = first.var, None, -np.inf, np.inf
    while graph.single_use(end) and end in readers:
        var = readers[end]
        call = graph.values[var]
        if var in plan.computes:
            second = plan.computes[var]
            fits = second.weight is not None and _data_axis(call) == first.channel_axis
            return Pair(first, second, bias, (low, high)) if fits else None
        if var in plan.bias:
            bias = var
        elif (clip := clip_of(call, constant)) is not None:
            low, high = max(low, clip[1][0]), min(high, clip[1][1])
        elif op_name(call) not in _POOLS or not _keeps_layout(call):
            return None
        end = var
    return None


def _data_axis(call: relax.Call) -> int:
    """Return the axis of the input channels in a layer's data; -1 where there is no single one."""
    if op_name(call) == "relax.matmul":
        return int(call.args[0].ty.ndim) - 1
    layout = str(call.attrs.data_layout)
    return layout.index("C") if len(layout) == 4 else -1


def _keeps_layout(call: relax.Call) -> bool:
    layout = str(call.attrs.layout)
    return len(layout) == 4 and str(call.attrs.out_layout) in ("", layout)


# ---------------------------------------------------------------- scales


@dataclass(frozen=True)
class _State:
    """A layer as equalised so far: weight (groups, oc / g, ic / g, kh, kw), bias (oc,), float64."""

    weight: np.ndarray
    bias: np.ndarray

    def divided(self, scale: np.ndarray) -> _State:
        """Return it with its output channels divided."""
        groups, channels = self.weight.shape[:2]
        return _State(
            self.weight / scale.reshape(groups, channels, 1, 1, 1), self.bias / scale
        )

    def multiplied(self, scale: np.ndarray) -> _State:
        """Return it with the weights of its input channels multiplied."""
        groups, channels = self.weight.shape[0], self.weight.shape[2]
        return replace(self, weight=self.weight * scale.reshape(groups, 1, channels, 1, 1))


class _Equalizer:
    """The pairs of a prepared module, and the layers as they are.

    Scales, here: what the output channels of each pair's first layer are to be divided by, (oc,),
    by that layer's name.
    """

    def __init__(self, mod: tvm.IRModule) -> None:
        self.mod = mod
        graph = Graph(mod)
        plan = make_plan(graph)
        biases = {source: value.reshape(-1) for source, value, _ in plan.bias.values()}
        self.states = {
            compute.var: _State(
                grouped(compute.weight, graph.values[compute.var]).astype("float64"),
                biases.get(compute.var, np.zeros(compute.channels)).astype("float64"),
            )
            for compute in plan.computes.values()
            if compute.weight is not None
        }
        self.pairs = find_pairs(graph, plan)
        self.limits = [_limits(graph, pair, self.states[pair.first.var]) for pair in self.pairs]

    def weight_scales(self) -> dict[str, np.ndarray]:
        """Return the scales of "weights"."""
        states = dict(self.states)
        totals = [np.ones(pair.first.channels) for pair in self.pairs]
        for _ in range(_ROUNDS):
            moved = 0.0
            for pair, (least, most), total in zip(self.pairs, self.limits, totals, strict=True):
                first, second = states[pair.first.var], states[pair.second.var]
                scale = np.clip(_weight_scale(first, second), least / total, most / total)
                states[pair.first.var] = first.divided(scale)
                states[pair.second.var] = second.multiplied(scale)
                total *= scale
                moved = max(moved, float(np.abs(np.log(scale)).max(initial=0.0)))
            if moved < _SETTLED:
                break
        return {
            pair.first.var.name: total for pair, total in zip(self.pairs, totals, strict=True)
        }

    def activation_scales(self, seen: Mapping[str, _Seen]) -> dict[str, np.ndarray]:
        """Return the scales of "activations", from what was seen of each second layer's data."""
        scales = {}
        for pair, (least, most) in zip(self.pairs, self.limits, strict=True):
            second = self.states[pair.second.var].weight
            data = seen[pair.second.data.name].with_headroom()
            largest = np.abs(second).max(axis=(2, 3, 4), keepdims=True)
            relative = np.abs(second) / np.where(largest > 0, largest, 1.0)
            # Relative to the largest: so a clip that holds other channels at 1 fits in.
            r1 = data.largest / (data.largest.max() or 1.0)
            r2 = relative.max(axis=(1, 3, 4)).reshape(-1)
            candidates = [
                np.clip(np.maximum(scale, scale.max() / _GROWTH), least, most)
                for scale in (_balance(r1**a, r2**b) ** 2 for a, b in _EXPONENTS)
            ]
            noise = [_predicted_noise(second, data, scale) for scale in candidates]
            scales[pair.first.var.name] = candidates[int(np.argmin(noise))]
        return scales


@dataclass
class _Seen:
    """What calibration saw of a tensor's channels: largest absolute value and mean square."""

    largest: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0

    def update(self, channels: np.ndarray) -> None:
        """Take in one input's values, (channels, ..)."""
        rows = channels.reshape(len(channels), -1).astype("float64")
        self.largest = np.maximum(self.largest, np.abs(rows).max(axis=1))
        self.squares = self.squares + np.mean(rows**2, axis=1)

    def with_headroom(self) -> _Seen:
        """Return it as other inputs may be: channels larger, the largest as it is."""
        largest = np.minimum(self.largest * _HEADROOM, np.max(self.largest))
        return replace(self, largest=largest)


def _predicted_noise(weight: np.ndarray, data: _Seen, scale: np.ndarray) -> float:
    """Return the noise power of a layer's output, in some unit, for its data divided by a scale.

    Roundings of step d are noise of power d**2 / 12. The data's step is its largest channel's, and
    meets all weights of a channel; a weight's is its output channel's largest, and meets the data's
    power. 255 and 127 levels: data is mostly a relu's.
    """
    groups, _, channels, kh, kw = weight.shape
    by_group = scale.reshape(groups, 1, channels)
    scaled = np.abs(weight).max(axis=(3, 4)) * by_group
    weight_steps = (scaled.max(axis=2) / 127) ** 2
    power = np.sum(data.squares.reshape(groups, channels) / by_group[:, 0] ** 2, axis=1)
    data_step = (np.max(data.largest / scale) / 255) ** 2
    gains = np.sum(weight**2, axis=(1, 3, 4)) * by_group[:, 0] ** 2
    return float(data_step * gains.sum() + kh * kw * np.sum(weight_steps.sum(axis=1) * power))


def _channel_statistics(
    equalizer: _Equalizer, inputs: Iterable[Any], target: tvm.target.Target | None
) -> dict[str, _Seen]:
    """Return what second layers read, by tensor: sums over the inputs, but for largest values."""
    axes = {pair.second.data.name: pair.first.channel_axis for pair in equalizer.pairs}
    seen = {name: _Seen() for name in axes}
    runs = 0
    for tensors in run_instrumented(equalizer.mod, list(axes), inputs, target):
        for (name, axis), values in zip(axes.items(), tensors, strict=True):
            seen[name].update(np.moveaxis(values, axis, 0))
        runs += 1
    if runs == 0:
        raise ValueError("calibration is empty; allowed: an iterable of at least one input")
    for statistics in seen.values():
        statistics.squares = statistics.squares / runs
    return seen


def _balance(r1: np.ndarray, r2: np.ndarray) -> np.ndarray:
    """Return ``sqrt(r1 / r2)``; for a channel of zeros on one side the middle of the others."""
    alive = (r1 > 0) & (r2 > 0)
    scale = np.ones_like(r1)
    scale[alive] = np.sqrt(r1[alive] / r2[alive])
    scale[~alive] = np.median(scale[alive]) if alive.any() else 1.0
    return scale


def _weight_scale(first: _State, second: _State) -> np.ndarray:
    """Return the paper's scales, no bias growing beyond the largest."""
    r1 = np.abs(first.weight).max(axis=(2, 3, 4)).reshape(-1)
    r2 = np.abs(second.weight).max(axis=(1, 3, 4)).reshape(-1)
    alive = (r1 > 0) & (r2 > 0)
    scale = np.where(alive, _balance(r1, r2), 1.0)
    largest = np.abs(first.bias).max()
    return np.maximum(scale, np.abs(first.bias) / largest) if largest > 0 else scale


def _limits(graph: Graph, pair: Pair, first: _State) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the most that each channel may be divided by, for a clip's sake."""
    free = np.zeros(pair.first.channels), np.full(pair.first.channels, np.inf)
    if not set(pair.bounds) - {0.0, -np.inf, np.inf}:
        return free
    low, high = pair.bounds
    bottom, top = _data_bounds(graph, pair.first.data)
    reach = np.full(pair.first.channels, np.inf)
    if high > 0 and low in (0.0, -np.inf) and np.isfinite((bottom, top)).all():
        # Padding reads zeros.
        products = first.weight * min(bottom, 0.0), first.weight * max(top, 0.0)
        reach = np.maximum(*products).sum(axis=(2, 3, 4)).reshape(-1)
        reach += first.bias + _SLACK * (reach + np.abs(first.bias))
        reach = np.maximum(reach, high * _LEAST)
    unfelt = reach <= high
    return np.where(unfelt, reach / high, 1.0), np.where(unfelt, np.inf, 1.0)


def _data_bounds(graph: Graph, data: relax.Var) -> tuple[float, float]:
    """Return bounds of a tensor that hold for every input."""
    call = graph.values.get(data)
    while op_name(call) == "relax.nn.max_pool2d":
        call = graph.values.get(call.args[0])
    clip = clip_of(call, constant)
    return (-np.inf, np.inf) if clip is None else clip[1]


def with_scales(mod: tvm.IRModule, scales: Mapping[str, np.ndarray]) -> tvm.IRModule:
    """Return a prepared module with channels of layers divided, and multiplied by their readers.

    Parameters
    ----------
    scales : mapping of str to array
        Layer -> what its output channels are divided by, (oc,); layers that begin a pair.
    """
    graph = Graph(mod)
    plan = make_plan(graph)
    values: dict[str, np.ndarray] = {}

    def weight(compute: Compute) -> _State:
        call = graph.values[compute.var]
        current = values.get(compute.var.name, compute.weight)
        return _State(grouped(current, call).astype("float64"), np.zeros(compute.channels))

    for pair in find_pairs(graph, plan):
        scale = scales.get(pair.first.var.name)
        if scale is None:
            continue
        first = weight(pair.first).divided(scale)
        values[pair.first.var.name] = ungrouped(first.weight, graph.values[pair.first.var])
        second = weight(pair.second).multiplied(scale)
        values[pair.second.var.name] = ungrouped(second.weight, graph.values[pair.second.var])
        if pair.bias is not None:
            _, bias, _ = plan.bias[pair.bias]
            values[pair.bias.name] = bias / scale.reshape(bias.shape)
    return with_constants(mod, values)
