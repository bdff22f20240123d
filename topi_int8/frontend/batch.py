"""Imported graphs of a symbolic batch -> graphs of one batch, which int8 kernels are made for."""

from __future__ import annotations

import tvm
from tvm import ir, relax

# What an importer says of a symbol's range; both lose their meaning with the symbol.
_LOWER, _UPPER = "tir_var_lower_bound", "tir_var_upper_bound"


def with_batch(mod: tvm.IRModule, batch: int) -> tvm.IRModule:
    """Return a module whose inputs have that batch instead of a symbolic one.

    The kernels of this package are made for shapes. A graph of symbolic batch compiles and runs by
    TVM's own path, in float; serve a few batches fast by compiling one module each.

    Parameters
    ----------
    mod : tvm.IRModule
        The first dimension of some inputs of ``main`` is a symbol. Not changed.
    batch : int
        At least 1.

    Raises
    ------
    ValueError
        ``batch`` is not allowed by the range that the program was exported with, or no input has a
        symbolic first dimension.
    """
    main = mod["main"]
    shapes = [getattr(param.ty, "shape", None) for param in main.params]
    first = [shape[0] for shape in shapes if shape is not None and len(shape)]
    symbols = {dim.name: dim for dim in first if ir.is_prim_var(dim)}
    if not symbols:
        inputs = ", ".join(f"{param.name}: {param.ty}" for param in main.params)
        raise ValueError(
            f"batch is {batch}, and no input has a symbolic first dimension to take it ({inputs})"
        )
    for name in symbols:
        low, high = _range(main, name)
        if batch < low or (high is not None and batch > high):
            allowed = f"{low} or more" if high is None else f"{low} to {high}"
            raise ValueError(f"batch is {batch}; allowed: {allowed}, as the program was exported")
    bound = relax.transform.BindSymbolicVars(dict.fromkeys(symbols, batch), "main")(mod)
    bound["main"] = _without_ranges(bound["main"], set(symbols))
    return bound


def _range(func: relax.Function, name: str) -> tuple[int, int | None]:
    """Return (least, most) of a symbol; None for no bound.

    torch.export gives 2 as the least of every symbol that nothing else bounds: programs are traced
    without looking at whether it is 1. A graph whose shapes are inferred anew may have 1.
    """
    attrs = func.attrs or {}
    low = int(attrs[_LOWER][name]) if name in attrs.get(_LOWER, {}) else 1
    high = int(attrs[_UPPER][name]) if name in attrs.get(_UPPER, {}) else None
    return 1 if low <= 2 else low, high


def _without_ranges(func: relax.Function, names: set[str]) -> relax.Function:
    for key in (_LOWER, _UPPER):
        ranges = dict((func.attrs or {}).get(key, {}))
        kept = {name: value for name, value in ranges.items() if name not in names}
        if ranges:
            func = func.with_attr(key, kept) if kept else func.without_attr(key)
    return func
