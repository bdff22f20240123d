"""The pass order, strung together: what `tvm.compile` runs for an LLVM CPU target while we are
enabled.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.relax.backend.cpu_generic import pipeline as cpu_generic
from tvm.target import Target

from ..target import features
from .convert_layout import ConvertLayout
from .detach_weights import DetachWeights
from .fold_batch_norm import FoldBatchNorm
from .fold_pad import FoldPad
from .fuse_concat import FuseConcat
from .fuse_dynamic import FuseDynamic
from .fuse_elementwise import FuseElementwise
from .fuse_float import FuseFloat
from .fuse_qdq import FuseQDQ
from .keep_borders import KeepBorders
from .lower import Lower
from .schedule_rest import ScheduleRest
from .sign_activations import SignActivations
from .split_batch import SplitBatch


def integer_passes(target: Target, layout: str = "NCHWc") -> list[tvm.transform.Pass]:
    """Return the passes from a user's graph to topi_int8 operators in the kernels' layouts."""
    return [
        FoldBatchNorm(), SignActivations(target), FuseElementwise(), FuseDynamic(), FuseQDQ(),
        FuseFloat(), FoldPad(), ConvertLayout(target, layout), FuseConcat(),
    ]  # fmt: skip


def pipeline(
    target: Target,
    layout: str = "NCHWc",
    weights: dict[str, tvm.runtime.Tensor] | None = None,
) -> tvm.transform.Pass:
    """Return the whole Relax pipeline for a target: ours, then TVM's own for what is left.

    Parameters
    ----------
    target : Target or str or dict
        An ``llvm`` CPU target.
    layout : str
        "NCHWc" packs every convolution's channels, whatever layout it is given in. "NHWC" leaves
        convolutions that are given in NHWC there, where that has a kernel: no transforms at a
        region's borders, for graphs of few convolutions.
    weights : dict of str to Tensor, optional
        Where given, large constants go into it by name, and not into the module: see
        `DetachWeights`, and `export`, which writes them.

    Raises
    ------
    ValueError
        For a target that is not an LLVM CPU, or another layout.
    """
    target = Target(target) if not isinstance(target, Target) else target
    features(target)  # refuses what is no LLVM CPU, before anything is built
    ConvertLayout(target, layout)  # refuses another layout

    @tvm.transform.module_pass(opt_level=0, name="topi_int8.pipeline")
    def run(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        passes = [
            *cpu_generic.library_dispatch_passes(target),
            *integer_passes(target, layout),
            KeepBorders(target),
            SplitBatch(target),
            Lower(target, layout),
            *cpu_generic.legalize_passes(target),
            ScheduleRest(target),
            *([] if weights is None else [DetachWeights(weights)]),
            *cpu_generic.dataflow_lower_passes(target),
            *cpu_generic.finalize_passes(target),
        ]
        with target:
            return tvm.transform.Sequential(passes)(mod)

    return run
