"""Whether an imported graph is quantized already."""

from __future__ import annotations

import tvm
from tvm import relax

from ..op import op_name


def is_quantized(mod: tvm.IRModule) -> bool:
    """Return whether ``main`` quantizes or dequantizes anything."""
    found: list[bool] = []

    def look(expr: relax.Expr) -> None:
        found.append(op_name(expr) in ("relax.quantize", "relax.dequantize"))

    relax.analysis.post_order_visit(mod["main"], look)
    return any(found)
