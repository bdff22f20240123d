"""The integer operators of the graph: Relax ops that FuseQDQ makes and Lower takes apart.

Each is an ordinary Relax call whose attributes are an `ir.DictAttrs`, with type inference, so that
TVM's own passes (fold, dead code, printing) see well-formed programs. The epilogue's fields travel
as flat attributes; `epilogue_of` and `workload_of` read them back.

| op | args | meaning |
|---|---|---|
| conv2d | data, weight, [bias], [scale], [residual] | `workload.Conv2dWorkload` |
| matmul | data, weight, [bias], [scale], [residual] | `MatmulWorkload`; dense: weight (N, K) |
| add | a, b | clip(rint((a-za)*sa + (b-zb)*sb) + zo) |
| avg_pool2d | data | clip(rint(mean(data - zi) * scale) + zo); like relax.nn.avg_pool2d |
| requantize | data | clip(rint((data - zi) * scale) + zo) |
| affine | data, scale, bias | clip(rint((data - zi) * scale + bias) + zo), a vector of each |
| multiply | a, b | clip(rint((a-za) * (b-zb) * scale) + zo), b may have one value a channel |
| lookup | data, table | table[bits of data], 256 entries |
| concat | parts, [scale, bias] | NCHW[c]c of any blocks joined along the channels; affine |
| layout_transform | data | NCHW, NHWC <-> NCHW[c]c, channels padded with a fill value |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from tvm import relax
from tvm.ir import GenericConst, Op, make_node
from tvm.ir import _ffi_api as _ir_ffi

from . import layout as _layout
from .workload import Conv2dWorkload, Epilogue, MatmulWorkload

NAMESPACE = "topi_int8"


def _register(name: str, infer_type: Callable[[relax.Call, Any], Any]) -> Op:
    full = f"{NAMESPACE}.{name}"
    if full not in Op.list_op_names():
        _ir_ffi.RegisterOp(full, f"topi_int8 integer operator {name}")
    op = Op.get(full)
    op.set_num_inputs(-1)
    op.set_attr("FInferType", infer_type)
    op.set_attr("FPurity", True)
    return op


def op_name(expr: Any) -> str:
    """Return the operator's name of a call, "" for anything else."""
    is_call = isinstance(expr, relax.Call) and isinstance(expr.op, Op)
    return str(expr.op.name) if is_call else ""


def renamed(expr: Any, new: Mapping[relax.Var, relax.Expr]) -> Any:
    """Return an expression of values with other variables in the place of those in `new`."""
    if isinstance(expr, relax.Var):
        return new.get(expr, expr)
    if isinstance(expr, relax.Call):
        args = [renamed(arg, new) for arg in expr.args]
        return relax.Call(expr.op, args, expr.attrs, expr.ty_args)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([renamed(field, new) for field in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(renamed(expr.tuple_value, new), expr.index)
    return expr


def is_op(expr: Any, name: str) -> bool:
    """Return whether `expr` is a call of the operator `topi_int8.<name>`."""
    return op_name(expr) == f"{NAMESPACE}.{name}"


def _call(op: Op, args: list, attrs: dict[str, Any]) -> relax.Call:
    # DictAttrs has no null: an absent attribute stands for None.
    attrs = {key: value for key, value in attrs.items() if value is not None}
    return relax.Call(op, args, make_node("ir.DictAttrs", **attrs))


def attrs_of(call: relax.Call) -> dict[str, Any]:
    """Return the attributes of a call of ours as plain Python values."""
    plain: dict[str, Any] = {}
    for key, value in dict(call.attrs).items():
        if hasattr(value, "__len__") and not isinstance(value, str):
            value = tuple(int(v) for v in value)
        plain[str(key)] = str(value) if isinstance(value, str) else value
    return plain


def rebuild(call: relax.Call, args: list, **changed: Any) -> relax.Call:
    """Return the same operator on other arguments, some attributes changed (None removes one)."""
    return _call(call.op, args, {**attrs_of(call), **changed})


def shape_of(expr: Any) -> tuple[int, ...]:
    """Return the static shape of an expression as ints; ValueError if a dimension is symbolic."""
    dims = expr.ty.shape
    if dims is None or not all(hasattr(d, "value") for d in dims):
        raise ValueError(f"shape is {dims}; allowed: static dimensions")
    return tuple(int(d) for d in dims)


def static_shape(expr: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor whose dimensions are all known; None otherwise."""
    try:
        return shape_of(expr)
    except (ValueError, AttributeError):
        return None


_EPILOGUE_FIELDS = tuple(asdict(Epilogue()))


def epilogue_of(call: relax.Call) -> Epilogue:
    """Return the Epilogue described by a call's attributes."""
    attrs = attrs_of(call)
    return Epilogue(**{k: attrs[k] for k in _EPILOGUE_FIELDS if k in attrs})


def operands(call: relax.Call) -> dict[str, Any]:
    """Return the operands of a conv2d or matmul call by name; absent optional ones are None."""
    epi, args = epilogue_of(call), list(call.args)
    named = {"data": args.pop(0), "weight": args.pop(0)}
    for name, present in (
        ("bias", epi.bias),
        ("scale", epi.scale),
        ("residual", epi.residual_dtype is not None),
    ):
        named[name] = args.pop(0) if present else None
    return named


# ---------------------------------------------------------------- conv2d


def _conv2d_type(call: relax.Call, _ctx: Any) -> Any:
    attrs = attrs_of(call)
    work = conv2d_workload(call)
    shape = _layout.Layout.parse(attrs["out_layout"]).shape(work.n, work.oc, *work.stored)
    return relax.TensorType(shape, work.epilogue.out_dtype)


def conv2d(
    data: Any,
    weight: Any,
    *,
    bias: Any = None,
    scale: Any = None,
    residual: Any = None,
    strides: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    data_layout: str = "NCHW",
    kernel_layout: str = "OIHW",
    out_layout: str | None = None,
    channels: int | None = None,
    data_zero_point: int = 0,
    weight_zero_point: int = 0,
    out_dtype: str = "int32",
    out_zero_point: int = 0,
    clip_min: float | None = None,
    clip_max: float | None = None,
    residual_zero_point: int = 0,
    residual_scale: float = 1.0,
    name: str = "",
    out_border: tuple[int, int, int, int] = (0, 0, 0, 0),
    residual_border: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> relax.Call:
    """Return a `topi_int8.conv2d` call. `weight` is OIHW or HWIO; `channels` is the logical ic of
    packed data.

    The residual has the shape and layout of the output, and a border of its own. See `workload` for
    the arithmetic, and for the borders.
    """
    optional = [x for x in (bias, scale, residual) if x is not None]
    if channels is None:
        channels = shape_of(data)[_layout.Layout.parse(data_layout).channel_axis]
    attrs = dict(
        strides=list(strides),
        padding=list(padding),
        dilation=list(dilation),
        groups=groups,
        data_layout=data_layout,
        kernel_layout=kernel_layout,
        out_layout=out_layout or data_layout,
        channels=channels,
        data_zero_point=data_zero_point,
        weight_zero_point=weight_zero_point,
        out_dtype=out_dtype,
        bias=bias is not None,
        scale=scale is not None,
        out_zero_point=out_zero_point,
        clip_min=None if clip_min is None else float(clip_min),
        clip_max=None if clip_max is None else float(clip_max),
        residual_dtype=None if residual is None else str(residual.ty.dtype),
        residual_zero_point=residual_zero_point,
        residual_scale=float(residual_scale),
        name=name or None,
        out_border=list(out_border) if any(out_border) else None,
        residual_border=list(residual_border) if any(residual_border) else None,
    )
    return _call(CONV2D, [data, weight, *optional], attrs)


def conv2d_workload(call: relax.Call) -> Conv2dWorkload:
    """Return the Conv2dWorkload of a `topi_int8.conv2d` call."""
    attrs, data, weight = attrs_of(call), call.args[0], call.args[1]
    shape = shape_of(data)
    n, _, ih, iw = _layout.Layout.parse(attrs["data_layout"]).logical(shape, attrs["channels"])
    wshape = shape_of(weight)
    kernel = dict(zip(attrs["kernel_layout"], wshape, strict=True))
    return Conv2dWorkload(
        n=n, ic=attrs["channels"], ih=ih, iw=iw,
        oc=kernel["O"], kh=kernel["H"], kw=kernel["W"],
        strides=attrs["strides"], padding=attrs["padding"], dilation=attrs["dilation"],
        groups=attrs["groups"],
        data_dtype=str(data.ty.dtype), weight_dtype=str(weight.ty.dtype),
        data_zero_point=attrs["data_zero_point"], weight_zero_point=attrs["weight_zero_point"],
        epilogue=epilogue_of(call),
        **{name: attrs[name] for name in ("out_border", "residual_border") if name in attrs},
    )  # fmt: skip


CONV2D = _register("conv2d", _conv2d_type)

# ---------------------------------------------------------------- matmul


def _matmul_type(call: relax.Call, _ctx: Any) -> Any:
    attrs = attrs_of(call)
    data, weight = shape_of(call.args[0]), shape_of(call.args[1])
    n = weight[-2] if attrs["transpose_b"] else weight[-1]
    lead = data[:-1] if len(data) >= len(weight) else (*weight[:-2], *data[-2:-1])
    return relax.TensorType((*lead, n), attrs["out_dtype"])


def matmul(
    data: Any,
    weight: Any,
    *,
    bias: Any = None,
    scale: Any = None,
    residual: Any = None,
    transpose_b: bool = True,
    data_zero_point: int = 0,
    weight_zero_point: int = 0,
    out_dtype: str = "int32",
    out_zero_point: int = 0,
    clip_min: float | None = None,
    clip_max: float | None = None,
    residual_zero_point: int = 0,
    residual_scale: float = 1.0,
    name: str = "",
) -> relax.Call:
    """Return a `topi_int8.matmul` call: data (..., M, K) by weight (N, K) or (..., N, K).

    With ``transpose_b=False`` the weight is (K, N) or (..., K, N).
    """
    optional = [x for x in (bias, scale, residual) if x is not None]
    attrs = dict(
        transpose_b=transpose_b,
        data_zero_point=data_zero_point,
        weight_zero_point=weight_zero_point,
        out_dtype=out_dtype,
        bias=bias is not None,
        scale=scale is not None,
        out_zero_point=out_zero_point,
        clip_min=None if clip_min is None else float(clip_min),
        clip_max=None if clip_max is None else float(clip_max),
        residual_dtype=None if residual is None else str(residual.ty.dtype),
        residual_zero_point=residual_zero_point,
        residual_scale=float(residual_scale),
        name=name or None,
    )
    return _call(MATMUL, [data, weight, *optional], attrs)


def matmul_workload(call: relax.Call) -> MatmulWorkload:
    """Return the MatmulWorkload of a `topi_int8.matmul` call.

    A 2-D weight folds all of data's leading dimensions into m; a batched one keeps them as batch.
    """
    attrs, data, weight = attrs_of(call), call.args[0], call.args[1]
    dshape, wshape = shape_of(data), shape_of(weight)
    n, k = wshape[-2:] if attrs["transpose_b"] else wshape[-2:][::-1]
    rows = 1
    for dim in dshape[:-1]:
        rows *= dim
    batch = 1
    for dim in wshape[:-2]:
        batch *= dim
    return MatmulWorkload(
        m=rows // batch, n=n, k=k, batch=batch,
        data_dtype=str(data.ty.dtype), weight_dtype=str(weight.ty.dtype),
        data_zero_point=attrs["data_zero_point"], weight_zero_point=attrs["weight_zero_point"],
        weight_constant=isinstance(weight, GenericConst), transpose_b=attrs["transpose_b"],
        epilogue=epilogue_of(call),
    )  # fmt: skip


MATMUL = _register("matmul", _matmul_type)

# ---------------------------------------------------------------- elementwise and pooling


def _same_shape_type(call: relax.Call, _ctx: Any) -> Any:
    return relax.TensorType(call.args[0].ty.shape, attrs_of(call)["out_dtype"])


def _clip_attrs(clip_min: float | None, clip_max: float | None) -> dict[str, Any]:
    return dict(
        clip_min=None if clip_min is None else float(clip_min),
        clip_max=None if clip_max is None else float(clip_max),
    )


def add(
    a: Any,
    b: Any,
    *,
    a_zero_point: int,
    a_scale: float,
    b_zero_point: int,
    b_scale: float,
    out_dtype: str,
    out_zero_point: int,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> relax.Call:
    """Return a quantized add of two tensors of one shape; the scales are relative to the output's.
    """
    attrs = dict(
        a_zero_point=a_zero_point,
        a_scale=float(a_scale),
        b_zero_point=b_zero_point,
        b_scale=float(b_scale),
        out_dtype=out_dtype,
        out_zero_point=out_zero_point,
        **_clip_attrs(clip_min, clip_max),
    )
    return _call(ADD, [a, b], attrs)


def requantize(
    data: Any,
    *,
    zero_point: int,
    scale: float,
    out_dtype: str,
    out_zero_point: int,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> relax.Call:
    """Return ``clip(rint((data - zero_point) * scale) + out_zero_point)``; relu and clip are its
    bounds.
    """
    attrs = dict(
        zero_point=zero_point,
        scale=float(scale),
        out_dtype=out_dtype,
        out_zero_point=out_zero_point,
        **_clip_attrs(clip_min, clip_max),
    )
    return _call(REQUANTIZE, [data], attrs)


def affine(
    data: Any,
    scale: Any,
    bias: Any,
    *,
    zero_point: int,
    out_dtype: str,
    out_zero_point: int,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> relax.Call:
    """Return ``clip(rint((data - zero_point) * scale + bias) + out_zero_point)``.

    `scale` and `bias` are float32 constants of the data's rank in units of the output, which
    broadcast to its shape: a BatchNorm that no convolution could take in.
    """
    attrs = dict(
        zero_point=zero_point,
        out_dtype=out_dtype,
        out_zero_point=out_zero_point,
        **_clip_attrs(clip_min, clip_max),
    )
    return _call(AFFINE, [data, scale, bias], attrs)


def multiply(
    a: Any,
    b: Any,
    *,
    a_zero_point: int,
    b_zero_point: int,
    scale: float,
    out_dtype: str,
    out_zero_point: int,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> relax.Call:
    """Return a quantized product; `b` has the shape of `a`, or broadcasts to it.

    `scale` is the product of both scales over the output's.
    """
    attrs = dict(
        a_zero_point=a_zero_point,
        b_zero_point=b_zero_point,
        scale=float(scale),
        out_dtype=out_dtype,
        out_zero_point=out_zero_point,
        **_clip_attrs(clip_min, clip_max),
    )
    return _call(MULTIPLY, [a, b], attrs)


def lookup(data: Any, table: Any) -> relax.Call:
    """Return the 8-bit elements of `data` replaced by entries of a table.

    Parameters
    ----------
    data : relax.Expr
        uint8 or int8, any shape.
    table : relax.Expr
        A uint8 or int8 constant (256,), indexed by the element's bits: int8 -1 finds entry 255.
    """
    return _call(LOOKUP, [data, table], {})


def _lookup_type(call: relax.Call, _ctx: Any) -> Any:
    return relax.TensorType(call.args[0].ty.shape, str(call.args[1].ty.dtype))


AFFINE = _register("affine", _same_shape_type)
MULTIPLY = _register("multiply", _same_shape_type)
LOOKUP = _register("lookup", _lookup_type)
ADD = _register("add", _same_shape_type)
REQUANTIZE = _register("requantize", _same_shape_type)


def _avg_pool2d_type(call: relax.Call, _ctx: Any) -> Any:
    attrs = attrs_of(call)
    lay = _layout.Layout.parse(attrs["layout"])
    n, c, h, w = lay.logical(shape_of(call.args[0]), attrs["channels"])
    top, left, bottom, right = attrs["padding"]
    extra = [s - 1 if attrs["ceil_mode"] else 0 for s in attrs["strides"]]
    oh = (h + top + bottom - attrs["pool_size"][0] + extra[0]) // attrs["strides"][0] + 1
    ow = (w + left + right - attrs["pool_size"][1] + extra[1]) // attrs["strides"][1] + 1
    return relax.TensorType(lay.shape(n, c, oh, ow), attrs["out_dtype"])


def avg_pool2d(
    data: Any,
    *,
    pool_size: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = False,
    layout: str = "NCHW",
    channels: int | None = None,
    zero_point: int,
    scale: float,
    out_dtype: str,
    out_zero_point: int,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> relax.Call:
    """Return an integer average pool. Global pooling is ``pool_size == (h, w)``; scale is in/out
    scale.
    """
    if channels is None:
        channels = shape_of(data)[_layout.Layout.parse(layout).channel_axis]
    attrs = dict(
        pool_size=list(pool_size),
        strides=list(strides),
        padding=list(padding),
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        layout=layout,
        channels=channels,
        zero_point=zero_point,
        scale=float(scale),
        out_dtype=out_dtype,
        out_zero_point=out_zero_point,
        **_clip_attrs(clip_min, clip_max),
    )
    return _call(AVG_POOL2D, [data], attrs)


AVG_POOL2D = _register("avg_pool2d", _avg_pool2d_type)

# ---------------------------------------------------------------- layout


def _concat_type(call: relax.Call, _ctx: Any) -> Any:
    attrs, first = attrs_of(call), call.args[0]
    n, _, h, w, _ = shape_of(first)
    shape = _layout.Layout.packed(attrs["out_block"]).shape(n, sum(attrs["channels"]), h, w)
    return relax.TensorType(shape, attrs.get("out_dtype", str(first.ty.dtype)))


def concat(parts: list, channels: tuple[int, ...], out_block: int) -> relax.Call:
    """Return packed 8-bit tensors of one dtype joined along their channels.

    Parameters
    ----------
    parts : list of relax.Expr
        In NCHW[c]c, each of its own block, a multiple of 16.
    channels : tuple of int
        Logical channels of each part; multiples of 16 but for the last.
    out_block : int
        Channel block of the result, a multiple of 16.

    Notes
    -----
    With the attribute ``affine`` two more arguments follow the parts, and the attributes of
    `affine` say what becomes of the joined tensor: `FuseConcat` makes such calls.
    """
    return _call(
        CONCAT, list(parts), dict(channels=list(channels), out_block=out_block, affine=False)
    )


CONCAT = _register("concat", _concat_type)


def _layout_transform_type(call: relax.Call, _ctx: Any) -> Any:
    attrs = attrs_of(call)
    logical = _layout.Layout.parse(attrs["src_layout"]).logical(
        shape_of(call.args[0]), attrs["channels"]
    )
    shape = _layout.Layout.parse(attrs["dst_layout"]).shape(*logical)
    return relax.TensorType(shape, call.args[0].ty.dtype)


def layout_transform(
    data: Any, src_layout: str, dst_layout: str, channels: int, pad_value: float = 0
) -> relax.Call:
    """Return data in another activation layout; channels that pad a block hold `pad_value`."""
    attrs = dict(
        src_layout=src_layout, dst_layout=dst_layout, channels=channels, pad_value=float(pad_value)
    )
    return _call(LAYOUT_TRANSFORM, [data], attrs)


LAYOUT_TRANSFORM = _register("layout_transform", _layout_transform_type)
