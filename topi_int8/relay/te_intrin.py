"""Our tensor intrinsics for TE's tensorize: meaning and implementation, in TE's terms.

An intrinsic is a pair of PrimFuncs (desc, impl) over the same buffers. TE wants the first as a
computation, to compare a stage with, and the second as a statement over buffers of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te

from intrinsics import compat
from intrinsics.compat import tir


@dataclass(frozen=True)
class _Operand:
    """A buffer of an intrinsic without its leading dimensions of one element, as TE sees it.

    A stage's tensors have more such dimensions than an intrinsic, or (a matrix seen as an image)
    fewer.
    """

    buffer: Any

    @property
    def dropped(self) -> int:
        """Leading dimensions left out; never the last one."""
        extents = [int(extent) for extent in self.buffer.shape]
        wide = [at for at, extent in enumerate(extents[:-1]) if extent > 1]
        return wide[0] if wide else len(extents) - 1

    @property
    def shape(self) -> list[int]:
        """The dimensions that are left."""
        return [int(extent) for extent in self.buffer.shape[self.dropped :]]

    def placeholder(self) -> Any:
        """Return a tensor of this shape."""
        return te.placeholder(self.shape, self.buffer.dtype, self.buffer.name)

    def declare(self) -> Any:
        """Return TE's buffer: anywhere in a larger tensor, unless it is in registers."""
        strides = None
        if self.buffer.scope() != "local":
            strides = [te.var(f"{self.buffer.name}_s{at}") for at in range(len(self.shape) - 1)]
            strides.append(1)
        return tir.decl_buffer(
            self.shape, self.buffer.dtype, self.buffer.name, strides=strides, offset_factor=1,
            scope=self.buffer.scope(),
        )  # fmt: skip


def _operands(func: Any) -> list[_Operand]:
    return [_Operand(func.buffer_map[param]) for param in func.params]


# ---------------------------------------------------------------- meaning


def _innermost(func: Any) -> tuple[Any, Any]:
    """Return the block of a desc's one statement, and the statement."""
    found: list[Any] = []
    tir.stmt_functor.post_order_visit(
        func.body, lambda node: found.append(node) if isinstance(node, compat.Block) else None
    )
    return found[0], found[0].body  # post order: the innermost is first


def _computation(desc: Any, reduced: Sequence[tuple[str, int]]) -> tuple[Any, list[Any]]:
    """Return what a desc computes as (TE tensor, its input placeholders).

    Parameters
    ----------
    desc : PrimFunc
        Of one statement: ``O[..] = value`` or, where something is reduced, ``O[..] = O[..] +
        value``. O is its last parameter.
    reduced : sequence of (str, int)
        The reduction's iterators and extents in the stage's order. (A desc has none of extent 1; a
        stage does.)
    """
    *inputs, result = _operands(desc)
    placeholders = {operand.buffer: operand.placeholder() for operand in inputs}
    block, store = _innermost(desc)
    variables = {iterator.var.name: iterator.var for iterator in block.iter_vars}
    axes = [te.reduce_axis((0, extent), name) for name, extent in reduced]
    value = store.value.b if axes else store.value

    def at(*spatial: Any) -> Any:
        ours = dict(zip(store.indices[result.dropped :], spatial, strict=True))
        known = {var: index for var, index in ours.items() if isinstance(var, tir.Var)}
        for (name, _), axis in zip(reduced, axes, strict=True):
            if name in variables:
                known[variables[name]] = axis.var

        def load(node: Any) -> Any:
            operand = _Operand(node.buffer)
            indices = node.indices[operand.dropped :]
            return placeholders[node.buffer](*indices)

        inner = tir.stmt_functor.ir_transform(
            tir.Evaluate(value), None, load, ["tir.BufferLoad"]
        ).value
        inner = tir.stmt_functor.substitute(inner, known)
        return te.sum(inner, axis=axes) if axes else inner

    return te.compute(result.shape, at, "C"), [placeholders[item.buffer] for item in inputs]


# ---------------------------------------------------------------- implementation


def _bound(impl: Any, buffers: Sequence[Any]) -> Any:
    """Return the statement of an implementation over other buffers."""
    ours = {
        operand.buffer: (operand.dropped, buffer)
        for operand, buffer in zip(_operands(impl), buffers, strict=True)
    }

    def replace(node: Any) -> Any:
        if node.buffer not in ours:
            return None
        dropped, buffer = ours[node.buffer]
        if isinstance(node, tir.BufferLoad):
            return tir.BufferLoad(buffer, node.indices[dropped:])
        return tir.BufferStore(buffer, node.value, node.indices[dropped:])

    names = ["tir.BufferLoad", "tir.BufferStore"]
    return tir.stmt_functor.ir_transform(compat.first_block(impl), None, replace, names)


def _intrinsic(name: str, reset: str | None, reduced: Sequence[tuple[str, int]]) -> Any:
    registered = compat.TensorIntrin.get(name)
    computed, inputs = _computation(registered.desc, reduced)
    declared = [operand.declare() for operand in _operands(registered.desc)]
    buffers = dict(zip((*inputs, computed), declared, strict=True))

    def lower(ins: list[Any], outs: list[Any]) -> Any:
        body = _bound(registered.impl, [*ins, *outs])
        if not reduced:
            return body
        if reset is not None:
            return None, _bound(compat.TensorIntrin.get(reset).impl, outs), body
        (sums,) = outs
        zero = tir.const(0, f"{sums.dtype}x{int(sums.shape[0])}")
        return None, sums.vstore(0, zero), body

    params = {"offset_factor": 1}
    return te.decl_tensor_intrin(computed.op, lower, binds=buffers, default_buffer_params=params)


def copying(name: str) -> Any:
    """Return a registered intrinsic that reduces nothing, for TE."""
    return _intrinsic(name, None, ())


def reducing(name: str, reset: str | None, reduced: Sequence[tuple[str, int]]) -> Any:
    """Return a registered intrinsic that adds to its last operand, for TE.

    Parameters
    ----------
    name : str
    reset : str or None
        The registered intrinsic that zeroes the sums; None: they are one vector.
    reduced : sequence of (str, int)
        See `_computation`.
    """
    return _intrinsic(name, reset, reduced)
