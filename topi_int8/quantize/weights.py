"""A weight as (groups, oc / groups, ic / groups, kh, kw), whatever its operator and layout."""

from __future__ import annotations

import numpy as np
from tvm import relax

from ..op import op_name


def grouped(weight: np.ndarray, call: relax.Call) -> np.ndarray:
    """Return the weight of a conv2d or matmul call as (groups, oc / g, ic / g, kh, kw).

    Parameters
    ----------
    weight : array
        In the layout of the call's second argument; a matmul's is (ic, oc).
    call : relax.Call
        ``relax.nn.conv2d`` of a 4-letter kernel layout, or ``relax.matmul``.
    """
    if op_name(call) == "relax.matmul":
        return weight.T[None, :, :, None, None]
    groups = int(call.attrs.groups)
    oihw = weight.transpose(_oihw(call))
    return oihw.reshape(groups, oihw.shape[0] // groups, *oihw.shape[1:])


def ungrouped(weight: np.ndarray, call: relax.Call) -> np.ndarray:
    """Return what `grouped` made as the call's second argument has it."""
    if op_name(call) == "relax.matmul":
        return np.ascontiguousarray(weight[0, :, :, 0, 0].T)
    oihw = weight.reshape(-1, *weight.shape[2:])
    return np.ascontiguousarray(oihw.transpose(np.argsort(_oihw(call))))


def _oihw(call: relax.Call) -> list[int]:
    layout = str(call.attrs.kernel_layout)
    return [layout.index(axis) for axis in "OIHW"]
