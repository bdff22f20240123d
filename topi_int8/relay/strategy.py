"""Our implementations in Relay's op strategies, above upstream's, which all stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.relay.op import op as relay_op
from tvm.relay.op.strategy import arm_cpu, generic, x86
from tvm.target import Target

from ..kernel import Kernel
from ..strategy import Decision
from ..target import features, is_supported
from ..workload import INT8_DTYPES
from . import call, te_compute, te_schedule
from .call import NotOurs, Request

PLEVEL = 20  # upstream's best is 15
SUFFIX = ".topi_int8"
UPSTREAM_DENSE = "NC16n4c"  # the packed weight that upstream's dense and ours share

# What may be known of a weight. Only a packed one is proven, by who packed it: its layout says so.
_RANGES = (None, *call.PROOFS)

Strategy = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class _Slot:
    """The strategy function of one operator for one target key.

    Parameters
    ----------
    op : str
        Name of the Relay operator.
    generic : callable
        Relay's generic function, in which strategies are registered by key.
    key : str
        "cpu" or "arm_cpu".
    upstream : callable
        What upstream registered there.
    """

    op: str
    generic: Any
    key: str
    upstream: Strategy

    def install(self) -> Callable[[], None]:
        """Register ours; return what registers upstream's again."""
        self.generic.register(self.key, self.strategy, override=True)
        return lambda: self.generic.register(self.key, self.upstream, override=True)

    def strategy(self, attrs: Any, inputs: Any, out_type: Any, target: Any) -> Any:
        """Return upstream's strategy with our implementation added, where we have one."""
        found = implementation(self.op, attrs, inputs, out_type, target)
        if found is None and self.key == "cpu" and _is_dynamic_int8(inputs[0]):
            # Upstream's int8 schedules raise; those for a CPU without such instructions do not.
            with Target("llvm") as plain:
                return self.upstream(attrs, inputs, out_type, plain)
        if found is None:
            return self.upstream(attrs, inputs, out_type, target)
        only_ours, compute, schedule, name = found
        strategy = relay_op.OpStrategy()
        if not only_ours:
            strategy = self.able(attrs, inputs, out_type, target)
        strategy.add_implementation(compute, schedule, name=name, plevel=PLEVEL)
        return strategy

    def able(self, attrs: Any, inputs: Any, out_type: Any, target: Any) -> Any:
        """Return upstream's strategy without the implementations that fail on this call.

        Relay asks each for its computation before it compares them, and some raise: int8
        convolutions with dilation (IndexError), operands of different types (AssertionError).
        """
        kept = relay_op.OpStrategy()
        try:
            specializations = self.upstream(attrs, inputs, out_type, target).specializations
        except (AssertionError, RuntimeError, ValueError):
            return kept
        for implementation in (one for spec in specializations for one in spec.implementations):
            try:
                with target:
                    implementation.compute(attrs, inputs, out_type)
            except (AssertionError, IndexError, RuntimeError, ValueError):
                continue
            kept.add_implementation(
                implementation.compute, implementation.schedule, implementation.name,
                implementation.plevel,
            )  # fmt: skip
        return kept


@dataclass(frozen=True)
class Choice:
    """Our kernel for a call."""

    request: Request
    decision: Decision
    kernel: Kernel

    @property
    def name(self) -> str:
        """Name of the implementation."""
        return self.decision.strategy + SUFFIX


def _is_dynamic_int8(data: Any) -> bool:
    try:
        call.shape_of(data)
    except NotOurs:
        return str(data.dtype) in INT8_DTYPES
    return False


def choose(op: str, attrs: Any, inputs: Any, out_type: Any, target: Any) -> Choice:
    """Return our kernel for a call, as `relay.build` asks for it.

    Parameters
    ----------
    op : str
        Name of the Relay operator.
    attrs : tvm.ir.Attrs
    inputs : list of te.Tensor
    out_type : relay.TensorType
    target : Target

    Raises
    ------
    NotOurs
        When we have none; upstream's then runs.
    """
    if not is_supported(target):
        raise NotOurs("the target is no LLVM CPU")
    feats, refusals = features(target), []
    for weight_range in _RANGES if op in call.PACKED_OPS else (None,):
        try:
            req = call.request(op, attrs, *inputs[:2], str(out_type.dtype), weight_range)
            decision = req.decide(feats)
            kernel = req.kernel(decision)
            if not te_schedule.supports(kernel.plan):
                raise NotOurs("TE has no schedule for it")
            te_compute.lower(req, kernel, *inputs[:2])
            return Choice(req, decision, kernel)
        except NotOurs as refusal:
            refusals.append(refusal)
    raise refusals[0]


def implementation(
    op: str, attrs: Any, inputs: Any, out_type: Any, target: Any
) -> tuple[bool, Callable, Callable, str] | None:
    """Return (no other can compute it, compute, schedule, name) for a call, or None."""
    try:
        chosen = choose(op, attrs, inputs, out_type, target)
    except NotOurs:
        return None
    req, kernel = chosen.request, chosen.kernel
    # Upstream's implementations would misread, or refuse, a weight in a layout of our own.
    only_ours = req.packed and req.kernel_layout != UPSTREAM_DENSE
    made: list[Any] = []  # the call in TE, once Relay has asked for it

    def compute(_attrs: Any, tensors: Any, _out_type: Any) -> list[Any]:
        made[:] = [te_compute.lower(req, kernel, *tensors[:2])]
        return [made[0].out]

    def schedule(_attrs: Any, outs: Any, at: Any) -> Any:
        with at:
            return te_schedule.schedule(kernel.plan, made[0], list(outs))

    return only_ours, compute, schedule, chosen.name


SLOTS: tuple[_Slot, ...] = (
    _Slot(call.CONV2D, generic.conv2d_strategy, "cpu", x86.conv2d_strategy_cpu),
    _Slot(call.CONV2D, generic.conv2d_strategy, "arm_cpu", arm_cpu.conv2d_strategy_arm_cpu),
    _Slot(
        call.CONV2D_PACKED, generic.conv2d_NCHWc_strategy, "cpu", x86.conv2d_NCHWc_strategy_cpu
    ),
    _Slot(
        call.CONV2D_PACKED, generic.conv2d_NCHWc_strategy, "arm_cpu",
        arm_cpu.conv2d_NCHWc_strategy_arm_cpu,
    ),
    _Slot(
        call.CONV2D_TRANSFORMED, generic.conv2d_winograd_without_weight_transform_strategy, "cpu",
        x86.conv2d_winograd_without_weight_transform_strategy_cpu,
    ),
    _Slot(
        call.DEPTHWISE_PACKED, generic.depthwise_conv2d_NCHWc_strategy, "cpu",
        x86.depthwise_conv2d_NCHWc_strategy_cpu,
    ),
    _Slot(
        call.DEPTHWISE_PACKED, generic.depthwise_conv2d_NCHWc_strategy, "arm_cpu",
        arm_cpu.depthwise_conv2d_NCHWc_strategy_arm_cpu,
    ),
    _Slot(call.DENSE, generic.dense_strategy, "cpu", x86.dense_strategy_cpu),
    _Slot(call.DENSE, generic.dense_strategy, "arm_cpu", arm_cpu.schedule_dense_arm_cpu),
    _Slot(call.DENSE_PACKED, generic.dense_pack_strategy, "cpu", x86.dense_pack_strategy_cpu),
    _Slot(call.BATCH_MATMUL, generic.batch_matmul_strategy, "cpu", x86.batch_matmul_strategy_cpu),
)  # fmt: skip

