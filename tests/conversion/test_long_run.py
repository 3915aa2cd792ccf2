"""Law 7: a million steps on noise stay with the float64 recurrence, for every method at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.ablations import without_balancing
from tnnlm.conversion import convert_taps
from tnnlm.ops.companion import CompanionParams
from tnnlm.ops.recurrence import Params, State
from tnnlm.ops.ssm import SSMParams

STEPS = 1_000_000
WINDOW = 64
DRIFT = 1e-4
"""relative, of the outputs of the last steps"""


def kernels() -> dict[str, SSMParams]:
    """One channel per method: a rough kernel with decay 0.99, small enough to step quickly."""
    lags = torch.arange(64, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    smooth = torch.cos(0.1 * lags) + 0.3 * torch.cos(lags + 1)
    k = (smooth + 0.1 * torch.randn(64, dtype=torch.float64, generator=generator)) * 0.99**lags
    return {
        "etsc": convert_taps(k, method="etsc", decay=0.99)[0],
        "balanced": convert_taps(0.95**lags * smooth, method="balanced")[0],
        "gradient": convert_taps(0.95**lags * smooth, method="gradient", order=8, gradient_steps=50)[0],
        "window": convert_taps(k, method="window")[0],
        "undecayed etsc": convert_taps(k, method="etsc")[0],
        "constant mode": without_balancing(k.unsqueeze(0)),
    }


def together(parts: list[SSMParams]) -> SSMParams:
    """Several single-channel recurrences as the channels of one: a step of it is a step of each."""
    modes = max(part.residues.shape[2] for part in parts)
    taps = max(part.window.shape[1] for part in parts)

    def filled(tensors: list[Tensor], width: int) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[-1])) for t in tensors])

    return SSMParams(
        filled([part.window for part in parts], taps),
        filled([part.poles.reshape(1, 2, -1) for part in parts], modes),
        filled([part.residues for part in parts], modes),
    )


@pytest.fixture(scope="module")
def drift() -> dict[str, float]:
    """By method."""
    named = kernels()
    stored = together(list(named.values())).to_dtype(torch.float32)
    return dict(zip(named, relative_drift(stored, len(named)).tolist(), strict=True))


def relative_drift(stored: Params, channels: int) -> Tensor:
    """Relative error of the last outputs of a float32 run against the float64 recurrence, (E,)."""
    # The float64 run starts from what float32 stored: drift is what stepping adds.
    reference = type(stored)(*(part.double() for part in stored))
    generator = torch.Generator().manual_seed(1)
    slow, fast = stored.init_state(1), reference.init_state(1)
    ends: list[Tensor] = []
    with torch.inference_mode():
        for _ in range(STEPS // 10_000):
            x = torch.randn(1, 10_000, 1, generator=generator).expand(-1, -1, channels).contiguous()
            y, slow = _steps(stored, x, slow)
            # Float64 in parallel: prefill equals stepping to 1e-11, which other tests show.
            expected, fast = reference.prefill(x.double(), fast)
            ends = [y[:, -WINDOW:].double(), expected[:, -WINDOW:]]
    return (ends[0] - ends[1]).norm(dim=(0, 1)) / ends[1].norm(dim=(0, 1))


def _steps(params: Params, x: Tensor, state: State) -> tuple[Tensor, State]:
    outputs = []
    for token in x.unbind(1):
        y, state = params.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("method", ["etsc", "balanced", "gradient", "window"])
def test_a_million_steps_stay_with_float64(drift: dict[str, float], method: str) -> None:
    assert drift[method] <= DRIFT


@pytest.fixture(scope="module")
def companion_drift() -> float:
    """The same of an RTF kernel's own recurrence, poles up to 0.99."""
    angle = torch.tensor([0.1, 0.8, 1.7, 2.6], dtype=torch.float64)
    poles = torch.polar(torch.tensor([0.99, 0.9, 0.95, 0.8], dtype=torch.float64), angle)
    a = np.real(np.poly(torch.cat((poles, poles.conj())).numpy()))[1:]
    numerator = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = CompanionParams(torch.ones(1, dtype=torch.float64), numerator, torch.from_numpy(a)[None])
    return float(relative_drift(exact.to_dtype(torch.float32), 1))


def test_a_million_companion_steps_stay_with_float64(companion_drift: float) -> None:
    assert companion_drift <= DRIFT


@pytest.mark.parametrize("method", ["undecayed etsc", "constant mode"])
def test_undecayed_poles_drift_but_stay_finite(drift: dict[str, float], method: str) -> None:
    # Rounding is never forgotten on the unit circle: it grows like the square root of the steps.
    assert drift[method] < 0.05
