"""A workload, the blocks of its tensors and a target -> a packed, scheduled kernel.

One builder a family of schedules: each fixes what its schedule may choose (channel blocks, rows of
weights, the register tile) and hands over a `Kernel`. Which of them is asked is `strategy`'s table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from intrinsics.arm_dot import PRODUCTS, ArmProduct
from intrinsics.compat import STATES
from intrinsics.x86_dot import DOT_INTRINSICS, DotIntrinsic
from intrinsics.x86_unpack import BITS as PACKED_BITS
from intrinsics.x86_unpack import FEATURE as UNPACKS
from intrinsics.x86_unpack import bounds as packed_bounds

from .compute import winograd as compute_winograd
from .compute.conv2d import PackedConv2d
from .compute.depthwise import PackedDepthwise
from .compute.weights import window_taps
from .compute.winograd import PackedWinograd
from .layout import Layout, round_up
from .schedule import (
    arm,
    spatial_pack,
    winograd,
    x86_amx,
    x86_depthwise,
    x86_depthwise_lanes,
    x86_dot,
)
from .schedule.depthwise import DepthwisePlan, choose_strip
from .target import Features
from .workload import Conv2dWorkload, MatmulWorkload

# PACKED_BITS: of weights that kernels unpack; UNPACKS: what a target must have for it.
__all__ = ["PACKED_BITS", "STATES", "UNPACKS", "Blocks", "Kernel", "packed_bounds"]


@dataclass(frozen=True)
class Blocks:
    """Channel blocks of an operator's data and output.

    Parameters
    ----------
    data, out : int
        Channels per block.
    stored : int
        Channels of each output block that are stored; 0: all. Fewer where the output is no packed
        tensor: a matmul's rows, and NHWC, whose single block is all channels.
    plain : bool
        Whether weights must lie as a layout of OIHW, and sums as the output does: no windows of
        taps, no virtual rows. Relay's packed operators have no other.
    scheduled : bool
        Whether the kernel must be a computation that is scheduled, for others to be fused with it,
        rather than statements.
    """

    data: int
    out: int
    stored: int = 0
    plain: bool = False
    scheduled: bool = False


class Plan(Protocol):
    """A packed convolution and what one family of schedules chose for it."""

    conv: Any  # PackedConv2d, PackedDepthwise or PackedWinograd

    def schedule(self) -> Any:
        """Return the scheduled PrimFunc."""
        ...


@dataclass(frozen=True)
class Kernel:
    """A scheduled kernel and how to pack its operands.

    ``func`` takes (data, weight, [bias], [scale], [residual], out): bias when `takes_bias`, scale
    and residual when the workload's epilogue has them. Packers take the operator's own arrays
    (weights OIHW or (batch, N, K)) and return what `func` takes.

    Parameters
    ----------
    packing : PackedConv2d, PackedDepthwise, PackedWinograd or MatmulPacking
        The packers.
    plan : Plan
        What its schedule chose; ``func`` is scheduled by it when first asked for.
    data_layout, out_layout : Layout
    """

    packing: PackedConv2d | PackedDepthwise | PackedWinograd | MatmulPacking
    plan: Plan
    data_layout: Layout
    out_layout: Layout

    @cached_property
    def func(self) -> Any:
        """The scheduled PrimFunc."""
        return self.plan.schedule()

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
Build = Callable[[Any, Blocks, Features, bool], Kernel]


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


def default_blocks(work: Workload, feats: Features, layout: str = "NCHWc") -> Blocks:
    """Return the blocks used when the caller has no wish; with "NHWC", one of all channels."""
    if isinstance(work, MatmulWorkload):
        return Blocks(work.k, round_up(work.n, 16), work.n)
    if layout == "NHWC":
        out = work.oc if work.is_depthwise else round_up(work.oc, 16)
        return Blocks(work.ic, out, work.oc)
    out = activation_block(feats, work.oc, work.is_float)
    if work.is_depthwise:
        return Blocks(out, out)
    return Blocks(activation_block(feats, work.ic, work.is_float, entry=True), out)


# ---------------------------------------------------------------- matmul as convolution


def matmul_as_conv(work: MatmulWorkload) -> tuple[Conv2dWorkload, int]:
    """Return the 1x1 convolution that a matmul is, and the output block.

    Rows are columns of a one-row image, K is a single channel block and each batch is a group, so
    that the packed tensors are the matmul's own, (batch, M, K) and (batch, M, N), seen in five
    dimensions.
    """
    out_block = round_up(work.n, 16)
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
    return round_up(block, step) if block % step else 0


def _spatial_pack(
    work: Workload, blocks: Blocks, lanes: int, k: int, dtypes: tuple[str, str],
    registers: int, uops: int, intrinsic: DotIntrinsic | None, weight_bits: int = 8,
) -> Kernel:  # fmt: skip
    """Build the broadcast-dot convolution or matmul."""
    conv_work, out_block = work, blocks.out
    if isinstance(work, MatmulWorkload):
        conv_work, out_block = matmul_as_conv(work)
    packing = PackedConv2d(
        conv_work, blocks.data, out_block, lanes, k, *dtypes,
        widened=_widened(blocks.data, k * 8 // weight_bits), kw_inside=uops == 1,
        out_store=blocks.stored, weight_bits=weight_bits,
    )  # fmt: skip
    per_group = packing.out_blocks // packing.super_groups
    stated = STATES and intrinsic is not None and not blocks.scheduled
    pixels = x86_dot.pixels_of(conv_work) if stated else (conv_work.oh, conv_work.ow)
    tile, ow_padded = spatial_pack.choose_tile(
        *pixels, per_group, out_block // lanes, registers, uops, not stated
    )
    if stated:
        return _kernel(work, blocks, x86_dot.DotPlan(packing, tile, intrinsic))
    packing = replace(packing, ow_padded=ow_padded)
    return _kernel(work, blocks, spatial_pack.SpatialPack(packing, tile, intrinsic))


def _kernel(work: Workload, blocks: Blocks, plan: Plan) -> Kernel:
    packing = plan.conv
    packers = MatmulPacking(work, packing) if isinstance(work, MatmulWorkload) else packing
    if isinstance(work, Conv2dWorkload) and blocks.stored:
        nhwc = Layout("NHWC")
        return Kernel(packers, plan, nhwc, nhwc)
    return Kernel(packers, plan, packing.data_layout, packing.out_layout)


def build_dot(name: str, weight_bits: int = 8) -> Build:
    """Return the builder of the broadcast dot product of that name (x86), on weights of so many
    bits in memory.
    """

    def build(work: Workload, blocks: Blocks, _feats: Features, _ask: bool) -> Kernel:
        dot: DotIntrinsic = DOT_INTRINSICS[name]
        # Of packed weights, what is not unpacked yet takes registers, too.
        registers = dot.registers - (0 if weight_bits == 8 else 2)
        return _spatial_pack(
            work, blocks, dot.n, dot.k, (dot.a, dot.b), registers, dot.uops, dot, weight_bits
        )

    return build


def declines_winograd(work: Conv2dWorkload, lanes: int, k: int, uops: int) -> str | None:
    """Return why `build_winograd` cannot, or should not, compute a convolution; None if it should.

    Parameters
    ----------
    lanes : int
        Of its dot product.
    k, uops : int
        Of the dot product that the direct sum would be made by, on as many lanes.
    """
    if not compute_winograd.applies(work):
        return "not 3x3 with strides, dilation and groups of 1"
    if work.weight_range is None:
        return "weights are no constant: they would be transformed at each run"
    if compute_winograd.overflows(work):
        return f"4 times a sum over {9 * work.ic} products may not fit int32"
    return winograd.worthwhile(work, lanes, k, uops)


def build_winograd(name: str) -> Build:
    """Return the builder of F(2x2, 3x3) by the broadcast dot product of int16 of that name (x86).
    """

    def build(work: Conv2dWorkload, blocks: Blocks, _feats: Features, _ask: bool) -> Kernel:
        dot: DotIntrinsic = DOT_INTRINSICS[name]
        packing = PackedWinograd(work, blocks.data, blocks.out, dot.n)
        rows = winograd.choose_rows(packing.tiles_h, packing.tiles_w)
        tile, tiles_w = spatial_pack.choose_tile(
            rows, packing.tiles_w, packing.padded.out_blocks, blocks.out // dot.n, dot.registers,
            dot.uops,
        )  # fmt: skip
        packing = replace(packing, tiles_w=tiles_w)
        channels = packing.padded.in_blocks * blocks.data
        columns = winograd.choose_columns(tiles_w, tile.width, rows, channels)
        return _kernel(work, blocks, winograd.WinogradPlan(packing, rows, columns, tile, dot))

    return build


def _vector_lanes(feats: Features) -> tuple[int, int]:
    """Return (lanes of 32 bits, vector registers) of plain vector code on this target."""
    for isa, lanes, registers in (("avx512_bw", 16, 32), ("avx2", 8, 16), ("neon", 4, 32)):
        if feats.has(isa):
            return lanes, registers
    return 4, 16


def build_vector(work: Workload, blocks: Blocks, feats: Features, _ask: bool) -> Kernel:
    """Build the convolution with plain vector multiply-adds: float32, and int8 anywhere."""
    lanes, registers = _vector_lanes(feats)
    dtype = "float32" if work.is_float else "int16"
    return _spatial_pack(
        work, blocks, lanes, 1, (dtype, dtype), registers, 1 if work.is_float else 4, None
    )


def build_amx(
    work: Workload, blocks: Blocks, feats: Features, ask: bool, weight_bits: int = 8
) -> Kernel:
    """Build the convolution on AMX tiles; `ask`: it asks Linux for tile state when it starts."""
    conv_work, out_block = work, blocks.out
    if isinstance(work, MatmulWorkload):
        conv_work, out_block = matmul_as_conv(work)
    # Whole steps of 64 channels where a block has more than one of them.
    widened = _widened(blocks.data, 64 if blocks.data > 64 else 4 * 8 // weight_bits)
    window = not blocks.plain and weight_bits == 8
    window = window and x86_amx.wants_window(conv_work, blocks.data)
    same = work.weight_zero_point == 0 and weight_bits == 8
    weight = work.weight_dtype if same else "int8"
    packing = PackedConv2d(
        conv_work, blocks.data, out_block, 16, 4, work.data_dtype, weight,
        widened=widened, window=window, out_store=blocks.stored,
        window_rows=x86_amx.choose_window_rows(conv_work, blocks.data) if window else 1,
        weight_bits=weight_bits,
    )  # fmt: skip
    packing = replace(packing, phases=x86_amx.wants_phases(packing))
    plan = x86_amx.AmxPlan(x86_amx.choose_pipeline(packing, narrows=feats.has("avx512_bw")), ask)
    return _kernel(work, blocks, plan)


def build_arm(isa: str, how: str) -> Build:
    """Return the builder for an ARM instruction set and a way of making products (`arm_dot`)."""

    def build(work: Workload, blocks: Blocks, _feats: Features, _ask: bool) -> Kernel:
        product = _arm_product(work, isa, how)
        conv_work, out_block = work, blocks.out
        if isinstance(work, MatmulWorkload):
            conv_work, out_block = matmul_as_conv(work)
        window = not (work.is_float or blocks.plain)
        window = window and arm.wants_window(conv_work, blocks.data, product.k)

        def channels(k: int) -> int:
            if window:
                return blocks.data * window_taps(conv_work.kw, blocks.data, k)
            return round_up(blocks.data, k)

        # Whole rows of weights: of two lengths the one that pads less, else the longer.
        k = min(product.k, key=lambda k: (channels(k), -k))
        flat = not (window or blocks.plain) and arm.wants_flat(conv_work)
        packing = PackedConv2d(
            conv_work, blocks.data, out_block, 4, k, product.a, product.b,
            widened=0 if window else _widened(blocks.data, k), window=window, flat=flat,
            partial=product.partial, out_store=blocks.stored,
        )  # fmt: skip
        h, w, n, ow_padded = arm.choose_block(
            product, packing.rows, packing.columns, out_block, packing.crops
        )
        packing = replace(packing, lanes=n, ow_padded=ow_padded)
        return _kernel(work, blocks, arm.plan(packing, product, h, w))

    return build


def _arm_product(work: Workload, isa: str, how: str) -> ArmProduct:
    """Return how an ARM kernel multiplies these types: signed, unsigned, or (i8mm) mixed."""
    a, b = work.data_dtype, work.weight_dtype
    if not work.is_float:
        if work.weight_zero_point or how == "smlal":
            b = "int8"
        if isa != "neon_i8mm" or b == "uint8":
            a = b
    return next(
        row for row in PRODUCTS.values() if (row.isa, row.how, row.a, row.b) == (isa, how, a, b)
    )


def build_depthwise(work: Conv2dWorkload, blocks: Blocks, feats: Features, _ask: bool) -> Kernel:
    """Build the depthwise convolution with plain vector multiply-adds."""
    lanes, registers = _vector_lanes(feats)
    packing = PackedDepthwise(work, blocks.out)
    return _kernel(work, blocks, DepthwisePlan(packing, lanes, registers))


def build_x86_depthwise(how: str, bits: int) -> Build:
    """Return the builder of x86's depthwise convolution by that product of four rows, in vectors of
    so many bits.
    """

    def build(work: Conv2dWorkload, blocks: Blocks, _feats: Features, _ask: bool) -> Kernel:
        packing = PackedDepthwise(work, blocks.out, "rows", "uint8")
        rows = x86_depthwise_lanes.choose_rows(work)
        columns = x86_depthwise_lanes.choose_columns(packing, rows, bits // 128)
        last = x86_depthwise_lanes.choose_last(columns)
        return _kernel(work, blocks, x86_depthwise.LanesPlan(packing, rows, columns, last, how))

    return build


def build_arm_depthwise(how: str) -> Build:
    """Return the builder of ARM's depthwise convolution by "pairs" of taps or by the "dot" product.
    """

    def build(work: Conv2dWorkload, blocks: Blocks, feats: Features, _ask: bool) -> Kernel:
        a = "int8"
        if how == "dot" and not work.weight_zero_point:
            # As the instructions take them: both signed, both unsigned, or (usdot) mixed.
            mixed = feats.has("neon_i8mm") and work.weight_dtype == "int8"
            a = work.data_dtype if mixed else work.weight_dtype
        strip = choose_strip(work) if how == "dot" else 1
        # With few registers, or many taps, LLVM would keep all weights, and spill them.
        by_rows = how == "pairs" and (feats.arch == "arm" or work.kh * work.kw > 9)
        packing = PackedDepthwise(
            work, blocks.out, "row_pairs" if by_rows else how, a, strip, arch=feats.arch
        )
        lanes, registers = _vector_lanes(feats)
        return _kernel(work, blocks, DepthwisePlan(packing, lanes, registers))

    return build
