"""What a tensor is, element by element, of others: found in a graph, functions evaluated in numpy.

The values of a function of one tensor become the 256 entries of a table (`FuseElementwise`), so
this is where its meaning is stated, for every target alike: each operator is computed in float64
and rounded to float32. numpy's own float32 exp differs in its last bit from CPU to CPU, and so
does LLVM's from numpy's; a table must not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax

from ..op import op_name, static_shape
from ._qdq_values import NO_BOUNDS, ArrayOf, Bounds, clip_of, narrow, number

_erf = np.vectorize(math.erf, otypes=["float64"])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Operator -> its value for a call and float64 operands.
_POINTWISE: dict[str, Callable[..., np.ndarray]] = {
    "relax.abs": lambda _, x: np.abs(x),
    "relax.add": lambda _, x, y: x + y,
    "relax.clip": lambda _, x, low, high: np.clip(x, low, high),
    "relax.divide": lambda _, x, y: x / y,
    "relax.erf": lambda _, x: _erf(x),
    "relax.exp": lambda _, x: np.exp(x),
    "relax.log": lambda _, x: np.log(x),
    "relax.maximum": lambda _, x, y: np.maximum(x, y),
    "relax.minimum": lambda _, x, y: np.minimum(x, y),
    "relax.multiply": lambda _, x, y: x * y,
    "relax.negative": lambda _, x: -x,
    "relax.nn.gelu": lambda _, x: x * 0.5 * (1 + _erf(x * math.sqrt(0.5))),
    "relax.nn.gelu_tanh": lambda _, x: _gelu_tanh(x),
    "relax.nn.leakyrelu": lambda call, x: np.where(x > 0, x, x * float(call.attrs.alpha)),
    "relax.nn.relu": lambda _, x: np.maximum(x, 0),
    "relax.nn.relu6": lambda _, x: np.clip(x, 0, 6),
    "relax.nn.silu": lambda _, x: x * _sigmoid(x),
    "relax.power": lambda _, x, y: np.power(x, y),
    "relax.rsqrt": lambda _, x: 1 / np.sqrt(x),
    "relax.sigmoid": lambda _, x: _sigmoid(x),
    "relax.sqrt": lambda _, x: np.sqrt(x),
    "relax.square": lambda _, x: x * x,
    "relax.subtract": lambda _, x, y: x - y,
    "relax.tanh": lambda _, x: np.tanh(x),
}

# Of these, what an integer kernel's bounds do: a function of clips alone needs no table.
_CLIPS = ("relax.clip", "relax.maximum", "relax.minimum", "relax.nn.relu", "relax.nn.relu6")


class NotPointwise(Exception):
    """An expression that is no function of one tensor; the message says why."""


@dataclass(frozen=True)
class Step:
    """One operator of a function; its operands are variables, and scalars."""

    var: relax.Var
    call: relax.Call
    operands: tuple[relax.Var | float, ...]


@dataclass(frozen=True)
class Pointwise:
    """A function of one float32 tensor, element by element.

    Parameters
    ----------
    source : relax.Var
        The tensor.
    steps : tuple of Step
        In order; the last one's value is the function's.
    """

    source: relax.Var
    steps: tuple[Step, ...]

    @property
    def only_clips(self) -> bool:
        """Whether all it does is clip."""
        return all(op_name(step.call) in _CLIPS for step in self.steps)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the function's float32 values at float32 points; NaN where it has none."""
        known = {self.source: x.astype("float64")}
        value = x
        with np.errstate(all="ignore"):
            for step in self.steps:
                operands = (v if isinstance(v, float) else known[v] for v in step.operands)
                value = _POINTWISE[op_name(step.call)](step.call, *operands).astype("float32")
                known[step.var] = value.astype("float64")
        return value


@dataclass(frozen=True)
class Affine:
    """``clip(source * scale + shift)``; float64, broadcasting to the source's shape."""

    source: relax.Var
    scale: np.ndarray
    shift: np.ndarray
    bounds: Bounds = NO_BOUNDS

    @property
    def only_clips(self) -> bool:
        """Whether all it does is clip."""
        return bool(np.all(self.scale == 1) and np.all(self.shift == 0))


@dataclass(frozen=True)
class Product:
    """``clip(a * b)`` of two tensors; `b` broadcasts to the shape of `a`."""

    a: relax.Var
    b: relax.Var
    bounds: Bounds = NO_BOUNDS


# (scale, shift) of ``x <op> c`` for a constant c.
_AFFINE = {
    "relax.add": lambda c: (1.0, c),
    "relax.multiply": lambda c: (c, 0.0),
    "relax.subtract": lambda c: (1.0, -c),
    "relax.divide": lambda c: (1.0 / c, 0.0),
}
_COMMUTATIVE = ("relax.add", "relax.multiply")


def is_pointwise(expr: Any) -> bool:
    """Return whether an expression is a call of an operator that can be part of such a function."""
    return op_name(expr) in _POINTWISE


class Finder:
    """Finds what a variable is, elementwise, of others.

    Parameters
    ----------
    value_of : callable
        What a variable is bound to; None for a parameter.
    array_of : callable
        The value of a constant, or of a variable bound to one; None for others.
    is_source : callable
        Whether to take a variable as it is, and not to ask what it is made of.
    """

    def __init__(
        self,
        value_of: Callable[[relax.Var], Any],
        array_of: ArrayOf,
        is_source: Callable[[relax.Var], bool] = lambda _: False,
    ) -> None:
        self.value_of, self.array_of, self.is_source = value_of, array_of, is_source

    def pointwise(self, var: relax.Var) -> Pointwise:
        """Return the function of one tensor that a variable holds.

        Raises
        ------
        NotPointwise
            When it reads several tensors, or constants of more than one value.
        """
        steps: dict[relax.Var, Step] = {}
        sources: set[relax.Var] = set()

        def visit(at: relax.Var) -> None:
            call = self.value_of(at)
            if not is_pointwise(call) or (at is not var and self.is_source(at)):
                sources.add(at)
            elif at not in steps:
                operands = tuple(operand(call, arg) for arg in call.args)
                steps[at] = Step(at, call, operands)

        def operand(call: relax.Call, arg: Any) -> relax.Var | float:
            value = number(arg, self.array_of)
            if value is not None:
                return value
            if self.array_of(arg) is not None or not isinstance(arg, relax.Var):
                raise NotPointwise(f"{op_name(call)} has a constant of more than one value")
            # A scalar constant of a higher rank would reshape the tensor.
            if int(arg.ty.ndim) != int(call.ty.ndim) or str(call.ty.dtype) != "float32":
                raise NotPointwise(f"{op_name(call)} makes {call.ty} of {arg.ty}")
            visit(arg)
            return arg

        visit(var)
        if not steps:
            raise NotPointwise("it is no elementwise operator")
        if len(sources) != 1:
            raise NotPointwise(f"it reads {len(sources)} tensors")
        return Pointwise(sources.pop(), tuple(steps.values()))

    def affine(self, var: relax.Var) -> Affine | None:
        """Return the scale, shift and last clip by constants that a variable is of another.

        Constants are vectors: they vary along one axis.
        """
        found = self._affine(var, first=True)
        return found if found is not None and found.source is not var else None

    def _affine(self, var: Any, first: bool = False) -> Affine | None:
        call = self.value_of(var) if isinstance(var, relax.Var) else None
        one = Affine(var, np.asarray(1.0), np.asarray(0.0))
        if call is None or (self.is_source(var) and not first):
            return one if isinstance(var, relax.Var) else None
        clip = clip_of(call, self.array_of)
        if clip is not None:
            inner = self._affine(clip[0])
            return None if inner is None else replace(inner, bounds=narrow(inner.bounds, clip[1]))
        name = op_name(call)
        for source, other in (call.args, call.args[::-1]) if name in _AFFINE else ():
            array = self.array_of(other)
            if array is None or static_shape(source) != static_shape(call):
                if name not in _COMMUTATIVE:
                    break
                continue
            inner = self._affine(source)
            if sum(dim > 1 for dim in array.shape) > 1:
                return None  # varies from pixel to pixel: nothing that layouts could follow
            if inner is None or inner.bounds != NO_BOUNDS:
                return None
            with np.errstate(divide="ignore"):
                scale, shift = _AFFINE[name](array.astype("float64"))
            return replace(
                inner, scale=inner.scale * scale, shift=inner.shift * scale + shift
            )
        return one

    def product(self, var: relax.Var) -> Product | None:
        """Return the product of two tensors, and its clip, that a variable is; None for others."""
        call, bounds = self.value_of(var), NO_BOUNDS
        clip = clip_of(call, self.array_of)
        if clip is not None:
            call, bounds = self.value_of(clip[0]), clip[1]
        if op_name(call) != "relax.multiply":
            return None
        a, b = call.args
        if static_shape(a) != static_shape(call):
            a, b = b, a
        tensors = all(isinstance(x, relax.Var) and self.array_of(x) is None for x in (a, b))
        if not tensors or static_shape(a) != static_shape(call) or static_shape(b) is None:
            return None
        return Product(a, b, bounds) if int(a.ty.ndim) == int(b.ty.ndim) else None
