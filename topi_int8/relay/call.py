"""What a Relay call computes: attributes and tensor types of conv2d and matmul as a workload."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..compute.depthwise import PackedDepthwise
from ..compute.winograd import PackedWinograd
from ..kernel import Blocks, Kernel, MatmulPacking, Workload, default_blocks
from ..strategy import PROVEN_7BIT, Decision, conv2d, declines_nhwc, matmul
from ..target import Features
from ..workload import DTYPE_RANGE, INT8_DTYPES, Conv2dWorkload, MatmulWorkload

CONV2D = "nn.conv2d"
CONV2D_PACKED = "nn.contrib_conv2d_NCHWc"
DEPTHWISE_PACKED = "nn.contrib_depthwise_conv2d_NCHWc"
# Its weight is transformed, and of any shape.
CONV2D_TRANSFORMED = "nn.contrib_conv2d_winograd_without_weight_transform"
DENSE, DENSE_PACKED, BATCH_MATMUL = "nn.dense", "nn.contrib_dense_pack", "nn.batch_matmul"
PACKED_OPS = (CONV2D_PACKED, CONV2D_TRANSFORMED, DEPTHWISE_PACKED, DENSE_PACKED)
TRANSFORMED = "F(2x2, 3x3)"  # in the place of a layout

_PACKED = re.compile(r"NCHW(\d+)c$")
_NC = re.compile(r"NC(\d+)n(\d+)c$")
# A weight as its kernel reads it may be wider than it was.
_PACKED_DTYPES = (*INT8_DTYPES, "int16")

# What strategies ask of a weight's range, the weakest first: that the sum of two products fits
# int16, signed (smlal) or with unsigned data (vpmaddubsw).
PROOFS = ((-127, 127), (-PROVEN_7BIT, PROVEN_7BIT))


class NotOurs(Exception):
    """A call that none of our kernels computes; the message says why."""


class LeftAsItIs(NotOurs):
    """A call whose operands nobody is to rewrite while a model is built; the message says why."""


def _require(ok: bool, reason: str) -> None:
    if not ok:
        raise NotOurs(reason)


@dataclass(frozen=True)
class Request:
    """A call's workload, and how its tensors lie.

    Parameters
    ----------
    work : Conv2dWorkload or MatmulWorkload
    layout : str
        "NCHW", "NHWC", "NCHWc", or "" for matrices.
    kernel_layout : str
        Of the weight: "OIHW", "HWIO", "HWOI" or a packed one; `TRANSFORMED`; "" for matrices as
        they are.
    blocks : Blocks or None
        Channel blocks, where the call has them.
    packed : bool
        Whether the weight is to lie as our kernel reads it.
    batched : bool
        Whether matrices have a batch dimension.
    """

    work: Workload
    layout: str
    kernel_layout: str
    blocks: Blocks | None
    packed: bool
    batched: bool = False

    @property
    def proven(self) -> bool:
        """Whether the weight's range is known."""
        return self.work.weight_range is not None

    def decide(self, feats: Features) -> Decision:
        """Return the strategy table's decision."""
        if isinstance(self.work, MatmulWorkload):
            return matmul(self.work, feats)
        if self.layout == "NHWC" and not self.packed and declines_nhwc(self.work) is None:
            return conv2d(self.work, feats, "NHWC", plain=True)
        return conv2d(self.work, feats, plain=self.kernel_layout != TRANSFORMED)

    def kernel(self, decision: Decision) -> Kernel:
        """Return the kernel of a decision in this call's blocks, as a scheduled computation."""
        blocks = self.blocks or default_blocks(decision.work, decision.feats, decision.layout)
        return decision.kernel(replace(blocks, scheduled=True))


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Return the static shape of a TE tensor or a Relay type.

    Raises
    ------
    LeftAsItIs
        When a dimension is not known; upstream's rewrites would raise AttributeError.
    """
    try:
        return tuple(int(extent) for extent in tensor.shape)
    except TypeError:
        raise LeftAsItIs("a dimension is not known at compile time") from None


def request(
    op: str, attrs: Any, data: Any, weight: Any, out_dtype: str,
    weight_range: tuple[int, int] | None = None,
) -> Request:  # fmt: skip
    """Return what a call asks for.

    Parameters
    ----------
    op : str
        Name of the Relay operator.
    attrs : tvm.ir.Attrs
    data, weight : te.Tensor or relay.TensorType
    out_dtype : str
    weight_range : (int, int), optional
        Smallest and largest weight, where they are known.

    Raises
    ------
    NotOurs
        When no kernel of ours computes the call.
    """
    _require(op in _READERS, f"{op} is none of {', '.join(_READERS)}")
    dtypes = str(data.dtype), str(weight.dtype)
    allowed = _PACKED_DTYPES if op in PACKED_OPS else INT8_DTYPES
    _require(dtypes[0] in INT8_DTYPES and dtypes[1] in allowed, f"operands are {dtypes}")
    _require(out_dtype == "int32", f"sums are {out_dtype}, ours int32")
    return _READERS[op](attrs, data, weight, weight_range)


def with_proof(req: Request, feats: Features, weight: np.ndarray) -> Request:
    """Return the request with what is proven of its weight's range, where that changes the kernel.
    """
    low, high = int(weight.min()), int(weight.max())
    unproven = req.decide(feats).strategy
    for least, most in PROOFS:
        if least <= low and high <= most:
            proven = replace(req, work=replace(req.work, weight_range=(least, most)))
            if proven.decide(feats).strategy != unproven:
                return proven
    return req


def kernel_layout(kernel: Kernel, proven: bool) -> str:
    """Return Relay's name for how a kernel's packed weight lies.

    A strategy sees a weight's type and layout, not its values. So the name carries what is proven
    of them: the last number is then written with a zero in front, which Relay reads as the same
    layout of another name.
    """
    packing, mark = kernel.packing, "0" if proven else ""
    if isinstance(packing, PackedWinograd):
        return TRANSFORMED
    if isinstance(packing, PackedDepthwise):
        rows = f"{mark}4h" if packing.how == "dot" else ""
        return f"OIHW1i{'' if rows else mark}{packing.block}o{rows}"
    conv = packing.conv if isinstance(packing, MatmulPacking) else packing
    if isinstance(packing, MatmulPacking):
        return f"NC{conv.lanes}n{mark}{conv.k}c"
    taps = "IW" if conv.kw_inside else "WI"
    return f"OH{taps}{conv.in_block // conv.k}i{conv.lanes}o{mark}{conv.k}i"


# ---------------------------------------------------------------- convolutions


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _padding(attrs: Any) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right); Relay has one, two or four numbers."""
    padding = _ints(attrs.padding)
    return {1: padding * 4, 2: padding * 2, 4: padding}[len(padding)]


def _conv_work(
    attrs: Any, image: tuple[int, int, int, int], oc: int, kernel: tuple[int, int], groups: int,
    dtypes: tuple[str, str], weight_range: tuple[int, int] | None,
) -> Conv2dWorkload:  # fmt: skip
    n, ic, ih, iw = image
    return Conv2dWorkload(
        n, ic, ih, iw, oc, *kernel, strides=_ints(attrs.strides), padding=_padding(attrs),
        dilation=_ints(attrs.dilation), groups=groups, data_dtype=dtypes[0],
        weight_dtype=dtypes[1], weight_range=weight_range,
    )  # fmt: skip


def _read_conv2d(attrs: Any, data: Any, weight: Any, weight_range: Any) -> Request:
    layout, kernel_layout = str(attrs.data_layout), str(attrs.kernel_layout)
    pairs = {"NCHW": ("OIHW",), "NHWC": ("HWIO", "HWOI")}
    known = kernel_layout in pairs.get(layout, ())
    _require(known, f"data is {layout} and weight {kernel_layout}")
    _require(str(attrs.out_layout) in ("", layout), f"output is {attrs.out_layout}")
    shape, taps = shape_of(data), dict(zip(kernel_layout, shape_of(weight), strict=True))
    image = dict(zip(layout, shape, strict=True))
    groups = int(attrs.groups)
    # HWOI is the weight of depthwise convolutions: (kh, kw, channels, multiplier).
    _require(kernel_layout != "HWOI" or taps["I"] == 1, "channels are multiplied in HWOI")
    work = _conv_work(
        attrs, (image["N"], image["C"], image["H"], image["W"]), taps["O"], (taps["H"], taps["W"]),
        groups, (str(data.dtype), str(weight.dtype)), weight_range,
    )  # fmt: skip
    return Request(work, layout, kernel_layout, None, packed=False)


def _narrow(weight: Any) -> str:
    """Return the dtype that a packed weight had: one that was widened fits no int8."""
    return str(weight.dtype) if str(weight.dtype) in INT8_DTYPES else "uint8"


def _block(layout: str) -> int:
    found = _PACKED.match(layout)
    _require(found is not None, f"layout {layout} is not NCHW[c]c")
    return int(found[1])


def _read_packed(attrs: Any, data: Any, weight: Any, weight_range: Any) -> Request:
    blocks = Blocks(
        _block(str(attrs.data_layout)), _block(str(attrs.out_layout)), plain=True
    )
    n, cb, ih, iw, ci = shape_of(data)
    _require(ci == blocks.data, f"data has blocks of {ci}, its layout of {blocks.data}")
    _require(attrs.channels is not None, "channels are not known")
    work = _conv_work(
        attrs, (n, cb * ci, ih, iw), int(attrs.channels), _ints(attrs.kernel_size),
        int(attrs.groups), (str(data.dtype), _narrow(weight)), weight_range,
    )  # fmt: skip
    return Request(work, "NCHWc", str(attrs.kernel_layout), blocks, packed=True)


def _read_transformed(attrs: Any, data: Any, weight: Any, _weight_range: Any) -> Request:
    blocks = Blocks(_block(str(attrs.data_layout)), _block(str(attrs.out_layout)))
    n, cb, ih, iw, ci = shape_of(data)
    _require(ci == blocks.data, f"data has blocks of {ci}, its layout of {blocks.data}")
    work = _conv_work(
        attrs, (n, cb * ci, ih, iw), int(attrs.channels), _ints(attrs.kernel_size),
        int(attrs.groups), (str(data.dtype), "int8"), DTYPE_RANGE["int8"],
    )  # fmt: skip
    return Request(work, "NCHWc", TRANSFORMED, blocks, packed=True)


def transformed_request(req: Request, feats: Features) -> Request | None:
    """Return a packed convolution's request for F(2x2, 3x3), or None where the direct sum wins.

    What is proven of the weight may make that faster; who reads the transformed weight knows
    nothing of it.
    """
    full = DTYPE_RANGE["int8"]
    made = replace(
        req, work=replace(req.work, weight_dtype="int8", weight_range=full),
        kernel_layout=TRANSFORMED, blocks=Blocks(req.blocks.data, req.blocks.out),
    )  # fmt: skip
    known = replace(made, work=replace(made.work, weight_range=req.work.weight_range or full))
    wins = all(one.decide(feats).strategy_row.transforms for one in (known, made))
    return made if wins else None


def packed_request(req: Request) -> Request:
    """Return the request for a convolution's packed form, in the largest blocks that divide it.

    Raises
    ------
    NotOurs
        When the channels are no whole blocks.
    """
    work = req.work
    block = next((block for block in (16, 8, 4) if work.ic % block == 0), 0)
    _require(block > 0 and work.oc % 16 == 0, f"{work.ic} to {work.oc} channels: no whole blocks")
    blocks = Blocks(16 if work.is_depthwise else block, 16, plain=True)
    return Request(work, "NCHWc", "", blocks, packed=True)


# ---------------------------------------------------------------- matrices


def _matmul_work(data: Any, weight: Any, sizes: tuple[int, ...], weight_range: Any, **more: Any):
    m, n, k = sizes
    dtypes = {"data_dtype": str(data.dtype), "weight_dtype": _narrow(weight)}
    return MatmulWorkload(m, n, k, weight_range=weight_range, **dtypes, **more)


def _read_dense(attrs: Any, data: Any, weight: Any, weight_range: Any) -> Request:
    shape, (n, _) = shape_of(data), shape_of(weight)
    _require(len(shape) == 2, f"data has {len(shape)} dimensions")
    work = _matmul_work(data, weight, (shape[0], n, shape[1]), weight_range)
    return Request(work, "", "", None, packed=False)


def _read_dense_packed(attrs: Any, data: Any, weight: Any, weight_range: Any) -> Request:
    found = _NC.match(str(attrs.weight_layout))
    _require(found is not None, f"weight is {attrs.weight_layout}")
    (m, k), (nb, _, *_) = shape_of(data), shape_of(weight)
    work = _matmul_work(data, weight, (m, nb * int(found[1]), k), weight_range)
    return Request(work, "", str(attrs.weight_layout), None, packed=True)


def _read_batch_matmul(attrs: Any, data: Any, weight: Any, weight_range: Any) -> Request:
    _require(not attrs.transpose_a, "the first operand is transposed")
    (batch, m, k), (other, *rest) = shape_of(data), shape_of(weight)
    _require(batch == other, f"batches are {batch} and {other}")
    transposed = bool(attrs.transpose_b)
    n = rest[0] if transposed else rest[1]
    work = _matmul_work(
        data, weight, (m, n, k), weight_range, batch=batch, transpose_b=transposed
    )
    return Request(work, "", "", None, packed=False, batched=True)


_READERS = {
    CONV2D: _read_conv2d,
    CONV2D_PACKED: _read_packed,
    CONV2D_TRANSFORMED: _read_transformed,
    DEPTHWISE_PACKED: _read_packed,
    DENSE: _read_dense,
    DENSE_PACKED: _read_dense_packed,
    BATCH_MATMUL: _read_batch_matmul,
}
