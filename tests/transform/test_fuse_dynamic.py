"""FuseDynamic: which products it takes, and that they compute the same."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.transform import interpret
from topi_int8.transform.fuse_dynamic import FuseDynamic
from topi_int8.transform.fuse_qdq import FuseQDQ

RNG = np.random.default_rng(0)


def dynamic(
    data: tuple[int, ...] = (6, 32),
    weight: tuple[int, ...] = (24, 32),
    dtype: str = "uint8",
    per_channel: bool = True,
    weight_zero_point: int = 0,
    through_reshape: bool = False,
    scale_shape: tuple[int, ...] = (),
    axis: int = 0,
) -> tvm.IRModule:
    """Return ``dequantize(x, s, z) @ dequantize(W).T`` of inputs x, s and z."""
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(data, dtype))
    s = relax.Var("s", relax.TensorType(scale_shape, "float32"))
    z = relax.Var("z", relax.TensorType(scale_shape, dtype))
    scale = RNG.uniform(0.01, 0.1, weight[axis]) if per_channel else np.asarray(0.05)
    zero_point = np.full(scale.shape, weight_zero_point, "int8")
    array = RNG.integers(-128, 128, weight).astype("int8")
    with bb.function("main", [x, s, z]):
        with bb.dataflow():
            real = bb.emit(relax.op.dequantize(x, s, z))
            if through_reshape:
                real = bb.emit(relax.op.reshape(real, (-1, data[-1])))
            w = bb.emit(relax.op.dequantize(
                relax.const(array), relax.const(scale.astype("float32")), relax.const(zero_point),
                axis=axis if per_channel else -1,
            ))  # fmt: skip
            w = bb.emit(relax.op.permute_dims(w))
            out = bb.emit_output(relax.op.matmul(real, w))
        bb.emit_func_output(out)
    return bb.get()


def run(mod: tvm.IRModule) -> np.ndarray:
    shapes = [tuple(int(d) for d in p.ty.shape) for p in mod["main"].params]
    dtype = str(mod["main"].params[0].ty.dtype)
    rng = np.random.default_rng(1)
    low, high = {"uint8": (0, 256), "int8": (-128, 128)}[dtype]
    x = rng.integers(low, high, shapes[0]).astype(dtype)
    scale = np.full(shapes[1], 0.03, "float32")
    return interpret.run(mod, x, scale, np.full(shapes[2], low + 100, dtype))[0]


@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(dtype="int8"),
        dict(per_channel=False),
        dict(data=(2, 3, 32), through_reshape=True),
        dict(scale_shape=(1,)),
    ],
    ids=str,
)
def test_products_become_integer_ones(case: dict) -> None:
    mod = dynamic(**case)
    new = FuseQDQ()(FuseDynamic()(mod))
    relax.analysis.well_formed(new)
    count = interpret.count(new)
    assert count["topi_int8.matmul"] == 1
    assert not {"relax.matmul", "relax.dequantize"} & set(count)
    want, got = run(mod), run(new)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "case",
    [
        dict(weight_zero_point=3),
        dict(weight=(32, 32), axis=1),  # the scale varies along k
        dict(data=(6, 32), scale_shape=(32,)),  # so does the data's
    ],
    ids=str,
)
def test_other_products_stay(case: dict) -> None:
    mod = dynamic(**case)
    assert interpret.count(FuseDynamic()(mod))["relax.dequantize"] == 2


def test_constant_scales_are_left_to_fuse_qdq() -> None:
    mod = relax.transform.BindParams(
        "main", {"s": np.asarray(0.03, "float32"), "z": np.asarray(100, "uint8")}
    )(dynamic())
    assert interpret.count(FuseDynamic()(mod))["relax.dequantize"] == 2
    assert interpret.count(FuseQDQ()(FuseDynamic()(mod)))["topi_int8.matmul"] == 1
