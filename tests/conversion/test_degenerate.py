"""Kernels that are zero, tiny, huge, constant or a delay convert correctly or are refused in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.converted import measure_model
from tests.support.models import FAMILIES, tiny_config
from tnnlm.checkpoints.certificate import ConversionReport
from tnnlm.conversion import convert_model, convert_taps
from tnnlm.errors import UserError
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import kernels
from tnnlm.ops.ssm import SSMParams

LENGTH = 24
LAGS = np.arange(LENGTH)
SMOOTH = np.stack([0.6**LAGS, 0.5**LAGS * np.cos(LAGS), -(0.7**LAGS)])


def delay(lag: int, length: int = LENGTH) -> np.ndarray:
    return (np.arange(length) == lag).astype(float)


KERNELS: dict[str, Any] = {
    "smooth": SMOOTH,
    "zero": np.zeros((3, LENGTH)),
    "zero in float32": np.zeros((2, LENGTH), dtype=np.float32),
    "zero channel": np.stack([SMOOTH[0], np.zeros(LENGTH), SMOOTH[1]]),
    "zero channel first, in float32": np.stack([np.zeros(LENGTH), SMOOTH[0]]).astype(np.float32),
    "denormal": SMOOTH * 5e-310,
    "denormal in float32": (SMOOTH * 1e-39).astype(np.float32),
    "denormal channel": SMOOTH * np.array([[1.0], [3e-309], [1.0]]),
    "tiny": SMOOTH * 1e-200,
    "huge": SMOOTH * 1e160,
    "near the largest number": SMOOTH * 1e306,
    "near the largest float32": (SMOOTH * 1e38).astype(np.float32),
    "huge channel": SMOOTH * np.array([[1.0], [1e180], [1.0]]),
    "single tap": [[2.0]],
    "two taps": [[2.0, -1.0]],
    "three taps": [[0.0, 0.0, 1.0]],
    "tap at lag 0": delay(0),
    "delay": delay(5),
    "longest delay": delay(LENGTH - 1),
    "two delays": np.stack([delay(3), delay(11)]),
    "constant": np.ones((2, LENGTH)),
    "alternating": np.stack([(-1.0) ** LAGS, 0.5 * (-1.0) ** LAGS]),
    "step": (LAGS < 7).astype(float),
    "longdouble": SMOOTH.astype(np.longdouble),
    "integers": (100 * SMOOTH).astype(np.int32),
    "unsigned": np.arange(LENGTH, dtype=np.uint16),
    "booleans": LAGS % 3 == 0,
    "half": SMOOTH.astype(np.float16),
    "big-endian": SMOOTH.astype(">f8"),
    "Fortran order": np.asfortranarray(SMOOTH),
    "reversed view": SMOOTH[:, ::-1][:, ::-1],
    "parameter": torch.nn.Parameter(torch.tensor(SMOOTH)),
}
METHODS = ("balanced", "auto", "etsc", "window", "gradient")
EXACT = ("etsc", "window")


def numbers_of(report: ConversionReport) -> list[float]:
    found = [value for value in vars(report).values() if isinstance(value, (int, float))]
    return [float(value) for value in found]


def check(name: str, k: np.ndarray, method: str, options: dict[str, Any]) -> str:
    """Return "converted" or "refused"; fail if a conversion is wrong or an error isn't a ``UserError``."""
    case = f"{name}, {method}, {options}"
    try:
        params, report = convert_taps(KERNELS[name], method=method, **options)
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"refused in several lines: {error}"
    assert isinstance(params, SSMParams)
    assert all(bool(torch.isfinite(part).all()) for part in params), case
    assert not any(math.isnan(number) for number in numbers_of(report)), case
    peak = np.abs(k).max() or 1.0
    found = params.taps(k.shape[1]).numpy()
    missed, size = (np.linalg.norm(x / peak) for x in (found - k, k))
    error = missed / size if missed else 0.0
    assert report.relative_tap_error == pytest.approx(error, rel=1e-6, abs=1e-12), case
    if method in ("balanced", "auto"):
        assert error <= 1e-3, case
        assert report.largest_pole < 1, case
    if method in EXACT:
        assert error <= 1e-5, case
    return "converted"


@pytest.mark.parametrize("finite", [False, True])
def test_degenerate_kernels_convert_or_are_refused(finite: bool) -> None:
    outcomes: dict[tuple[str, str], str] = {}
    for name, given in KERNELS.items():
        array = given.detach().numpy() if isinstance(given, Tensor) else np.asarray(given)
        k = np.atleast_2d(array.astype(np.float64))
        for method in METHODS:
            options = {
                "finite": finite,
                **({"gradient_steps": 2, "order": 1} if method == "gradient" else {}),
            }
            outcomes[name, method] = check(name, k, method, options)
        outcomes[name, "channel"] = check(name, k, "balanced", {"finite": finite, "poles": "channel"})
    assert set(outcomes.values()) == {"converted", "refused"}
    refused = {case for case, outcome in outcomes.items() if outcome == "refused"}
    # The exact window takes every kernel, and so does auto. Nothing usual is refused.
    assert not {case for case in refused if case[1] in ("window", "auto")}
    assert {name for name, method in refused if method == "etsc"} <= {"denormal", "denormal in float32"}
    plain = {"smooth", "zero", "zero channel", "tiny", "huge", "huge channel", "tap at lag 0", "single tap"}
    assert not {case for case in refused if case[0] in plain}


BAD: dict[str, Callable[[], Any]] = {
    "NaN": lambda: convert_taps([[1.0, math.nan]]),
    "infinity": lambda: convert_taps(np.array([[1.0, -math.inf]])),
    "longdouble out of range": lambda: convert_taps(
        np.array([[1.0]], dtype=np.longdouble) * 10 ** np.longdouble(400)
    ),
    "words": lambda: convert_taps([["a", "b"]]),
    "rows of unequal length": lambda: convert_taps([[1.0, 2.0], [3.0]]),
    "nothing": lambda: convert_taps(None),
    "short decay": lambda: convert_taps(SMOOTH, method="etsc", decay=np.array([0.9, 0.9])),
    "decay with two axes": lambda: convert_taps(SMOOTH, method="etsc", decay=np.full((3, 1), 0.9)),
    "NaN as decay": lambda: convert_taps(SMOOTH, method="etsc", decay=math.nan),
    "complex decay": lambda: convert_taps(SMOOTH, method="etsc", decay=0.9 + 0j),
    "decay of another method": lambda: convert_taps(SMOOTH, method="window", decay=[0.9] * 2),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_arrays_are_one_clear_error(case: str) -> None:
    with pytest.raises(UserError) as caught:
        BAD[case]()
    assert "\n" not in str(caught.value)
    assert "Error" not in str(caught.value).split("(")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_dead_kernels_converts(family: str) -> None:
    model = CausalLM(tiny_config(kernel=FAMILIES[family]())).eval()
    first, second = kernels(model)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
        for name, parameter in second.named_parameters():
            if name in ("rpe.output.weight", "rpe.output.bias", "skip", "numerator", "direct"):
                parameter[0] = 0
    for method in ("balanced", "auto", "etsc", "window"):
        # Kernels that end abruptly have no small balanced recurrence.
        tolerance = {"tolerance": 0.5} if family in ("sgconv", "hyena") else {}
        converted = convert_model(model, method=method, **tolerance)
        report = measure_model(model, converted, method=method, horizon=64)
        for layer in report.layers:
            assert not any(math.isnan(number) for number in numbers_of(layer))
        assert report.layers[0].relative_tap_error == 0
        tokens = torch.randint(300, (1, 20))
        assert torch.isfinite(converted(tokens)).all()
