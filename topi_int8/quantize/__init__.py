"""Post-training static quantization: fp32 Relax in, QDQ Relax out.

observer -> calibrate (run the graph) -> qparams (ranges to scales); graph and plan decide which
tensors are quantized; insert writes the pairs; report measures what they cost.
"""

from .calibrate import instrument
from .observer import OBSERVERS, MinMax, Observer
from .qparams import QParams
from .quantize import Layer, list_layers, quantize
from .report import LayerError, layer_errors

__all__ = [
    "OBSERVERS",
    "Layer",
    "LayerError",
    "MinMax",
    "Observer",
    "QParams",
    "instrument",
    "layer_errors",
    "list_layers",
    "quantize",
]
