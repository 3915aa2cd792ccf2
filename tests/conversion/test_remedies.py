"""Remedies of conversions that fail."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import FAMILIES
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion.convert import convert_kernel
from tnnlm.conversion.source import ToleranceError
from tnnlm.kernels import build_kernel


def test_order_that_rounding_ruins_is_not_the_one_quoted() -> None:
    torch.manual_seed(0)
    kernel = build_kernel(FAMILIES["sgconv"](), 6, 32)
    recipe = ConversionConfig(method="balanced")
    with pytest.raises(ToleranceError, match="--method auto or window") as caught:
        convert_kernel(kernel, recipe, 32, max_length=32)
    assert caught.value.reached < 1
    assert f"relative error of {caught.value.reached:.1e}" in caught.value.reason
    converted = convert_kernel(kernel, ConversionConfig(method="auto"), 32, max_length=32)
    assert converted.method in ("window", "multirate", "etsc")
