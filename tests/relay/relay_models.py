"""TVM's own float networks, quantized by relay.quantize: what Relay's users had without QNN."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relay
from tvm.relay.testing import mobilenet, resnet

Model = tuple[tvm.IRModule, dict[str, Any]]


def resnet18(layout: str = "NCHW", size: int = 32) -> Model:
    """Return fp32 ResNet-18 as (module, parameters), its batch normalisations not yet folded."""
    shape = (3, size, size) if layout == "NCHW" else (size, size, 3)
    return _with_signal(
        *resnet.get_workload(
            batch_size=1, num_classes=100, num_layers=18, image_shape=shape, layout=layout
        )
    )


def mobilenet_v1(size: int = 32) -> Model:
    """Return fp32 MobileNet v1 in NCHW as (module, parameters)."""
    return _with_signal(
        *mobilenet.get_workload(batch_size=1, num_classes=100, image_shape=(3, size, size))
    )


def _with_signal(mod: tvm.IRModule, params: dict[str, Any]) -> Model:
    """Return the model without its softmax, its weights such that activations keep their size."""
    rng = np.random.default_rng(11)
    for name, value in params.items():
        shape = value.shape
        if name.endswith("weight"):
            fan_in = int(np.prod(shape)) // max(shape[0], shape[-1] if len(shape) == 4 else 0)
            weight = rng.normal(0, np.sqrt(2 / max(fan_in, 1)), shape)
            params[name] = tvm.nd.array(weight.astype("float32"))
    main = mod["main"]
    logits = relay.Function(main.params, main.body.args[0])
    return relay.transform.InferType()(tvm.IRModule.from_expr(logits)), params


def quantized(mod: tvm.IRModule, params: dict[str, Any]) -> tvm.IRModule:
    """Return the module as relay.quantize makes it, up to its last integer tensor.

    Scales are uniform, activations and weights int8, the first convolution's too, which the default
    leaves in float. The classifier stays float whatever is asked for, and sums of floats depend on
    their order: so the network ends before it.
    """
    scheme = {"calibrate_mode": "global_scale", "global_scale": 8.0, "skip_conv_layers": []}
    with tvm.transform.PassContext(opt_level=3), relay.quantize.qconfig(**scheme):
        main = relay.quantize.quantize(mod, params)["main"]
    out = main.body
    while not str(out.checked_type.dtype).startswith("int"):
        out = out.args[0]
    func = relay.Function(main.params, out)
    return relay.transform.InferType()(tvm.IRModule.from_expr(func))


def image(shape: tuple[int, ...], dtype: str = "float32", seed: int = 3) -> np.ndarray:
    """Return a seeded input: normal, or all values of an integer type alike."""
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.normal(0, 1, shape).astype("float32")
    bounds = np.iinfo(dtype)
    return rng.integers(bounds.min, bounds.max + 1, shape).astype(dtype)


def inputs(mod: tvm.IRModule) -> dict[str, np.ndarray]:
    """Return a seeded input of a module of one."""
    (data,) = relay.transform.InferType()(mod)["main"].params
    return {data.name_hint: image([int(d) for d in data.checked_type.shape],
                                  data.checked_type.dtype)}  # fmt: skip
