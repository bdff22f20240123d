"""Whether an imported graph is quantized already."""

from __future__ import annotations

import tvm
from tvm import relax

from ..op import op_name

_PAIRS = ("relax.quantize", "relax.dequantize")
_PRODUCTS = ("relax.nn.conv2d", "relax.matmul")


def is_quantized(mod: tvm.IRModule) -> bool:
    """Return whether ``main`` quantizes or dequantizes anything, or multiplies integers."""
    found: list[bool] = []

    def look(expr: relax.Expr) -> None:
        name = op_name(expr)
        found.append(name in _PAIRS or (name in _PRODUCTS and str(expr.ty.dtype) == "int32"))

    relax.analysis.post_order_visit(mod["main"], look)
    return any(found)
