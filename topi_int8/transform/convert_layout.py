"""ConvertLayout: packed activation layouts through whole regions, transforms only at their borders.

Every convolution wants NCHW[c]c; everything that does not care (pooling, adds, clips, requantize,
concat along whole blocks) follows its input. A tensor is kept in each layout somebody asked for:
the first who asks pays the transform, and in a region of operators that follow, nobody asks.

Channels that fill a block up hold no meaning. Weights there are zero, so what they hold never
reaches a result, as long as it is finite; only operators that keep it so are followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.target import Target

from .. import op
from ..kernel import activation_block
from ..layout import Layout
from ..strategy import LAYOUTS, declines_nhwc
from ..target import Features, features
from ._qdq_graph import functions_of
from .fold_pad import pad_of


@dataclass
class Image:
    """The layouts a 4-D tensor exists in so far.

    ``logical`` is the layout the graph's own operators see (NCHW, NHWC, or a packed one that no
    kernel reads, such as NCHW3c); ``values`` maps a layout's name to the expression that holds the
    tensor so.
    """

    logical: str
    channels: int
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def packed(self) -> str | None:
        """A packed layout that kernels read and the tensor exists in, or None."""
        return next((name for name in self.values if _is_read(name)), None)


def _is_read(layout: str) -> bool:
    """Return whether kernels read the layout: whole vectors of channels, or 32-bit groups."""
    return Layout.parse(layout).block == 4 or _is_written(layout)


def _is_written(layout: str) -> bool:
    block = Layout.parse(layout).block
    return block > 0 and block % 16 == 0


@tvm.transform.module_pass(opt_level=0, name="topi_int8.ConvertLayout")
class ConvertLayout:
    """Put convolutions and what lies between them in packed layouts.

    Parameters
    ----------
    target : Target
        Its features choose the channel blocks.
    layout : str
        "NCHWc" packs every convolution; "NHWC" leaves those that are given in NHWC, and have a
        kernel for it (`strategy.declines_nhwc`), as they are.

    Raises
    ------
    ValueError
        For another layout.
    """

    def __init__(self, target: Target, layout: str = "NCHWc") -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
        self.feats = features(target)
        self.layout = layout

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Return the converted module; the argument is not changed."""
        converter = _Converter(mod, self.feats, self.layout)
        for name, func in functions_of(mod):
            converter.images.clear()
            converter.builder_.update_func(name, converter.visit_expr(func))
        out = converter.builder_.finalize()
        return relax.transform.DeadCodeElimination()(out)


@mutator
class _Converter(PyExprMutator):
    """Rewrites binding by binding; `images` knows the tensors that live in a packed layout."""

    def __init__(self, mod: tvm.IRModule, feats: Features, layout: str) -> None:
        super().__init__(mod)
        self.feats = feats
        self.layout = layout
        self.images: dict[Any, Image] = {}

    # ------------------------------------------------------------ bindings

    def visit_seq_expr_(self, seq: relax.SeqExpr) -> relax.Expr:
        """A branch, or an inner function, must not reuse what another one emitted."""
        outer = self._copied_images()
        result = super().visit_seq_expr_(seq)
        self.images = outer
        return result

    def visit_dataflow_block_(self, block: relax.DataflowBlock) -> relax.BindingBlock:
        """The packed tensors of a dataflow block are not seen outside it."""
        outer = self._copied_images()
        result = super().visit_dataflow_block_(block)
        self.images = outer
        return result

    def _copied_images(self) -> dict[Any, Image]:
        return {
            expr: replace(image, values=dict(image.values)) for expr, image in self.images.items()
        }

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Convert an operator that wants or follows a packed layout."""
        call, is_inner = binding.value, isinstance(binding.var, relax.DataflowVar)
        if isinstance(call, relax.Var) and call in self.images:
            if not is_inner:
                super().visit_var_binding_(binding)
            self.images[binding.var] = self.images[call]
            return
        handler = _HANDLERS.get(op.op_name(call))
        converted = handler(self, call) if handler else None
        if converted is None:
            super().visit_var_binding_(binding)
            return
        value, image = converted
        layout = next(iter(image.values))
        image.values[layout] = self.builder_.emit(value, binding.var.name)
        self.images[binding.var] = image
        if not is_inner and self.builder_.current_block_is_dataflow():
            # Somebody outside the dataflow block reads it: it must exist there as it was.
            plain = self.builder_.emit_output(self._transform(image, image.logical))
            image.values[image.logical] = plain
            self.set_var_remap(binding.var, plain)

    def visit_var_(self, var: relax.Var) -> Any:
        """An operator that does not follow reads the tensor in its own layout."""
        return self._plain(var) if var in self.images else super().visit_var_(var)

    def visit_dataflow_var_(self, var: relax.DataflowVar) -> Any:
        """As `visit_var_`."""
        return self._plain(var) if var in self.images else super().visit_dataflow_var_(var)

    def _plain(self, var: Any) -> Any:
        return self.in_layout(var, self.images[var].logical)

    # ------------------------------------------------------------ what handlers use

    def image(self, expr: Any, logical: str, channels: int) -> Image:
        """Return the image of an operand, making one for a tensor seen for the first time."""
        image = self.images.get(expr)
        if image is None or image.logical != logical:
            image = Image(logical, channels, {logical: self.visit_expr(expr)})
            self.images[expr] = image
        return image

    def in_layout(self, expr: Any, layout: str) -> Any:
        """Return the operand in that layout, transformed once however often it is asked for."""
        image = self.images[expr]
        if layout not in image.values:
            image.values[layout] = self.builder_.emit(self._transform(image, layout))
        return image.values[layout]

    def _transform(self, image: Image, layout: str) -> Any:
        source, value = next(iter(image.values.items()))
        if source == layout:
            return value
        shape = Layout.parse(source).logical(op.shape_of(value), image.channels)
        reshaped = _same_memory(source, layout, shape)
        if reshaped:
            return relax.op.reshape(value, reshaped)
        return op.layout_transform(value, source, layout, image.channels)

    def packed_operand(self, expr: Any, logical: str, channels: int, entry: bool = False) -> str:
        """Return the packed layout to read an operand in: its own, else the target's choice."""
        image = self.image(expr, logical, channels)
        if image.packed:
            return image.packed
        is_float = str(expr.ty.dtype) == "float32"
        return Layout.packed(activation_block(self.feats, channels, is_float, entry)).name


def _same_memory(source: str, layout: str, shape: tuple[int, int, int, int]) -> tuple | None:
    """Return the shape to view a tensor by where two layouts hold the same bytes, else None.

    That is so for single pixels (after a global pool) of whole blocks.
    """
    _, c, h, w = shape
    for name in (source, layout):
        block = Layout.parse(name).block
        if (h, w) != (1, 1) or (block and c % block):
            return None
    return Layout.parse(layout).shape(*shape)


# ---------------------------------------------------------------- handlers
#
# A handler returns (call, image of the result) or None where the operator should stay as it is. The
# image's one layout has no value yet: visit_var_binding_ emits the call and fills it in.

Handler = Callable[[_Converter, relax.Call], "tuple[relax.Call, Image] | None"]


def _static(*exprs: Any) -> bool:
    return all(op.static_shape(expr) is not None for expr in exprs)


def _conv2d(conv: _Converter, call: relax.Call) -> tuple[relax.Call, Image] | None:
    attrs, named = op.attrs_of(call), op.operands(call)
    logical, out_logical = attrs["data_layout"], attrs["out_layout"]
    if not _static(call, named["data"], named["weight"]):
        return None
    if _is_read(logical) and _is_written(out_logical):
        return None
    work = op.conv2d_workload(call)
    stays = conv.layout == "NHWC" == logical == out_logical and not declines_nhwc(work)
    if stays:
        return None
    out = Layout.packed(activation_block(conv.feats, work.oc, work.is_float)).name
    data = conv.packed_operand(named["data"], logical, work.ic, entry=not work.is_depthwise)
    if work.is_depthwise and data != out:
        # Its data and output have one block; only a network's input has fewer than 16 channels.
        data = out = data if Layout.parse(data).block >= 16 else out
    args = [conv.in_layout(named["data"], data), conv.visit_expr(named["weight"])]
    args += [conv.visit_expr(named[key]) for key in ("bias", "scale") if named[key] is not None]
    if named["residual"] is not None:
        conv.image(named["residual"], out_logical, work.oc)
        args.append(conv.in_layout(named["residual"], out))
    new = op.rebuild(call, args, data_layout=data, out_layout=out)
    return new, Image(out_logical, work.oc, {out: None})


def _elementwise(conv: _Converter, call: relax.Call) -> tuple[relax.Call, Image] | None:
    """Follow the packed operand; the others have its shape, are scalars, or one value a channel."""
    packed = [arg for arg in call.args if arg in conv.images and conv.images[arg].packed]
    if not packed or not _static(call):
        return None
    # The largest: one value a channel may be packed too (squeeze and excitation).
    first = max(packed, key=lambda arg: math.prod(op.shape_of(arg)))
    leader = conv.images[first]
    shape, layout = op.shape_of(first), leader.packed
    if op.shape_of(call) != shape:
        return None
    per_channel = op.op_name(call) not in _PER_TENSOR
    args = [_beside(conv, arg, shape, leader, per_channel) for arg in call.args]
    if any(arg is None for arg in args):
        return None
    new = relax.Call(call.op, args, call.attrs, call.ty_args)
    return new, Image(leader.logical, leader.channels, {layout: None})


def _beside(
    conv: _Converter, arg: Any, shape: tuple[int, ...], leader: Image, per_channel: bool
) -> Any:
    """Return an operand in the layout of the packed one it meets; None where that cannot be."""
    if not hasattr(arg.ty, "dtype") or not getattr(arg.ty, "ndim", 0):
        return conv.visit_expr(arg)
    if not _static(arg):
        return None
    own, axis = op.shape_of(arg), Layout.parse(leader.logical).channel_axis
    if isinstance(arg, GenericConst):
        if all(dim == 1 for dim in own):
            return relax.const(arg.value.numpy().reshape(()), str(arg.ty.dtype))
        own = (1,) * (4 - len(own)) + own
    elif own == shape:
        conv.image(arg, leader.logical, leader.channels)
        return conv.in_layout(arg, leader.packed)
    broadcasts = all(dim in (1, full) for dim, full in zip(own, shape, strict=False))
    if not per_channel or len(own) != 4 or not broadcasts or own[axis] != shape[axis]:
        return None
    if isinstance(arg, GenericConst):
        nchw = Layout.parse(leader.logical).unpack(arg.value.numpy().reshape(own), leader.channels)
        return relax.const(Layout.parse(leader.packed).pack(nchw), str(arg.ty.dtype))
    conv.image(arg, leader.logical, leader.channels)
    return conv.in_layout(arg, leader.packed)


def _lookup(conv: _Converter, call: relax.Call) -> tuple[relax.Call, Image] | None:
    """Follow the data; the table has no layout."""
    image = conv.images.get(call.args[0])
    if image is None or not image.packed or not _static(call):
        return None
    new = op.lookup(conv.in_layout(call.args[0], image.packed), conv.visit_expr(call.args[1]))
    return new, Image(image.logical, image.channels, {image.packed: None})


def _pool(conv: _Converter, call: relax.Call) -> tuple[relax.Call, Image] | None:
    image = conv.images.get(call.args[0])
    ours = op.is_op(call, "avg_pool2d")
    logical = op.attrs_of(call)["layout"] if ours else str(call.attrs.layout)
    if image is None or not image.packed or image.logical != logical or not _static(call):
        return None
    layout = image.packed
    data = conv.in_layout(call.args[0], layout)
    if ours:
        new = op.rebuild(call, [data], layout=layout)
    else:
        if str(call.attrs.out_layout) not in ("", logical):
            return None
        fields = ("pool_size", "strides", "padding", "dilation", "ceil_mode", "count_include_pad")
        kept = {key: getattr(call.attrs, key) for key in fields}
        pool = {
            "relax.nn.max_pool2d": relax.op.nn.max_pool2d,
            "relax.nn.avg_pool2d": relax.op.nn.avg_pool2d,
        }
        new = pool[call.op.name](data, layout=layout, out_layout=layout, **kept)
    return new, Image(image.logical, image.channels, {layout: None})


def _pad(conv: _Converter, call: relax.Call) -> tuple[relax.Call, Image] | None:
    """Follow the data where rows and columns alone are padded."""
    image = conv.images.get(call.args[0])
    if image is None or not image.packed or not _static(call):
        return None
    pad = pad_of(call, image.logical)
    if pad is None or not math.isfinite(pad[0]):
        return None
    value, (top, left, bottom, right) = pad
    widths = [0, 0, 0, 0, top, bottom, left, right, 0, 0]
    data = conv.in_layout(call.args[0], image.packed)
    new = relax.op.nn.pad(data, widths, "constant", value)
    return new, Image(image.logical, image.channels, {image.packed: None})


def _concat(conv: _Converter, call: relax.Call) -> tuple[relax.Call, Image] | None:
    """Stay packed where every input but the last is whole blocks.

    Of one size, or 8-bit integers: those may also come to lie in other blocks.
    """
    parts = list(call.args[0]) if isinstance(call.args[0], relax.Tuple) else []
    images = [conv.images.get(part) for part in parts]
    if not parts or any(image is None or not image.packed for image in images) or not _static(call):
        return None
    first = images[0]
    axis = int(call.attrs.axis) % len(call.ty.shape)
    block = Layout.parse(first.packed).block
    channels = [image.channels for image in images]
    same = all(image.logical == first.logical for image in images)
    if not same or axis != Layout.parse(first.logical).channel_axis:
        return None
    layouts = [image.packed for image in images]
    runs = all(count % 16 == 0 for count in channels[:-1]) and all(map(_is_written, layouts))
    if runs and {str(part.ty.dtype) for part in parts} in ({"uint8"}, {"int8"}):
        out = Layout.packed(activation_block(conv.feats, sum(channels)))
        inputs = [conv.in_layout(p, layout) for p, layout in zip(parts, layouts, strict=True)]
        new = op.concat(inputs, tuple(channels), out.block)
        return new, Image(first.logical, sum(channels), {out.name: None})
    whole = all(count % block == 0 for count in channels[:-1])
    if not whole or any(layout != first.packed for layout in layouts):
        return None
    new = relax.op.concat([conv.in_layout(part, first.packed) for part in parts], axis=1)
    return new, Image(first.logical, sum(channels), {first.packed: None})


# Elementwise operators under which a finite value stays finite.
_FOLLOW = (
    "topi_int8.add", "topi_int8.affine", "topi_int8.multiply", "topi_int8.requantize",
    "relax.quantize", "relax.dequantize", "relax.nn.relu",
    "relax.nn.relu6", "relax.clip", "relax.add", "relax.subtract", "relax.multiply",
    "relax.maximum", "relax.minimum", "relax.sigmoid", "relax.tanh", "relax.nn.silu",
    "relax.nn.gelu", "relax.astype", "relax.negative", "relax.abs", "relax.right_shift",
    "relax.left_shift",
)  # fmt: skip

# Of these, the ones that do not broadcast: quantize takes one scale, or one along its own axis.
_PER_TENSOR = ("topi_int8.add", "topi_int8.requantize", "relax.quantize", "relax.dequantize")

_HANDLERS: dict[str, Handler] = {
    "topi_int8.conv2d": _conv2d,
    "topi_int8.avg_pool2d": _pool,
    "topi_int8.lookup": _lookup,
    "relax.nn.max_pool2d": _pool,
    "relax.nn.avg_pool2d": _pool,
    "relax.nn.pad": _pad,
    "relax.concat": _concat,
    **dict.fromkeys(_FOLLOW, _elementwise),
}
