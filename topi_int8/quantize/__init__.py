"""Post-training static quantization: fp32 Relax in, QDQ Relax out.

observer -> calibrate (run the graph) -> qparams (ranges to scales); graph and plan decide which
tensors are quantized; insert writes the pairs.
"""

from .calibrate import instrument
from .observer import OBSERVERS, MinMax, Observer
from .qparams import QParams
from .quantize import Layer, list_layers, quantize

__all__ = [
    "OBSERVERS",
    "Layer",
    "MinMax",
    "Observer",
    "QParams",
    "instrument",
    "list_layers",
    "quantize",
]
