"""Queue of prompts, and the sequences that the scheduler has not ended; shared by all threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence

from tnnlm.serving.sequence import GeneratedSequence, Prompt


class QueueFullError(Exception):
    """Raised by ``submit`` if too many sequences are waiting."""


class ClosedError(Exception):
    """Raised by ``submit`` if the scheduler is not running."""


class PromptQueue:
    """Queue of prompts, first come first served, with a limit of the sequences that have not ended."""

    def __init__(self, most: int) -> None:
        """Create a queue; ``most`` limits the sequences that wait, are in prefill or run, together."""
        self.changed = threading.Condition()
        """Lock of the queue, which is notified of new prompts and of the end."""
        self.closing = False
        self._most = most
        self._waiting: deque[Prompt] = deque()
        self._inside: set[GeneratedSequence] = set()

    def __len__(self) -> int:
        return len(self._inside)

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Queue all prompts of a request.

        Raises:
            QueueFullError: If there are too many sequences.
        """
        new = {sequence for prompt in prompts for sequence in prompt.sequences}
        with self.changed:
            if len(self._inside) + len(new) > self._most:
                raise QueueFullError
            self._inside |= new
            self._waiting.extend(prompts)
            self.changed.notify()

    def close(self) -> None:
        """End the waiting of :meth:`more`."""
        with self.changed:
            self.closing = True
            self.changed.notify()

    def more(self) -> bool:
        """Wait for sequences; return False once the queue is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self._inside or self.closing)
            return not self.closing

    def take(self, room: int) -> list[Prompt]:
        """Remove and return the first prompts whose sequences fit into ``room``."""
        taken: list[Prompt] = []
        with self.changed:
            while self._waiting and len(self._waiting[0].sequences) <= room:
                taken.append(self._waiting.popleft())
                room -= len(taken[-1].sequences)
        return taken

    def ended(self, now: float) -> set[GeneratedSequence]:
        """Return the sequences that were cancelled, or timed out at ``now``, and are to be removed."""
        with self.changed:
            return {sequence for sequence in self._inside if sequence.cancelled or now > sequence.deadline}

    def inside(self, sequences: Sequence[GeneratedSequence]) -> list[GeneratedSequence]:
        """Return those of the sequences that have not ended."""
        with self.changed:
            return [sequence for sequence in sequences if sequence in self._inside]

    def forget(self, sequence: GeneratedSequence) -> None:
        """Remove a sequence that has ended from those that count."""
        with self.changed:
            self._inside.discard(sequence)

    def remove(self, gone: Collection[GeneratedSequence]) -> None:
        """Remove sequences from the prompts that wait."""
        with self.changed:
            remove_sequences(self._waiting, gone)

    def clear(self) -> list[GeneratedSequence]:
        """Remove all prompts; return the sequences that have not ended."""
        with self.changed:
            self._waiting.clear()
            return list(self._inside)


def remove_sequences(prompts: deque[Prompt], gone: Collection[GeneratedSequence]) -> None:
    """Remove sequences from prompts, and prompts that have no sequences left."""
    for prompt in prompts:
        prompt.sequences = [sequence for sequence in prompt.sequences if sequence not in gone]
    kept = [prompt for prompt in prompts if prompt.sequences]
    prompts.clear()
    prompts.extend(kept)
