"""Our packed layouts in Relay's own passes: Legalize makes operands fit, AlterOpLayout packs them.

`legalize_*` rewrites an integer convolution or dense so that our kernel takes it without a pass of
its own over the data: signs flipped where the instruction wants them so (which Relay fuses into the
producer), channels filled up to whole blocks, groups merged. `alter_*` then gives it our layout;
Relay's AlterOpLayout carries that through whatever lies between convolutions, and FoldConstant
packs the weights. Weights that are no constants are left to the strategies, which pack at run time.

Zero points. With x' = x + s (s = 128 or -128: the sign bit flipped),
sum x * w = sum x' * w - s * sum w, and borders are padded with s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relay, te, topi

from ..compute.conv2d import PackedConv2d
from ..compute.depthwise import PackedDepthwise
from ..compute.weights import merge_groups
from ..kernel import Kernel
from ..layout import round_up
from ..switch import DictSlot
from ..target import features, is_supported
from . import call, te_schedule
from .call import BATCH_MATMUL, CONV2D, DENSE, LeftAsItIs, NotOurs

Rewrite = Callable[..., Any]


def _flip(dtype: str) -> int:
    """Return what is added to data of the other sign to make it `dtype`."""
    return 128 if dtype == "uint8" else -128


def constant(expr: Any) -> np.ndarray | None:
    """Return the value of an expression without variables, or None."""
    if not isinstance(expr, relay.Constant) and not relay.analysis.free_vars(expr):
        expr = relay.transform.FoldConstantExpr(expr, tvm.IRModule())
    return expr.data.numpy() if isinstance(expr, relay.Constant) else None


def _read(op: str, attrs: Any, inputs: Any, types: Any, out_type: Any) -> tuple[Any, ...]:
    """Return (request, kernel, weight, features) of a call with a constant weight.

    Raises
    ------
    NotOurs
    """
    target = tvm.target.Target.current(allow_none=True)
    if target is None or not is_supported(target):
        raise NotOurs("the target is no LLVM CPU")
    feats = features(target)
    req = call.request(op, attrs, types[0], types[1], str(out_type.dtype))
    if not te_schedule.supports(req.kernel(req.decide(feats)).plan):
        raise NotOurs("TE has no schedule for it")
    weight = constant(inputs[1])
    if weight is None:
        # Our kernel packs it at run time. Upstream would convert the operands for nothing, or
        # (arm_cpu, NHWC) raise UnboundLocalError.
        raise LeftAsItIs("the weight is no constant")
    req = call.with_proof(req, feats, weight)
    return req, req.kernel(req.decide(feats)), weight, feats


def _attrs(attrs: Any) -> dict[str, Any]:
    return {key: attrs[key] for key in attrs.keys()}


def padded(expr: Any, layout: str, widths: dict[str, tuple[int, int]], value: int, dtype: str):
    """Return the expression padded in the dimensions that are named."""
    axes = [widths.get(letter, (0, 0)) for letter in layout]
    return expr if not any(map(any, axes)) else relay.nn.pad(expr, axes, relay.const(value, dtype))


def _flipped(data: Any, dtype: str) -> Any:
    shifted = relay.add(relay.cast(data, "int32"), relay.const(_flip(dtype), "int32"))
    return relay.cast(shifted, dtype)


# ---------------------------------------------------------------- conv2d


@dataclass(frozen=True)
class _Filled:
    """A convolution's channels and groups as whole blocks."""

    ic: int
    oc: int
    groups: int

    @staticmethod
    def of(kernel: Kernel) -> _Filled:
        """Return what a kernel's blocks ask for."""
        packing = kernel.packing
        work = packing.work
        if isinstance(packing, PackedDepthwise):
            channels = round_up(work.ic, 16)
            return _Filled(channels, channels, channels)
        groups = packing.super_groups
        if groups > 1:  # already whole blocks
            return _Filled(work.ic, work.oc, groups)
        # A network's input has few channels: as many as the instruction reduces, at least 4.
        narrow = work.ic <= 4
        step = max(4, min(8, packing.k)) if narrow else 16
        return _Filled(round_up(work.ic, step), round_up(work.oc, 16), 1)


def legalize_conv2d(attrs: Any, inputs: Any, types: Any) -> Any | None:
    """Return the convolution as our packed kernels take it; None to leave it as it is.

    Raises
    ------
    NotOurs
    """
    req, kernel, weight, _ = _read(CONV2D, attrs, inputs, types, types[2])
    work, packing, new = req.work, kernel.packing, _attrs(attrs)
    filled = _Filled.of(kernel)
    flips = packing.folds_bias
    if not flips and filled == _Filled(work.ic, work.oc, work.groups):
        return None
    # 1. The weight: groups merged, channels filled up.
    oihw = weight.transpose([req.kernel_layout.index(letter) for letter in "OIHW"])
    if isinstance(packing, PackedConv2d):
        oihw = merge_groups(oihw, work.groups, filled.groups)
        more = filled.ic // filled.groups - oihw.shape[1]
        oihw = np.pad(oihw, ((0, filled.oc - work.oc), (0, more), (0, 0), (0, 0)))
    else:
        oihw = np.pad(oihw, ((0, filled.oc - work.oc), (0, 0), (0, 0), (0, 0)))
    kernel_layout = req.kernel_layout
    if kernel_layout == "HWOI" and not isinstance(packing, PackedDepthwise):
        kernel_layout = "HWIO"
    # 2. The data: sign flipped, borders and channels filled.
    data, zero, dtype = inputs[0], 0, work.data_dtype
    if flips:
        zero, dtype = _flip(packing.data_dtype), packing.data_dtype
        data = _flipped(data, dtype)
        top, left, bottom, right = work.padding
        borders = {"H": (top, bottom), "W": (left, right)}
        data = padded(data, req.layout, borders, zero, dtype)
        new["padding"] = (0, 0, 0, 0)
    data = padded(data, req.layout, {"C": (0, filled.ic - work.ic)}, 0, dtype)
    # 3. The convolution, its surplus channels cut off, its sums corrected.
    order = ["OIHW".index(letter) for letter in kernel_layout]
    new |= {"groups": filled.groups, "channels": filled.oc, "kernel_layout": kernel_layout}
    new["kernel_size"] = (work.kh, work.kw)
    out = relay.nn.conv2d(data, relay.const(np.ascontiguousarray(oihw.transpose(order))), **new)
    axis = req.layout.index("C")
    if filled.oc != work.oc:
        out = relay.strided_slice(out, [0], [work.oc], axes=[axis])
    if flips:
        shape = [1, 1, 1, 1]
        shape[axis] = work.oc
        sums = oihw[: work.oc].astype("int32").sum((1, 2, 3)) * zero
        out = relay.subtract(out, relay.const(sums.reshape(shape)))
    return out


def alter_conv2d(attrs: Any, inputs: Any, types: Any, out_type: Any) -> Any | None:
    """Return the convolution in our packed layout.

    Raises
    ------
    NotOurs
    """
    req, _, weight, feats = _read(CONV2D, attrs, inputs, types, out_type)
    as_given = req.kernel_layout
    req = call.packed_request(req)
    transformed = None
    if req.work.weight_dtype == "int8" and not req.work.is_depthwise:
        transformed = call.transformed_request(req, feats)
    if transformed is not None:
        kernel = transformed.kernel(transformed.decide(feats))
        oihw = weight.transpose([as_given.index(letter) for letter in "OIHW"])
        # The layout is said to be what it was, so that Relay does not change it.
        new = _attrs(attrs) | {
            "channels": req.work.oc, "kernel_size": (3, 3), "out_dtype": "int32",
            "kernel_layout": as_given, "data_layout": kernel.data_layout.name,
            "out_layout": kernel.out_layout.name,
        }  # fmt: skip
        return relay.nn.contrib_conv2d_winograd_without_weight_transform(
            inputs[0], relay.const(kernel.pack_weight(oihw)), 2, **new
        )
    kernel = req.kernel(req.decide(feats))
    packing, work = kernel.packing, req.work
    if packing.folds_bias:
        raise NotOurs(f"{work.data_dtype} data is no operand of the instruction")
    depthwise = isinstance(packing, PackedDepthwise)
    if not depthwise and packing.super_groups != work.groups:
        raise NotOurs("the channels of a group are no whole blocks")
    if not depthwise and packing.widened:
        raise NotOurs(f"blocks of {packing.in_block} channels are no whole steps")
    new = _attrs(attrs) | {
        "channels": work.oc, "kernel_size": (work.kh, work.kw), "out_dtype": "int32",
        "kernel_layout": call.kernel_layout(kernel, req.proven),
        "data_layout": kernel.data_layout.name,
        "out_layout": kernel.out_layout.name,
    }  # fmt: skip
    make = relay.nn.contrib_depthwise_conv2d_nchwc if depthwise else relay.nn.contrib_conv2d_nchwc
    return make(inputs[0], relay.const(weight.astype(kernel.weight_dtype)), **new)


# ---------------------------------------------------------------- dense, batched matmul


def legalize_dense(attrs: Any, inputs: Any, types: Any) -> Any | None:
    """Return the dense operator as our packed kernel takes it; None to leave it as it is.

    Raises
    ------
    NotOurs
    """
    req, kernel, weight, _ = _read(DENSE, attrs, inputs, types, types[2])
    work, conv = req.work, kernel.packing.conv
    more_n, more_k = round_up(work.n, 16) - work.n, round_up(work.k, max(4, conv.k)) - work.k
    flips = conv.folds_bias
    if not (flips or more_n or more_k):
        return None
    data, dtype = inputs[0], work.data_dtype
    if flips:
        data, dtype = _flipped(data, conv.data_dtype), conv.data_dtype
    data = padded(data, "MK", {"K": (0, more_k)}, 0, dtype)
    full = relay.const(np.pad(weight, ((0, more_n), (0, more_k))))
    out = relay.nn.dense(data, full, units=work.n + more_n, out_dtype="int32")
    if more_n:
        out = relay.strided_slice(out, [0], [work.n], axes=[1])
    if flips:
        sums = weight.astype("int32").sum(1) * _flip(dtype)
        out = relay.subtract(out, relay.const(sums.reshape(1, -1)))
    return out


def alter_dense(attrs: Any, inputs: Any, types: Any, out_type: Any) -> Any | None:
    """Return the dense operator with its weight packed.

    Raises
    ------
    NotOurs
    """
    req, kernel, weight, _ = _read(DENSE, attrs, inputs, types, out_type)
    conv = kernel.packing.conv
    if conv.folds_bias or conv.widened or req.work.n % 16:
        raise NotOurs("operands are not as the kernel takes them")
    return relay.nn.contrib_dense_pack(
        inputs[0], relay.const(weight.astype(kernel.weight_dtype)),
        call.kernel_layout(kernel, req.proven), None, "int32",
    )  # fmt: skip


def legalize_batch_matmul(attrs: Any, inputs: Any, types: Any) -> Any | None:
    """Leave a batched matmul as it is: its second operand is packed at run time.

    Raises
    ------
    NotOurs
    """
    target = tvm.target.Target.current(allow_none=True)
    if target is None or not is_supported(target):
        raise NotOurs("the target is no LLVM CPU")
    req = call.request(BATCH_MATMUL, attrs, types[0], types[1], str(types[2].dtype))
    if not te_schedule.supports(req.kernel(req.decide(features(target))).plan):
        raise NotOurs("TE has no schedule for it")


# ---------------------------------------------------------------- sums of fewer bits


def _cut_off(make: Callable[..., Any], legalize: Rewrite) -> Rewrite:
    """Return a Legalize that also takes sums of 8 or 16 bits: int32 sums, cut off behind.

    relay.quantize asks for them by `dtype_activation`. Modulo 2**bits both are the same.
    """

    def rewrite(attrs: Any, inputs: Any, types: Any) -> Any:
        data, weight, out = types
        if str(out.dtype) not in ("int8", "int16"):
            return legalize(attrs, inputs, types)
        call = make(*inputs, **(_attrs(attrs) | {"out_dtype": "int32"}))
        whole = relay.TensorType(out.shape, "int32")
        try:
            call = legalize(call.attrs, inputs, [data, weight, whole]) or call
        except LeftAsItIs:
            pass  # a strategy packs it
        return relay.cast(call, out.dtype)

    return rewrite


# ---------------------------------------------------------------- what lies between


def _float_nchwc(upstream: Rewrite) -> Rewrite:
    """Return upstream's AlterOpLayout of conv2d, float32 NHWC convolutions taken for NCHW ones.

    Upstream packs float convolutions in NCHW only. What it leaves in NHWC is several times slower,
    and stands beside our packed tensors with a layout change on either side.
    """

    def alter(attrs: Any, inputs: Any, types: Any, out_type: Any) -> Any:
        layouts = str(attrs.data_layout), str(attrs.kernel_layout)
        dense = layouts == ("NHWC", "HWIO") and int(attrs.groups) == 1
        static = dense and all(isinstance(extent, tvm.tir.IntImm) for extent in types[0].shape)
        if not (static and str(types[0].dtype) == str(types[1].dtype) == "float32"):
            return upstream(attrs, inputs, types, out_type)
        data, weight = (
            te.placeholder([tensor.shape[layout.index(letter)] for letter in wanted], "float32")
            for tensor, layout, wanted in zip(types[:2], layouts, ("NCHW", "OIHW"), strict=True)
        )
        new = _attrs(attrs) | {"data_layout": "NCHW", "kernel_layout": "OIHW", "out_layout": ""}
        variables = (relay.var("x", shape=tensor.shape) for tensor in (data, weight))
        shape = [out_type.shape["NHWC".index(letter)] for letter in "NCHW"]
        as_nchw = relay.nn.conv2d(*variables, **new).attrs, inputs, [data, weight]
        return upstream(*as_nchw, relay.TensorType(shape, out_type.dtype))

    return alter


def legalize_round(_attrs: Any, inputs: Any, types: Any) -> Any | None:
    """Return rounding half away from zero without the call that LLVM makes for each element.

    Adding the float32 below a half, of x's sign, and truncating is exact: the sum carries to the
    next integer where x's fraction is a half or more, and nowhere else.
    """
    if str(types[0].dtype) != "float32":
        return None
    below_half = relay.const(float(np.nextafter(np.float32(0.5), np.float32(0))), "float32")
    half = relay.multiply(relay.sign(inputs[0]), below_half)
    return relay.trunc(relay.add(inputs[0], half))


@dataclass(frozen=True)
class _LegalizeSlot:
    """The Legalize attribute of an operator that has none upstream."""

    op: str
    rewrite: Rewrite

    def install(self) -> Callable[[], None]:
        """Register ours; return what takes it away."""
        found = relay.op.get(self.op)
        if found.get_attr("FTVMLegalize") is not None:
            return lambda: None  # somebody else's
        relay.op.op.register_legalize(self.op, self.rewrite)
        return lambda: found.reset_attr("FTVMLegalize")


def _before(ours: Rewrite) -> Callable[[Rewrite], Rewrite]:
    """Return a wrapper that asks ours first and upstream where it is none of ours."""

    def wrap(upstream: Rewrite) -> Rewrite:
        def rewrite(*args: Any) -> Any:
            try:
                return ours(*args)
            except LeftAsItIs:
                return None
            except NotOurs:
                return upstream(*args)

        return rewrite

    return wrap


_WRAPPED: tuple[tuple[Any, Rewrite], ...] = (
    (topi.nn.conv2d_legalize, _cut_off(relay.nn.conv2d, legalize_conv2d)),
    (topi.nn.conv2d_alter_layout, alter_conv2d),
    (topi.nn.dense_legalize, _cut_off(relay.nn.dense, legalize_dense)),
    (topi.nn.dense_alter_layout, alter_dense),
    (topi.nn.batch_matmul_legalize, legalize_batch_matmul),
)

SLOTS: tuple[DictSlot | _LegalizeSlot, ...] = (
    DictSlot(topi.nn.conv2d_alter_layout.dispatch_dict, "cpu", _float_nchwc),
    *(
        DictSlot(function.dispatch_dict, key, _before(ours))
        for function, ours in _WRAPPED
        for key in ("cpu", "arm_cpu")
        if key in function.dispatch_dict
    ),
    _LegalizeSlot("round", legalize_round),
)

