"""States at the end of generated sequences, which prompts that continue them begin from."""

from __future__ import annotations

from torch import Tensor

from tnnlm.chat.encoding import SpecialTokens
from tnnlm.inference.generator import GenerationState
from tnnlm.serving.batch import RunningBatch
from tnnlm.serving.dialogues import Dialogues
from tnnlm.serving.event_log import EventLog
from tnnlm.serving.prefix_cache import PrefixCache
from tnnlm.serving.sequence import GeneratedSequence, Mark
from tnnlm.tokenizer import TextTokenizer

TOKENS_PER_MARK = 4
"""Least number of tokens per copy of a state for stop strings: a copy takes a part of the time of a step."""
SHARE = 16
"""Size of the prefix cache relative to that of the tokens of conversations."""


class Endings:
    """Keeper of the states of sequences that have ended.

    Args:
        tokenizer: Tokenizer of the model.
        cache: Prefix cache, which gets the states.
        log: Log of the server.
    """

    def __init__(self, tokenizer: TextTokenizer, cache: PrefixCache, log: EventLog) -> None:
        self.dialogues = Dialogues(SpecialTokens(tokenizer), cache.limit // SHARE)
        """Tokens of conversations that have ended."""
        self._cache, self._end, self._log = cache, tokenizer.eos_id, log

    def keep(self, sequence: GeneratedSequence, batch: RunningBatch, row: int, logits: Tensor) -> None:
        """Keep the state of a row at the end of its sequence, unless the sequence failed.

        Args:
            sequence: Sequence that has ended.
            batch: Batch with its state, after all tokens of it but the last one.
            row: Row of the batch.
            logits: Logits that the last tokens of all rows were sampled from, (B, V).
        """
        begun, drawn = sequence.beginning, sequence.drawn
        if begun is None or not sequence.complete or not self._cache.limit:
            return
        try:
            n, state = len(drawn) - 1, None
            answer = drawn[:-1] if drawn[-1] == self._end else drawn
            if sequence.text.stopped:  # a client doesn't have the text from the stop string on
                if sequence.mark is not None and sequence.mark.shown == sequence.text.shown:
                    _, n, state = sequence.mark
                answer = drawn[:n]
            state = state or self._copied(sequence, batch, row, logits)
            self._cache.put([*begun.tokens, *drawn[:n]], state, begun.partition)
            if begun.text is not None:
                self.dialogues.put(begun.text, begun.tokens, answer, begun.partition, begun.lead)
        except Exception as error:  # the sequence itself has ended well
            self._log.failed("the end of a sequence is not kept", error)

    def mark(self, sequence: GeneratedSequence, batch: RunningBatch, row: int, logits: Tensor) -> None:
        """Note the state of a chat before its last token, with which a stop string may begin.

        Arguments are those of :meth:`keep`. At most one of :data:`TOKENS_PER_MARK` tokens is noted.
        """
        begun, drawn, shown = sequence.beginning, sequence.drawn, sequence.text.shown
        if begun is None or begun.text is None or not self._cache.limit:
            return
        noted = sequence.mark is not None and sequence.mark.shown == shown
        if noted or len(drawn) < TOKENS_PER_MARK * sequence.n_marks:
            return
        try:
            state = self._copied(sequence, batch, row, logits)
            sequence.mark = Mark(shown, len(drawn) - 1, state)
            sequence.n_marks += 1
        except Exception as error:  # the sequence continues without it
            self._log.failed("the end of a sequence is not kept", error)

    def _copied(
        self, sequence: GeneratedSequence, batch: RunningBatch, row: int, logits: Tensor
    ) -> GenerationState:
        """Return a copy of the state of a row, before its last token."""
        assert sequence.beginning is not None
        length = len(sequence.beginning.tokens) + len(sequence.drawn) - 1
        return GenerationState(batch.state_of(row), logits[row : row + 1].clone(), (length,), 0.0)
