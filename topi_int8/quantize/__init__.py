"""Post-training static quantization: fp32 Relax in, QDQ Relax out.

observers (methods: observer, clipping) -> calibrate (run the graph) -> qparams (ranges to scales);
graph and plan decide which tensors are quantized; insert writes the pairs; report measures what
they cost. Less error: equalize before, bias_correction after; budget leaves layers in float32,
sensitivity says which.
"""

from .accuracy import Accuracy, AccuracyReport, LayerAccuracy, Skip
from .budget import BudgetReport, BudgetStep, Network, budget_report
from .calibrate import instrument
from .clipping import KLDivergence, MeanSquaredError, Percentile
from .layers import Layer, list_layers
from .methods import OBSERVERS
from .observer import Grid, MinMax, MovingAverage, Observer
from .preparation import prepare_like
from .qparams import QParams
from .quantize import quantize
from .report import LayerError, accuracy_report, layer_errors

__all__ = [
    "OBSERVERS",
    "Accuracy",
    "AccuracyReport",
    "BudgetReport",
    "BudgetStep",
    "Grid",
    "KLDivergence",
    "Layer",
    "LayerAccuracy",
    "LayerError",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Network",
    "Observer",
    "Percentile",
    "QParams",
    "Skip",
    "accuracy_report",
    "budget_report",
    "instrument",
    "layer_errors",
    "list_layers",
    "prepare_like",
    "quantize",
]
