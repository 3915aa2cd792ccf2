"""Conversion of long convolutions to linear recurrences, from the taps of their kernels alone.

ETSC (arXiv 2311.08756), balanced reduction (Ho-Kalman / ERA) and the exact window have a closed form;
gradient descent is their baseline.
"""

from tnnlm.conversion.balanced import balanced
from tnnlm.conversion.certify import certify, describe, measure
from tnnlm.conversion.convert import (
    convert_kernel,
    convert_kernels,
    convert_layers,
    convert_model,
)
from tnnlm.conversion.etsc import etsc
from tnnlm.conversion.gradient import gradient
from tnnlm.conversion.horizon import auto_horizon
from tnnlm.conversion.taps import convert_taps
from tnnlm.conversion.window import window

__all__ = [
    "auto_horizon",
    "balanced",
    "certify",
    "convert_kernel",
    "convert_kernels",
    "convert_layers",
    "convert_model",
    "convert_taps",
    "describe",
    "etsc",
    "gradient",
    "measure",
    "window",
]
