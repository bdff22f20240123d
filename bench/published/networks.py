"""torchvision's ResNets in Relay, float32, from their weights: NCHW or NHWC. Needs Relay's TVM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relay

_BLOCKS = {"resnet18": ((2, 2, 2, 2), 1), "resnet50": ((3, 4, 6, 3), 4)}
_EPSILON = 1e-5  # of torch's BatchNorm
KERNEL_LAYOUT = {"NCHW": "OIHW", "NHWC": "HWIO"}


class _Builder:
    """Layers by the names that torchvision gives their weights."""

    def __init__(self, weights: Mapping[str, np.ndarray], layout: str) -> None:
        self._weights, self._layout = weights, layout

    def _const(self, name: str) -> Any:
        return relay.const(np.ascontiguousarray(self._weights[name], "float32"))

    def conv(self, data: Any, name: str, norm: str, stride: int = 1, relu: bool = True) -> Any:
        """Return convolution and batch normalisation, folded; its padding keeps the size.

        Relay would fold it too, evaluating some hundred expressions one by one.
        """
        gamma, beta, mean, variance = (
            self._weights[f"{norm}.{part}"]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + np.float32(_EPSILON))
        oihw = self._weights[f"{name}.weight"] * scale[:, None, None, None]
        order = KERNEL_LAYOUT[self._layout]
        weight = np.ascontiguousarray(oihw.transpose(["OIHW".index(letter) for letter in order]))
        size = oihw.shape[2]
        out = relay.nn.conv2d(
            data, relay.const(weight), strides=(stride, stride), padding=(size // 2, size // 2),
            kernel_size=(size, size), channels=oihw.shape[0], data_layout=self._layout,
            kernel_layout=order,
        )  # fmt: skip
        bias = beta - mean * scale
        shape = (-1, 1, 1) if self._layout == "NCHW" else (-1,)
        out = relay.add(out, relay.const(bias.reshape(shape)))
        return relay.nn.relu(out) if relu else out

    def block(self, data: Any, name: str, stride: int, wide: bool) -> Any:
        """Return a residual block."""
        if wide:
            out = self.conv(data, f"{name}.conv1", f"{name}.bn1")
            out = self.conv(out, f"{name}.conv2", f"{name}.bn2", stride)
            out = self.conv(out, f"{name}.conv3", f"{name}.bn3", relu=False)
        else:
            out = self.conv(data, f"{name}.conv1", f"{name}.bn1", stride)
            out = self.conv(out, f"{name}.conv2", f"{name}.bn2", relu=False)
        if f"{name}.downsample.0.weight" in self._weights:
            short = (f"{name}.downsample.0", f"{name}.downsample.1")
            data = self.conv(data, *short, stride, relu=False)
        return relay.nn.relu(relay.add(out, data))

    def classify(self, data: Any) -> Any:
        """Return average pooling and the dense layer."""
        pooled = relay.nn.batch_flatten(relay.nn.global_avg_pool2d(data, layout=self._layout))
        return relay.nn.bias_add(
            relay.nn.dense(pooled, self._const("fc.weight")), self._const("fc.bias")
        )

    def max_pool(self, data: Any) -> Any:
        """Return the stem's pooling."""
        return relay.nn.max_pool2d(data, (3, 3), (2, 2), padding=(1, 1), layout=self._layout)


def resnet(
    name: str, weights: Mapping[str, np.ndarray], batch: int, layout: str, image: int = 224
) -> tvm.IRModule:
    """Return a network of torchvision's.

    Parameters
    ----------
    name : str
        "resnet18" or "resnet50".
    weights : mapping of str to array
        torch's state_dict.
    """
    made = _Builder(weights, layout)
    counts, widening = _BLOCKS[name]
    extent = {"N": batch, "C": 3, "H": image, "W": image}
    data = relay.var("data", shape=[extent[letter] for letter in layout], dtype="float32")
    out = made.max_pool(made.conv(data, "conv1", "bn1", 2))
    for stage, count in enumerate(counts):
        for block in range(count):
            stride = 2 if stage and not block else 1
            out = made.block(out, f"layer{stage + 1}.{block}", stride, widening > 1)
    func = relay.Function([data], made.classify(out))
    return relay.transform.InferType()(tvm.IRModule.from_expr(func))


def quantized(mod: tvm.IRModule, activation: str = "int32", stem: bool = False) -> tvm.IRModule:
    """Return what relay.quantize makes of a network with its default calibration.

    Parameters
    ----------
    activation : str
        Dtype of what convolutions store; relay.quantize's default is int32.
    stem : bool
        Whether the first convolution is quantized; relay.quantize's default leaves it.
    """
    bits = {"int8": 8, "int16": 16, "int32": 32}[activation]
    with relay.quantize.qconfig(
        calibrate_mode="global_scale", global_scale=8.0, dtype_activation=activation,
        nbit_activation=bits, skip_conv_layers=[] if stem else [0],
    ):  # fmt: skip
        return relay.quantize.quantize(mod, {})
