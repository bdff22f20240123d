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

_OP = "tir.topi_int8_long_product"
_LANES = 8  # of smull's result
_FINDS_SMULL = 22  # an LLVM that is known to


def long_product(a: Any, b: Any) -> Any:
    """Return the int16 product of two int8 expressions."""
    if compat.llvm_major() >= _FINDS_SMULL:
        return a.astype("int16") * b.astype("int16")
    return tir.call_intrin("int16", _registered(), a, b)


@functools.cache
def _registered() -> str:
    """Register the operator and what becomes of it (once); return its name."""
    tvm.ir.register_op_attr(_OP, "TCallEffectKind", tir.CallEffectKind.Pure.value)
    tvm.ir.register_op_attr(_OP, "TVectorizable", True)
    for target, lower in (("default", _plain), ("llvm.aarch64", _smull)):
        tvm.ir.register_intrin_lowering(_OP, target=target, f=lower)
    return _OP


def _lanes(dtype: str) -> int:
    return int(dtype.partition("x")[2] or 1)


def _plain(call: Any) -> Any:
    a, b = (arg.astype(str(call.dtype)) for arg in call.args)
    return a * b


def _smull(call: Any) -> Any:
    lanes = _lanes(str(call.dtype))
    if lanes == _LANES:
        return _instruction(*call.args)
    if lanes != 2 * _LANES:
        return _plain(call)
    halves = (
        _instruction(*(tir.call_intrin(f"int8x{_LANES}", f"tir.{half}", arg) for arg in call.args))
        for half in ("vectorlow", "vectorhigh")
    )
    return tir.call_intrin(str(call.dtype), "tir.vectorcombine", *halves)


def _instruction(a: Any, b: Any) -> Any:
    name = f"llvm.aarch64.neon.smull.v{_LANES}i16"
    return tir.call_llvm_pure_intrin(f"int16x{_LANES}", name, tir.const(2, "uint32"), a, b)
