"""Post-training static quantization: fp32 Relax in, QDQ Relax out.

observers (methods: observer, clipping) -> calibrate (run the graph) -> qparams (ranges to scales);
graph and plan decide which tensors are quantized; insert writes the pairs; report measures what
they cost.
"""

from .calibrate import instrument
from .clipping import KLDivergence, MeanSquaredError, Percentile
from .methods import OBSERVERS
from .observer import Grid, MinMax, MovingAverage, Observer
from .qparams import QParams
from .quantize import Layer, list_layers, quantize
from .report import LayerError, layer_errors

__all__ = [
    "OBSERVERS",
    "Grid",
    "KLDivergence",
    "Layer",
    "LayerError",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "QParams",
    "instrument",
    "layer_errors",
    "list_layers",
    "quantize",
]
