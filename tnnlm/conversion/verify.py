"""Checks of ``convert.py --verify``: the converted model compared with slow reference implementations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import kernels, recurrences
from tnnlm.ops.reference import recurrence_loop, toeplitz_dense

GAP_THRESHOLD = 1e-4
"""Largest accepted absolute relative perplexity gap at the training length."""
CONV_THRESHOLD = 1e-5
"""Largest accepted relative error of a layer's outputs, recurrence loop against dense Toeplitz product."""
LOGITS_THRESHOLD = 1e-4
"""Largest accepted difference between step-by-step and parallel logits."""


@dataclass(frozen=True)
class Check:
    """Comparison that passes if ``error`` is at most ``threshold``."""

    name: str
    error: float
    threshold: float

    @property
    def passed(self) -> bool:
        """Whether the comparison passes; NaN fails."""
        return self.error <= self.threshold


@torch.no_grad()
def check_layers(model: CausalLM, converted: CausalLM, length: int = 64, tap_error: float = 0.0) -> Check:
    """Compare every layer's recurrence, a loop in complex128, with the dense product in float64, on noise.

    Args:
        model: Trained model, in its parallel form.
        converted: Converted model.
        length: Length of the noise sequence.
        tap_error: Relative error of the taps. On noise, outputs have relative errors of the same size, so
            the threshold is raised by three times this error.
    """
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for kernel, params in zip(kernels(model), recurrences(converted), strict=True):
        k = kernel(length).double()
        x = torch.randn(1, length, len(k), generator=generator, dtype=torch.float64)
        # In blocks of channels, because the dense matrices are E x L x L.
        expected = torch.cat(
            [toeplitz_dense(x[..., i : i + 64], k[i : i + 64]) for i in range(0, len(k), 64)], dim=2
        )
        error = (recurrence_loop(params, x) - expected).norm() / expected.norm()
        worst = max(worst, float(error))
    return Check("convolutions, recurrence loop against dense product", worst, CONV_THRESHOLD + 3 * tap_error)


@torch.no_grad()
def check_steps(reference: CausalLM, converted: CausalLM, tokens: Tensor) -> Check:
    """Compare the logits of one ``step`` per token with those of ``reference.forward``.

    Args:
        reference: Trained model if the conversion is exact, else the converted model.
        converted: Converted model.
        tokens: Token ids (B, L).
    """
    expected = reference(tokens)
    state = converted.init_state(tokens.shape[0])
    worst = torch.zeros(())
    for position in range(tokens.shape[1]):
        logits, state = converted.step(tokens[:, position], state)
        worst = torch.maximum(worst, (logits - expected[:, position]).abs().max())
    return Check("logits, step by step against parallel", float(worst), LOGITS_THRESHOLD)


def check_gap(gap: float) -> Check:
    """Compare the parallel and recurrent perplexities at the training length by their relative gap."""
    return Check("relative perplexity gap", abs(gap), GAP_THRESHOLD)
