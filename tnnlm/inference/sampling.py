"""Sampling of the next token: temperature, top-k, top-p, min-p and penalties."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tnnlm.errors import UserError

NOT_FINITE = "the model's logits are not finite: its weights are corrupt, or the conversion is unstable"
"""Message about logits that no token can be sampled from."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters: penalties, then temperature, top-k, top-p and min-p in this order."""

    temperature: float = 0.8
    """Divisor of the logits, from 0 to 100; 0 is greedy decoding."""
    top_k: int = 0
    """Number of most likely tokens to sample from; 0 or -1 disables it, as in vLLM."""
    top_p: float = 1.0
    """Cumulative probability of the most likely tokens to sample from; 1 disables it, 0 is greedy."""
    min_p: float = 0.0
    """Smallest probability of a token relative to that of the most likely one, from 0 (off) to 1."""
    repetition_penalty: float = 1.0
    """Divisor of positive logits, and factor of negative ones, of tokens that the prompt or the completion
    contains, from 0.01 to 100; 1 disables it."""
    presence_penalty: float = 0.0
    """Number to subtract from the logits of tokens that the completion contains, from -2 to 2."""
    frequency_penalty: float = 0.0
    """Number to subtract from the logit of a token for each time that the completion contains it, from -2
    to 2."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise UserError(f"temperature {self.temperature}: must be from 0 (greedy) to 100")
        if self.top_k < -1:
            raise UserError(f"top_k {self.top_k}: must be 0 (off) or more")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be from 0 (greedy) to 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p {self.min_p}: must be from 0 (off) to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition_penalty {self.repetition_penalty}: must be from 0.01 to 100")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UserError(f"{name} {getattr(self, name)}: must be from -2 to 2")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a random number."""
        return self.temperature == 0 or self.top_p == 0


def tempered(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Divide logits (B, V) by positive temperatures, a number or (B, 1), in float64.

    The maximum of each row is subtracted first, so that the most likely token stays finite at any
    temperature.
    """
    logits = logits.double()
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def sample(logits: Tensor, sampling: SamplingParams, generator: torch.Generator | None = None) -> Tensor:
    """Sample the next token of each row: logits (B, V) -> (B,).

    Raises:
        UserError: If the largest logit of a row is not finite.
    """
    if sampling.greedy:
        check_finite(logits)
        return logits.argmax(-1)
    return sample_from(probabilities(logits, sampling), generator)


def probabilities(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Return the distribution (B, V), in float64, of the tokens of :func:`sample` unless it is greedy.

    Raises:
        UserError: If the largest logit of a row is not finite.
    """
    check_finite(logits)
    logits = tempered(logits, sampling.temperature)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        # A token is kept if the mass before it is below p, so the most likely token is always kept.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(dropped.gather(-1, index.argsort(-1)), -math.inf)
    if sampling.min_p > 0:  # the largest logit is 0 here
        logits = logits.masked_fill(logits < math.log(sampling.min_p), -math.inf)
    return logits.softmax(-1)


def check_finite(logits: Tensor) -> None:
    """Check that a token can be sampled from each row of logits (B, V).

    Raises:
        UserError: If the largest logit of a row is not finite.
    """
    if not bool(logits.amax(-1).isfinite().all()):  # the maximum of a row with a NaN is NaN
        raise UserError(NOT_FINITE, "check the model with convert.py --verify")


def sample_from(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Sample a token of each row of distributions (B, V), which need not be normalised: -> (B,)."""
    # Inverse transform sampling: torch.multinomial takes a random number for each token of the vocabulary.
    mass = p.cumsum(-1)
    uniform = torch.rand(len(mass), 1, generator=generator, dtype=mass.dtype, device=mass.device)
    tokens = torch.searchsorted(mass, uniform * mass[:, -1:], right=True).squeeze(-1)
    # Rounding errors alone can give an index past the end.
    return torch.where(tokens < mass.shape[1], tokens, p.argmax(-1))
