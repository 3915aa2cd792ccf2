"""Ids of the tokens of prompts and completions, which a client sends to continue them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tnnlm.serving.sequence import GeneratedSequence, Prompt


class TokenIds:
    """Fields ``prompt_token_ids`` and ``token_ids`` of the choices of a response, as in vLLM.

    The same text may have other tokens than those that the model has read and written, after which the prefix
    cache has a state.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = {sequence: prompt.tokens for prompt in prompts for sequence in prompt.sequences}
        self._sent = Counter[GeneratedSequence]()

    def begins(self, sequence: GeneratedSequence) -> bool:
        """Return whether the next fields of a sequence are its first ones, with the ids of its prompt."""
        return sequence not in self._sent

    def fields(self, sequence: GeneratedSequence, count: int) -> dict[str, list[int]]:
        """Return the ids of the next ``count`` tokens of a sequence; the end token is none of them."""
        prompt = {"prompt_token_ids": self._prompts[sequence]} if self.begins(sequence) else {}
        start = self._sent[sequence]
        self._sent[sequence] = start + count
        return prompt | {"token_ids": sequence.drawn[start : start + count]}
