"""The layers that `test_two_tvms` computes in both TVMs, and what computes them in Relax's.

usage: python -m tests.relay.relax_side OPERANDS.npz RESULTS.npz     in the environment with Relax
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests import grid
from topi_int8.workload import Conv2dWorkload, MatmulWorkload

Workload = Conv2dWorkload | MatmulWorkload

# Layers of ResNet, some on smaller images, and ugly ones.
LAYERS: dict[str, Workload] = {
    "stem": grid.SHAPES["stem_7x7"],
    "res2_3x3": grid.conv(64, (14, 14), 64, (3, 3), padding=grid.SAME),
    "res3_1x1_s2": grid.conv(256, (14, 14), 128, strides=(2, 2)),
    "res4_1x1": grid.conv(1024, (14, 14), 256),
    "res5_3x3": grid.conv(512, (7, 7), 512, (3, 3), padding=grid.SAME),
    **{
        name: grid.SHAPES[name]
        for name in ("ic17_oc33", "groups_misaligned", "channel_multiplier_7", "even_kernel",
                     "dilation_3_strided", "padding_beyond_kernel", "batch_3_1x1")
    },
    **{name: grid.DTYPES[name] for name in ("s8s8_1x1", "u8u8", "s8u8", "s8s8_grouped")},
    **{f"depthwise_{name}": grid.DEPTHWISE[name] for name in ("c65", "stride_2_1", "s8s8")},
    **{f"matmul_{name}": grid.MATMULS[name] for name in ("vector_odd", "rows_17_odd_n", "s8s8")},
}  # fmt: skip

SHIFT = 24  # requantize: (sum * multiplier + half) >> SHIFT, plus ZERO, to uint8
ZERO = 101


def multipliers(work: Workload) -> np.ndarray:
    """Return each channel's multiplier as int64, in the rank of the sums."""
    is_conv = isinstance(work, Conv2dWorkload)
    channels = work.oc if is_conv else work.n
    terms = work.ic // work.groups * work.kh * work.kw if is_conv else work.k
    rng = np.random.default_rng(channels)
    # A sum of such products has mean 0, unless both factors are positive.
    positive = (work.data_dtype, work.weight_dtype) == ("uint8", "uint8")
    size = 128 * 128 * terms if positive else 128 * 74 * np.sqrt(terms)
    scale = rng.uniform(0.3, 1.0, channels) * 60 / size
    values = np.round(scale * 2**SHIFT).astype("int64")
    return values.reshape(1, -1, 1, 1) if is_conv else values.reshape(1, -1)


def main(operands: Path, results: Path) -> None:
    """Compute all layers with Relax, and store sums and requantized sums by name."""
    import tvm
    from tvm import relax

    import topi_int8

    op = relax.op
    arrays = np.load(operands)
    builder = relax.BlockBuilder()
    inputs = {name: arrays[f"{name}.data"] for name in LAYERS}
    variables = [relax.Var(name, relax.TensorType(x.shape, str(x.dtype)))
                 for name, x in inputs.items()]  # fmt: skip

    def requantize(sums: Any, work: Workload) -> Any:
        wide = op.multiply(op.astype(sums, "int64"), relax.const(multipliers(work), "int64"))
        half = op.add(wide, relax.const(1 << (SHIFT - 1), "int64"))
        shifted = op.right_shift(half, relax.const(SHIFT, "int64"))
        return op.astype(op.clip(op.add(shifted, relax.const(ZERO, "int64")), 0, 255), "uint8")

    with builder.function("main", variables):
        with builder.dataflow():
            outputs = []
            for data, (name, work) in zip(variables, LAYERS.items(), strict=True):
                weight = relax.const(arrays[f"{name}.weight"])
                if isinstance(work, Conv2dWorkload):
                    sums = op.nn.conv2d(
                        data, weight, strides=work.strides, padding=work.padding,
                        dilation=work.dilation, groups=work.groups, out_dtype="int32",
                    )  # fmt: skip
                else:
                    sums = op.matmul(data, op.permute_dims(weight), out_dtype="int32")
                sums = builder.emit(sums)
                outputs += [sums, builder.emit(requantize(sums, work))]
            out = builder.emit_output(relax.Tuple(outputs))
        builder.emit_func_output(out)
    built = tvm.compile(builder.get(), topi_int8.host_target(num_cores=1))
    machine = relax.VirtualMachine(built, tvm.cpu())
    got = [t.numpy() for t in machine["main"](*map(tvm.runtime.tensor, inputs.values()))]
    named = dict(zip(LAYERS, zip(got[::2], got[1::2], strict=True), strict=True))
    np.savez(results, **{f"{name}.sums": sums for name, (sums, _) in named.items()},
             **{f"{name}.uint8": out for name, (_, out) in named.items()})  # fmt: skip


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
