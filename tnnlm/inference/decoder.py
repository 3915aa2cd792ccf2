"""Protocol of models that decode: a converted ``CausalLM``, or one with a compiled or captured step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from tnnlm.models.causal_lm import ModelState


class DecoderModel(Protocol):
    """Model that processes prompts in parallel, and one or several tokens per pass over its weights."""

    embedding: nn.Embedding

    def init_state(self, batch_size: int) -> ModelState:
        """Return the state before the first token."""
        ...

    def prefill(
        self, tokens: Tensor, state: ModelState, lengths: Tensor | None = None, keep: int | None = None
    ) -> tuple[Tensor, ModelState]:
        """Process tokens (B, L) in parallel."""
        ...

    def step(
        self, tokens: Tensor, state: ModelState, active: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Process one token per row (B,)."""
        ...

    def steps(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, Sequence[ModelState]]:
        """Process K tokens per row (B, K), and return the logits (B, K, V) and the state after each."""
        ...
