"""A Relay call in TE: our packed convolution over views of its tensors.

Where the weight already lies as the kernel reads it, the output is the sums themselves and whatever
Relay fused behind them is computed tile by tile. Elsewhere operands are packed at run time first,
and what the kernel computes beyond the output (whole tiles) is cropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import te

from intrinsics.compat import tir

from ..compute import conv2d, depthwise, pack, winograd
from ..compute.conv2d import PackedConv2d
from ..compute.depthwise import PackedDepthwise
from ..compute.winograd import PackedWinograd
from ..kernel import Kernel, MatmulPacking
from ..workload import MatmulWorkload
from . import tir_plans
from .call import NotOurs, Request, kernel_layout
from .tir_plans import Placed

TAG = "topi_int8"  # of the stages that are ours, and not Relay's
Packing = PackedConv2d | PackedDepthwise | PackedWinograd
_ROOMS: dict[type, Any] = {
    PackedConv2d: conv2d, PackedDepthwise: depthwise, PackedWinograd: winograd,
}  # fmt: skip


@dataclass(frozen=True)
class View:
    """A tensor under other indices."""

    tensor: Any
    shape: tuple[int, ...]
    index: Callable[..., tuple]

    def __getitem__(self, at: tuple) -> Any:
        return self.tensor[self.index(*at)]

    @property
    def dtype(self) -> str:
        """Element type."""
        return str(self.tensor.dtype)


@dataclass(frozen=True)
class Lowered:
    """A call in TE.

    Parameters
    ----------
    out : te.Tensor
        The call's output.
    sums : te.Tensor
        (n, out_blocks, rows, ow_padded, out_block), of which `out` is a view.
    axes : tuple of int or None
        Which axis of `out` is n, block, row, column, channel of the sums; None: it has one element.
    exact : bool
        Whether `out` is all of the sums, so that it can be computed tile by tile.
    """

    out: Any
    sums: Any
    axes: tuple[int | None, ...]
    exact: bool


def lower(req: Request, kernel: Kernel, data: Any, weight: Any) -> Lowered:
    """Return a call's computation.

    Raises
    ------
    NotOurs
        When a packed weight is not the kernel's.
    """
    packing = kernel.packing
    conv = packing.conv if isinstance(packing, MatmulPacking) else packing
    packed = bias = None
    if req.packed:
        layout = kernel_layout(kernel, req.proven)
        if req.kernel_layout != layout:
            raise NotOurs(f"the weight is {req.kernel_layout}, not {layout}")
        packed = _prepacked(req, conv, weight)
    with te.tag_scope(TAG):
        source = _source(req, conv, data)
        if packed is None:
            packed, bias = _packed_here(req, packing, conv, weight)
        room = _ROOMS[type(conv)]
        key = tir_plans.key(req, kernel.plan)
        attrs, rolled = {tir_plans.ATTRIBUTE: key}, _rolled(kernel.plan)
        sums = room.accumulate(conv, source, packed, attrs, rolled)
    lowered = _output(req, conv, sums, bias)
    shape = tuple(int(extent) for extent in lowered.out.shape)
    tir_plans.place(key, Placed(kernel.plan, lowered.axes, lowered.exact, shape))
    return lowered


def _rolled(plan: Any) -> str:
    """Return the axis of the reduction that LLVM must not unroll, or "".

    TE has no mark for a loop, so that its extent is hidden from the start. TIR's schedules mark it.
    """
    in_tir = tvm.transform.PassContext.current().config.get("relay.backend.use_meta_schedule")
    axis = "" if in_tir else getattr(plan, "short_loop", "")
    # Of an axis of unknown extent TE tensorizes single elements only.
    return "" if axis == "ik" and plan.block.rows_k > 1 else axis


# ---------------------------------------------------------------- operands


def _source(req: Request, conv: Packing, data: Any) -> Any:
    """Return the data as (n, in_blocks, ih, iw, in_block)."""
    w = conv.work
    if req.layout == "NCHWc":
        return data
    if not req.layout:  # (m, k) and (batch, m, k) are one-row images of m columns
        shape = (1, w.groups, 1, w.iw, conv.in_block)
        return View(data, shape, lambda n, c, y, x, i: (c, x, i) if req.batched else (x, i))
    blocks = conv if isinstance(conv, PackedConv2d) else conv.padded
    shape = (w.n, blocks.in_blocks, w.ih, w.iw, blocks.in_block)
    nhwc = req.layout == "NHWC"
    if nhwc and blocks.in_block == w.ic:
        return View(data, shape, lambda n, c, y, x, i: (n, y, x, i))

    def element(n: Any, c: Any, y: Any, x: Any, i: Any) -> Any:
        channel = c * blocks.in_block + i
        value = data[(n, y, x, channel) if nhwc else (n, channel, y, x)]
        if w.ic % blocks.in_block == 0:
            return value
        return tir.if_then_else(channel < w.ic, value, tir.const(0, str(data.dtype)))

    return te.compute(shape, element, name="pack_data")


def _prepacked(req: Request, conv: Packing, weight: Any) -> Any:
    """Return a weight that lies as the kernel reads it, in the kernel's dimensions."""
    shape = tuple(int(extent) for extent in weight.shape)
    wanted = conv.weight_shape
    if isinstance(conv, PackedDepthwise):  # OIHW1i{block}o, and 4h behind it by the dot product
        view = View(weight, wanted, lambda c, h, w, *inner: (c, 0, h, w, 0, *inner))
        real = (*wanted[:1], 1, *wanted[1:3], 1, *wanted[3:])
    elif not req.layout:  # NC{lanes}n{k}c
        view = View(weight, wanted, lambda o, h, t0, t1, ik, lane, kk: (o, ik, lane, kk))
        real = (wanted[0], *wanted[4:])
    else:
        view, real = weight, wanted
    if (shape, str(weight.dtype)) != (real, conv.weight_dtype):
        raise NotOurs(f"the weight is {weight.dtype}{shape}, not {conv.weight_dtype}{real}")
    if conv.folds_bias:
        raise NotOurs(f"{conv.work.data_dtype} data is no operand of the instruction")
    return view


def _packed_here(
    req: Request, packing: Any, conv: Packing, weight: Any
) -> tuple[Any, Any]:
    """Return the weight packed at run time, and the zero point's compensation or None."""
    if isinstance(packing, MatmulPacking):
        w = packing.work
        oihw = pack.matmul_weight_as_oihw(
            weight, w.batch, w.n, w.k, conv.out_block, w.transpose_b, w.weight_zero_point
        )
    else:
        w = conv.work
        shape = (w.oc, w.ic // w.groups, w.kh, w.kw)

        def index(o: Any, i: Any, h: Any, x: Any) -> tuple:
            at = {"O": o, "I": i, "H": h, "W": x}
            return tuple(at[letter] for letter in req.kernel_layout)

        oihw = View(weight, shape, index)
    depth = isinstance(conv, PackedDepthwise)
    packed = (pack.pack_depthwise_weight if depth else pack.pack_weight)(conv, oihw)
    if not conv.folds_bias:
        return packed, None
    return packed, pack.pack_bias(conv.padded if depth else conv, oihw, None)


# ---------------------------------------------------------------- output


def _output(
    req: Request, conv: Packing, sums: Any, bias: Any
) -> Lowered:
    """Return the call's output as a view of the sums."""
    w = conv.work
    block = int(sums.shape[4])
    exact = tuple(map(int, sums.shape[2:4])) == (w.oh, w.ow)
    # TE computes no more of a stage than is read of it, and our tiles are whole. So the last
    # element is read too, as far as TE can see: what never happens is removed later.
    last = tuple(int(extent) - 1 for extent in sums.shape)
    channels = w.oc if not isinstance(req.work, MatmulWorkload) else req.work.n
    whole = exact and channels % block == 0

    def value(n: Any, ob: Any, y: Any, x: Any, o: Any) -> Any:
        if isinstance(conv, PackedConv2d) and conv.flat:
            y, x = 0, y * conv.padded_width + x
        total = sums[n, ob, y, x, o]
        if not whole:
            total = tir.Select(tir.const(True, "bool"), total, sums[last])
        return total if bias is None else total + bias[ob, o]

    def channel(c: Any) -> tuple[Any, Any]:
        """Return (block, channel in it)."""
        one = int(sums.shape[1]) == 1
        return (0, c) if one else (tir.floordiv(c, block), tir.floormod(c, block))

    if req.layout == "NCHWc":
        axes: tuple[int | None, ...] = (0, 1, 2, 3, 4)
        if exact and bias is None:
            return Lowered(sums, sums, axes, True)
        shape: tuple[int, ...] = (w.n, int(sums.shape[1]), w.oh, w.ow, block)
        fcompute: Callable[..., Any] = value
    elif req.layout == "NCHW":
        axes, exact = (0, None, 2, 3, 1), False
        shape = (w.n, w.oc, w.oh, w.ow)

        def fcompute(n: Any, c: Any, y: Any, x: Any) -> Any:
            ob, o = channel(c)
            return value(n, ob, y, x, o)

    elif req.layout == "NHWC":
        axes, exact = (0, None, 1, 2, 3), exact and block == w.oc
        shape = (w.n, w.oh, w.ow, w.oc)

        def fcompute(n: Any, y: Any, x: Any, c: Any) -> Any:
            ob, o = channel(c)
            return value(n, ob, y, x, o)

    else:
        columns = req.work.n
        exact = exact and columns == block
        if req.batched:
            axes, shape = (None, 0, None, 1, 2), (req.work.batch, w.iw, columns)

            def fcompute(b: Any, m: Any, n: Any) -> Any:
                return value(0, b, 0, m, n)

        else:
            axes, shape = (None, None, None, 0, 1), (w.iw, columns)

            def fcompute(m: Any, n: Any) -> Any:
                return value(0, 0, 0, m, n)

    out = te.compute(shape, fcompute, name="topi_int8_out", tag="injective")
    return Lowered(out, sums, axes, exact)
