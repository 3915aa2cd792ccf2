"""How the next token is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tnnlm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. Temperature 0 is greedy; the cuts are applied in the order k, p."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise UserError(f"temperature {self.temperature}: must be from 0 (greedy) to 100")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}: must be above 0 and at most 1 (off)")


def tempered(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Logits (B, V) over temperatures above 0, one or (B, 1), in float64, the likeliest at 0: that of a
    temperature however small stays finite."""
    logits = logits.double()
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def sample(logits: Tensor, sampling: SamplingParams, generator: torch.Generator | None = None) -> Tensor:
    """Draw the next token of every row: logits (B, V) -> (B,).

    Raises:
        UserError: if the logits are not numbers.
    """
    if not bool(logits.amax(-1).isfinite().all()):  # a maximum is NaN where one of its row is
        raise UserError(
            "the model's logits are not finite: its weights are damaged, or the conversion is unstable",
            "check them with convert.py --verify",
        )
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = tempered(logits, sampling.temperature)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        # A token stays while the mass before it is below p, so the likeliest always does.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(dropped.gather(-1, index.argsort(-1)), -math.inf)
    probabilities = logits.softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
