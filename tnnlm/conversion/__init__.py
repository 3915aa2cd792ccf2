"""Conversion: taps -> recurrence, in closed form."""

from tnnlm.conversion.convert import METHODS, attach, convert_kernel, convert_model, model_horizon
from tnnlm.conversion.etsc import etsc
from tnnlm.conversion.horizon import auto_horizon
from tnnlm.conversion.report import ConversionReport, LayerReport, measure
from tnnlm.conversion.window import window

__all__ = [
    "METHODS",
    "ConversionReport",
    "LayerReport",
    "attach",
    "auto_horizon",
    "convert_kernel",
    "convert_model",
    "etsc",
    "measure",
    "model_horizon",
    "window",
]
