"""Our tensor intrinsics for TE's tensorize: the same implementations, bound to TE's buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import te

from intrinsics import compat
from intrinsics.compat import tir
from intrinsics.x86_dot import DotIntrinsic


def _bound(func: Any, buffers: list[Any]) -> Any:
    """Return the statement of an implementation with its parameters' buffers replaced."""
    ours: Mapping[Any, Any] = {
        func.buffer_map[param]: buffer for param, buffer in zip(func.params, buffers, strict=True)
    }

    def replace(node: Any) -> Any:
        if node.buffer not in ours:
            return None
        buffer = ours[node.buffer]
        if isinstance(node, tir.BufferLoad):
            return tir.BufferLoad(buffer, node.indices)
        return tir.BufferStore(buffer, node.value, node.indices)

    names = ["tir.BufferLoad", "tir.BufferStore"]
    return tir.stmt_functor.ir_transform(compat.first_block(func), None, replace, names)


def _zero(buffer: Any, lanes: int) -> Any:
    return buffer.vstore(0, tir.const(0, f"int32x{lanes}"))


def dot(intrinsic: DotIntrinsic) -> Any:
    """Return ``C[j] += sum_k A[k] * B[j, k]`` as TE tensorizes it: zero, then accumulate."""
    n, k = intrinsic.n, intrinsic.k
    a = te.placeholder((k,), intrinsic.a, "A")
    b = te.placeholder((n, k), intrinsic.b, "B")
    kk = te.reduce_axis((0, k), "kk")
    c = te.compute(
        (n,), lambda j: te.sum(a[kk].astype("int32") * b[j, kk].astype("int32"), axis=kk), "C"
    )
    buffers = {
        t: tir.decl_buffer(t.shape, t.dtype, t.op.name, offset_factor=1) for t in (a, b, c)
    }
    impl = intrinsic.impl()

    def lower(ins: list[Any], outs: list[Any]) -> tuple[Any, Any, Any]:
        return None, _zero(outs[0], n), _bound(impl, [*ins, *outs])

    params = {"offset_factor": 1}
    return te.decl_tensor_intrin(c.op, lower, binds=buffers, default_buffer_params=params)


