"""FoldPad: a pad before a convolution or pooling -> the operator's own padding.

Importers write borders as operators of their own where a framework's two ways of padding cannot
say them, such as TFLite's for a stride of 2. As an operator it costs a copy of the tensor, and no
convolution before it can write the border (`KeepBorders`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from .. import op
from ..op import op_name
from ._qdq_graph import Graph, rewrite_functions


@tvm.transform.module_pass(opt_level=0, name="topi_int8.FoldPad")
class FoldPad:
    """Fold pads of the rows and columns into topi_int8.conv2d, avg_pool2d, and max_pool2d.

    Where the value that the pad writes is the one that the operator's own padding stands for: a
    convolution's zero point, an average pool's, or what no maximum picks. Run it after FuseQDQ and
    FuseFloat. The input module is not changed.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the rewritten module."""
        return rewrite_functions(mod, _Rules)


Padding = tuple[int, int, int, int]


def pad_of(call: Any, layout: str) -> tuple[float, Padding] | None:
    """Return (value, (top, left, bottom, right)) of a constant pad of an image's rows and columns.

    None for anything else, and where batch or channels are padded too, or something is cut off.
    """
    if op_name(call) != "relax.nn.pad" or str(call.attrs.pad_mode) != "constant":
        return None
    widths = [int(width) for width in call.attrs.pad_width]
    rows = 1 if layout == "NHWC" else 2
    top, bottom, left, right = widths[2 * rows : 2 * rows + 4]
    elsewhere = widths[: 2 * rows] + widths[2 * rows + 4 :]
    if any(elsewhere) or min(widths) < 0:
        return None
    return float(call.attrs.pad_value), (top, left, bottom, right)


class _Rules:
    """The rewrite of one binding."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._folds: dict[str, Callable[[relax.Call], relax.Call | None]] = {
            "topi_int8.conv2d": self._conv2d,
            "topi_int8.avg_pool2d": self._avg_pool2d,
            "relax.nn.max_pool2d": self._max_pool2d,
        }

    def rewrite(self, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        """Return an operator with the padding of the pad before it; None to keep the binding."""
        fold = self._folds.get(op_name(value))
        return fold(value) if fold is not None else None

    def _padded(self, call: relax.Call, layout: str, value: float, own: Any) -> Padding | None:
        """Return an operator's padding and that of the pad of `value` that it reads, together."""
        pad = pad_of(self.graph.value(call.args[0]), layout)
        if pad is None or pad[0] != value:
            return None
        return tuple(int(a) + b for a, b in zip(own, pad[1], strict=True))

    def _args(self, call: relax.Call) -> list[relax.Expr]:
        source = self.graph.value(call.args[0]).args[0]
        return [self.graph.new(arg) for arg in (source, *call.args[1:])]

    def _conv2d(self, call: relax.Call) -> relax.Call | None:
        attrs = op.attrs_of(call)
        padding = self._padded(
            call, attrs["data_layout"], attrs["data_zero_point"], attrs["padding"]
        )
        return op.rebuild(call, self._args(call), padding=list(padding)) if padding else None

    def _avg_pool2d(self, call: relax.Call) -> relax.Call | None:
        attrs = op.attrs_of(call)
        padding = self._padded(call, attrs["layout"], attrs["zero_point"], attrs["padding"])
        # The pad's elements count in the mean, those of another padding may not.
        if padding is None or any(attrs["padding"]):
            return None
        return op.rebuild(call, self._args(call), padding=list(padding), count_include_pad=True)

    def _max_pool2d(self, call: relax.Call) -> relax.Call | None:
        attrs, dtype = call.attrs, str(call.ty.dtype)
        layout = str(attrs.layout)
        if layout not in ("NCHW", "NHWC") or len(attrs.padding) != 4:
            return None
        lowest = -np.inf if dtype == "float32" else float(np.iinfo(dtype).min)
        padding = self._padded(call, layout, lowest, attrs.padding)
        if padding is None:
            return None
        fields = ("pool_size", "strides", "dilation", "ceil_mode", "count_include_pad")
        kept = {key: getattr(attrs, key) for key in fields}
        return relax.op.nn.max_pool2d(
            *self._args(call), padding=padding, layout=layout, out_layout=str(attrs.out_layout),
            **kept,
        )  # fmt: skip
