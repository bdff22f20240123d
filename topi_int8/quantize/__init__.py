"""Post-training static quantization: fp32 Relax in, QDQ Relax out.

observer -> calibrate (run the graph) -> qparams (ranges to scales); graph and plan decide which
tensors are quantized; insert writes the pairs; report measures what they cost. Less error: equalize
before, bias_correction after; budget leaves layers in float32, sensitivity says which.
"""

from .budget import BudgetReport, BudgetStep, Network, budget_report
from .calibrate import instrument
from .layers import Layer, list_layers
from .observer import OBSERVERS, MinMax, Observer
from .preparation import prepare_like
from .qparams import QParams
from .quantize import quantize
from .report import LayerError, layer_errors

__all__ = [
    "OBSERVERS",
    "BudgetReport",
    "BudgetStep",
    "Layer",
    "LayerError",
    "MinMax",
    "Network",
    "Observer",
    "QParams",
    "budget_report",
    "instrument",
    "layer_errors",
    "list_layers",
    "prepare_like",
    "quantize",
]
