"""Whole networks in QNN, as importers of quantized models make them: NCHW or NHWC, no dequantizing.

Weights are seeded int8 with a scale per channel, activations uint8 with zero points. Scales are
chosen so that activations keep using their range: with inputs of about `SPREAD` quantization steps'
standard deviation, and weights of `_WEIGHT`, a sum of K products has SPREAD * _WEIGHT * sqrt(K).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relay
from tvm.relay import qnn

SPREAD = 40.0
_WEIGHT = 40.0
_ZERO = 3


@dataclass
class Network:
    """A network under construction: a layout, seeded weights, and one activation scale.

    Parameters
    ----------
    layout : str
        "NCHW" or "NHWC".
    data_dtype : str
        "uint8" or "int8", of all activations.
    """

    layout: str = "NCHW"
    data_dtype: str = "uint8"
    rng: Any = field(default_factory=lambda: np.random.default_rng(7))

    @property
    def axis(self) -> int:
        """Axis of the channels."""
        return self.layout.index("C")

    def _zero(self) -> Any:
        return relay.const(_ZERO, "int32")

    def _weight(self, shape: tuple[int, ...], order: str = "OIHW") -> Any:
        values = np.clip(np.round(self.rng.normal(0, _WEIGHT, shape)), -127, 127).astype("int8")
        if len(shape) == 4:
            values = np.ascontiguousarray(values.transpose(["OIHW".index(c) for c in order]))
        return relay.const(values)

    def _requantized(self, sums: Any, channels: int, terms: int, axis: int, relu: bool) -> Any:
        """Return sums of so many products, with a bias, as an activation."""
        bias = self.rng.integers(-2000, 2000, channels).astype("int32")
        sums = relay.nn.bias_add(sums, relay.const(bias), axis)
        steps = np.float32(1.4 / (_WEIGHT * np.sqrt(terms)))  # ReLU halves the second moment
        scales = (steps * self.rng.uniform(0.7, 1.3, channels)).astype("float32")
        out = qnn.op.requantize(
            sums, relay.const(scales), relay.const(0, "int32"), relay.const(1.0), self._zero(),
            axis=axis, out_dtype=self.data_dtype,
        )  # fmt: skip
        high = 255 if self.data_dtype == "uint8" else 127
        return relay.clip(out, _ZERO, high) if relu else out

    def conv(
        self, data: Any, ic: int, oc: int, k: int, stride: int = 1, groups: int = 1,
        relu: bool = True, dilation: int = 1,
    ) -> Any:  # fmt: skip
        """Return convolution, bias, requantization per channel and ReLU; padding keeps the size."""
        depthwise = groups == ic == oc and groups > 1
        order = {"NCHW": "OIHW", "NHWC": "HWOI" if depthwise else "HWIO"}[self.layout]
        sums = qnn.op.conv2d(
            data, self._weight((oc, ic // groups, k, k), order), self._zero(),
            relay.const(0, "int32"), relay.const(1.0), relay.const(np.full(oc, 1, "float32")),
            kernel_size=(k, k), channels=oc, strides=(stride, stride),
            padding=(k // 2 * dilation, k // 2 * dilation), dilation=(dilation, dilation),
            groups=groups, data_layout=self.layout, kernel_layout=order,
        )  # fmt: skip
        return self._requantized(sums, oc, ic // groups * k * k, self.axis, relu)

    def add(self, a: Any, b: Any) -> Any:
        """Return a residual addition and ReLU."""
        one, zero = relay.const(1.0), self._zero()
        total = qnn.op.add(a, b, one, zero, one, zero, relay.const(1.4), zero)
        return relay.clip(total, _ZERO, 255 if self.data_dtype == "uint8" else 127)

    def concat(self, parts: list[Any], scales: list[float]) -> Any:
        """Return a concatenation of channels, each part of a scale of its own."""
        return qnn.op.concatenate(
            relay.Tuple(parts), relay.Tuple([relay.const(s) for s in scales]),
            relay.Tuple([self._zero()] * len(parts)), relay.const(1.0), self._zero(), self.axis,
        )  # fmt: skip

    def max_pool(self, data: Any) -> Any:
        """Return 3x3 maximum pooling of stride 2."""
        return relay.nn.max_pool2d(data, (3, 3), (2, 2), padding=(1, 1), layout=self.layout)

    def classify(self, data: Any, channels: int, classes: int = 1000) -> Any:
        """Return global average pooling and a dense layer."""
        pooled = relay.nn.global_avg_pool2d(relay.cast(data, "int32"), layout=self.layout)
        pooled = relay.nn.batch_flatten(relay.cast(pooled, self.data_dtype))
        sums = qnn.op.dense(
            pooled, self._weight((classes, channels)), self._zero(), relay.const(0, "int32"),
            relay.const(1.0), relay.const(np.full(classes, 1, "float32")), units=classes,
        )  # fmt: skip
        return self._requantized(sums, classes, channels, 1, relu=False)

    def input(self, batch: int, size: int, channels: int = 3) -> Any:
        """Return the network's quantized input."""
        extent = {"N": batch, "C": channels, "H": size, "W": size}
        return relay.var("data", shape=[extent[c] for c in self.layout], dtype=self.data_dtype)


def _module(data: Any, out: Any) -> tvm.IRModule:
    return relay.transform.InferType()(tvm.IRModule.from_expr(relay.Function([data], out)))


def resnet(depth: int, net: Network | None = None, batch: int = 1, size: int = 224) -> tvm.IRModule:
    """Return ResNet-18 or ResNet-50 v1.5."""
    net = net or Network()
    blocks, wide = {18: ((2, 2, 2, 2), 1), 50: ((3, 4, 6, 3), 4)}[depth]
    data = net.input(batch, size)
    x, ic = net.max_pool(net.conv(data, 3, 64, 7, 2)), 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            oc = width * wide
            if wide == 1:
                y = net.conv(x, ic, width, 3, stride)
                y = net.conv(y, width, oc, 3, relu=False)
            else:
                y = net.conv(net.conv(x, ic, width, 1), width, width, 3, stride)
                y = net.conv(y, width, oc, 1, relu=False)
            short = x if stride == 1 and ic == oc else net.conv(x, ic, oc, 1, stride, relu=False)
            x, ic = net.add(y, short), oc
    return _module(data, net.classify(x, ic))


def mobilenet(net: Network | None = None, batch: int = 1, size: int = 224) -> tvm.IRModule:
    """Return MobileNet v1."""
    net = net or Network()
    data = net.input(batch, size)
    x, ic = net.conv(data, 3, 32, 3, 2), 32
    for oc, stride in (
        (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2),
        (1024, 1),
    ):  # fmt: skip
        x = net.conv(net.conv(x, ic, ic, 3, stride, groups=ic), ic, oc, 1)
        ic = oc
    return _module(data, net.classify(x, ic))


def branches(net: Network | None = None, size: int = 28) -> tvm.IRModule:
    """Return what a ResNet lacks: concatenation, grouped convolution, odd channels, two outputs."""
    net = net or Network()
    data = net.input(1, size)
    x = net.conv(data, 3, 24, 3, 2)
    left = net.conv(x, 24, 40, 1)
    right = net.conv(net.conv(x, 24, 17, 1), 17, 24, 3, groups=1)
    x = net.concat([left, right, x], [1.0, 0.8, 1.3])
    grouped = net.conv(x, 88, 88, 3, groups=4)
    x = net.add(net.conv(grouped, 88, 88, 1, relu=False), x)
    return _module(data, relay.Tuple([net.classify(net.max_pool(x), 88, 10), x]))
