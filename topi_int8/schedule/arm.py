# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""ARM convolutions: which block of accumulators, for smlal, sdot, smmla and fmla."""

from __future__ import annotations

from intrinsics.arm_dot import ArmBlock, ArmProduct

from ..compute.conv2d import PackedConv2d
from ..compute.weights import window_taps
from ..workload import Conv2dWorkload
from .blocks import BlockPlan
from .stages import divisors

# Vector loads of 16 bytes that one instruction's time hides: two pipes each, on the cores that have
# them (A72, N1, V1); on in-order ones a load is issued beside a product.
_LOAD = 0.5
# Registers of sums that a block may have. LLVM's schedulers keep as many products in flight: of
# more sums some spill.
_SUMS = {"aarch64": 16, "arm": 6}


def wants_flat(work: Conv2dWorkload) -> bool:
    """Whether to compute the image as one row of virtual pixels.

    Rows of fewer than 8 pixels leave a block of them half empty, or half as large as it should be.
    """
    return work.strides == (1, 1) and work.oh > 1 and work.ow < 8


def wants_window(work: Conv2dWorkload, block: int, rows: tuple[int, ...]) -> bool:
    """Whether one step should read all horizontal taps.

    Where a pixel is less than a vector, and the taps side by side, filled up to whole rows of
    weights, are no longer than each of them filled up.

    Parameters
    ----------
    work : Conv2dWorkload
    block : int
        Channels of a data block.
    rows : tuple of int
        Channels that a row of weights may have.
    """
    fits = work.ic <= block < 16 and work.groups == 1 and work.dilation[1] == 1
    if not fits or not 1 < work.kw <= 16:
        return False
    together = min(window_taps(work.kw, block, k) * block for k in rows)
    return together <= min(work.kw * -(-block // k) * k for k in rows)


def choose_step(product: ArmProduct, channels: int, k: int) -> int:
    """Return the channels of one step: at most a vector of them (with fma 4), whole rows of k."""
    limit = {"float32": 4}.get(product.a, 16 if channels % 16 == 0 else 32)
    return max(d for d in range(k, limit + 1, k) if channels % d == 0)


def _cost(product: ArmProduct, pixels: int, n: int) -> float | None:
    """Return the time of a step per product, in products' time; None if registers do not suffice.

    What a core does beside its products: 16-byte loads of both operands (and, with mmla, joining
    pixels in pairs, by the units that multiply).
    """
    vectors = n // 4
    if product.partial:
        sums, products = pixels * n, 3 * pixels * n
        fits = sums <= _SUMS[product.arch]
        beside = 3 * _LOAD * (pixels + n)  # in-order cores start them instead of products, and wait
    elif product.how == "mmla":
        sums, products = pixels * vectors, 2 * pixels * vectors
        fits = sums + pixels + 5 <= product.registers
        beside = _LOAD * (pixels + 4 * vectors) + pixels
    else:
        sums, products = pixels * vectors, 4 * pixels * vectors
        # By lane a product is one instruction; only 32 bits make it two.
        fits = sums + pixels + 2 <= product.registers
        fits &= product.arch == "aarch64" or sums <= _SUMS[product.arch]
        beside = _LOAD * (pixels + 4 * vectors)
    if not fits:
        return None
    # Two pipes times four cycles until a sum can be added to again.
    return (1 + beside / products) * max(1.0, 8 / sums) ** 0.5


def choose_block(
    product: ArmProduct, oh: int, ow: int, out_block: int, crops: bool = False
) -> tuple[int, int, int, int]:
    """Choose the block of accumulators by a cost rule.

    Parameters
    ----------
    product : ArmProduct
    oh, ow : int
        Output rows and columns.
    out_block : int
        Output channels in a channel block.
    crops : bool
        Whether the output is cropped anyhow.

    Returns
    -------
    h, w, n, ow_padded : int
        Rows, columns and channels of the block; the columns padded to whole blocks.
    """
    best: tuple[float, tuple[int, int, int, int]] | None = None
    # Vectors of partial sums by the dozen for one pixel would load a weight for each product.
    most = 8 if product.partial else 64
    for n in (n for n in divisors(out_block, most) if n % 4 == 0):
        for h in divisors(oh, 4):
            for w in range(1, min(ow + 1, product.registers) + 1):
                if product.how == "mmla" and h * w % 2:
                    continue
                cost = _cost(product, h * w, n)
                if cost is None:
                    continue
                padded = -(-ow // w) * w
                # Cropping is another pass over the output; wide blocks over tall ones, whose loads
                # are closer together.
                cost *= padded / ow * (1.0 if crops or padded == ow else 1.05) * (1 + 0.002 * h)
                if best is None or cost < best[0]:
                    best = (cost, (h, w, n, padded))
    if best is None:
        raise ValueError(f"out_block is {out_block}; allowed: multiples of 4")
    return best[1]


def plan(conv: PackedConv2d, product: ArmProduct, h: int, w: int) -> BlockPlan:
    """Return the plan of a convolution whose block of accumulators is chosen.

    Parameters
    ----------
    conv : PackedConv2d
        `lanes` are the block's channels, `k` the product's; `ow_padded` whole blocks.
    product : ArmProduct
    h, w : int
        Rows and columns of the block of accumulators.
    """
    step = choose_step(product, conv.step_block, conv.k)
    sh, sw = conv.work.strides
    block = ArmBlock(
        product, h, w, conv.lanes, step, conv.k, stride_h=sh,
        stride_w=sw * conv.in_block if conv.window else sw, window=conv.window,
    )  # fmt: skip
    rolled = "all" if product.arch == "arm" else "whole"
    return BlockPlan(conv, block, vector=16, rolled=rolled)
