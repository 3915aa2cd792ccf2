"""The loss: cross-entropy of the next token, without ever holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from tnnlm.model import CausalLM


def next_token_loss(model: CausalLM, rows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of rows of token ids (B, L + 1)."""
    logits = model(rows[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
