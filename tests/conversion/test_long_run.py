"""Long runs on noise stay close to the float64 recurrence (invariant 7 of CONTRIBUTING.md).

``TNNLM_NIGHTLY=1`` runs a million steps instead of 100,000.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.etsc import without_balancing
from tnnlm.conversion import convert_taps
from tnnlm.ops.companion import CompanionParams, CompanionState
from tnnlm.ops.recurrence import Params, State
from tnnlm.ops.ssm import SSMParams, SSMState

STEPS = 1_000_000 if os.environ.get("TNNLM_NIGHTLY") == "1" else 100_000
CHUNK = 10_000
WINDOW = 64
DRIFT = 1e-4
"""Largest relative error of the outputs of the last steps."""


def kernels() -> dict[str, SSMParams]:
    """Return one channel per method: a rough kernel with decay 0.99, small enough to step quickly."""
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
    """Return single-channel recurrences as the channels of one recurrence, which steps all of them."""
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
    """Return the drift of each method."""
    named = kernels()
    stored = together(list(named.values())).to_dtype(torch.float32)
    return dict(zip(named, relative_drift(stored, len(named)).tolist(), strict=True))


def relative_drift(stored: Params, channels: int) -> Tensor:
    """Return the relative error of the last outputs of a float32 run against the float64 recurrence, (E,)."""
    # The float64 run starts from the parameters as stored in float32, so that only rounding of the steps
    # counts.
    reference = type(stored)(*(part.double() for part in stored))
    generator = torch.Generator().manual_seed(1)
    slow, fast = stored.init_state(1), reference.init_state(1)
    ends: list[Tensor] = []
    with torch.inference_mode():
        for _ in range(STEPS // CHUNK):
            x = torch.randn(1, CHUNK, 1, generator=generator).expand(-1, -1, channels).contiguous()
            slow = _advance(stored, x[:, :-WINDOW], slow)
            alike = _advance(stored, x[:, -WINDOW:], slow)
            y, slow = _steps(stored, x[:, -WINDOW:], slow)
            assert all(map(torch.equal, alike, slow)), "_advance and step give different states"
            # The float64 run uses prefill, which equals steps to 1e-11 as other tests show.
            expected, fast = reference.prefill(x.double(), fast)
            ends = [y.double(), expected[:, -WINDOW:]]
    return (ends[0] - ends[1]).norm(dim=(0, 1)) / ends[1].norm(dim=(0, 1))


def _steps(params: Params, x: Tensor, state: State) -> tuple[Tensor, State]:
    outputs = []
    for token in x.unbind(1):
        y, state = params.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def _advance(params: Params, x: Tensor, state: State) -> State:
    """Return the state after single steps, bit for bit, without outputs: ten times faster than the steps.

    Every operation that a step applies to the state runs token after token, on tensors of the same shapes.
    What depends on the parameters alone is computed once, and outputs are skipped.
    """
    if isinstance(params, SSMParams):
        return _advance_modes(params, x, state)
    return _advance_companion(params, x, state)


def _advance_modes(params: SSMParams, x: Tensor, state: SSMState) -> SSMState:
    coarse = params.poles.to(x.dtype)
    fine = (params.poles - coarse).to(x.dtype)
    (re, im), (re_fine, im_fine) = coarse.unbind(-2), fine.unbind(-2)
    window, real, imag = state
    for u in x.unsqueeze(-1).unbind(1):
        after = torch.addcmul(u, re_fine, real).addcmul_(im_fine, imag, value=-1)
        after = after.addcmul_(re, real).addcmul_(im, imag, value=-1)
        imag = (re_fine * imag).addcmul_(im_fine, real).addcmul_(re, imag).addcmul_(im, real)
        real = after
    # The window holds the inputs unchanged, newest first.
    inputs = torch.cat((x.transpose(1, 2).flip(-1), window), dim=-1)
    return SSMState(inputs[..., : window.shape[-1]], real, imag)


def _advance_companion(params: CompanionParams, x: Tensor, state: CompanionState) -> CompanionState:
    """Advance one sequence with one denominator per channel."""
    length, order = x.shape[1], params.denominator.shape[1]
    a = params.denominator[:, :, None]
    # One row holds every w of the chunk, newest first, and is filled from its end, so that no step moves
    # older values.
    row = torch.cat((x.new_zeros(x.shape[2], length), state.recent[0]), dim=1)
    recent = row.unfold(1, order, 1)[:, :, None].unbind(1)
    cells = row[:, :length, None, None].unbind(1)
    for t, u in enumerate(x[0, :, :, None, None]):
        torch.sub(u, torch.bmm(recent[length - t], a), out=cells[length - 1 - t])
    return CompanionState(row[None, :, :order])


@pytest.mark.parametrize("method", ["etsc", "balanced", "gradient", "window"])
def test_many_steps_stay_with_float64(drift: dict[str, float], method: str) -> None:
    assert drift[method] <= DRIFT


@pytest.fixture(scope="module")
def companion_drift() -> float:
    """Return the drift of the companion recurrence of an RTF kernel with poles up to 0.99."""
    angle = torch.tensor([0.1, 0.8, 1.7, 2.6], dtype=torch.float64)
    poles = torch.polar(torch.tensor([0.99, 0.9, 0.95, 0.8], dtype=torch.float64), angle)
    a = np.real(np.poly(torch.cat((poles, poles.conj())).numpy()))[1:]
    numerator = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = CompanionParams(torch.ones(1, dtype=torch.float64), numerator, torch.from_numpy(a)[None])
    return float(relative_drift(exact.to_dtype(torch.float32), 1))


def test_many_companion_steps_stay_with_float64(companion_drift: float) -> None:
    assert companion_drift <= DRIFT


@pytest.mark.parametrize("method", ["undecayed etsc", "constant mode"])
def test_undecayed_poles_drift_but_stay_finite(drift: dict[str, float], method: str) -> None:
    # On the unit circle, rounding errors never decay: they grow with the square root of the number of steps.
    assert drift[method] < 0.05
