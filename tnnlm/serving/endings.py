"""States at the end of generated sequences, which prompts that continue them begin from."""

from __future__ import annotations

from torch import Tensor

from tnnlm.chat.encoding import SpecialTokens
from tnnlm.inference.generator import GenerationState
from tnnlm.serving.batch import RunningBatch
from tnnlm.serving.dialogues import Dialogues
from tnnlm.serving.event_log import EventLog
from tnnlm.serving.prefix_cache import PrefixCache
from tnnlm.serving.sequence import GeneratedSequence
from tnnlm.tokenizer import TextTokenizer

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
            logits: Logits that the last token was sampled from, (1, V).
        """
        begun, drawn = sequence.beginning, sequence.drawn
        if begun is None or not sequence.complete or not self._cache.limit:
            return
        try:
            tokens = [*begun.tokens, *drawn[:-1]]
            state = GenerationState(batch.state_of(row), logits.clone(), (len(tokens),), 0.0)
            self._cache.put(tokens, state, begun.partition)
            # The client doesn't have the text behind a stop string, and can't send it again.
            if begun.text is not None and not sequence.text.stopped:
                answer = drawn[:-1] if drawn[-1] == self._end else drawn
                self.dialogues.put(begun.text, begun.tokens, answer, begun.partition)
        except Exception as error:  # the sequence itself has ended well
            self._log.failed("the end of a sequence is not kept", error)
