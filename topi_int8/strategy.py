"""The strategy table: for an operator, a dtype pair, a shape and a target, which kernel.

An ordered list, fastest first. Each entry says yes, or gives the reason for no; the first yes wins,
and the last entry of each operator always accepts. `explain` prints the reasons, so a slow path is
never taken silently. The table knows no graph: it is asked with a workload and a target's features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from intrinsics.x86_dot import DOT_INTRINSICS, DotIntrinsic

from .compute.conv2d import PackedConv2d
from .compute.depthwise import PackedDepthwise
from .layout import Layout
from .schedule import depthwise as depthwise_schedule
from .schedule import spatial_pack, x86_amx
from .target import Features, features
from .workload import Conv2dWorkload, MatmulWorkload

PROVEN_7BIT = 64  # |w| <= 64: 2 * 255 * 64 = 32640 < 2**15, vpmaddubsw's pair sum cannot saturate


@dataclass(frozen=True)
class Blocks:
    """Channel blocks of an operator's data and output; None leaves the choice to the strategy."""

    data: int
    out: int


@dataclass(frozen=True)
class Kernel:
    """A scheduled kernel and how to pack its operands.

    ``func`` takes (data, weight, [bias], [scale], [residual], out): bias when `takes_bias`, scale
    and residual when the workload's epilogue has them. Packers take the operator's own arrays
    (weights OIHW or (batch, N, K)) and return what `func` takes.
    """

    func: Any
    packing: PackedConv2d | PackedDepthwise
    data_layout: Layout
    out_layout: Layout

    @property
    def takes_bias(self) -> bool:
        """Whether `func` has a bias operand (the workload's, or a zero point's compensation)."""
        return self.packing.folds_bias

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weight."""
        return self.packing.weight_shape

    @property
    def weight_dtype(self) -> str:
        """Dtype of the packed weight."""
        return self.packing.weight_dtype

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        """Return the packed weight."""
        return self.packing.pack_weight(weight)

    def pack_bias(self, bias: np.ndarray | None, weight: np.ndarray) -> np.ndarray:
        """Return the bias with compensation folded in; `weight` is the unpacked one."""
        return self.packing.pack_bias(bias, weight)

    def pack_scale(self, scale: np.ndarray) -> np.ndarray:
        """Return the packed multiplier."""
        return self.packing.pack_scale(scale)


Workload = Conv2dWorkload | MatmulWorkload
Accepts = Callable[[Workload, Features], str | None]
Build = Callable[[Any, Blocks, Features, bool], Kernel]


_OPS = ("conv2d", "depthwise", "matmul", "conv2d_float32", "depthwise_float32", "matmul_float32")


@dataclass(frozen=True)
class Strategy:
    """One row of the table.

    Parameters
    ----------
    name : str
        As explain() shows it.
    op : str
        "conv2d", "depthwise" or "matmul", with "_float32" behind it for float operands.
    isa : str
        The ISA it needs (a name of `topi_int8.target`'s table).
    intrinsic : str
        What does the work: a tensor intrinsic, or a description.
    declines : callable
        (workload, features) -> the reason for no, or None for yes.
    build : callable
        (workload, blocks, features, ask_permission) -> Kernel.
    """

    name: str
    op: str
    isa: str
    intrinsic: str
    declines: Accepts
    build: Build

    def __post_init__(self) -> None:
        if self.op not in _OPS:
            raise ValueError(f"op is {self.op!r}; allowed: {', '.join(_OPS)}")

    def accepts(self, work: Workload, feats: Features) -> str | None:
        """Return None for yes, or the reason for no."""
        if not feats.has(self.isa):
            return f"target lacks {self.isa}"
        return self.declines(work, feats)


@dataclass(frozen=True)
class Decision:
    """The strategy that won, and why the faster ones declined."""

    work: Workload
    strategy_row: Strategy
    feats: Features
    declined: tuple[tuple[str, str], ...]

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return self.strategy_row.name

    @property
    def intrinsic(self) -> str:
        """The tensor intrinsic that does the work."""
        return self.strategy_row.intrinsic

    def kernel(self, blocks: Blocks | None = None, ask_permission: bool = True) -> Kernel:
        """Build the kernel.

        Parameters
        ----------
        blocks : Blocks, optional
            Channel blocks of data and output; by default the target's own choice.
        ask_permission : bool
            On AMX: whether the function asks the operating system for tile state when it starts.
        """
        if blocks is None:
            blocks = default_blocks(self.work, self.feats)
        # The weight's range decides; the code does not depend on it, so kernels are shared.
        work = replace(self.work, weight_range=None)
        return _build(work, self.strategy_row, self.feats, blocks, ask_permission)


@lru_cache(maxsize=512)
def _build(work: Any, row: Strategy, feats: Features, blocks: Blocks, ask: bool) -> Kernel:
    return row.build(work, blocks, feats, ask)


# ---------------------------------------------------------------- blocks


def activation_block(
    feats: Features, channels: int, is_float: bool = False, entry: bool = False
) -> int:
    """Return the channel block of an activation on this target.

    AMX multiplies 64 input channels a step and wants them in one 64-byte row, so that the row
    stride of a tile is a cache line; narrower tensors take a narrower block rather than mostly
    padding. The other ISAs take one vector of 16 channels. A network's input (`entry`) of up to 4
    channels keeps them in 32-bit groups; what a convolution writes has at least 16.
    """
    if entry and channels <= 4:
        return 4
    if feats.has("amx_int8") and not is_float:
        return next((block for block in (16, 32) if channels <= block), 64)
    return 16


def default_blocks(work: Workload, feats: Features) -> Blocks:
    """Return the blocks used when the caller has no wish."""
    if isinstance(work, MatmulWorkload):
        return Blocks(work.k, _round_up(work.n, 16))
    out = activation_block(feats, work.oc, work.is_float)
    if work.is_depthwise:
        return Blocks(out, out)
    return Blocks(activation_block(feats, work.ic, work.is_float, entry=True), out)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


# ---------------------------------------------------------------- matmul as convolution


def matmul_as_conv(work: MatmulWorkload) -> tuple[Conv2dWorkload, int]:
    """Return the 1x1 convolution that a matmul is, and the output block.

    Rows are columns of a one-row image, K is a single channel block and each batch is a group, so
    that the packed tensors are the matmul's own, (batch, M, K) and (batch, M, N), seen in five
    dimensions.
    """
    out_block = _round_up(work.n, 16)
    conv = Conv2dWorkload(
        n=1, ic=work.batch * work.k, ih=1, iw=work.m, oc=work.batch * out_block, kh=1, kw=1,
        groups=work.batch, data_dtype=work.data_dtype, weight_dtype=work.weight_dtype,
        data_zero_point=work.data_zero_point, weight_zero_point=work.weight_zero_point,
        weight_range=work.weight_range, epilogue=work.epilogue,
    )  # fmt: skip
    return conv, out_block


@dataclass(frozen=True)
class MatmulPacking:
    """The packers of a matmul over those of the convolution that computes it."""

    work: MatmulWorkload
    conv: PackedConv2d

    @property
    def folds_bias(self) -> bool:
        """Whether the kernel adds a bias."""
        return self.conv.folds_bias

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weight."""
        return self.conv.weight_shape

    @property
    def weight_dtype(self) -> str:
        """Dtype of the packed weight."""
        return self.conv.weight_dtype

    def _wide(self, weight: np.ndarray) -> np.ndarray:
        """Return the weight (batch, N, K) as OIHW with N padded to whole vectors by zero points."""
        w = self.work
        fill = 0 if w.is_float else w.weight_zero_point
        full = np.full((w.batch, self.conv.out_block, w.k), fill, weight.dtype)
        full[:, : w.n] = weight.reshape(w.batch, w.n, w.k)
        return full.reshape(w.batch * self.conv.out_block, w.k, 1, 1)

    def _channels(self, values: np.ndarray) -> np.ndarray:
        full = np.zeros((self.work.batch, self.conv.out_block), values.dtype)
        full[:, : self.work.n] = values.reshape(-1, self.work.n)
        return full.reshape(-1)

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        """Pack a weight (N, K) or (batch, N, K)."""
        return self.conv.pack_weight(self._wide(weight))

    def pack_bias(self, bias: np.ndarray | None, weight: np.ndarray) -> np.ndarray:
        """Return the bias per (batch, n) with the zero point's compensation folded in."""
        channels = None if bias is None else self._channels(bias)
        return self.conv.pack_bias(channels, self._wide(weight))

    def pack_scale(self, scale: np.ndarray) -> np.ndarray:
        """Return the float32 multiplier per (batch, n)."""
        return self.conv.pack_scale(self._channels(scale))


# ---------------------------------------------------------------- builders


def _widened(block: int, step: int) -> int:
    """Return the data block filled up to whole steps, or 0 if it is whole."""
    return _round_up(block, step) if block % step else 0


def _spatial_pack(
    work: Workload, blocks: Blocks, lanes: int, k: int, dtypes: tuple[str, str],
    registers: int, uops: int, intrinsic: str | None,
) -> Kernel:  # fmt: skip
    """Build the broadcast-dot convolution or matmul."""
    conv_work, out_block = work, blocks.out
    if isinstance(work, MatmulWorkload):
        conv_work, out_block = matmul_as_conv(work)
    widened = _widened(blocks.data, k)
    packing = PackedConv2d(
        conv_work, blocks.data, out_block, lanes, k, *dtypes, widened=widened, kw_inside=uops == 1
    )
    if isinstance(work, MatmulWorkload):
        packing = replace(packing, out_store=work.n)
    per_group = packing.out_blocks // packing.super_groups
    tile, ow_padded = spatial_pack.choose_tile(
        conv_work.oh, conv_work.ow, per_group, out_block // lanes, registers, uops
    )
    packing = replace(packing, ow_padded=ow_padded)
    return _kernel(work, packing, spatial_pack.schedule(packing, tile, intrinsic))


def _kernel(work: Workload, packing: PackedConv2d, func: Any) -> Kernel:
    packers = MatmulPacking(work, packing) if isinstance(work, MatmulWorkload) else packing
    return Kernel(func, packers, packing.data_layout, packing.out_layout)


def _build_dot(name: str) -> Build:
    def build(work: Workload, blocks: Blocks, _feats: Features, _ask: bool) -> Kernel:
        dot: DotIntrinsic = DOT_INTRINSICS[name]
        return _spatial_pack(
            work, blocks, dot.n, dot.k, (dot.a, dot.b), dot.registers, dot.uops, dot.register()
        )

    return build


def _vector_lanes(feats: Features) -> tuple[int, int]:
    """Return (lanes of 32 bits, vector registers) of plain vector code on this target."""
    for isa, lanes, registers in (("avx512_bw", 16, 32), ("avx2", 8, 16)):
        if feats.has(isa):
            return lanes, registers
    return 4, 16


def _build_vector(work: Workload, blocks: Blocks, feats: Features, _ask: bool) -> Kernel:
    """Build the convolution with plain vector multiply-adds: float32, and int8 anywhere."""
    lanes, registers = _vector_lanes(feats)
    dtype = "float32" if work.is_float else "int16"
    return _spatial_pack(
        work, blocks, lanes, 1, (dtype, dtype), registers, 1 if work.is_float else 4, None
    )


def _build_amx(work: Workload, blocks: Blocks, _feats: Features, ask: bool) -> Kernel:
    conv_work, out_block = work, blocks.out
    out_store = out_block
    if isinstance(work, MatmulWorkload):
        conv_work, out_block = matmul_as_conv(work)
        out_store = work.n
    # Whole steps of 64 channels where a block has more than one of them.
    widened = _widened(blocks.data, 64 if blocks.data > 64 else 4)
    window = x86_amx.wants_window(conv_work, blocks.data)
    weight = work.weight_dtype if work.weight_zero_point == 0 else "int8"
    packing = PackedConv2d(
        conv_work, blocks.data, out_block, 16, 4, work.data_dtype, weight,
        widened=widened, window=window, out_store=out_store,
        flat=not window and x86_amx.wants_flat(conv_work),
    )  # fmt: skip
    rows, ow_padded = x86_amx.choose_rows(packing.columns)
    packing = replace(packing, ow_padded=ow_padded)
    block = x86_amx.choose_block(packing, rows)
    return _kernel(work, packing, x86_amx.schedule(packing, block, ask))


def _build_depthwise(work: Conv2dWorkload, blocks: Blocks, feats: Features, _ask: bool) -> Kernel:
    lanes, registers = _vector_lanes(feats)
    packing = PackedDepthwise(work, blocks.out)
    func = depthwise_schedule.schedule(packing, lanes, registers)
    return Kernel(func, packing, packing.data_layout, packing.out_layout)


# ---------------------------------------------------------------- reasons for no


def _always(_work: Workload, _feats: Features) -> None:
    return None


def _weights_not_int8(work: Workload) -> str | None:
    """Return why weight - zero_point may not fit int8, or None if it does."""
    if work.weight_dtype == "int8" and work.weight_zero_point == 0:
        return None
    if work.weight_range is None:
        return (
            f"{work.weight_dtype} weights with zero point {work.weight_zero_point} may not fit int8"
        )
    low, high = (bound - work.weight_zero_point for bound in work.weight_range)
    if -128 <= low and high <= 127:
        return None
    return f"weights minus their zero point span [{low}, {high}], not int8"


def _declines_dot(work: Workload, _feats: Features) -> str | None:
    return _weights_not_int8(work)


def _declines_7bit(work: Workload, feats: Features) -> str | None:
    reason = _declines_dot(work, feats)
    if reason:
        return reason
    if work.weight_range is None:
        return "weights are not known to be 7-bit: vpmaddubsw could saturate"
    low, high = (bound - work.weight_zero_point for bound in work.weight_range)
    if max(-low, high) > PROVEN_7BIT:
        return f"weights span [{low}, {high}], beyond +-{PROVEN_7BIT}: vpmaddubsw could saturate"
    return None


def _declines_amx(work: Workload, _feats: Features) -> str | None:
    return None if work.weight_zero_point == 0 else _weights_not_int8(work)


_DOT_ROWS: tuple[tuple[str, str, str, Accepts], ...] = (
    ("avx512_vnni", "avx512_vnni", "dot_1x16x4_u8s8s32_avx512_vnni", _declines_dot),
    ("avx_vnni", "avx_vnni", "dot_1x8x4_u8s8s32_avx_vnni", _declines_dot),
    ("avx512_bw_7bit", "avx512_bw", "dot_1x16x4_u8s8s32_avx512_bw", _declines_7bit),
    ("avx512_bw", "avx512_bw", "dot_1x16x2_s16s16s32_avx512_bw", _always),
    ("avx2_7bit", "avx2", "dot_1x8x4_u8s8s32_avx2", _declines_7bit),
    ("avx2", "avx2", "dot_1x8x2_s16s16s32_avx2", _always),
)


def _rows(op: str) -> tuple[Strategy, ...]:
    """Return the dense rows of conv2d or matmul: they share algorithms, and so the order."""
    stem = "conv2d_nchwc" if op == "conv2d" else "matmul"
    return (
        Strategy(f"{stem}_float32", f"{op}_float32", "generic", "fma", _always, _build_vector),
        Strategy(f"{stem}_amx_int8", op, "amx_int8", "dot_amx_int8", _declines_amx, _build_amx),
        *(
            Strategy(f"{stem}_{suffix}", op, isa, name, declines, _build_dot(name))
            for suffix, isa, name, declines in _DOT_ROWS
        ),
        Strategy(f"{stem}_generic", op, "generic", "vector multiply-add", _always, _build_vector),
    )


STRATEGIES: tuple[Strategy, ...] = (
    *(
        Strategy(
            f"depthwise_nchwc{suffix}",
            f"depthwise{suffix}",
            "generic",
            "vector multiply-add",
            _always,
            _build_depthwise,
        )
        for suffix in ("", "_float32")
    ),
    *_rows("conv2d"),
    *_rows("matmul"),
)


def _decide(op: str, work: Workload, target: Any) -> Decision:
    op += "_float32" if work.is_float else ""
    feats = target if isinstance(target, Features) else features(target)
    declined: list[tuple[str, str]] = []
    for row in STRATEGIES:
        if row.op != op:
            continue
        reason = row.accepts(work, feats)
        if reason is None:
            return Decision(work, row, feats, tuple(declined))
        declined.append((row.name, reason))
    raise AssertionError(f"no strategy for {op}: the last row of each operator accepts everything")


def conv2d(work: Conv2dWorkload, target: Any) -> Decision:
    """Return the decision for a convolution on a Target (or its `Features`)."""
    return _decide("depthwise" if work.is_depthwise else "conv2d", work, target)


def matmul(work: MatmulWorkload, target: Any) -> Decision:
    """Return the decision for a dense or batched matmul on a Target (or its `Features`)."""
    return _decide("matmul", work, target)
