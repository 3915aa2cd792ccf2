"""``convert.py --verify``: the converted model against the slow, obvious references."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import kernels, recurrences
from tnnlm.ops.reference import recurrence_loop, toeplitz_dense

GAP_THRESHOLD = 1e-4
"""largest |relative perplexity gap| at the training length"""
CONV_THRESHOLD = 1e-5
"""largest relative error of a layer's outputs, Python-loop recurrence against dense Toeplitz product"""
LOGITS_THRESHOLD = 1e-4
"""largest difference of step-by-step and parallel logits"""


@dataclass(frozen=True)
class Check:
    """One comparison: it passes while ``error`` is at most ``threshold``."""

    name: str
    error: float
    threshold: float

    @property
    def passed(self) -> bool:
        """NaN fails."""
        return self.error <= self.threshold


@torch.no_grad()
def check_layers(model: CausalLM, converted: CausalLM, length: int = 64, tap_error: float = 0.0) -> Check:
    """Every layer on noise: the loop in complex128 against the dense product in float64.

    On noise outputs are off by as much as the taps: three times ``tap_error`` is let pass.
    """
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for kernel, params in zip(kernels(model), recurrences(converted), strict=True):
        k = kernel(length).double()
        x = torch.randn(1, length, len(k), generator=generator, dtype=torch.float64)
        # A few channels at a time: the dense matrices are E x L x L.
        expected = torch.cat(
            [toeplitz_dense(x[..., i : i + 64], k[i : i + 64]) for i in range(0, len(k), 64)], dim=2
        )
        error = (recurrence_loop(params, x) - expected).norm() / expected.norm()
        worst = max(worst, float(error))
    return Check("convolutions, recurrence loop against dense product", worst, CONV_THRESHOLD + 3 * tap_error)


@torch.no_grad()
def check_steps(reference: CausalLM, converted: CausalLM, tokens: Tensor) -> Check:
    """Logits of tokens (B, L), one ``step`` after the other, against ``reference.forward``: of the trained
    model for an exact conversion, of the converted one for a reduced one."""
    expected = reference(tokens)
    state = converted.init_state(tokens.shape[0])
    worst = torch.zeros(())
    for position in range(tokens.shape[1]):
        logits, state = converted.step(tokens[:, position], state)
        worst = torch.maximum(worst, (logits - expected[:, position]).abs().max())
    return Check("logits, step by step against parallel", float(worst), LOGITS_THRESHOLD)


def check_gap(gap: float) -> Check:
    """The two perplexities at the training length."""
    return Check("relative perplexity gap", abs(gap), GAP_THRESHOLD)
