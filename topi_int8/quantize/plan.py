"""Which tensors are quantized, and which of them share their parameters.

Fusion decides: a tensor gets its quantize/dequantize pair where an integer kernel stores it, never
inside one.

- conv2d and matmul with a constant weight want their data quantized; a matmul of two activations
  wants both (the second as symmetric int8).
- ``conv -> bias -> (+ residual) -> relu/clip`` is one kernel: its last tensor is quantized and the
  residual operand, nothing between. Where both operands of an add are convolutions, the later one
  is fused and the earlier one is stored.
- max_pool2d, concat, split, reshape and the like move integers unchanged, so their inputs and
  outputs share one scale; average pooling and a free-standing add have their own.
- A function of one integer tensor, such as x * sigmoid(x), is a table of 256 values: its input and
  its output are quantized, nothing between. So is a product of two integer tensors
  (squeeze-and-excitation's), and a scale and a shift a channel with its relu (a BatchNorm before
  its convolution).
- A tensor that only float operators read, or that is the result of the network, stays float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from tvm import relax

from ..op import op_name, static_shape
from ..transform._elementwise import Finder, NotPointwise
from .graph import Graph, constant

SHARED_SCALE = frozenset(
    "relax." + name
    for name in (
        "nn.max_pool2d", "concat", "split", "strided_slice", "reshape", "flatten",
        "nn.batch_flatten", "squeeze", "expand_dims", "permute_dims", "nn.pad",
    )
)  # fmt: skip
AVERAGES = frozenset(("relax.mean", "relax.nn.avg_pool2d", "relax.nn.adaptive_avg_pool2d"))
ACTIVATIONS = frozenset(("relax.nn.relu", "relax.nn.relu6", "relax.clip"))


@dataclass(frozen=True)
class Compute:
    """A conv2d or matmul to be quantized.

    `channel_axis` and `kernel_axis` are the axes of the output channels in the output and in the
    weight; `weight` is None for a matmul of two activations.
    """

    var: relax.Var
    data: relax.Var
    weight: np.ndarray | None
    channel_axis: int
    kernel_axis: int

    @property
    def channels(self) -> int:
        """Number of output channels."""
        assert self.weight is not None
        return int(self.weight.shape[self.kernel_axis])


@dataclass
class Plan:
    """What to quantize in one function.

    Attributes
    ----------
    computes : conv2d and matmul by output variable
    bias : variable of a bias add -> (its conv2d or matmul, the bias as stored, its channel axis)
    tensors : variables that get a quantize/dequantize pair, in no particular order
    group : variable -> the representative of those it shares its parameters with
    symmetric : representatives of groups that must be symmetric int8
    """

    computes: dict[relax.Var, Compute] = field(default_factory=dict)
    bias: dict[relax.Var, tuple[relax.Var, np.ndarray, int]] = field(default_factory=dict)
    tensors: set[relax.Var] = field(default_factory=set)
    group: dict[relax.Var, relax.Var] = field(default_factory=dict)
    symmetric: set[relax.Var] = field(default_factory=set)

    def representative(self, var: relax.Var) -> relax.Var:
        """Return the variable that stands for all that share the parameters of this one."""
        while var in self.group:
            var = self.group[var]
        return var

    def share(self, first: relax.Var, second: relax.Var) -> None:
        """Let two variables have the same parameters."""
        first, second = self.representative(first), self.representative(second)
        if first is not second and not first.same_as(second):
            self.group[second] = first


def make_plan(graph: Graph, skipped: Iterable[relax.Var] = ()) -> Plan:
    """Return the plan for a prepared function; skipped layers stay float32."""
    return _Planner(graph, frozenset(skipped)).run()


class _Planner:
    """Finds the fused chains forwards, then spreads the wish for integers backwards."""

    def __init__(self, graph: Graph, skipped: frozenset[relax.Var]) -> None:
        self.graph, self.skipped = graph, skipped
        self.plan = Plan()
        # The end of a fused chain so far -> how far it has come: sum, bias, residual, activation.
        self.stage: dict[relax.Var, str] = {}
        self.source: dict[relax.Var, relax.Var] = {}
        self.residual: list[relax.Var] = []
        self.fused_adds: set[relax.Var] = set()
        self._integer: dict[relax.Var, bool] = {}
        # A fused chain's end is stored; what comes after it reads that.
        self.finder = Finder(graph.values.get, constant, self.stage.__contains__)

    def run(self) -> Plan:
        for var in self.graph.order:
            self._chain(var)
        self._spread()
        self._share()
        return self.plan

    # ------------------------------------------------------------ forwards: fused chains

    def _chain(self, var: relax.Var) -> None:
        call = self.graph.values[var]
        name = op_name(call)
        if var in self.skipped:
            return
        if name in ("relax.nn.conv2d", "relax.matmul"):
            compute = _compute(var, call)
            if compute is not None:
                self.plan.computes[var] = compute
                self.stage[var], self.source[var] = "sum", var
        elif name == "relax.add":
            self._bias(var, call) or self._residual(var, call)
        elif name in ACTIVATIONS:
            data = call.args[0]
            if data in self.stage and self.graph.single_use(data):
                self.stage[var], self.source[var] = "activation", self.source[data]

    def _bias(self, var: relax.Var, call: relax.Call) -> bool:
        for data, other in (call.args, call.args[::-1]):
            value = constant(other)
            if value is None or self.stage.get(data) != "sum" or not self.graph.single_use(data):
                continue
            compute = self.plan.computes[self.source[data]]
            axis = _bias_axis(value, compute, int(call.ty.ndim))
            if axis is not None:
                self.stage[var], self.source[var] = "bias", compute.var
                self.plan.bias[var] = (compute.var, value, axis)
                return True
        return False

    def _residual(self, var: relax.Var, call: relax.Call) -> None:
        operands = list(call.args)
        if any(not isinstance(x, relax.Var) for x in operands) or not _same_shape(*operands):
            return
        # The later convolution is fused: the other operand has to be there before it runs.
        operands.sort(key=lambda x: self.graph.position.get(x, -1))
        other, fused = operands
        for other, fused in (operands, operands[::-1]):
            if self.stage.get(fused) in ("sum", "bias") and self.graph.single_use(fused):
                self.stage[var], self.source[var] = "residual", self.source[fused]
                self.residual.append(other)
                self.fused_adds.add(var)
                return

    # ------------------------------------------------------------ backwards: who wants integers

    def _spread(self) -> None:
        plan, graph = self.plan, self.graph
        wanted: list[relax.Var] = []
        for compute in plan.computes.values():
            wanted.append(compute.data)
            if compute.weight is None:
                wanted.append(graph.values[compute.var].args[1])
        wanted += [var for var in self.residual if self._is_integer(var)]
        # An average of integers is an integer kernel even where its result leaves as float32.
        for var in graph.order:
            if op_name(graph.values[var]) in AVERAGES and var not in self.skipped:
                wanted += [x for x in graph.tensors(graph.values[var]) if self._is_integer(x)]
        while wanted:
            var = wanted.pop()
            if var in plan.tensors:
                continue
            plan.tensors.add(var)
            wanted += self._inputs_wanted(var)

    def _inputs_wanted(self, var: relax.Var) -> list[relax.Var]:
        """Return the inputs that must be integers for this tensor to be made from integers."""
        if var in self.stage or var in self.skipped:
            return []
        expr, name = self._producer(var)
        inputs = self.graph.tensors(expr)
        if name in SHARED_SCALE:
            return inputs if all(_is_float_tensor(x) for x in inputs) else []
        if name == "relax.add" and self._adds_integers(expr):
            return inputs
        if (elementwise := self._elementwise_inputs(var)) is not None:
            return elementwise
        if name in AVERAGES or name in ACTIVATIONS:
            return inputs if all(self._is_integer(x) for x in inputs) else []
        return []

    def _elementwise_inputs(self, var: relax.Var) -> list[relax.Var] | None:
        """Return the tensors that one pass over integers makes this one of; None if none does.

        The passes are `FuseElementwise`'s; sums and clips alone are no concern of it.
        """
        if static_shape(var) is None:
            return None
        try:
            function = self.finder.pointwise(var)
            inputs = [] if function.only_clips else [function.source]
        except NotPointwise:
            affine, product = self.finder.affine(var), self.finder.product(var)
            if affine is not None and not affine.only_clips:
                inputs = [affine.source]
            else:
                inputs = [product.a, product.b] if product is not None else []
        return inputs if inputs and all(self._is_integer(x) for x in inputs) else None

    def _adds_integers(self, call: relax.Call) -> bool:
        operands = [x for x in call.args if isinstance(x, relax.Var)]
        same = len(operands) == 2 and _same_shape(*operands)
        return same and all(self._is_integer(x) for x in operands)

    def _producer(self, var: relax.Var) -> tuple[relax.Expr, str]:
        """Return the operator call behind a variable, through the tuple of a split."""
        expr = self.graph.values.get(var)
        if isinstance(expr, relax.TupleGetItem):
            expr = self.graph.values.get(expr.tuple_value)
        name = op_name(expr)
        return expr, name if name != "relax.nn.pad" or _pads_zero(expr) else ""

    def _is_integer(self, var: relax.Var) -> bool:
        """Return whether an integer kernel can make this tensor without detours."""
        known = self._integer.get(var)
        if known is not None:
            return known
        expr, name = self._producer(var)
        if var in self.stage:
            result = True
        elif var in self.skipped or expr is None:
            result = False
        elif self._elementwise_inputs(var) is not None:
            result = True
        elif name in SHARED_SCALE or name in AVERAGES or name in ACTIVATIONS:
            result = all(self._is_integer(x) for x in self.graph.tensors(expr))
        elif name == "relax.add":
            result = self._adds_integers(expr)
        else:
            result = False
        self._integer[var] = result
        return result

    # ------------------------------------------------------------ shared parameters

    def _share(self) -> None:
        plan = self.plan
        for var in plan.tensors:
            expr, name = self._producer(var)
            if name in SHARED_SCALE and var not in self.skipped:
                for x in self.graph.tensors(expr):
                    if x in plan.tensors:
                        plan.share(x, var)
        for compute in plan.computes.values():
            if compute.weight is None:
                right = self.graph.values[compute.var].args[1]
                plan.symmetric.add(plan.representative(right))


def _compute(var: relax.Var, call: relax.Call) -> Compute | None:
    """Return the conv2d or matmul of a call; None where it cannot be quantized."""
    data, other = call.args[0], call.args[1]
    if not isinstance(data, relax.Var) or str(call.ty.dtype) != "float32":
        return None
    weight = constant(other)
    if op_name(call) == "relax.matmul":
        if weight is not None and weight.ndim != 2:
            return None
        if weight is None and (not isinstance(other, relax.Var) or other.ty.ndim < 2):
            return None
        return Compute(var, data, weight, int(call.ty.ndim) - 1, 1)
    out_layout, kernel_layout = (
        str(call.attrs.out_layout or call.attrs.data_layout),
        str(call.attrs.kernel_layout),
    )
    if weight is None or len(out_layout) != 4 or len(kernel_layout) != 4:
        return None
    return Compute(var, data, weight, out_layout.index("C"), kernel_layout.index("O"))


def _bias_axis(value: np.ndarray, compute: Compute, rank: int) -> int | None:
    """Return the channel axis of a constant that adds one value a channel; None for others."""
    if compute.weight is None or value.ndim > rank:
        return None
    axis = compute.channel_axis - (rank - value.ndim)
    if axis < 0 or value.size != compute.channels or value.shape[axis] != compute.channels:
        return None
    return axis


def _same_shape(first: relax.Var, second: relax.Var) -> bool:
    shapes = [first.ty.shape, second.ty.shape]
    if any(shape is None for shape in shapes) or len(shapes[0]) != len(shapes[1]):
        return False
    return all(_same_dim(a, b) for a, b in zip(*shapes, strict=True))


def _same_dim(first: object, second: object) -> bool:
    if hasattr(first, "value") and hasattr(second, "value"):
        return int(first.value) == int(second.value)
    return first is second or bool(getattr(first, "same_as", lambda _: False)(second))


def _is_float_tensor(var: relax.Var) -> bool:
    return isinstance(var.ty, relax.TensorType) and str(var.ty.dtype) == "float32"


def _pads_zero(call: relax.Call) -> bool:
    # Zero is the one value that every scale represents exactly.
    return str(call.attrs.pad_mode) == "constant" and float(call.attrs.pad_value) == 0.0
