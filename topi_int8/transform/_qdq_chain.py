"""A convolution or matmul and what has been folded into it so far.

A chain starts at the multiply-accumulate and grows, one operator of the graph at a time, by bias,
residual and clip. Whichever operator comes last decides how it is stored: `emit` makes the one
topi_int8 call that stands for all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tvm import relax

from .. import op
from ._qdq_graph import Graph
from ._qdq_values import INF, QParams, channel_vector, clip_of, narrow

# |bias| beyond this could overflow int32 together with the sum; such a bias is added in float.
_BIAS_LIMIT = 2**30


@dataclass(frozen=True)
class Residual:
    """A tensor added before the clip; real = scale * (expr - zero_point)."""

    expr: relax.Expr
    scale: float = 1.0
    zero_point: int = 0


@dataclass(frozen=True)
class Chain:
    """The operator so far.

    Parameters
    ----------
    kind : str
        "conv2d" or "matmul".
    data, weight : relax.Expr
        Tensors of the new graph.
    shape : tuple of int
        Shape of the output.
    channel_axes : tuple of int
        The output's axes that hold channels.
    acc_scale : np.ndarray or None
        float64 (channels,): the real value of one accumulator step. None: the accumulator itself is
        the result (raw int32, or float32 operands).
    bias : np.ndarray or None
        At accumulator scale: int32, or float32 for float32 operands.
    attrs : dict
        Geometry, zero points and name, as `op.conv2d` or `op.matmul` takes them.
    """

    kind: str
    data: relax.Expr
    weight: relax.Expr
    shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    acc_scale: np.ndarray | None
    bias: np.ndarray | None = None
    residual: Residual | None = None
    bounds: tuple[float, float] = (-INF, INF)
    attrs: dict[str, Any] = field(default_factory=dict)

    @property
    def is_float(self) -> bool:
        """Whether the operands are float32."""
        return str(self.data.ty.dtype) == "float32"

    @property
    def is_raw(self) -> bool:
        """Whether the result is the int32 accumulator."""
        return self.acc_scale is None and not self.is_float

    @property
    def clipped(self) -> bool:
        """Whether a clip was folded in; nothing may be added after it."""
        return self.bounds != (-INF, INF)

    def with_bias(self, addend: np.ndarray) -> Chain | None:
        """Return the chain with a constant added; None where that cannot be a per-channel bias."""
        if self.clipped:
            return None
        bias = channel_vector(addend, self.shape, self.channel_axes)
        if bias is None:
            return None
        if self.is_float:
            return replace(self, bias=(bias if self.bias is None else self.bias + bias))
        bias = bias.astype("float64")
        if self.acc_scale is not None:
            bias = bias / self.acc_scale
        bias = np.rint(bias) + (0 if self.bias is None else self.bias)
        if not np.all(np.abs(bias) <= _BIAS_LIMIT):
            return None
        return replace(self, bias=bias.astype("int32"))

    def with_residual(self, residual: Residual) -> Chain | None:
        """Return the chain with a tensor added; None where there is one, or a clip, already."""
        if self.clipped or self.residual is not None or self.acc_scale is None:
            return None
        return replace(self, residual=residual)

    def with_clip(self, bounds: tuple[float, float]) -> Chain | None:
        """Return the chain clipped, in real units; None for a raw accumulator."""
        return None if self.is_raw else replace(self, bounds=narrow(self.bounds, bounds))

    def dequantized(self, scale: np.ndarray) -> Chain | None:
        """Return a raw accumulator as real numbers: one scale, or one a channel."""
        channels = int(np.prod([self.shape[axis] for axis in self.channel_axes]))
        if not self.is_raw or scale.size not in (1, channels):
            return None
        scale = np.broadcast_to(scale.astype("float64").reshape(-1), (channels,))
        return replace(self, acc_scale=scale)

    def emit(self, out: QParams | None = None) -> relax.Call:
        """Return the call: stored as `out` says, or as float32 (a raw accumulator as int32)."""
        operands: dict[str, Any] = {}
        attrs = dict(self.attrs)
        unit = 1.0 if out is None else out.scale
        if self.bias is not None:
            operands["bias"] = relax.const(self.bias, str(self.bias.dtype))
        if self.acc_scale is not None:
            operands["scale"] = relax.const((self.acc_scale / unit).astype("float32"), "float32")
        if self.residual is not None:
            operands["residual"] = self.residual.expr
            attrs["residual_scale"] = self.residual.scale / unit
            attrs["residual_zero_point"] = self.residual.zero_point
        if out is None:
            attrs["out_dtype"] = "int32" if self.is_raw else "float32"
            low, high = (None if abs(b) == INF else b for b in self.bounds)
        else:
            attrs["out_dtype"], attrs["out_zero_point"] = out.dtype, out.zero_point
            low, high = (out.bound(b) for b in self.bounds)
        make = {"conv2d": op.conv2d, "matmul": op.matmul}[self.kind]
        return make(self.data, self.weight, **operands, clip_min=low, clip_max=high, **attrs)


def conv2d_attrs(call: relax.Call, name: str) -> dict[str, Any] | None:
    """Return the geometry of a relax.nn.conv2d for `op.conv2d`; None if it cannot be said."""
    attrs = call.attrs
    padding = [int(p) for p in attrs.padding]
    padding = {1: padding * 4, 2: padding * 2}.get(len(padding), padding)
    layout = str(attrs.data_layout)
    if str(attrs.out_layout) not in ("", layout) or len(padding) != 4 or min(padding) < 0:
        return None
    return dict(
        strides=tuple(int(s) for s in attrs.strides),
        padding=tuple(padding),
        dilation=tuple(int(d) for d in attrs.dilation),
        groups=int(attrs.groups),
        data_layout=layout,
        name=name,
    )


class ChainBook:
    """The chains that end at each variable of the old graph, and how an operator extends one."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._chains: dict[relax.Var, Chain] = {}

    def record(self, var: relax.Var, chain: Chain) -> relax.Call:
        """Remember the chain that ends at `var` and return its call, stored unquantized."""
        self._chains[var] = chain
        return chain.emit()

    def open(self, expr: relax.Expr) -> Chain | None:
        """Return the chain that ends at a tensor and may grow: the tensor has one consumer."""
        chain = self._chains.get(expr) if isinstance(expr, relax.Var) else None
        return chain if chain is not None and self.graph.single_use(expr) else None

    def extend_by_constant(self, var: relax.Var, call: relax.Call) -> relax.Call | None:
        """Rewrite an add of a constant to a chain."""
        for this, other in ((0, 1), (1, 0)):
            chain, addend = self.open(call.args[this]), self.graph.array(call.args[other])
            if chain is not None and addend is not None:
                grown = chain.with_bias(addend)
                if grown is not None:
                    return self.record(var, grown)
        return None

    def extend_by_clip(self, var: relax.Var, call: relax.Call) -> relax.Call | None:
        """Rewrite a relu or clip of a chain."""
        clip = clip_of(call, self.graph.array)
        chain = self.open(clip[0]) if clip is not None else None
        grown = chain.with_clip(clip[1]) if chain is not None and clip is not None else None
        return self.record(var, grown) if grown is not None else None
