# Licensed to the Apache Software Foundation (ASF) under one or more contributor license agreements.
# Licensed under the Apache License, Version 2.0; see http://www.apache.org/licenses/LICENSE-2.0
"""The int16 product of two int8 as ARM multiplies: smull, where LLVM would not find it by itself.

LLVM 10 moves the widening of what does not change, such as weights, out of a loop. What is left in
it is no product of two widened operands any more: it widens the other one and multiplies int16, at
half the rate and with twice the registers. LLVM 22 puts them together again.
"""

from __future__ import annotations

import functools
from typing import Any

import tvm

from . import compat
from .compat import tir

_INSTRUCTIONS = {"aarch64": "aarch64.neon.smull", "arm": "arm.neon.vmulls"}
_LANES = 8  # of their result
_FINDS_SMULL = 22  # an LLVM that is known to


def long_product(a: Any, b: Any, arch: str) -> Any:
    """Return the int16 product of two int8 expressions.

    Parameters
    ----------
    a, b : PrimExpr
    arch : str
        Of the target: "aarch64" or "arm".
    """
    if compat.llvm_major() >= _FINDS_SMULL:
        return a.astype("int16") * b.astype("int16")
    return tir.call_intrin("int16", _registered(arch), a, b)


@functools.cache
def _registered(arch: str) -> str:
    """Register an architecture's operator and what becomes of it (once); return its name."""
    name = f"tir.topi_int8_long_product_{arch}"
    tvm.ir.register_op_attr(name, "TCallEffectKind", tir.CallEffectKind.Pure.value)
    tvm.ir.register_op_attr(name, "TVectorizable", True)
    lower = functools.partial(_lowered, f"llvm.{_INSTRUCTIONS[arch]}.v{_LANES}i16")
    tvm.ir.register_intrin_lowering(name, target="default", f=lower)
    return name


def _lanes(dtype: str) -> int:
    return int(dtype.partition("x")[2] or 1)


def _plain(call: Any) -> Any:
    a, b = (arg.astype(str(call.dtype)) for arg in call.args)
    return a * b


def _lowered(instruction: str, call: Any) -> Any:
    lanes = _lanes(str(call.dtype))

    def product(a: Any, b: Any) -> Any:
        dtype, count = f"int16x{_LANES}", tir.const(2, "uint32")
        return tir.call_llvm_pure_intrin(dtype, instruction, count, a, b)

    if lanes == _LANES:
        return product(*call.args)
    if lanes != 2 * _LANES:
        return _plain(call)
    halves = (
        product(*(tir.call_intrin(f"int8x{_LANES}", f"tir.{half}", arg) for arg in call.args))
        for half in ("vectorlow", "vectorhigh")
    )
    return tir.call_intrin(str(call.dtype), "tir.vectorcombine", *halves)
