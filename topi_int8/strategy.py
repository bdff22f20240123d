"""The strategy table: for an operator, a dtype pair, a shape and a target, which kernel.

An ordered list, fastest first. Each entry says yes, or gives the reason for no; the first yes wins,
and the last entry of each operator always accepts. `explain` prints the reasons, so a slow path is
never taken silently. The table knows no graph: it is asked with a workload and a target's features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from .kernel import (
    PACKED_BITS,
    STATES,
    UNPACKS,
    Blocks,
    Build,
    Kernel,
    Workload,
    build_amx,
    build_arm,
    build_arm_depthwise,
    build_depthwise,
    build_dot,
    build_vector,
    build_winograd,
    build_x86_depthwise,
    declines_winograd,
    default_blocks,
    packed_bounds,
)
from .target import GENERIC, ISAS, X86_ISAS, Features, features
from .workload import Conv2dWorkload, MatmulWorkload

PROVEN_7BIT = 64  # |w| <= 64: 2 * 255 * 64 = 32640 < 2**15, vpmaddubsw's pair sum cannot saturate

Accepts = Callable[[Workload, Features], str | None]

_OPS = tuple(
    op + suffix
    for suffix in ("", "_float32")
    for op in ("conv2d", "depthwise", "matmul", "conv2d_nhwc", "depthwise_nhwc")
)


@dataclass(frozen=True)
class Strategy:
    """One row of the table.

    Parameters
    ----------
    name : str
        As explain() shows it.
    op : str
        "conv2d", "depthwise" or "matmul"; "conv2d_nhwc" and "depthwise_nhwc" where the tensors are
        NHWC; with "_float32" behind it for float operands.
    isa : str
        The ISA it needs (a name of `topi_int8.target`'s table).
    intrinsic : str
        What does the work: a tensor intrinsic, or a description.
    declines : callable
        (workload, features) -> the reason for no, or None for yes.
    build : callable
        (workload, blocks, features, ask_permission) -> Kernel.
    transforms : bool
        Whether packing changes the weight's values, so that it lies in no layout of OIHW.
    alone : bool
        Whether the kernel is a function of its own, with no stages that others could be fused with.
    borders : bool
        Whether it can write a border around its output, and read a residual with one
        (`Conv2dWorkload.out_border`, `residual_border`).
    weight_bits : int
        Bits of a weight in memory. A row of fewer than 8 is asked where all weights are proven to
        fit, and not mentioned elsewhere.
    """

    name: str
    op: str
    isa: str
    intrinsic: str
    declines: Accepts
    build: Build
    transforms: bool = False
    alone: bool = False
    borders: bool = False
    weight_bits: int = 8

    def __post_init__(self) -> None:
        if self.op not in _OPS:
            raise ValueError(f"op is {self.op!r}; allowed: {', '.join(_OPS)}")

    def accepts(self, work: Workload, feats: Features) -> str | None:
        """Return None for yes, or the reason for no."""
        if not feats.has(self.isa):
            return f"target lacks {self.isa}"
        if not self.borders and _has_borders(work):
            return "it writes no border around its output, and reads no residual's"
        return self.declines(work, feats)


def _has_borders(work: Workload) -> bool:
    return isinstance(work, Conv2dWorkload) and any((*work.out_border, *work.residual_border))


@dataclass(frozen=True)
class Decision:
    """The strategy that won, and why the faster ones declined."""

    work: Workload
    strategy_row: Strategy
    feats: Features
    declined: tuple[tuple[str, str], ...]
    layout: str = "NCHWc"

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
            blocks = default_blocks(self.work, self.feats, self.layout)
        # The weight's range decides; the code does not depend on it, so kernels are shared.
        work = replace(self.work, weight_range=None)
        return _build(work, self.strategy_row, self.feats, blocks, ask_permission)


@lru_cache(maxsize=512)
def _build(work: Any, row: Strategy, feats: Features, blocks: Blocks, ask: bool) -> Kernel:
    return row.build(work, blocks, feats, ask)


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


def _declines_winograd(lanes: int) -> Accepts:
    """Return the reasons for no of F(2x2, 3x3) in vectors of that many sums."""

    def declines(work: Workload, feats: Features) -> str | None:
        # What the direct sum would be made by: products of a vector operation's lane, operations.
        exact = _declines_7bit(work, feats) is not None
        return declines_winograd(work, lanes, *((2, 2) if exact else (4, 3)))

    return declines


def _fit(work: Workload, bits: int) -> bool:
    """Whether weights, their zero point subtracted, are known to fit so many bits."""
    if work.weight_range is None:
        return False
    lowest, highest = packed_bounds(bits)
    low, high = (bound - work.weight_zero_point for bound in work.weight_range)
    return lowest <= low and high <= highest


def _declines_packed(bits: int, declines: Accepts, worthwhile: Accepts) -> Accepts:
    """Return the reasons for no of a kernel that unpacks weights: that of the same kernel on bytes,
    and where it would not be the faster.
    """

    def packed(work: Workload, feats: Features) -> str | None:
        if not _fit(work, bits):
            return f"weights are not known to fit {bits} bits"
        if not feats.has(UNPACKS):
            return f"target lacks {UNPACKS}, which unpacks weights"
        return declines(work, feats) or worthwhile(work, feats)

    return packed


def _declines_folded(work: Workload, _feats: Features) -> str | None:
    return None if work.weight_zero_point == 0 else _weights_not_int8(work)


# Rows of a matmul up to which reading the weights is all that matters: measured on Granite Rapids
# against tiles, 768x768 to 768x3072: 1.3x to 1.8x for one row, 1.05x for four, 0.65x for eight.
FEW_ROWS = 4


def _declines_amx(work: Workload, feats: Features) -> str | None:
    few = isinstance(work, MatmulWorkload) and work.m <= FEW_ROWS
    if few and feats.has("avx512_vnni") and _declines_dot(work, feats) is None:
        return f"{work.m} rows: vpdpbusd reads weights faster than tiles do"
    return _declines_folded(work, feats)


# Output pixels up to which packed weights are the faster: reading weights is what takes the time.
# Measured on Granite Rapids with weights that are in no cache of the core, bytes to 4 bits. Tiles:
# 3x3 512-512 @7x7 0.80x, 1x1 512-2048 @7x7 0.81x, 32x768x3072 0.79x, but 64x768x768 1.09x and
# 3x3 256-256 @14x14 1.17x. vpdpbusd: 1x2048x1000 0.51x, 8x768x3072 0.67x, 16 rows 0.91x, 49 1.04x.
PACKED_PIXELS = {"amx_int8": 49, "avx512_vnni": 8, "avx_vnni": 8}


def _worthwhile(isa: str) -> Accepts:
    """Return the reason for no where unpacking costs more than reading half the bytes saves."""

    def worthwhile(work: Workload, _feats: Features) -> str | None:
        matmul = isinstance(work, MatmulWorkload)
        pixels = work.m if matmul else work.n * work.oh * work.ow
        if pixels <= PACKED_PIXELS[isa]:
            return None
        return f"{pixels} {'rows' if matmul else 'pixels'} use each weight: bytes are the faster"

    return worthwhile


def _declines_mmla(work: Workload, feats: Features) -> str | None:
    pixels = work.m if isinstance(work, MatmulWorkload) else work.oh * work.ow
    if pixels == 1:
        return "one output pixel: a matrix product would compute two"
    return _declines_folded(work, feats)


def _declines_usdot(work: Workload, feats: Features) -> str | None:
    if work.data_dtype == "int8" or (work.weight_dtype, work.weight_zero_point) == ("uint8", 0):
        return "data and weights are both signed or both unsigned: sdot and udot take them"
    return _declines_folded(work, feats)


def _declines_smlal(work: Workload, _feats: Features) -> str | None:
    """Sums of two products fit int16 unless both weights are -128."""
    reason = _weights_not_int8(work)
    if reason:
        return reason
    if work.weight_range is None:
        return "weights may be -128: the sum of two products could overflow int16"
    if work.weight_range[0] - work.weight_zero_point < -127:
        return "a weight is -128: the sum of two products could overflow int16"
    return None


def _declines_depthwise_dot(work: Workload, feats: Features) -> str | None:
    """Vector operations a pixel of 16 channels: eight zips and four stores a new column, a dot
    product for each vector and horizontal tap; against two multiplies and two wide adds for each
    pair of taps. llvm-mca agrees on A55, N1 and V1: 0.74-0.92x at stride 1, 0.99-1.15x at stride 2.
    """
    assert isinstance(work, Conv2dWorkload)
    groups = -(-work.kh // 4)
    dots = groups * (12 * min(work.strides[1], work.kw) + 4 * work.kw)
    pairs = 4 * work.kh * work.kw
    if dots >= pairs:
        return f"gathering {work.kh} rows takes longer than multiplying by them"
    return _declines_folded(work, feats)


def _nhwc_in_lanes(declines: Accepts) -> Accepts:
    """Return the reasons for no of a depthwise kernel on lanes of 16 channels, in NHWC."""

    def nhwc(work: Workload, feats: Features) -> str | None:
        assert isinstance(work, Conv2dWorkload)
        if work.ic % 16:
            return f"{work.ic} channels are no multiple of 16"
        return declines(work, feats)

    return nhwc


# suffix, instruction set, product of four rows, bits of a vector, reasons for no
_X86_DEPTHWISE: tuple[tuple[str, str, str, int, Accepts], ...] = (
    ("avx512_vnni", "avx512_vnni", "vpdpbusd", 512, _declines_dot),
    ("avx_vnni", "avx_vnni", "vpdpbusd", 256, _declines_dot),
    ("avx512_bw_7bit", "avx512_bw", "vpmaddubsw", 512, _declines_7bit),
    ("avx512_bw", "avx512_bw", "vpmaddwd", 512, _declines_dot),
    ("avx2_7bit", "avx2", "vpmaddubsw", 256, _declines_7bit),
    ("avx2", "avx2", "vpmaddwd", 256, _declines_dot),
)

# suffix, instruction set, how taps are summed, what explain() calls it
_ARM_DEPTHWISE: tuple[tuple[str, str, str, str], ...] = (
    ("neon_dotprod", "neon_dotprod", "dot", "sdot, udot, usdot over four rows"),
    ("neon", "neon", "pairs", "smull + smlal, saddw"),
    ("armv7_neon", "armv7_neon", "pairs", "vmull + vmlal, vaddw"),
)

# suffix, instruction set, how products are made, what explain() calls it, reasons for no
_ARM_ROWS: tuple[tuple[str, str, str, str, Accepts], ...] = (
    ("neon_i8mm", "neon_i8mm", "mmla", "smmla, usmmla, ummla", _declines_mmla),
    ("neon_usdot", "neon_i8mm", "dot", "usdot by lane", _declines_usdot),
    ("neon_dotprod", "neon_dotprod", "dot", "sdot, udot by lane", _declines_folded),
    ("neon", "neon", "smlal", "4x4 interleaved smull, smlal2, sadalp", _declines_smlal),
    ("neon_full", "neon", "mull", "4x4 interleaved mull, adalp", _declines_folded),
    ("armv7_neon", "armv7_neon", "smlal", "interleaved vmull, vmlal, vpadal", _declines_smlal),
    ("armv7_neon_full", "armv7_neon", "mull", "interleaved vmull, vpadal", _declines_folded),
)

_DOT_ROWS: tuple[tuple[str, str, str, Accepts], ...] = (
    ("avx512_vnni", "avx512_vnni", "dot_1x16x4_u8s8s32_avx512_vnni", _declines_dot),
    ("avx_vnni", "avx_vnni", "dot_1x8x4_u8s8s32_avx_vnni", _declines_dot),
    ("avx512_bw_7bit", "avx512_bw", "dot_1x16x4_u8s8s32_avx512_bw", _declines_7bit),
    ("avx512_bw", "avx512_bw", "dot_1x16x2_s16s16s32_avx512_bw", _always),
    ("avx2_7bit", "avx2", "dot_1x8x4_u8s8s32_avx2", _declines_7bit),
    ("avx2", "avx2", "dot_1x8x2_s16s16s32_avx2", _always),
)

# Instruction set -> lanes. None with vpdpbusd: it makes four products where vpmaddwd makes two, and
# of 36 : 16 nothing is left behind the transforms.
_WINOGRAD = {"avx512_bw": 16, "avx2": 8}

# Instruction sets whose kernels read weights of fewer than 8 bits.
_UNPACKING = ("avx512_vnni", "avx_vnni")


def _dot_rows(stem: str, op: str) -> list[Strategy]:
    """Return the rows of the broadcast dot products, each set's F(2x2, 3x3) before its direct sums.
    """
    rows: list[Strategy] = []
    for suffix, isa, name, declines in _DOT_ROWS:
        tiles = f"{stem}_winograd_{isa}"
        if op == "conv2d" and isa in _WINOGRAD and all(row.name != tiles for row in rows):
            lanes = _WINOGRAD[isa]
            product = f"dot_1x{lanes}x2_s16s16s32_{isa}"
            rows.append(
                Strategy(
                    tiles, op, isa, product, _declines_winograd(lanes), build_winograd(product),
                    transforms=True,
                )
            )
        borders = op == "conv2d" and STATES
        for bits in sorted(PACKED_BITS) if isa in _UNPACKING else ():
            why_not = _declines_packed(bits, declines, _worthwhile(isa))
            rows.append(
                Strategy(
                    f"{stem}_{suffix}_{bits}bit", op, isa, name, why_not, build_dot(name, bits),
                    alone=True, borders=borders, weight_bits=bits,
                )
            )
        rows.append(
            Strategy(
                f"{stem}_{suffix}", op, isa, name, declines, build_dot(name), borders=borders
            )
        )
    return rows


def _rows(op: str) -> tuple[Strategy, ...]:
    """Return the dense rows of conv2d or matmul: they share algorithms, and so the order."""
    stem = "conv2d_nchwc" if op == "conv2d" else op
    return (
        *(
            Strategy(
                f"{stem}_float32_{isa}", f"{op}_float32", isa, "fma by lane", _always,
                build_arm(isa, "fma"),
            )
            for isa in ("neon", "armv7_neon")
        ),
        Strategy(f"{stem}_float32", f"{op}_float32", "generic", "fma", _always, build_vector),
        *(
            Strategy(
                f"{stem}_amx_int8_{bits}bit", op, "amx_int8", "dot_amx_int8",
                _declines_packed(bits, _declines_amx, _worthwhile("amx_int8")),
                partial(build_amx, weight_bits=bits), alone=True, borders=op == "conv2d",
                weight_bits=bits,
            )
            for bits in sorted(PACKED_BITS)
        ),
        Strategy(
            f"{stem}_amx_int8", op, "amx_int8", "dot_amx_int8", _declines_amx, build_amx,
            borders=op == "conv2d",
        ),
        *_dot_rows(stem, op),
        *(
            Strategy(f"{stem}_{suffix}", op, isa, what, declines, build_arm(isa, how))
            for suffix, isa, how, what, declines in _ARM_ROWS
        ),
        Strategy(f"{stem}_generic", op, "generic", "vector multiply-add", _always, build_vector),
    )


def _depthwise_rows(layout: str) -> tuple[Strategy, ...]:
    op = "depthwise" if layout == "nchwc" else "depthwise_nhwc"
    stem, plain = f"depthwise_{layout}", "vector multiply-add"

    def in_lanes(declines: Accepts) -> Accepts:
        return declines if layout == "nchwc" else _nhwc_in_lanes(declines)

    return (
        *(
            Strategy(
                f"{stem}_{suffix}", op, isa, what,
                in_lanes(_declines_depthwise_dot) if how == "dot" else _declines_smlal,
                build_arm_depthwise(how),
            )
            for suffix, isa, how, what in _ARM_DEPTHWISE
        ),
        *(
            Strategy(
                f"{stem}_{suffix}", op, isa, f"{product} over four rows", in_lanes(declines),
                build_x86_depthwise(product, bits), alone=True,
            )
            for suffix, isa, product, bits, declines in _X86_DEPTHWISE
        ),
        Strategy(stem, op, "generic", plain, _always, build_depthwise),
        Strategy(
            f"{stem}_float32", f"{op}_float32", "generic", plain, _always, build_depthwise
        ),
    )


STRATEGIES: tuple[Strategy, ...] = (
    *_depthwise_rows("nchwc"),
    *_depthwise_rows("nhwc"),
    *_rows("conv2d"),
    *_rows("conv2d_nhwc"),
    *_rows("matmul"),
)


def _of_this_arch(row: Strategy, feats: Features) -> bool:
    """Whether the row's instruction set exists on the target's architecture at all."""
    return row.isa == GENERIC or any(isa.name == row.isa for isa in ISAS.get(feats.arch, X86_ISAS))


def _decide(
    op: str, work: Workload, target: Any, layout: str = "NCHWc", plain: bool = False
) -> Decision:
    op += "_nhwc" if layout == "NHWC" else ""
    op += "_float32" if work.is_float else ""
    feats = target if isinstance(target, Features) else features(target)
    declined: list[tuple[str, str]] = []
    for row in STRATEGIES:
        if row.op != op or not (row.weight_bits == 8 or _fit(work, row.weight_bits)):
            continue
        if not _of_this_arch(row, feats):
            if row.weight_bits < 8:
                reason = f"target lacks {row.isa}: on {feats.arch} weights of few bits are bytes"
                declined.append((row.name, reason))
            continue
        reason = row.accepts(work, feats)
        if reason is None and plain and row.transforms:
            reason = "the weight is to lie in a layout of OIHW"
        if reason is None and row.alone and not STATES:
            reason = "this TVM has no statements that bind vectors"
        if reason is None and plain and row.alone:
            reason = "it is a function of its own, and others are to be fused with it"
        if reason is None:
            return Decision(work, row, feats, tuple(declined), layout)
        declined.append((row.name, reason))
    if _has_borders(work):
        borders = (work.out_border, work.residual_border)
        raise ValueError(f"out_border, residual_border are {borders}; allowed by {op}: none")
    raise AssertionError(f"no strategy for {op}: the last row of each operator accepts everything")


LAYOUTS = ("NCHWc", "NHWC")


def conv2d(
    work: Conv2dWorkload, target: Any, layout: str = "NCHWc", plain: bool = False
) -> Decision:
    """Return the decision for a convolution on a Target (or its `Features`).

    Parameters
    ----------
    work : Conv2dWorkload
    target : Target or Features
    layout : str
        "NCHWc", or "NHWC" for tensors that stay as they are.
    plain : bool
        Whether the packed weight must be the weight in a layout of OIHW, as Relay's packed
        operators want it.

    Raises
    ------
    ValueError
        For another layout, or NHWC where it has no kernel (`declines_nhwc`).
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
    if layout == "NHWC" and (reason := declines_nhwc(work)):
        raise ValueError(f"layout is 'NHWC'; allowed for this convolution: NCHWc: {reason}")
    op = "depthwise" if work.is_depthwise else "conv2d"
    return _decide(op, work, target, layout, plain)


def declines_nhwc(work: Conv2dWorkload) -> str | None:
    """Return why a convolution cannot stay in NHWC, or None if it can."""
    if work.is_depthwise:
        return None if work.ic % 4 == 0 else f"{work.ic} channels are no whole number of vectors"
    return None if work.groups == 1 else "the channels of a group are no block of their own"


def matmul(work: MatmulWorkload, target: Any) -> Decision:
    """Return the decision for a dense or batched matmul on a Target (or its `Features`)."""
    return _decide("matmul", work, target)
