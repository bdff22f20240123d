"""Post-training static quantization: fp32 Relax in, QDQ Relax out.

observer -> calibrate (run the graph) -> qparams (ranges to scales); graph and plan decide which
tensors are quantized; insert writes the pairs; report measures what they cost.
"""

from .accuracy import Accuracy, AccuracyReport, LayerAccuracy, Skip
from .calibrate import instrument
from .observer import OBSERVERS, MinMax, Observer
from .qparams import QParams
from .quantize import Layer, list_layers, quantize
from .report import LayerError, accuracy_report, layer_errors

__all__ = [
    "OBSERVERS",
    "Accuracy",
    "AccuracyReport",
    "Layer",
    "LayerAccuracy",
    "LayerError",
    "MinMax",
    "Observer",
    "QParams",
    "Skip",
    "accuracy_report",
    "instrument",
    "layer_errors",
    "list_layers",
    "quantize",
]
