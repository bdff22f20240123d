"""``bench conv --model mca``: each layer's kernel compiled for another core, and predicted.

The strategy table's kernel is compiled for the target, and llvm-mca says how many cycles its inner
loop takes (`bench.mca`); nothing is executed. With ``--whole`` QEMU counts how often each block of
the kernel runs (`bench.emulated`): cycles of the whole layer. All of it is a prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm.target import Target

from topi_int8 import strategy
from topi_int8 import target as topi_target
from topi_int8.workload import Conv2dWorkload

from . import emulated, mca, workloads
from .arm_core import Core
from .shape_lines import Shape

MODELS = ("mca",)
# Percent of the instruction mix's own bound that a dense layer's inner loop is to reach.
GOALS = {"neon": 85.0, "neon_dotprod": 85.0, "neon_i8mm": 80.0}

COLUMNS = (
    "name", "line", "count", "macs", "strategy", "intrinsic", "predicted_cycles", "loop_macs",
    "macs_per_cycle", "mix_peak", "percent_of_mix", "percent_of_issue", "percent_of_core",
    "loads_per_kmac", "stores_per_kmac", "load_bytes_per_mac", "spills", "layer_cycles",
    "layer_instructions", "layer_macs_per_cycle", "layer_inner_share", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """One layer, predicted.

    Attributes
    ----------
    strategy, intrinsic : str
        What the table chose for the target.
    analysis : bench.mca.Analysis or None
        None when the kernel failed to compile or the model to run; `error` then says how.
    core_peak : float or None
        MACs a cycle of the core's best stream for this kind of kernel.
    whole : bench.emulated.WholeKernel or None
        The whole layer on one core, where it was asked for.
    """

    shape: Shape
    strategy: str = ""
    intrinsic: str = ""
    declined: tuple[tuple[str, str], ...] = ()
    analysis: mca.Analysis | None = None
    core_peak: float | None = None
    whole: emulated.WholeKernel | None = None
    error: str = ""
    asm: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.analysis is None and not self.error:
            raise ValueError("error is ''; allowed: the reason, when there is no analysis")

    @property
    def core_percent(self) -> float | None:
        """Share of the core's best stream, in percent."""
        if self.analysis is None or not self.core_peak:
            return None
        return 100 * self.analysis.inner.macs_per_cycle / self.core_peak

    def record(self) -> dict[str, Any]:
        """Return the row of the CSV and JSON."""
        values: dict[str, Any] = dict.fromkeys(COLUMNS)
        values |= {
            "name": self.shape.name, "line": self.shape.format(), "count": self.shape.count,
            "macs": self.shape.macs, "strategy": self.strategy, "intrinsic": self.intrinsic,
            "error": self.error,
        }  # fmt: skip
        if self.whole is not None:
            values |= {
                "layer_cycles": self.whole.cycles, "layer_instructions": self.whole.instructions,
                "layer_macs_per_cycle": self.shape.macs / self.whole.cycles,
                "layer_inner_share": self.whole.inner,
            }  # fmt: skip
        if self.analysis is not None:
            inner = self.analysis.inner
            values |= {
                "predicted_cycles": inner.cycles, "loop_macs": inner.macs,
                "macs_per_cycle": inner.macs_per_cycle, "mix_peak": inner.peak_macs_per_cycle,
                "percent_of_mix": inner.percent, "percent_of_issue": inner.issue_percent,
                "percent_of_core": self.core_percent,
                "loads_per_kmac": 1000 * inner.loads / inner.macs,
                "stores_per_kmac": 1000 * inner.stores / inner.macs,
                "load_bytes_per_mac": inner.load_bytes / inner.macs,
                "spills": self.analysis.spills,
            }  # fmt: skip
        return values


# ---------------------------------------------------------------- a layer


def compile_layer(workload: workloads.Workload, target: Target, force: str = "") -> tuple[Any, Any]:
    """Return (decision, module) of the kernel that the strategy table chooses, or of `force`'s.

    Raises
    ------
    ValueError
        When the forced strategy is unknown, or declines.
    """
    if force:
        decision = _forced(workload, target, force)
    else:
        table = strategy.conv2d if isinstance(workload, Conv2dWorkload) else strategy.matmul
        decision = table(workload, target)
    func = decision.kernel().func.with_attr("global_symbol", "main")
    return decision, tvm.compile(tvm.IRModule({"main": func}), target=target)


def _forced(workload: workloads.Workload, target: Target, name: str) -> strategy.Decision:
    row = next((row for row in strategy.STRATEGIES if row.name == name), None)
    if row is None:
        raise ValueError(f"strategy is {name!r}; allowed: a name of the strategy table")
    feats = topi_target.features(target)
    if reason := row.accepts(workload, feats):
        raise ValueError(f"{name} declines: {reason}")
    layout = "NHWC" if "_nhwc" in row.op else "NCHWc"
    if layout == "NHWC" and (reason := strategy.declines_nhwc(workload)):
        raise ValueError(f"{name} declines: {reason}")
    return strategy.Decision(workload, row, feats, (), layout)


def predict_layer(
    shape: Shape,
    core: Core,
    dtype: str = "u8s8",
    epilogue: str = "",
    weight_bits: int = 8,
    whole: bool = False,
    force: str = "",
) -> Prediction:
    """Return the prediction for one layer. What fails is said in it, not raised.

    With `whole` the kernel runs once under QEMU, which says how often each block is executed;
    `force` names a strategy to take in place of the table's first.
    """
    chosen: dict[str, Any] = {}
    try:
        workload = workloads.make(shape, dtype, epilogue, weight_bits)
        decision, module = compile_layer(workload, core.target, force)
        chosen = {
            "strategy": decision.strategy, "intrinsic": decision.intrinsic,
            "declined": tuple(decision.declined), "asm": module.mod.inspect_source("asm"),
        }  # fmt: skip
        found = mca.analyse_asm(chosen["asm"], core.mcpu, core.triple, is_float=dtype == "f32")
        if whole:
            tensors = emulated.tensor_arguments(decision.kernel().func)
            executed = emulated.execute(chosen["asm"], tensors, core.qemu_cpu, blocks=True)
            chosen["whole"] = emulated.predict_cycles(chosen["asm"], executed, core.mcpu)
        return Prediction(shape, analysis=found, core_peak=core.peak(dtype == "f32"), **chosen)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        return Prediction(shape, error=f"{type(error).__name__}: {words[0]}", **chosen)


def predict_layers(shapes: list[Shape], core: Core, **options: Any) -> Iterator[Prediction]:
    """Yield each layer's prediction."""
    for shape in shapes:
        yield predict_layer(shape, core, **options)


def is_dense_conv(prediction: Prediction) -> bool:
    """Whether the goals are set for this layer: convolutions 1x1 and 3x3, not grouped, no stem."""
    shape = prediction.shape
    if shape.kind != "conv" or shape.g != 1 or shape.ic < 16:
        return False
    return (shape.h.k, shape.w.k) in ((1, 1), (3, 3))


def misses(prediction: Prediction, goal: float | None) -> bool:
    """Whether a layer with a goal is below it, or any layer spills."""
    if prediction.analysis is None:
        return True
    below = goal is not None and prediction.analysis.inner.percent < goal
    return bool(prediction.analysis.spills) or (below and is_dense_conv(prediction))
