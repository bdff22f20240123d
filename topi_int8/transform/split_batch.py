# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""SplitBatch: a network on many images runs on a few of them at a time.

Layer by layer, a batch of 64 writes each tensor to memory and reads it back: ResNet-50's first ones
are 51 MB. In pieces of eight images the later tensors stay in the second-level cache, and weights
are still read once for eight images; the first layers, whose tensors are too large for that even
so, take one image at a time. Measured with ResNet-50 on AMX: 3.8 ms an image -> 2.9.

A piece is a function of its own, called once a piece on slices of what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tvm
from tvm import relax
from tvm.target import Target

from .. import op
from ..op import op_name, static_shape
from ..schedule.join import joined

# Images of a piece, for each core.
PIECE = 8
# Cores of a Target that does not say how many.
CORES = 8
# Calls of a function at the most: each has a slice of its own.
CALLS = 64
# Bytes of an operator's tensors, of one image, from which the images of a piece go one by one.
LARGE = 640 << 10
OPAQUE = 8  # relax OpPatternKind.kOpaque: FuseOps leaves the function alone
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
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function) and not (func.attrs and "Primitive" in func.attrs):
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


def _first_axis(call: relax.Call, key: str = "axis") -> bool:
    """Whether an attribute of axes leaves the first one alone."""
    axes = getattr(call.attrs, key)
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
    constant = scale is not None and _only_first(call)
    return constant and (math.prod(scale) == 1 or _first_axis(call))


def _only_first(call: relax.Call) -> bool:
    """Whether nothing but the first operand is a variable."""
    return not any(map(_variables, call.args[1:]))


def _images_first(call: relax.Call) -> bool:
    """Whether the layout of a float operator with constant weights begins with the batch."""
    layout = getattr(call.attrs, "data_layout", None) or call.attrs.layout
    return str(layout).startswith("N") and _only_first(call)


def _constant_weights(call: relax.Call) -> bool:
    """Whether data and residual are the only variables of a convolution or matmul."""
    named = op.operands(call)
    return not any(
        _variables(named[name]) for name in ("weight", "bias", "scale") if named[name] is not None
    )


def _always(_call: relax.Call) -> bool:
    return True


_UNARY = ("relax.clip", "relax.astype", "relax.exp", "relax.sigmoid", "relax.tanh", "relax.erf")
_BINARY = (
    "relax.add", "relax.subtract", "relax.multiply", "relax.divide", "relax.maximum",
    "relax.minimum",
)  # fmt: skip
_ACTIVATIONS = ("relax.nn.relu", "relax.nn.silu", "relax.nn.gelu", "relax.nn.leakyrelu")
_POOLS = (
    "relax.nn.max_pool2d", "relax.nn.avg_pool2d", "relax.nn.adaptive_avg_pool2d",
    "relax.nn.conv2d",
)  # fmt: skip
_REDUCTIONS = ("relax.mean", "relax.sum", "relax.max", "relax.min")
# Operators that treat each image alone, where their attributes say no more about the first axis.
_INDEPENDENT: dict[str, Callable[[relax.Call], bool]] = {
    **dict.fromkeys((*_UNARY, *_BINARY, *_ACTIVATIONS), _always),
    **dict.fromkeys(_POOLS, _images_first),
    **dict.fromkeys(("relax.quantize", "relax.dequantize"), _by_channel),
    "relax.reshape": _always,
    "relax.flatten": _always,
    "relax.permute_dims": _stays_first,
    "relax.concat": lambda call: len(_variables(call)) == len(call.args[0]) and _first_axis(call),
    **dict.fromkeys(("relax.nn.softmax", *_REDUCTIONS), _first_axis),
    **dict.fromkeys(("topi_int8.conv2d", "topi_int8.matmul"), _constant_weights),
    **dict.fromkeys(("topi_int8.add", "topi_int8.multiply", "topi_int8.concat"), _always),
    **{
        f"topi_int8.{name}": _only_first
        for name in ("affine", "requantize", "lookup", "avg_pool2d", "layout_transform")
    },
}  # fmt: skip


def _independent(func: relax.Function, batch: int) -> list[relax.VarBinding]:
    """Return the operators from the first on that treat each image of the batch alone."""
    seen = set(func.params)
    bindings = _bindings(func)
    for at, binding in enumerate(bindings):
        call, shape = binding.value, static_shape(binding.var)
        rule = _INDEPENDENT.get(op_name(call) or "")
        if rule is None or not shape or shape[0] != batch:
            return bindings[:at]
        read = _variables(call)
        if not read or not seen.issuperset(read) or _has_one_an_image(call, batch):
            return bindings[:at]
        # What is broadcast to more axes has something else than the batch outermost.
        if len({len(static_shape(var)) for var in read}) > 1:
            return bindings[:at]
        if not rule(call):
            return bindings[:at]
        seen.add(binding.var)
    return bindings


def _has_one_an_image(call: relax.Call, batch: int) -> bool:
    """Whether a constant is added to, or multiplies, the images element by element."""
    if op_name(call) not in (*_BINARY, "topi_int8.add", "topi_int8.multiply"):
        return False
    constants = [arg for arg in call.args if not isinstance(arg, relax.Var)]
    rank = len(static_shape(_variables(call)[0]))
    shapes = [static_shape(arg) or () for arg in constants]
    return any(len(shape) >= rank and shape[0] == batch for shape in shapes)


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
        self.func, self.batch, self.size, self.count = func, batch, size, count
        bindings = _bindings(func)
        self.before = _leading(func, bindings[:count])
        inside = [b for b in bindings[:count] if b not in self.before]
        self.rest = bindings[count:]
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
        call = _renamed(binding.value, new)
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
                pieces = [self._call(outer, callee, old, at) for at in range(self._number)]
                for field, var in enumerate(self.gives):
                    parts = [piece[field] for piece in pieces]
                    old[var] = outer.emit(self._joined(builder, parts))
                for binding in self.rest:
                    old[binding.var] = outer.emit(_renamed(binding.value, old))
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
        func = joined(shape, len(parts), dtype)
        func = func.with_attr({"op_pattern": OPAQUE}).without_attr("global_symbol")
        out = relax.TensorType((self.batch, *shape[1:]), dtype)
        return relax.call_tir(builder.add_func(func, "joined"), parts, out_ty=out)

    @property
    def _number(self) -> int:
        return self.batch // self.size

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


def _renamed(expr: relax.Expr, new: dict[relax.Var, relax.Var]) -> relax.Expr:
    """Return an expression of values with other variables."""
    if isinstance(expr, relax.Var):
        return new.get(expr, expr)
    if isinstance(expr, relax.Call):
        args = [_renamed(arg, new) for arg in expr.args]
        return relax.Call(expr.op, args, expr.attrs, expr.ty_args)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([_renamed(field, new) for field in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(_renamed(expr.tuple_value, new), expr.index)
    return expr


def _fields(result: relax.Expr) -> list[relax.Expr]:
    return list(result.fields) if isinstance(result, relax.Tuple) else [result]
