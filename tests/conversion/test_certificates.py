"""Certificates bound what conversions do, for random kernels of every family and degenerate ones.

``TNNLM_NIGHTLY=1`` runs ten times as many examples, which are different ones every time.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.certificates import check_certificate
from tests.support.models import FAMILIES
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import convert_kernel, convert_taps
from tnnlm.conversion.certify import EXTENT, certify_kernel
from tnnlm.errors import UserError
from tnnlm.kernels import build_kernel

NIGHTLY = os.environ.get("TNNLM_NIGHTLY") == "1"
EXAMPLES = settings(
    max_examples=1000 if NIGHTLY else 100,
    derandomize=not NIGHTLY,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
"""Settings of each of the two tests, which together run 200 examples, or 2,000."""
METHODS = st.sampled_from(["balanced", "auto", "etsc", "window", "gradient"])
SHAPES = ("exponentials", "rough", "zero", "zero channel", "denormal", "tiny", "huge", "delay", "constant")


class Case(NamedTuple):
    """Random conversion."""

    seed: int
    channels: int
    length: int
    method: str
    single: bool
    shared: bool
    order: int | None

    def options(self) -> dict[str, Any]:
        order = min(self.order or 4, self.length) if self.method == "gradient" else self.order
        order = None if order is None else min(order, self.length)
        poles = "shared" if self.shared else "channel"
        return {"method": self.method, "poles": poles, "order": order, "gradient_steps": 2}


CASES = st.builds(
    Case,
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 64),
    METHODS,
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(1, 12),
)


def random_taps(shape: str, case: Case, generator: torch.Generator) -> Tensor:
    """Return taps (E, T) in float64."""
    size = (case.channels, case.length)
    lags = torch.arange(case.length, dtype=torch.float64)
    radius, angle, weight = torch.rand(3, 4, 1, generator=generator, dtype=torch.float64)
    basis = (0.3 + 0.69 * radius) ** lags * torch.cos(3.2 * angle * lags + weight)
    smooth = torch.randn(case.channels, 4, generator=generator, dtype=torch.float64) @ basis
    rough = torch.randn(size, generator=generator, dtype=torch.float64)
    if shape == "zero channel":
        smooth[case.seed % case.channels] = 0
    made = {
        "rough": rough,
        "zero": torch.zeros(size, dtype=torch.float64),
        "denormal": smooth * 1e-309,
        "tiny": smooth * 1e-180,
        "huge": smooth * 1e170,
        "delay": (lags == case.seed % case.length).double().expand(size).contiguous(),
        "constant": torch.ones(size, dtype=torch.float64),
    }
    return made.get(shape, smooth)


@EXAMPLES
@given(case=CASES, shape=st.sampled_from(SHAPES), finite=st.booleans())
def test_certificates_of_taps_bound_the_errors(case: Case, shape: str, finite: bool) -> None:
    torch.manual_seed(0)
    k = random_taps(shape, case, torch.Generator().manual_seed(case.seed))
    k = k.float() if case.single and float(k.abs().max()) < 1e38 else k
    try:
        params, report = convert_taps(k, finite=finite, **case.options())
    except UserError:
        return
    # Of kernels that are not finite, nothing is known past the given taps.
    check_certificate(report, params, k, case.length, 2 * EXTENT * case.length if finite else case.length)
    if case.method in ("balanced", "auto") and case.order is None:
        assert report.relative_tap_error <= 1e-3


@EXAMPLES
@given(case=CASES, family=st.sampled_from(sorted(FAMILIES)), own=st.booleans())
def test_certificates_of_kernels_bound_the_errors(case: Case, family: str, own: bool) -> None:
    torch.manual_seed(case.seed)
    config = FAMILIES[family]()
    for name, value in {"denominators": 1, "kernel_dim": 2, "state_size": 3, "decay": 0.9}.items():
        if name in vars(config):
            setattr(config, name, value)
    max_length = max(case.length, 5)
    kernel = build_kernel(config, case.channels, max_length)
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    kernel = kernel if case.single else kernel.double()
    options = case.options() | ({"method": "companion", "order": None} if own and family == "rtf" else {})
    try:
        converted = convert_kernel(kernel, ConversionConfig(**options), case.length, max_length=max_length)
    except UserError:
        return
    report = certify_kernel(kernel, converted, case.length, max_length)
    length = EXTENT * max_length + 64
    with torch.no_grad():
        k = kernel(length)
    check_certificate(report, converted.params, k, case.length, length)


def test_nan_is_never_a_number() -> None:
    with pytest.raises(UserError, match="not finite"):
        convert_taps([[1.0, math.nan]])
