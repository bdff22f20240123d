"""What a layer's weights meet on average, and so what its output is on average.

A convolution is linear, so the mean of its output over inputs, batch and pixels follows from the
means of what each of its taps reads: ``E[sum(w * x)] = sum(w * E[x])``. Borders are exact: a tap
that reads padding reads zeros.
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from ..op import op_name
from .graph import Graph
from .plan import Compute, Plan
from .weights import grouped


class InputMean:
    """Gathers the mean input of each weight of a conv2d or matmul with a constant weight.

    Attributes
    ----------
    tensor : str
        Name of the tensor to be shown to `update`.
    """

    def __init__(self, compute: Compute, call: relax.Call) -> None:
        self.tensor = compute.data.name
        self._call = call
        assert compute.weight is not None
        self._kernel = grouped(compute.weight, call).shape[3:]
        self._sums: np.ndarray | float = 0.0
        self._count = 0

    def update(self, values: np.ndarray) -> None:
        """Take in the layer's data for one calibration input."""
        if op_name(self._call) == "relax.matmul":
            rows = values.reshape(-1, values.shape[-1])
            sums, count = rows.sum(axis=0, dtype="float64")[:, None, None], len(rows)
        else:
            sums, count = self._taps(values)
        self._sums = self._sums + sums
        self._count += count

    def _taps(self, values: np.ndarray) -> tuple[np.ndarray, int]:
        """Return what each tap read, summed over output pixels: (ic, kh, kw), and their number."""
        attrs = self._call.attrs
        layout = str(attrs.data_layout)
        nchw = values.transpose([layout.index(axis) for axis in "NCHW"])
        top, left, bottom, right = (int(p) for p in attrs.padding)
        image = np.pad(nchw.sum(axis=0, dtype="float64"), ((0, 0), (top, bottom), (left, right)))
        strides, dilation = [int(s) for s in attrs.strides], [int(d) for d in attrs.dilation]
        spans = [d * (k - 1) + 1 for d, k in zip(dilation, self._kernel, strict=True)]
        oh, ow = (
            (size - span) // stride + 1
            for size, span, stride in zip(image.shape[1:], spans, strides, strict=True)
        )
        sums = np.empty((image.shape[0], *self._kernel))
        for kh, kw in np.ndindex(*self._kernel):
            rows = slice(kh * dilation[0], kh * dilation[0] + strides[0] * oh, strides[0])
            columns = slice(kw * dilation[1], kw * dilation[1] + strides[1] * ow, strides[1])
            sums[:, kh, kw] = image[:, rows, columns].sum(axis=(1, 2))
        return sums, nchw.shape[0] * oh * ow

    def expected(self, weight: np.ndarray) -> np.ndarray:
        """Return the mean output of each channel for a weight in place of the layer's own.

        Parameters
        ----------
        weight : array
            Shaped like the layer's.

        Returns
        -------
        (oc,) float64 array
        """
        if not self._count:
            raise ValueError(f"{self.tensor} has no values; allowed: at least one update")
        by_group = grouped(weight, self._call).astype("float64")
        means = (self._sums / self._count).reshape(len(by_group), *by_group.shape[2:])
        return np.einsum("goikl,gikl->go", by_group, means).reshape(-1)


def input_means(graph: Graph, plan: Plan) -> dict[relax.Var, InputMean]:
    """Return what gathers the mean inputs of each layer that has a constant weight."""
    return {
        var: InputMean(compute, graph.values[var])
        for var, compute in plan.computes.items()
        if compute.weight is not None
    }
