"""Lower: topi_int8 operators -> call_tir of scheduled PrimFuncs, operands packed at compile time.

Convolutions and matmuls get the strategy table's kernel; constant weights, biases (with the zero
point's compensation) and multipliers are packed here, others by a small function at run time. The
operators between them become TE that TVM's own FuseOps may merge and `ScheduleRest` schedules.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.target import Target

from intrinsics import byte_lookup

from .. import op, strategy
from ..compute import elementwise, pack
from ..compute.conv2d import PackedConv2d
from ..compute.depthwise import PackedDepthwise
from ..kernel import Blocks, Kernel, MatmulPacking
from ..layout import Layout
from ..schedule.concat import Concat
from ..schedule.lookup import Lookup
from ..strategy import Decision
from ..target import Features, features
from ..workload import INT8_DTYPES, Epilogue, with_known_bounds
from .convert_layout import ConvertLayout

_OPAQUE = 8  # relax OpPatternKind.kOpaque


@tvm.transform.module_pass(opt_level=0, name="topi_int8.Lower")
class Lower:
    """Replace every topi_int8 operator by calls of scheduled functions.

    Convolutions that ConvertLayout has not visited are given packed layouts first.

    Parameters
    ----------
    target : Target
        Chooses the strategies. No kernel uses an instruction the target does not name.
    layout : str
        As ConvertLayout's.
    """

    def __init__(self, target: Target, layout: str = "NCHWc") -> None:
        self.target = target
        self.feats = features(target)
        self.layout = layout

    def transform_module(self, mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        """Return the lowered module; the argument is not changed."""
        mod = ConvertLayout(self.target, self.layout)(mod)
        lowering = _Lowering(mod, self.feats)
        for name, func in mod.functions_items():
            if isinstance(func, relax.Function):
                lowering.asked_permission = False
                lowering.builder_.update_func(name, lowering.visit_expr(func))
        return lowering.builder_.finalize()


def decide(call: relax.Call, feats: Features) -> Decision:
    """Return the strategy table's decision for a `topi_int8.conv2d` or `topi_int8.matmul` call."""
    is_conv = op.is_op(call, "conv2d")
    work = op.conv2d_workload(call) if is_conv else op.matmul_workload(call)
    weight = call.args[1]
    if isinstance(weight, GenericConst) and not work.is_float:
        values = weight.value.numpy()
        work = replace(work, weight_range=(int(values.min()), int(values.max())))
        named = op.operands(call)
        bias, scale = (_constant(named[name]) for name in ("bias", "scale"))
        work = with_known_bounds(work, _oihw(values, op.attrs_of(call)), bias, scale)
    if is_conv:
        return strategy.conv2d(work, feats, "NHWC" if is_nhwc(call) else "NCHWc")
    return strategy.matmul(work, feats)


def _constant(expr: Any) -> np.ndarray | None:
    """Return the value of a constant, None for anything else."""
    return expr.value.numpy() if isinstance(expr, GenericConst) else None


def is_nhwc(call: relax.Call) -> bool:
    """Whether a `topi_int8.conv2d` call was left in NHWC by ConvertLayout."""
    return op.attrs_of(call)["data_layout"] == op.attrs_of(call)["out_layout"] == "NHWC"


def blocks_of(call: relax.Call) -> Blocks:
    """Return the channel blocks of a packed `topi_int8.conv2d` call."""
    attrs = op.attrs_of(call)
    return Blocks(*(Layout.parse(attrs[f"{of}_layout"]).block for of in ("data", "out")))


def opaque(func: Any) -> Any:
    """Return a scheduled function as one that FuseOps leaves alone."""
    return func.with_attr({"op_pattern": _OPAQUE}).without_attr("global_symbol")


# The operators; the method of the same name lowers each.
_LOWERED = (
    "conv2d", "matmul", "add", "affine", "multiply", "requantize", "lookup", "avg_pool2d",
    "concat", "layout_transform",
)  # fmt: skip


@mutator
class _Lowering(PyExprMutator):
    """The rewrite, one function at a time."""

    def __init__(self, mod: tvm.IRModule, feats: Features) -> None:
        super().__init__(mod)
        self.feats = feats
        self.asked_permission = False

    def visit_seq_expr_(self, seq: relax.SeqExpr) -> relax.Expr:
        """Permission that a branch asked for is not there when another one ran."""
        before = self.asked_permission
        result = super().visit_seq_expr_(seq)
        self.asked_permission = before
        return result

    def visit_call_(self, call: relax.Call) -> Any:
        """Lower a call of ours; every other call stays."""
        call = super().visit_call_(call)
        for name in _LOWERED:
            if op.is_op(call, name):
                return getattr(self, name)(call)
        _refuse_packed(call)
        return self.quantize(call)

    # ------------------------------------------------------------ conv2d and matmul

    def kernel(self, decision: Decision, blocks: Blocks | None) -> tuple[Kernel, Any]:
        """Return the kernel and the GlobalVar of its function, added to the module."""
        uses_amx = "amx" in decision.strategy
        kernel = decision.kernel(blocks, ask_permission=uses_amx and not self.asked_permission)
        self.asked_permission |= uses_amx
        return kernel, self.builder_.add_func(opaque(kernel.func), decision.strategy)

    def pack_operands(self, call: relax.Call, kernel: Kernel) -> list[Any]:
        """Return the packed [weight, (bias), (scale)] of a call."""
        named, attrs = op.operands(call), op.attrs_of(call)
        weight, bias, scale = named["weight"], named["bias"], named["scale"]
        constant = isinstance(weight, GenericConst)
        raw = _oihw(weight.value.numpy(), attrs) if constant else None
        if constant:
            args = [relax.const(kernel.pack_weight(raw))]
        else:
            args = [self._weight_at_run_time(weight, kernel, attrs)]
        if kernel.takes_bias and constant and (bias is None or isinstance(bias, GenericConst)):
            values = None if bias is None else bias.value.numpy().reshape(-1)
            args.append(relax.const(kernel.pack_bias(values, raw)))
        elif kernel.takes_bias:
            args.append(self._bias_at_run_time(weight, bias, kernel, attrs))
        if scale is not None:
            if not isinstance(scale, GenericConst):
                raise ValueError(f"scale of {call.op.name} is {scale}; allowed: a constant")
            args.append(relax.const(kernel.pack_scale(scale.value.numpy().reshape(-1))))
        return args

    def _weight_at_run_time(self, weight: Any, kernel: Kernel, attrs: dict) -> Any:
        """Emit the function that packs a weight known only at run time."""
        packing = kernel.packing
        conv = packing.conv if isinstance(packing, MatmulPacking) else packing
        depthwise = isinstance(packing, PackedDepthwise)
        packer = pack.pack_depthwise_weight if depthwise else pack.pack_weight
        return self.builder_.emit_te(
            lambda w: packer(conv, _te_oihw(packing, w)),
            self.builder_.normalize(_oihw_expr(weight, attrs)),
            primfunc_name_hint="pack_weight",
        )

    def _bias_at_run_time(self, weight: Any, bias: Any, kernel: Kernel, attrs: dict) -> Any:
        """Emit the function that packs a bias, or a weight's compensation, known only at run time.
        """
        if bias is not None and str(bias.ty.dtype) not in ("int32", "float32"):
            raise ValueError(f"bias dtype is {bias.ty.dtype}; allowed: int32, float32")
        packing = kernel.packing
        conv = packing.conv if isinstance(packing, MatmulPacking) else packing
        padded = conv if isinstance(conv, PackedConv2d) else conv.padded

        def bias_te(w: Any, *b: Any) -> Any:
            return pack.pack_bias(padded, _te_oihw(packing, w), b[0] if b else None)

        operands = [self.builder_.normalize(_oihw_expr(weight, attrs))]
        operands += [] if bias is None else [bias]
        return self.builder_.emit_te(bias_te, *operands, primfunc_name_hint="pack_bias")

    def conv2d(self, call: relax.Call) -> Any:
        """Lower a packed convolution."""
        attrs, named, shape = op.attrs_of(call), op.operands(call), op.shape_of(call)
        blocks = None if is_nhwc(call) else blocks_of(call)
        kernel, func = self.kernel(decide(call, self.feats), blocks)

        def view(expr: Any) -> Any:
            """NHWC is a packed layout of one block: (n, 1, h, w, c)."""
            return expr if blocks else self.reshape(expr, _with_block(op.shape_of(expr)))

        args = [view(named["data"]), *self.pack_operands(call, kernel)]
        if named["residual"] is not None:
            args.append(view(named["residual"]))
        kernel_shape = shape if blocks else _with_block(shape)
        out_type = relax.TensorType(kernel_shape, attrs["out_dtype"])
        out = relax.call_tir(func, args, out_ty=out_type)
        return out if blocks else relax.op.reshape(self.builder_.emit(out), shape)

    def reshape(self, expr: Any, shape: tuple[int, ...]) -> Any:
        """Emit a view of a tensor."""
        return self.builder_.emit(relax.op.reshape(expr, shape))

    def matmul(self, call: relax.Call) -> Any:
        """Lower a matmul: its tensors are seen as the five-dimensional ones of a convolution."""
        named, shape = op.operands(call), op.shape_of(call)
        decision = decide(call, self.feats)
        work = decision.work
        kernel, func = self.kernel(decision, None)

        def view(expr: Any, width: int) -> Any:
            return self.reshape(expr, (1, work.batch, 1, work.m, width))

        args = [view(named["data"], work.k), *self.pack_operands(call, kernel)]
        if named["residual"] is not None:
            args.append(view(named["residual"], work.n))
        out_type = relax.TensorType((1, work.batch, 1, work.m, work.n), work.epilogue.out_dtype)
        out = self.builder_.emit(relax.call_tir(func, args, out_ty=out_type))
        return relax.op.reshape(out, shape)

    # ------------------------------------------------------------ the rest

    def add(self, call: relax.Call) -> Any:
        """Lower a quantized add."""
        attrs = op.attrs_of(call)
        return self.builder_.call_te(
            lambda a, b: elementwise.add(a, b, attrs), *call.args, primfunc_name_hint="qadd"
        )

    def affine(self, call: relax.Call) -> Any:
        """Lower a requantize with a scale and a bias a channel."""
        attrs = op.attrs_of(call)
        return self.builder_.call_te(
            lambda x, scale, bias: elementwise.affine(x, scale, bias, attrs),
            *call.args,
            primfunc_name_hint="affine",
        )

    def multiply(self, call: relax.Call) -> Any:
        """Lower a quantized product."""
        attrs = op.attrs_of(call)
        return self.builder_.call_te(
            lambda a, b: elementwise.multiply(a, b, attrs),
            *call.args,
            primfunc_name_hint="qmultiply",
        )

    def lookup(self, call: relax.Call) -> Any:
        """Lower a table lookup: its tensor is one row of bytes, whatever the layout."""
        data, table = call.args
        shape, dtype = op.shape_of(data), str(call.ty.dtype)
        shuffle = byte_lookup.best(self.feats.arch, self.feats.llvm)
        kernel = Lookup(math.prod(shape), str(data.ty.dtype), dtype, shuffle)
        func = self.builder_.add_func(opaque(kernel.schedule()), "lookup")
        args = [
            self.reshape(data, (kernel.size,)),
            relax.const(kernel.pack_table(table.value.numpy())),
        ]
        out = relax.call_tir(func, args, out_ty=relax.TensorType((kernel.size,), dtype))
        return relax.op.reshape(self.builder_.emit(out), shape)

    def concat(self, call: relax.Call) -> Any:
        """Lower a concat of packed tensors, and the affine in it."""
        attrs = op.attrs_of(call)
        parts = call.args[: len(attrs["channels"])]
        n, _, h, w, _ = op.shape_of(parts[0])
        epilogue = None
        if attrs["affine"]:
            fields = ("out_dtype", "out_zero_point", "clip_min", "clip_max")
            epilogue = Epilogue(scale=True, **{k: attrs[k] for k in fields if k in attrs})
        kernel = Concat(
            n, h, w, attrs["channels"], tuple(op.shape_of(part)[-1] for part in parts),
            attrs["out_block"], str(parts[0].ty.dtype), epilogue, attrs.get("zero_point", 0),
        )  # fmt: skip
        vectors = [
            relax.const(vector.value.numpy().reshape(kernel.out_shape[1], kernel.out_block))
            for vector in call.args[len(parts) :]
        ]
        func = self.builder_.add_func(opaque(kernel.schedule()), "concat")
        return relax.call_tir(func, [*parts, *vectors], out_ty=call.ty)

    def quantize(self, call: relax.Call) -> Any:
        """Lower ``relax.quantize`` of float32 to 8 bits, half to even; return other calls as is.

        TVM's own legalization rounds half away from zero.
        """
        if op.op_name(call) != "relax.quantize":
            return call
        params = [a.value.numpy() for a in call.args[1:] if isinstance(a, GenericConst)]
        dtype, source = str(call.attrs.out_dtype), str(call.args[0].ty.dtype)
        if source != "float32" or dtype not in INT8_DTYPES:
            return call
        if len(params) == 2 and all(p.size == 1 for p in params):
            scale, zero_point = params[0].item(), int(params[1].item())
            return self.builder_.call_te(
                lambda x: elementwise.quantize(x, scale, zero_point, dtype),
                call.args[0],
                primfunc_name_hint="quantize",
            )
        axis = int(call.attrs.axis)
        return self.builder_.call_te(
            lambda *tensors: elementwise.quantize_along(*tensors, axis, dtype),
            *call.args,
            primfunc_name_hint="quantize",
        )

    def requantize(self, call: relax.Call) -> Any:
        """Lower a requantize."""
        attrs = op.attrs_of(call)
        return self.builder_.call_te(
            lambda x: elementwise.requantize(x, attrs), *call.args, primfunc_name_hint="requantize"
        )

    def avg_pool2d(self, call: relax.Call) -> Any:
        """Lower an integer average pool."""
        attrs, shape = op.attrs_of(call), op.shape_of(call)
        return self.builder_.call_te(
            lambda x: elementwise.avg_pool2d(x, attrs, shape),
            *call.args,
            primfunc_name_hint="avg_pool2d",
        )

    def layout_transform(self, call: relax.Call) -> Any:
        """Lower a layout transform."""
        attrs = op.attrs_of(call)
        src, dst = Layout.parse(attrs["src_layout"]), Layout.parse(attrs["dst_layout"])
        return self.builder_.call_te(
            lambda x: elementwise.layout_transform(
                x, src, dst, attrs["channels"], attrs["pad_value"]
            ),
            *call.args,
            primfunc_name_hint="layout_transform",
        )


def _te_oihw(packing: Any, weight: Any) -> Any:
    """Return a weight in TE as the packers take it."""
    if not isinstance(packing, MatmulPacking):
        return weight
    work = packing.work
    return pack.matmul_weight_as_oihw(
        weight, work.batch, work.n, work.k, packing.conv.out_block, work.transpose_b,
        work.weight_zero_point,
    )  # fmt: skip


def _refuse_packed(call: relax.Call) -> None:
    """Raise ValueError for a packed convolution that is left: TVM has no kernel for it either."""
    if op.op_name(call) != "relax.nn.conv2d":
        return
    layout = str(call.attrs.data_layout)
    if len(layout) > 4:
        raise ValueError(
            f"relax.nn.conv2d in {layout} has data {call.args[0].ty} and weight {call.args[1].ty}; "
            "allowed in packed layouts: static shapes, uint8 or int8 operands, out_dtype int32"
        )


def _with_block(nhwc: tuple[int, ...]) -> tuple[int, ...]:
    return (nhwc[0], 1, *nhwc[1:])


def _oihw(weight: np.ndarray, attrs: dict[str, Any]) -> np.ndarray:
    """Return a conv2d weight as OIHW, a matmul weight as (.., N, K)."""
    if "kernel_layout" in attrs:
        layout = attrs["kernel_layout"]
        return np.ascontiguousarray(weight.transpose([layout.index(axis) for axis in "OIHW"]))
    return weight if attrs["transpose_b"] else np.ascontiguousarray(weight.swapaxes(-1, -2))


def _oihw_expr(weight: Any, attrs: dict[str, Any]) -> Any:
    """Return a conv2d weight expression as OIHW; a matmul's with at most one batch dimension."""
    if "kernel_layout" not in attrs:
        *lead, rows, columns = op.shape_of(weight)
        if len(lead) <= 1:
            return weight
        return relax.op.reshape(weight, (math.prod(lead), rows, columns))
    layout = attrs["kernel_layout"]
    if layout == "OIHW":
        return weight
    return relax.op.permute_dims(weight, [layout.index(axis) for axis in "OIHW"])
