# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""What a plain CPU schedule has to know of one block: its loops, accesses and strides."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm.ir import Op

from intrinsics import compat
from intrinsics.compat import tir

SPATIAL, REDUCE = 0, 2  # IterVar.iter_type: data parallel, commutative reduction
SYMBOLIC_EXTENT = 32  # what an unknown extent counts for when work is estimated

# Calls that cost no more than arithmetic; anything else (exp, tanh, ...) is not computed twice.
_CHEAP_CALLS = {
    "if_then_else", "likely", "round", "nearbyint", "floor", "ceil", "trunc", "fabs", "sqrt",
    "rsqrt", "shift_left", "shift_right", "bitwise_and", "q_multiply_shift", "reinterpret",
    "isnan", "isinf", "fma",
}  # fmt: skip


def static(value: Any) -> int | None:
    """Return the value of a constant extent or index; None for a symbolic one."""
    return int(value.value) if isinstance(value, tir.IntImm) else None


def variables(expr: Any) -> set[tir.Var]:
    """Return the variables an expression reads."""
    found: set[tir.Var] = set()
    compat.walk(expr, (tir.Var, found.add))
    return found


@dataclass(frozen=True)
class Access:
    """One load or store: the buffer's shape, the indices, the element size in bytes."""

    shape: tuple
    indices: tuple
    itemsize: int

    def stride(self, var: tir.Var) -> int | None:
        """Return the step in elements as `var` grows by one; 0 if unused.

        None where it is not a constant step inside the innermost dimension.
        """
        users = [i for i, index in enumerate(self.indices) if var in variables(index)]
        if not users:
            return 0
        if users != [len(self.indices) - 1]:
            return None
        return _coefficient(self.indices[-1], var)

    def is_affine(self, var: tir.Var) -> bool:
        """Return whether the address is a linear function of `var`."""
        return all(_coefficient(i, var) is not None for i in self.indices if var in variables(i))

    def runs_along(self, loop_vars: list[tir.Var], extents: list[int]) -> bool:
        """Return whether these loops, merged into one, walk this buffer element by element.

        So they do, too, if it does not depend on any of them.
        """
        used = set().union(*(variables(index) for index in self.indices), set())
        if not used & set(loop_vars):
            return True
        count = len(loop_vars)
        if count > len(self.indices):
            return False
        tail = self.indices[-count:]
        if any(not var.same_as(index) for var, index in zip(loop_vars, tail, strict=True)):
            return False
        head = set().union(*(variables(index) for index in self.indices[:-count]), set())
        full = [static(dim) for dim in self.shape[len(self.shape) - count + 1 :]]
        return not head & set(loop_vars) and full == extents[1:]


def _coefficient(index: Any, var: tir.Var) -> int | None:
    if any(True for _ in _loads(index)):
        return None
    found = compat.detect_linear_equation(index, [var])
    return static(found[0]) if found else None


def _loads(node: Any) -> list[Any]:
    found: list[Any] = []
    compat.walk(node, (compat.BufferLoad, found.append))
    return found


@dataclass(frozen=True)
class Iter:
    """One iteration variable of a block with its loop and its extent (None: symbolic)."""

    var: tir.Var
    extent: int | None
    reduces: bool
    loop: Any


@dataclass(frozen=True)
class BlockInfo:
    """A block whose loops are its iteration variables, one to one."""

    name: str
    iters: tuple[Iter, ...]
    loads: tuple[Access, ...]
    stores: tuple[Access, ...]
    conditions: frozenset
    heavy: bool

    @property
    def spatial(self) -> list[Iter]:
        """The data-parallel variables, outermost first."""
        return [it for it in self.iters if not it.reduces]

    @property
    def reduced(self) -> list[Iter]:
        """The reduction variables, outermost first."""
        return [it for it in self.iters if it.reduces]

    @property
    def work(self) -> int:
        """Executions of the block; a symbolic extent counts as a small number."""
        return reduce(lambda n, it: n * (it.extent or SYMBOLIC_EXTENT), self.iters, 1)

    @property
    def itemsize(self) -> int:
        """Bytes of the widest element touched."""
        return max((a.itemsize for a in (*self.loads, *self.stores)), default=4)

    def mergeable(self) -> int:
        """Return how many of the last spatial loops walk every buffer as one long row."""
        spatial, best = self.spatial, 1 if self.spatial else 0
        for count in range(2, len(spatial) + 1):
            tail = spatial[-count:]
            extents = [it.extent for it in tail]
            if None in extents or self.conditions & {it.var for it in tail}:
                break
            loop_vars = [it.var for it in tail]
            if all(a.runs_along(loop_vars, extents) for a in (*self.loads, *self.stores)):
                best = count
        return best


class NotPlain(Exception):
    """A block that is no plain loop nest; the message says why."""


def analyse(sch: Any, block: Any) -> BlockInfo:
    """Return what is known of a block; NotPlain if its loops are not its iteration variables."""
    node, loops = sch.get(block), sch.get_loops(block)
    name = str(node.name_hint)
    if any(int(it.iter_type) not in (SPATIAL, REDUCE) for it in node.iter_vars):
        raise NotPlain(f"{name}: an iteration variable is neither spatial nor a reduction")
    if not isinstance(node.body, tir.BufferStore | tir.SeqStmt):
        raise NotPlain(f"{name}: its body is {type(node.body).__name__}, not a store")
    by_var = {sch.get(loop).loop_var: loop for loop in loops}
    iters = []
    if loops:
        realize = sch.get(loops[-1]).body
        if not hasattr(realize, "iter_values") or static(realize.predicate) == 0:
            raise NotPlain(f"{name}: more than a block inside its loops")
        for it, value in zip(node.iter_vars, realize.iter_values, strict=True):
            if isinstance(value, tir.Var) and value in by_var:
                kind = int(it.iter_type) == REDUCE
                iters.append(Iter(it.var, static(it.dom.extent), kind, by_var[value]))
            elif static(value) is None:
                raise NotPlain(f"{name}: {it.var} is bound to {value}, not to a loop")
    if len(iters) != len(loops):
        raise NotPlain(f"{name}: {len(loops)} loops for {len(iters)} iteration variables")
    order = {loop: position for position, loop in enumerate(by_var.values())}
    iters.sort(key=lambda it: order[it.loop])
    return BlockInfo(name, tuple(iters), *_body(node))


def _body(node: Any) -> tuple[tuple, tuple, frozenset, bool]:
    """Return (loads, stores, variables in conditions, has expensive calls) of a block."""
    written = [compat.buffer_of(region) for region in node.writes]
    loads, stores, conditions, heavy = [], [], set(), []

    def on_load(load: Any) -> None:
        source = compat.buffer_of(load)
        if not any(source.same_as(buffer) for buffer in written):
            loads.append(_access(source, load.indices))

    def on_store(store: tir.BufferStore) -> None:
        stores.append(_access(store.buffer, store.indices))

    def on_call(call: Any) -> None:
        name = str(call.op.name).rpartition(".")[2] if isinstance(call.op, Op) else "?"
        if name == "if_then_else":
            conditions.update(variables(call.args[0]))
        if name not in _CHEAP_CALLS:
            heavy.append(name)

    def on_select(select: tir.Select) -> None:
        conditions.update(variables(select.condition))

    compat.walk(
        node.body, (compat.BufferLoad, on_load), (tir.BufferStore, on_store),
        (compat.Call, on_call), (tir.Select, on_select),
    )  # fmt: skip
    return tuple(loads), tuple(stores), frozenset(conditions), bool(heavy)


def _access(buffer: Any, indices: Any) -> Access:
    shape, kind = compat.shape_and_dtype(buffer)
    bits = int("".join(c for c in kind if c.isdigit()) or 8)
    return Access(shape, tuple(indices), max(bits // 8, 1))
