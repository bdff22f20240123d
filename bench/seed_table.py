"""``bench seed-table``: the published Cortex-A72 measurements beside our kernels' predictions.

The published numbers are of TVM's Relay strategies on a ResNet-18; ours are predicted cycles of its
convolutions (`bench.predict` with whole layers). Only ratios can be compared: see `caveats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from topi_int8 import strategy
from topi_int8 import target as topi_target

from . import arm_core, predict
from .arm_core import Core
from .shape_lines import find_batch, read_shapes

TARGET = "cortex-a72"
NETWORK = "resnet18"
CLOCK_GHZ = 1.5  # a Raspberry Pi 4's; only scales the column of ms
CORES = 4


@dataclass(frozen=True)
class SeedRow:
    """One row: what was published, and which of our strategies does the same arithmetic.

    Attributes
    ----------
    label : str
    published_ms : float or None
        None for a strategy of ours that has no counterpart.
    dtype : str
        A key of `bench.workloads.DTYPES`.
    strategies : tuple of str
        Names in our table; the first that the target has is taken.
    base : str
        Label of the float32 row its ratio is to.
    """

    label: str
    published_ms: float | None
    dtype: str
    strategies: tuple[str, ...]
    base: str = ""


NCHW, NHWC = "NCHW spatial_pack float32", "NHWC float32"
ROWS = (
    SeedRow(NCHW, 13.29, "f32", ("conv2d_nchwc_float32_neon", "conv2d_nchwc_float32")),
    SeedRow("NCHW spatial_pack int8", 8.27, "u8s8", ("conv2d_nchwc_generic",), NCHW),
    SeedRow("NCHW spatial_pack simd int8", 11.36, "u8s8", ("conv2d_nchwc_neon",), NCHW),
    SeedRow("the same, any weights", None, "u8s8", ("conv2d_nchwc_neon_full",), NCHW),
    SeedRow(NHWC, 35.15, "f32", ("conv2d_nhwc_float32_neon", "conv2d_nhwc_float32")),
    SeedRow(
        "NHWC quantized_interleaved int8", 12.09, "u8s8",
        ("conv2d_nhwc_neon",), NHWC,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class SeedResult:
    """A row's prediction: cycles of all convolutions, or the words for why there are none."""

    row: SeedRow
    strategy: str = ""
    cycles: float | None = None
    macs: int = 0
    note: str = ""


def predict_row(row: SeedRow, core: Core, network: str = NETWORK) -> SeedResult:
    """Return the prediction of a row."""
    feats = topi_target.features(core.target)
    known = {s.name for s in strategy.STRATEGIES if feats.has(s.isa)}
    name = next((name for name in row.strategies if name in known), "")
    if not name:
        return SeedResult(row, note=f"no {' or '.join(row.strategies)} in the table")
    cycles, macs = 0.0, 0
    for shape in read_shapes(find_batch(network), 0):
        found = predict.predict_layer(shape, core, row.dtype, whole=True, force=name)
        if found.whole is None:
            return SeedResult(row, name, note=f"{shape.name}: {found.error}")
        cycles += shape.count * found.whole.cycles
        macs += shape.count * shape.macs
    return SeedResult(row, name, cycles, macs)


def ratios(results: Sequence[SeedResult]) -> dict[str, tuple[float | None, float | None]]:
    """Return, by label, (published, predicted) time of the float32 row over this row's."""
    by_label = {result.row.label: result for result in results}
    found = {}
    for result in results:
        base = by_label.get(result.row.base)
        published = predicted = None
        if base is not None and result.row.published_ms and base.row.published_ms:
            published = base.row.published_ms / result.row.published_ms
        if base is not None and result.cycles and base.cycles:
            predicted = base.cycles / result.cycles
        found[result.row.label] = (published, predicted)
    return found


def caveats(macs: int, peak: float) -> str:
    """Return what a reader must know before comparing.

    Parameters
    ----------
    macs : int
        Of the network's convolutions.
    peak : float
        float32 MACs a cycle of the core, by its model.
    """
    one = macs / peak / (CLOCK_GHZ * 1e6)
    needed = macs / (13.29e-3 * CLOCK_GHZ * 1e9 * CORES)
    return (
        "PREDICTED: llvm-mca's cycles of each block times its executions under qemu; no cache or "
        "branch misses, one core, convolutions only. The published numbers' input size, threads "
        f"and clock are not known to us: {macs / 1e9:.2f} GMACs in float32 at the A72's peak of "
        f"{peak:.0f} MACs/cycle are {one:.0f} ms on one core at {CLOCK_GHZ} GHz and "
        f"{one / CORES:.0f} ms on {CORES}; 13.29 ms would take {needed:.0f} MACs/cycle on each of "
        f"{CORES} cores. So milliseconds cannot be compared, only ratios."
    )


def table(results: Sequence[SeedResult], peak: float) -> Table:
    """Return the rich table."""
    macs = max((result.macs for result in results), default=0)
    out = Table(
        title=f"{NETWORK}'s convolutions on {TARGET}: published beside PREDICTED",
        title_justify="left", header_style="bold", pad_edge=False,
        caption=caveats(macs, peak) if macs else None, caption_justify="left",
    )  # fmt: skip
    out.add_column("published row")
    out.add_column("ours")
    for name in (
        "published ms", "f32/int8", "predicted Mcycles", f"ms at {CLOCK_GHZ} GHz, 1 core",
        "MACs/cycle", "f32/int8 predicted",
    ):  # fmt: skip
        out.add_column(name, justify="right")
    both = ratios(results)
    for result in results:
        published, predicted = both[result.row.label]
        out.add_row(
            result.row.label, result.strategy or result.note,
            f"{result.row.published_ms:.2f}" if result.row.published_ms else "",
            f"{published:.2f}x" if published else "", *_predicted_cells(result),
            f"{predicted:.2f}x" if predicted else "",
        )  # fmt: skip
    return out


def _predicted_cells(result: SeedResult) -> list[str]:
    if result.cycles is None:
        return [result.note if result.strategy else "", "", ""]
    ms = result.cycles / (CLOCK_GHZ * 1e6)
    return [f"{result.cycles / 1e6:,.1f}", f"{ms:,.1f}", f"{result.macs / result.cycles:.2f}"]


def predict_all() -> tuple[list[SeedResult], float]:
    """Return every row's prediction, and the core's float32 peak in MACs a cycle."""
    core = arm_core.choose(TARGET)
    return [predict_row(row, core) for row in ROWS], core.peak(is_float=True)
