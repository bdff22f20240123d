"""QNN convolutions and dense layers stay int8 on the way to plain operators.

Upstream's QNN Legalize widens them to int16 for targets without a dot product, and its
canonicalization those with groups or dilation to int32: no int8 kernel ever sees them.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relay
from tvm.relay.qnn.op import legalizations

from ..switch import DictSlot
from ..target import is_supported
from . import call
from .alter_layout import Rewrite, constant, padded
from .call import CONV2D, DENSE, NotOurs, Request


def _request(op: str, attrs: Any, types: Any) -> Request:
    """Return what a QNN call's products are as a plain call.

    Raises
    ------
    NotOurs
    """
    target = tvm.target.Target.current(allow_none=True)
    if target is None or not is_supported(target):
        raise NotOurs("the target is no LLVM CPU")
    return call.request(op, attrs, types[0], types[1], "int32")


def _scalar(expr: Any) -> int:
    """Return a zero point.

    Raises
    ------
    NotOurs
        When it is not one constant.
    """
    value = constant(expr)
    if value is None or value.size != 1:
        raise NotOurs("a zero point is no constant, or one a channel")
    return int(value.item())


def _lowered(req: Request, attrs: Any, inputs: Any) -> Any:
    """Return a convolution as sums of int8 products, the data's zero point folded behind them.

    sum (x - z) w = sum x w - z sum w, where borders are padded with z.

    Raises
    ------
    NotOurs
    """
    data, weight, *zero_points = inputs[:4]
    zero, weight_zero = map(_scalar, zero_points)
    if weight_zero:
        raise NotOurs(f"the weight's zero point is {weight_zero}")
    w, new = req.work, {key: attrs[key] for key in attrs.keys()}
    if zero:
        top, left, bottom, right = w.padding
        borders = {"H": (top, bottom), "W": (left, right)}
        data = padded(data, req.layout, borders, zero, w.data_dtype)
        new["padding"] = (0, 0, 0, 0)
    out = relay.nn.conv2d(data, weight, **new)
    if not zero:
        return out
    letters = req.kernel_layout
    # In HWOI (channels, multiplier 1) the sums come in the order of O too.
    axes = [at for at, letter in enumerate(letters) if letter != "O"]
    sums = relay.sum(relay.cast(weight, "int32"), axis=axes)
    shape = [1, 1, 1, 1]
    shape[req.layout.index("C")] = w.oc
    correction = relay.multiply(sums, relay.const(zero, "int32"))
    return relay.subtract(out, relay.reshape(correction, shape))


def _conv2d(upstream: Rewrite) -> Rewrite:
    """Return upstream's rewrite of convolutions but for those that it takes our kernels from."""

    def rewrite(attrs: Any, inputs: Any, types: Any) -> Any:
        try:
            req = _request(CONV2D, attrs, types)
            w = req.work
            if max(w.dilation) > 1 or (w.groups > 1 and not w.is_depthwise):
                return _lowered(req, attrs, inputs)
        except NotOurs:
            return upstream(attrs, inputs, types)
        return _unless_widened(upstream(attrs, inputs, types))

    return rewrite


def _dense(upstream: Rewrite) -> Rewrite:
    """Return upstream's rewrite of dense layers but for those that it takes our kernels from."""

    def rewrite(attrs: Any, inputs: Any, types: Any) -> Any:
        try:
            _request(DENSE, attrs, types)
        except NotOurs:
            return upstream(attrs, inputs, types)
        return _unless_widened(upstream(attrs, inputs, types))

    return rewrite


def _unless_widened(rewritten: Any) -> Any:
    """Return a rewrite that is still QNN's, or None: the call is canonicalized as it is."""
    return rewritten if rewritten is not None and rewritten.op.name.startswith("qnn.") else None


SLOTS: tuple[DictSlot, ...] = tuple(
    DictSlot(function.dispatch_dict, key, wrap)
    for function, wrap in (
        (legalizations.qnn_conv2d_legalize, _conv2d),
        (legalizations.qnn_dense_legalize, _dense),
    )
    for key in ("cpu", "arm_cpu")
)
