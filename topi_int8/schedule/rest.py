# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""A plain CPU schedule (inline, parallel, vectorize) for loop nests that nothing else schedules.

With no tuning and no case for any operator by name:

1. elementwise producers are inlined where that repeats no work;
2. an elementwise block: the innermost loop is vectorized, or loops that walk memory as one row are
   merged into one that LLVM vectorizes; the outer ones run in parallel;
3. a reduction: vectorized over an output axis that is contiguous in every operand (accumulating in
   registers), else over the reduced axis itself (partial sums in vector lanes), else left to LLVM.
"""

from __future__ import annotations

from typing import Any

from intrinsics import compat
from intrinsics.compat import tir

from .rest_analysis import BlockInfo, Iter, NotPlain, analyse

# A two-thread launch costs about a microsecond: as much as this many simple iterations.
_PARALLEL_WORK = 16384
# Iterations of the parallel loop that are enough to balance a few cores; more would add divisions.
_PARALLEL_EXTENT = 16
# Elements of a merged row: beyond this, loop overhead does not show.
_ROW = 512
_VECTOR_BYTES = 64
# Reads of one element by a pooling window of stride 1 (3x3).
_WINDOW = 9
_MIN_LANES = 4
# Accumulator rows of a register tile, when an operand is reused across rows.
_TILE_ROWS = (4, 3, 2)


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def schedule_block(sch: Any, block: Any, reasons: list[str]) -> None:
    """Schedule a block, or add to `reasons` why it keeps its loops."""
    try:
        info = analyse(sch, block)
    except NotPlain as why:
        reasons.append(str(why))
        return
    # Every primitive checks itself, so a failure half way leaves a correct, less fast nest.
    try:
        if info.reduced:
            _reduction(sch, block, info)
        elif info.iters:
            _elementwise(sch, info)
    except compat.ScheduleError as error:
        reasons.append(f"{info.name}: {first_line(error)}")


# ---------------------------------------------------------------- step 1: inline


def inline(sch: Any) -> None:
    """Inline elementwise blocks where that repeats no work."""
    for block in compat.child_blocks(sch):
        try:
            if _worth_inlining(sch, block):
                sch.compute_inline(block)
        except (NotPlain, compat.ScheduleError):
            continue  # its own loop nest is scheduled instead


def _worth_inlining(sch: Any, block: Any) -> bool:
    info = analyse(sch, block)
    if info.reduced or sch.get_output_blocks("root").count(block):
        return False
    consumers = [analyse(sch, consumer) for consumer in sch.get_consumers(block)]
    if not consumers:
        return False
    repeats = len(consumers) > 1 or consumers[0].work > info.work
    if any(consumer.reduced for consumer in consumers):
        # A reduction reads its input again and again; but the border test of a pooling window is
        # cheaper than a padded copy, if it is one test a vector.
        pads = len(consumers) == 1 and info.iters[-1].var not in info.conditions
        few = consumers[0].work <= _WINDOW * info.work
        return not repeats or (pads and few and not info.heavy)
    return not (info.heavy and repeats)


# ---------------------------------------------------------------- shared moves


def _lanes(extent: int | None, itemsize: int) -> int:
    """Return the vector length for a loop: a divisor of its extent; 0 if none is worth it."""
    if extent is None:
        return 0
    most = _VECTOR_BYTES // itemsize
    if extent <= most:
        return extent if extent >= _MIN_LANES else 0
    divisors = [d for d in range(_MIN_LANES, most + 1) if extent % d == 0]
    powers = [d for d in divisors if d & (d - 1) == 0 and d * 2 >= most]
    return max(powers or divisors, default=0)


def _parallel(sch: Any, loops: list[Any], work: int) -> list[Any]:
    """Run the outermost of `loops` in parallel, as many fused as it takes; return what is left."""
    if work < _PARALLEL_WORK or not loops:
        return loops
    extent, count = 1, 0
    for loop in loops:
        dim = sch.get(loop).extent
        if not isinstance(dim, tir.IntImm):
            count += 1
            break
        extent, count = extent * int(dim.value), count + 1
        if extent >= _PARALLEL_EXTENT:
            break
    outer = sch.fuse(*loops[:count]) if count > 1 else loops[0]
    sch.parallel(outer)
    return [outer, *loops[count:]]


# ---------------------------------------------------------------- step 2: elementwise


def _elementwise(sch: Any, info: BlockInfo) -> None:
    lane = info.iters[-1]
    lanes = _lanes(lane.extent, info.itemsize) if _vectorizable(info, lane) else 0
    count = _merge_count(info)
    # Merged and split again, the index of a row is more than TVM's simplifier sees through, and
    # the vector becomes a gather. So: vectors inside one dimension, or one long serial row, which
    # LLVM vectorizes (and better than it splits a vector of 14).
    if lanes and (lanes & (lanes - 1)) == 0 and (count == 1 or lanes * info.itemsize >= 32):
        rest, vector = sch.split(lane.loop, [None, lanes])
        _parallel(sch, [*(it.loop for it in info.iters[:-1]), rest], info.work)
        sch.vectorize(vector)
        return
    outer = [it.loop for it in info.iters[:-count]]
    tail = [it.loop for it in info.iters[-count:]]
    inner = sch.fuse(*tail) if count > 1 else tail[0]
    _parallel(sch, outer or [inner], info.work)


def _merge_count(info: BlockInfo) -> int:
    """Return how many of the last loops to merge: as few as make a row worth its overhead."""
    length = 1
    for count in range(1, info.mergeable() + 1):
        length *= info.iters[-count].extent or _ROW
        if length >= _ROW:
            return count
    return info.mergeable()


def _vectorizable(info: BlockInfo, lane: Iter) -> bool:
    """Return whether vector code, not a scalarised loop, comes of vectorizing over `lane`."""
    if lane.var in info.conditions or info.heavy:  # exp and its like have no vector code in LLVM
        return False
    if any(access.stride(lane.var) != 1 for access in info.stores):
        return False
    return all(access.is_affine(lane.var) for access in info.loads)


# ---------------------------------------------------------------- step 3: reductions


def _reduction(sch: Any, block: Any, info: BlockInfo) -> None:
    lane = info.spatial[-1] if info.spatial else None
    vectorizable = lane is not None and _vectorizable(info, lane)
    if vectorizable and all(a.stride(lane.var) in (0, 1) for a in info.loads) and lane.extent != 1:
        _over_output(sch, block, info, _lanes(lane.extent, info.itemsize))
        return
    along = _contiguous_reduced(info)
    if along is not None and len(info.stores) == 1:
        _over_reduced(sch, block, info, along)
        return
    sch.reorder(*(it.loop for it in (*info.spatial, *info.reduced)))
    _parallel(sch, [it.loop for it in info.spatial], info.work)
    sch.decompose_reduction(block, info.reduced[0].loop)


def _contiguous_reduced(info: BlockInfo) -> Iter | None:
    """Return the reduced variable along which every operand is contiguous or constant."""
    for it in reversed(info.reduced):
        strides = [access.stride(it.var) for access in info.loads]
        if it.var in info.conditions or not _lanes(it.extent, info.itemsize):
            continue
        if 1 in strides and all(stride in (0, 1) for stride in strides):
            return it
    return None


def _tile_rows(info: BlockInfo) -> tuple[Iter, int] | None:
    """Return the output axis to unroll, and by how much: one that some operand does not vary on.

    Its rows then share each load of that operand, as in a matmul or convolution.
    """
    lane = info.spatial[-1]
    if all(access.stride(lane.var) != 0 for access in info.loads):
        return None
    for it in reversed(info.spatial[:-1]):
        reused = any(access.stride(it.var) == 0 for access in info.loads)
        rows = next((r for r in _TILE_ROWS if it.extent and it.extent % r == 0), 0)
        if reused and rows and it.var not in info.conditions:
            return it, rows
    return None


def _over_output(sch: Any, block: Any, info: BlockInfo, lanes: int) -> None:
    """Vectorize over the last output axis; the accumulators are a register tile.

    Without `lanes` the axis is the innermost loop, and LLVM's.
    """
    tile = _tile_rows(info) if lanes else None
    outer, unrolled = [], []
    for it in info.spatial[:-1]:
        if tile is not None and it is tile[0]:
            rest, rows = sch.split(it.loop, [None, tile[1]])
            outer.append(rest)
            unrolled.append(rows)
        else:
            outer.append(it.loop)
    vector = info.spatial[-1].loop
    if lanes:
        rest, vector = sch.split(vector, [None, lanes])
        outer.append(rest)
    reduced = [it.loop for it in info.reduced]
    sch.reorder(*outer, *reduced, *unrolled, vector)
    outer = _parallel(sch, outer, info.work)
    if not lanes:  # a row of odd length: LLVM vectorizes it in place
        sch.decompose_reduction(block, reduced[0])
        return
    _accumulate_locally(sch, block, info, outer[-1])
    _split_off_init(sch, block, reduced[0], vector, unrolled)


def _split_off_init(
    sch: Any, block: Any, at: Any, vector: Any, unrolled: list[Any]
) -> None:
    # In this order: what decompose_reduction leaves behind is no reduction block to vectorize.
    sch.vectorize(vector)
    for loop in unrolled:
        sch.unroll(loop)
    init = sch.get_loops(sch.decompose_reduction(block, at))[-1]
    if sch.get(init).kind == tir.ForKind.SERIAL:
        sch.vectorize(init)


def _accumulate_locally(
    sch: Any, block: Any, info: BlockInfo, loop: Any
) -> None:
    if len(info.stores) != 1:
        return
    store = sch.cache_write(block, 0, "local")
    sch.reverse_compute_at(store, loop)
    innermost = sch.get_loops(store)[-1]
    if sch.get(innermost).extent.value > 1:
        sch.vectorize(innermost)


def _over_reduced(sch: Any, block: Any, info: BlockInfo, along: Iter) -> None:
    """Vectorize over a reduced axis: partial results in vector lanes, reduced at the end."""
    lanes = _lanes(along.extent, info.itemsize)
    others = [it.loop for it in info.reduced if it is not along]
    rest, vector = sch.split(along.loop, [None, lanes])
    spatial = [it.loop for it in info.spatial]
    sch.reorder(*spatial, *others, rest, vector)
    partial = sch.rfactor(vector, factor_axis=len(info.stores[0].indices))
    loops = sch.get_loops(partial)
    outer, reduced, vector = loops[: len(spatial)], loops[len(spatial) : -1], loops[-1]
    outer = _parallel(sch, outer, info.work)
    if outer:
        _accumulate_locally(sch, partial, info, outer[-1])
    _split_off_init(sch, partial, reduced[0], vector, [])
    final = sch.get_loops(block)
    _parallel(sch, final[:-1], info.work // max((along.extent or 1) // lanes, 1))
    sch.decompose_reduction(block, final[-1])
