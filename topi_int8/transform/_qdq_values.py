"""Values the QDQ matcher reasons about: quantization parameters, integer views, folded constants.

A *view* says that a float32 tensor of the graph equals
``clip(scale * (q - zero_point), low, high)`` of an integer tensor q that exists. Matching is
arithmetic on views; nothing here walks a graph.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.ir import GenericConst

from ..op import op_name, static_shape
from ..qparams import QParams
from ..workload import DTYPE_RANGE, INT8_DTYPES

INF = math.inf
Bounds = tuple[float, float]
NO_BOUNDS: Bounds = (-INF, INF)
# The value of a constant, or of a variable bound to one; None for anything else.
ArrayOf = Callable[[Any], np.ndarray | None]


def narrow(inner: tuple[float, float], outer: tuple[float, float]) -> tuple[float, float]:
    """Return the bounds of ``clip(clip(x, *inner), *outer)``."""
    (low, high), (outer_low, outer_high) = inner, outer
    return min(max(low, outer_low), outer_high), min(max(high, outer_low), outer_high)


@dataclass(frozen=True)
class View:
    """A float32 tensor as an integer tensor of the new graph.

    Parameters
    ----------
    expr : relax.Expr
        The integer tensor (or, for a split, the tuple of them).
    scale : np.ndarray
        float32, 0-d or one value per index of `axis`.
    zero_point : int
    dtype : str
    axis : int or None
        The axis of a per-channel scale, >= 0.
    bounds : (float, float)
        A clip that is still to be applied, in real units.
    """

    expr: relax.Expr
    scale: np.ndarray
    zero_point: int
    dtype: str
    axis: int | None = None
    bounds: tuple[float, float] = (-INF, INF)

    @property
    def per_tensor(self) -> QParams | None:
        """The parameters of a view with one scale; None for a per-channel one."""
        if self.axis is not None or self.dtype not in INT8_DTYPES:
            return None
        return QParams(float(self.scale), self.zero_point, self.dtype)

    @property
    def array(self) -> np.ndarray | None:
        """The integers, when they are constant."""
        return self.expr.value.numpy() if isinstance(self.expr, GenericConst) else None

    def clipped(self, bounds: tuple[float, float]) -> View:
        """Return the view of ``clip(x, *bounds)``."""
        return replace(self, bounds=narrow(self.bounds, bounds))

    def exact_clip(self) -> tuple[int | None, int | None] | None:
        """Return the pending clip in quantized units, (None, None) if it does nothing.

        None if a bound falls between two integers, so that clipping the integers would not be
        clipping the reals (relu never does).
        """
        params = self.per_tensor
        if params is None:
            return (None, None) if self.bounds == (-INF, INF) else None
        type_low, type_high = DTYPE_RANGE[self.dtype]
        exact: list[int | None] = []
        for real, edge, beyond in (
            (self.bounds[0], type_low, float.__le__),
            (self.bounds[1], type_high, float.__ge__),
        ):
            q = real / params.scale + params.zero_point
            if beyond(float(q), edge + 0.0):
                exact.append(None)
            elif abs(q - round(q)) < 1e-3:
                exact.append(int(min(max(round(q), type_low), type_high)))
            else:
                return None
        return exact[0], exact[1]


def scalar(array: np.ndarray | None) -> float | None:
    """Return the only element of an array; None if there are more, or there is no array."""
    return None if array is None or array.size != 1 else float(array.reshape(()))


def number(expr: Any, array_of: ArrayOf) -> float | None:
    """Return the value of an attribute or of a constant of one element; None for anything else."""
    if isinstance(expr, tirx.IntImm | tirx.FloatImm):
        return float(expr.value)
    return scalar(array_of(expr))


def clip_of(
    call: relax.Call, array_of: ArrayOf
) -> tuple[relax.Expr, tuple[float, float]] | None:
    """Return (input, bounds) of an operator that is a clip by constants; None for any other."""
    name = op_name(call)
    if name == "relax.nn.relu":
        return call.args[0], (0.0, INF)
    if name == "relax.nn.relu6":
        return call.args[0], (0.0, 6.0)
    if name == "relax.clip":
        bounds = [number(arg, array_of) for arg in call.args[1:]]
        if None in bounds:
            return None
        return call.args[0], (bounds[0], bounds[1])
    if name in ("relax.maximum", "relax.minimum"):
        for this, other in ((0, 1), (1, 0)):
            bound = scalar(array_of(call.args[other]))
            widens = static_shape(call) != static_shape(call.args[this])
            if bound is None or widens:
                continue
            bounds = (bound, INF) if name == "relax.maximum" else (-INF, bound)
            return call.args[this], bounds
    return None


def view_of(
    expr: relax.Expr,
    dtype: str,
    rank: int,
    scale: np.ndarray | None,
    zero_point: np.ndarray | None,
    axis: int,
) -> View | None:
    """Return the view that a dequantize makes; None if it is none that integer kernels can take."""
    if scale is None or zero_point is None or dtype not in (*INT8_DTYPES, "int32"):
        return None
    scale = np.asarray(scale, "float32")
    if not np.all(np.isfinite(scale)) or np.any(scale <= 0):
        return None
    if zero_point.size == 0 or np.any(zero_point != zero_point.flat[0]):
        return None
    if scale.size == 1:
        return View(expr, scale.reshape(()), int(zero_point.flat[0]), dtype)
    return View(expr, scale.reshape(-1), int(zero_point.flat[0]), dtype, axis % rank)


def channel_vector(
    array: np.ndarray, shape: Sequence[int], channel_axes: Sequence[int]
) -> np.ndarray | None:
    """Return a tensor that broadcasts over all but the channels of `shape` as one value a channel.

    `channel_axes` are the axes that hold channels, outer first (two for NCHW[c]c). None if the
    array varies along another axis or would widen the output.
    """
    if array.ndim > len(shape):
        return None
    full = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    axes = [axis % len(shape) for axis in channel_axes]
    if any(dim != 1 for axis, dim in enumerate(full.shape) if axis not in axes):
        return None
    want = [shape[axis] for axis in axes]
    have = [full.shape[axis] for axis in axes]
    if any(dim not in (1, limit) for dim, limit in zip(have, want, strict=True)):
        return None
    return np.broadcast_to(full.reshape(have), want).reshape(-1).copy()


@dataclass(frozen=True)
class KernelLayout:
    """A convolution's kernel layout: four letters of OIHW in any order, then blocks like 16i16o."""

    letters: str
    blocks: tuple[tuple[int, str], ...] = ()

    @staticmethod
    def parse(name: str) -> KernelLayout | None:
        """Return the layout of that name; None if it is none of a 2-D convolution."""
        match = re.fullmatch(r"([OIHW]{4})((?:\d+[oi])*)", name)
        if match is None or sorted(match.group(1)) != sorted("OIHW"):
            return None
        blocks = re.findall(r"(\d+)([oi])", match.group(2))
        return KernelLayout(match.group(1), tuple((int(size), axis) for size, axis in blocks))

    @property
    def is_oihw(self) -> bool:
        """Whether nothing has to be moved."""
        return self.letters == "OIHW" and not self.blocks

    def axes(self) -> tuple[int, ...]:
        """Return the permutation that brings a tensor of this layout to O o I i H W order."""
        order = []
        for letter in "OIHW":
            order.append(self.letters.index(letter))
            order += [4 + i for i, (_, sub) in enumerate(self.blocks) if sub.upper() == letter]
        return tuple(order)

    def oihw_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the OIHW shape of a tensor of this layout and shape."""
        dims = dict(zip(self.letters, shape[:4], strict=True))
        for size, sub in self.blocks:
            dims[sub.upper()] *= size
        return tuple(dims[letter] for letter in "OIHW")


_RESHAPES = (
    "relax.reshape",
    "relax.expand_dims",
    "relax.squeeze",
    "relax.flatten",
    "relax.nn.batch_flatten",
)


def permutation(call: relax.Call) -> tuple[int, ...]:
    """Return the axes of a permute_dims call (none given: all of them reversed)."""
    rank = len(call.args[0].ty.shape)
    axes = call.attrs.axes
    return tuple(range(rank))[::-1] if axes is None else tuple(int(a) % rank for a in axes)


def folds(call: relax.Call) -> bool:
    """Return whether `fold_move` can do a call on a constant."""
    name = call.op.name
    to = str(call.attrs.dtype) if name == "relax.astype" else ""
    return name in (*_RESHAPES, "relax.permute_dims") or to in ("float32", "int32", *INT8_DTYPES)


def fold_move(call: relax.Call, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a reshape, transpose or cast of a constant, done."""
    name = call.op.name
    if name == "relax.permute_dims":
        return np.ascontiguousarray(array.transpose(permutation(call)))
    if name == "relax.astype":
        return array.astype(str(call.attrs.dtype))
    return array.reshape(shape)


LOST = -1  # `moved_axis` of a per-channel axis that is an axis no more


def moved_axis(call: relax.Call, axis: int | None) -> int | None:
    """Return where a per-channel axis goes in a move of values; LOST if it is no axis after it.

    A reshape keeps an axis whose size, and that of all before it together, some axis has after it.
    """
    if axis is None:
        return None
    if call.op.name == "relax.permute_dims":
        return permutation(call).index(axis)
    before, after = static_shape(call.args[0]), static_shape(call)
    if call.op.name not in _RESHAPES or before is None or after is None:
        return LOST
    outer, size = math.prod(before[:axis]), before[axis]
    kept = (i for i, dim in enumerate(after) if dim == size and math.prod(after[:i]) == outer)
    return next(kept, LOST)
