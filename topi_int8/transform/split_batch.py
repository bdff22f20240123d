# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""SplitBatch: a network on many images runs on a few of them at a time.

Layer by layer, a batch of 64 writes each tensor to memory and reads it back: ResNet-50's first ones
are 51 MB. In pieces of eight images the later tensors stay in the second-level cache, and weights
are still read once for eight images; the first layers, whose tensors are too large for that even
so, take one image at a time. Measured with ResNet-50 on AMX, batch 64: 3.8 ms an image -> 3.0.

A piece is a function of its own, called once a piece on slices of what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tvm
from tvm import relax
from tvm.target import Target

from .. import op
from ..op import op_name, renamed, static_shape
from ..schedule.join import joined
from ._qdq_graph import functions_of
from .lower import opaque

# Images of a piece, for each core.
PIECE = 8
# Cores of a Target that does not say how many.
CORES = 8
# Calls of a function at the most: each has a slice of its own.
CALLS = 64
# Bytes of an operator's tensors, of one image, from which the images of a piece go one by one.
LARGE = 640 << 10
# Bytes of an operator's tensors, of a core's share of the batch, that need no pieces.
FITS = 1 << 20
# What a piece makes is this many times what it gives at the least, for that is copied to be joined.
GAIN = 4


@tvm.transform.module_pass(opt_level=0, name="topi_int8.SplitBatch")
class SplitBatch:
    """Call functions of a large batch piece by piece.

    Functions of one dataflow block whose parameters and operators have the batch outermost; the
    rest, and symbolic batches, are left alone. Run it after ConvertLayout. The input module is not
    changed.

    Parameters
    ----------
    target : Target
        Each of its ``num-cores`` has a cache of its own, so that pieces grow with their number.
    """

    def __init__(self, target: Target) -> None:
        self.cores = max(1, int(target.attrs.get("num-cores", CORES)))

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the module with the functions of pieces added."""
        builder = relax.BlockBuilder(mod)
        for gvar, func in functions_of(mod):
            split = self._split(func, builder, gvar.name_hint)
            if split is not None:
                builder.update_func(gvar, split)
        return builder.finalize()

    def _split(
        self, func: relax.Function, builder: relax.BlockBuilder, name: str
    ) -> relax.Function | None:
        batch = _batch_of(func)
        if batch is None:
            return None
        whole = _size(batch, PIECE * self.cores)
        one = _size(whole, self.cores)
        independent = _independent(func, batch)
        if max(map(_tensors, independent), default=0) <= FITS * self.cores:
            return None
        if whole == batch:
            return self._inner(func, batch, one, builder, name)
        try:
            piece = _Pieces(func, batch, whole, len(independent))
        except _Unfit:
            return None
        inner = self._inner(piece.function, whole, one, builder, name)
        return piece.calls(builder, f"{name}_of_{whole}", inner or piece.function)

    @staticmethod
    def _inner(
        func: relax.Function, batch: int, size: int, builder: relax.BlockBuilder, name: str
    ) -> relax.Function | None:
        """Return the function with its operators up to the last large one called on `size` images
        each; None where that is not worth it.
        """
        count = _large(func, batch)
        if not count or size >= batch:
            return None
        try:
            piece = _Pieces(func, batch, size, count)
        except _Unfit:
            return None
        return piece.calls(builder, f"{name}_of_{size}", piece.function)


class _Unfit(Exception):
    """Operators that are not independent image by image after all, or not worth a piece."""


def _size(batch: int, most: int) -> int:
    """Return the largest divisor of a batch up to `most`, or one for no more than `CALLS` pieces.
    """
    sizes = [size for size in range(1, batch + 1) if batch % size == 0]
    few = [size for size in sizes if batch // size <= CALLS]
    return max([size for size in few if size <= most], default=few[0])


def _bindings(func: relax.Function) -> list[relax.VarBinding]:
    return list(func.body.blocks[0].bindings)


def _batch_of(func: relax.Function) -> int | None:
    """Return the batch that every parameter has outermost; None where pieces are not possible."""
    shapes = [static_shape(param) for param in func.params]
    one_block = len(func.body.blocks) == 1 and isinstance(
        func.body.blocks[0], relax.DataflowBlock
    )
    if not shapes or not one_block or not all(shapes):
        return None
    if not all(isinstance(b, relax.VarBinding) for b in _bindings(func)):
        return None
    batches = {shape[0] for shape in shapes}
    batch = batches.pop()
    return batch if not batches and batch > 1 else None


# ---------------------------------------------------------------- what is independent by image


def _first(call: relax.Call) -> list[relax.Expr]:
    return [call.args[0]]


def _each(call: relax.Call) -> list[relax.Expr]:
    return list(call.args)


def _parts(call: relax.Call) -> list[relax.Expr]:
    return _fields(call.args[0])


def _data_and_residual(call: relax.Call) -> list[relax.Expr]:
    named = op.operands(call)
    return [named[name] for name in ("data", "residual") if named[name] is not None]


def _joined_parts(call: relax.Call) -> list[relax.Expr]:
    return list(call.args[: len(op.attrs_of(call)["channels"])])


def _no_axis(_call: relax.Call) -> bool:
    return True


def _not_first_axis(call: relax.Call) -> bool:
    """Whether the attribute of axes leaves the first one alone."""
    axes = call.attrs.axis
    if axes is None:
        return False
    rank = len(static_shape(_variables(call)[0]))
    axes = [axes] if isinstance(axes, int) else axes
    return all(int(axis) % rank != 0 for axis in axes)


def _stays_first(call: relax.Call) -> bool:
    axes = call.attrs.axes
    return axes is not None and int(axes[0]) == 0


def _by_channel(call: relax.Call) -> bool:
    scale = static_shape(call.args[1])
    return scale is not None and (math.prod(scale) == 1 or _not_first_axis(call))


def _images_first(call: relax.Call) -> bool:
    """Whether the layout of a float operator begins with the batch."""
    layout = getattr(call.attrs, "data_layout", None) or call.attrs.layout
    return str(layout).startswith("N")


_UNARY = (
    "clip", "astype", "exp", "sigmoid", "tanh", "erf", "reshape", "flatten", "nn.relu", "nn.silu",
    "nn.gelu", "nn.leakyrelu",
)  # fmt: skip
_BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum")
_WINDOWS = ("nn.max_pool2d", "nn.avg_pool2d", "nn.adaptive_avg_pool2d", "nn.conv2d")
_REDUCTIONS = ("mean", "sum", "max", "min", "nn.softmax")
_OURS = ("affine", "requantize", "lookup", "avg_pool2d", "layout_transform")
_Operands = Callable[[relax.Call], list[relax.Expr]]
_Rule = Callable[[relax.Call], bool]
# Operators that treat each image alone: which operands are images, and what of the attributes must
# hold. All other operands are the same for every image.
_INDEPENDENT: dict[str, tuple[_Operands, _Rule]] = {
    **{f"relax.{name}": (_first, _no_axis) for name in _UNARY},
    **{f"relax.{name}": (_each, _no_axis) for name in _BINARY},
    **{f"relax.{name}": (_first, _images_first) for name in _WINDOWS},
    **{f"relax.{name}": (_first, _not_first_axis) for name in _REDUCTIONS},
    "relax.quantize": (_first, _by_channel),
    "relax.dequantize": (_first, _by_channel),
    "relax.permute_dims": (_first, _stays_first),
    "relax.concat": (_parts, _not_first_axis),
    **{f"topi_int8.{name}": (_first, _no_axis) for name in _OURS},
    "topi_int8.add": (_each, _no_axis),
    "topi_int8.multiply": (_each, _no_axis),
    "topi_int8.concat": (_joined_parts, _no_axis),
    "topi_int8.conv2d": (_data_and_residual, _no_axis),
    "topi_int8.matmul": (_data_and_residual, _no_axis),
}


def _independent(func: relax.Function, batch: int) -> list[relax.VarBinding]:
    """Return the operators from the first on that treat each image of the batch alone."""
    seen = set(func.params)
    bindings = _bindings(func)
    for at, binding in enumerate(bindings):
        shape = static_shape(binding.var)
        if not shape or shape[0] != batch or not _treats_each_alone(binding.value, seen, batch):
            return bindings[:at]
        seen.add(binding.var)
    return bindings


def _treats_each_alone(value: relax.Expr, seen: set[relax.Var], batch: int) -> bool:
    """Whether an operator treats each image of the tensors in `seen` alone."""
    name = op_name(value)
    if name not in _INDEPENDENT:
        return False
    operands, rule = _INDEPENDENT[name]
    images, read = operands(value), _variables(value)
    if not read or not seen.issuperset(read) or not set(images).issuperset(read):
        return False
    # What is broadcast to more axes has something else than the batch outermost.
    ranks = {len(static_shape(var)) for var in read}
    constants = [static_shape(image) or () for image in images if image not in seen]
    one_an_image = any(len(shape) >= max(ranks) and shape[0] == batch for shape in constants)
    return len(ranks) == 1 and not one_an_image and rule(value)


def _large(func: relax.Function, batch: int) -> int:
    """Return how many operators there are up to the last that is large, and independent."""
    count = 0
    for at, binding in enumerate(_independent(func, batch), 1):
        if _tensors(binding) > LARGE * batch:
            count = at
    return count


def _tensors(binding: relax.VarBinding) -> int:
    """Return the bytes of what an operator reads and makes, without constants."""
    return sum(map(_nbytes, [binding.var, *_variables(binding.value)]))


def _nbytes(var: relax.Var) -> int:
    return math.prod(static_shape(var)) * tvm.DataType(str(var.ty.dtype)).itemsize


# ---------------------------------------------------------------- pieces


class _Pieces:
    """The first `count` operators of a function as a function of `size` images.

    What they read of the function's parameters is what a piece takes: elementwise operators on
    those stay outside, where TVM fuses them with the slices.
    """

    def __init__(self, func: relax.Function, batch: int, size: int, count: int) -> None:
        self.func, self.batch, self.size = func, batch, size
        bindings = _bindings(func)
        self.before = _leading(func, bindings[:count])
        inside, self.rest = bindings[len(self.before) : count], bindings[count:]
        made = {b.var for b in inside}
        self.reads = _read(inside, made)
        later = _read(self.rest, {b.var for b in self.rest})
        results = _fields(func.body.body)
        self.gives = [b.var for b in inside if b.var in later or b.var in results]
        given = sum(map(_nbytes, self.gives))
        if not given or sum(_nbytes(b.var) for b in inside) < GAIN * given:
            raise _Unfit
        self.function = self._function(inside)

    def _function(self, inside: Sequence[relax.VarBinding]) -> relax.Function:
        builder = relax.BlockBuilder()
        params = [relax.Var(v.name, self._type(v)) for v in self.reads]
        new = dict(zip(self.reads, params, strict=True))
        with builder.function("piece", params):
            with builder.dataflow():
                for binding in inside:
                    new[binding.var] = self._emit(builder, binding, new)
                outputs = [builder.emit_output(new[var]) for var in self.gives]
            builder.emit_func_output(outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))
        return builder.get()["piece"].without_attr("global_symbol")

    def _type(self, var: relax.Var) -> relax.TensorType:
        return relax.TensorType((self.size, *static_shape(var)[1:]), str(var.ty.dtype))

    def _emit(
        self, builder: relax.BlockBuilder, binding: relax.VarBinding,
        new: dict[relax.Var, relax.Var],
    ) -> relax.Var:  # fmt: skip
        """Return the operator on the images of a piece."""
        call = renamed(binding.value, new)
        if op_name(call) == "relax.reshape":
            shape = relax.ShapeExpr((self.size, *static_shape(binding.var)[1:]))
            call = relax.Call(call.op, [call.args[0], shape], call.attrs, call.ty_args)
        made = builder.emit(call)
        if static_shape(made) != (self.size, *static_shape(binding.var)[1:]):
            raise _Unfit
        return made

    def calls(
        self, builder: relax.BlockBuilder, name: str, function: relax.Function
    ) -> relax.Function:
        """Return the function that calls `function` once a piece, and adds it to the module."""
        callee = builder.add_func(function, name)
        params = [relax.Var(p.name, p.ty) for p in self.func.params]
        old = dict(zip(self.func.params, params, strict=True))
        outer = relax.BlockBuilder(tvm.IRModule({callee: function}))
        with outer.function("whole", params):
            with outer.dataflow():
                count = self.batch // self.size
                pieces = [self._call(outer, callee, old, at) for at in range(count)]
                for field, var in enumerate(self.gives):
                    parts = [piece[field] for piece in pieces]
                    old[var] = outer.emit(self._joined(builder, parts))
                for binding in self.rest:
                    old[binding.var] = outer.emit(renamed(binding.value, old))
                results = [
                    outer.emit_output(old[var]) for var in _fields(self.func.body.body)
                ]
            single = not isinstance(self.func.body.body, relax.Tuple)
            outer.emit_func_output(results[0] if single else relax.Tuple(results))
        whole = outer.get()["whole"].without_attr("global_symbol")
        return whole.with_attrs(dict(self.func.attrs)) if self.func.attrs else whole

    def _joined(self, builder: relax.BlockBuilder, parts: list[relax.Expr]) -> relax.Call:
        """Return the call that lays results of the pieces one behind the other."""
        shape, dtype = static_shape(parts[0]), str(parts[0].ty.dtype)
        func = opaque(joined(shape, len(parts), dtype))
        out = relax.TensorType((self.batch, *shape[1:]), dtype)
        return relax.call_tir(builder.add_func(func, "joined"), parts, out_ty=out)

    def _call(
        self, builder: relax.BlockBuilder, callee: relax.GlobalVar,
        old: dict[relax.Var, relax.Var], at: int,
    ) -> list[relax.Expr]:  # fmt: skip
        """Return what one piece gives."""
        begin, end = at * self.size, (at + 1) * self.size
        new = {
            param: builder.emit(relax.op.strided_slice(old[param], [0], [begin], [end]))
            for param in self.func.params
        }
        for binding in self.before:
            new[binding.var] = self._emit(builder, binding, new)
        got = builder.emit(relax.Call(callee, [new[var] for var in self.reads]))
        if len(self.gives) == 1:
            return [got]
        return [builder.emit(relax.TupleGetItem(got, i)) for i in range(len(self.gives))]


_LEADING = ("relax.quantize", "topi_int8.layout_transform", "relax.astype")


def _leading(
    func: relax.Function, bindings: Sequence[relax.VarBinding]
) -> list[relax.VarBinding]:
    """Return the elementwise operators that the function begins with."""
    made, out = set(func.params), []
    for binding in bindings:
        if op_name(binding.value) not in _LEADING or binding.value.args[0] not in made:
            break
        made.add(binding.var)
        out.append(binding)
    return out


def _read(bindings: Sequence[relax.VarBinding], own: set[relax.Var]) -> list[relax.Var]:
    """Return the variables that the operators read and do not make, each once."""
    read = [var for binding in bindings for var in _variables(binding.value)]
    return [var for var in dict.fromkeys(read) if var not in own]


def _variables(expr: relax.Expr) -> list[relax.Var]:
    """Return the variables of an expression; refuses what holds other expressions than values."""
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, relax.Call | relax.Tuple):
        parts = expr.args if isinstance(expr, relax.Call) else expr.fields
        return [var for part in parts for var in _variables(part)]
    if isinstance(expr, relax.TupleGetItem):
        return _variables(expr.tuple_value)
    if isinstance(expr, relax.If | relax.Function | relax.SeqExpr):
        raise _Unfit
    return []


def _fields(result: relax.Expr) -> list[relax.Expr]:
    return list(result.fields) if isinstance(result, relax.Tuple) else [result]
