"""Conversion: taps -> recurrence, in closed form."""

from tnnlm.conversion.balanced import balanced
from tnnlm.conversion.certify import ConversionReport, ModelReport, certify, measure, measure_model
from tnnlm.conversion.convert import (
    attach,
    convert_kernel,
    convert_kernels,
    convert_layers,
    convert_model,
    in_recurrent_form,
    model_horizon,
)
from tnnlm.conversion.etsc import etsc
from tnnlm.conversion.gradient import gradient
from tnnlm.conversion.horizon import auto_horizon
from tnnlm.conversion.methods import METHODS, Converted
from tnnlm.conversion.taps import convert_taps
from tnnlm.conversion.window import window

__all__ = [
    "METHODS",
    "ConversionReport",
    "Converted",
    "ModelReport",
    "attach",
    "auto_horizon",
    "balanced",
    "certify",
    "convert_kernel",
    "convert_kernels",
    "convert_layers",
    "convert_model",
    "convert_taps",
    "etsc",
    "gradient",
    "in_recurrent_form",
    "measure",
    "measure_model",
    "model_horizon",
    "window",
]
