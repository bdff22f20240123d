"""The fp32 graph that a QDQ module was made from: prepared, and rewritten as that one was."""

from __future__ import annotations

import tvm

from .equalize import EQUALIZED, with_scales
from .graph import prepare
from .rewrite import BIASED, with_biases


def prepare_like(mod: tvm.IRModule, qdq: tvm.IRModule) -> tvm.IRModule:
    """Return ``prepare(mod)`` with the tensors of a module that `quantize` made of it.

    Equalised channels have the scale that they have there, and layers that got a bias to be
    corrected have one, of zeros: so tensors of the same name are to be alike. It computes what
    ``mod`` does.

    Parameters
    ----------
    mod : tvm.IRModule
        The fp32 module given to `quantize`.
    qdq : tvm.IRModule
        What `quantize` returned for it.
    """
    prepared = prepare(mod)
    attrs = qdq.attrs or {}
    if EQUALIZED in attrs:
        scales = {str(name): scale.numpy() for name, scale in attrs[EQUALIZED].items()}
        prepared = with_scales(prepared, scales)
    if BIASED in attrs:
        prepared = with_biases(prepared, [str(name) for name in attrs[BIASED]])
    return prepared
