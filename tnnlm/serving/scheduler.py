"""Continuous batching over fixed-size states: a sequence joins and leaves the running batch at any step.

One thread owns the model. Each of its turns prefills a little of the waiting prompts and takes one step of
the running batch, so that a long prompt stalls nobody for longer than a chunk.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from tnnlm.inference.generator import TextGenerator
from tnnlm.models.causal_lm import ModelState, state_bytes
from tnnlm.serving.batch import RunningBatch
from tnnlm.serving.logprobs import score_tokens
from tnnlm.serving.metrics import Metrics
from tnnlm.serving.prefill import PrefillWorker
from tnnlm.serving.prefix_cache import PrefixCache
from tnnlm.serving.sampler import sample_batch
from tnnlm.serving.sequence import TIMEOUT, Finish, GeneratedSequence, Prompt, SequenceOutput
from tnnlm.serving.settings import Limits

PREFILL_SECONDS = 0.05
"""of a turn go to prompts while a batch is running, or one chunk if that takes longer"""


class QueueFullError(Exception):
    """More sequences wait than the limits allow."""


class ClosedError(Exception):
    """The server takes no more requests."""


class Scheduler:
    """``submit`` and ``cancel`` may be called from any thread; outputs are delivered from its own."""

    def __init__(
        self,
        generator: TextGenerator,
        limits: Limits,
        metrics: Metrics,
        deliver: Callable[[list[SequenceOutput]], None],
        executor: Executor | None = None,
    ) -> None:
        """Args:
        generator: the model.
        limits: of batch, queue and cache.
        metrics: to be counted in.
        deliver: takes the outputs of a turn.
        executor: of one thread, best that which loaded the model: OpenMP keeps workers for every thread
            that ever computed, and once they outnumber the cores none waits actively (measured: steps
            take 1.5 times as long). None makes one.
        """
        self.limits, self.metrics = limits, metrics
        self.row_bytes = state_bytes(generator.model.init_state(1))
        """of state per sequence"""
        self.load = {"running": 0, "reading": 0, "waiting": 0}
        """sequences, as of the last turn"""
        self._deliver = deliver
        self._eos, self._vocabulary = generator.tokenizer.eos_id, generator.tokenizer.size
        self._prefill = PrefillWorker(generator, PrefixCache(limits.cache_bytes), metrics)
        self._batch = RunningBatch(generator)
        self._wake = threading.Condition()
        self._waiting: deque[Prompt] = deque()
        self._prefilling: deque[Prompt] = deque()
        self._inside: set[GeneratedSequence] = set()
        self._outputs: list[SequenceOutput] = []
        self._closing = False
        self._executor = executor or ThreadPoolExecutor(1, "scheduler")
        self._run_of: Future[None] | None = None

    def start(self) -> None:
        """Begin to take turns."""
        self._run_of = self._executor.submit(self._run)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._run_of is not None and not self._run_of.done() and not self._closing

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Take on the prompts of a request, all or none; ``max_batch`` sequences of a prompt at the most.

        Raises:
            QueueFullError: if too many sequences wait.
            ClosedError: after :meth:`close`.
        """
        new = {sequence for prompt in prompts for sequence in prompt.sequences}
        with self._wake:
            if not self.alive:
                raise ClosedError
            if len(self._inside) + len(new) > self.limits.max_batch + self.limits.max_queue:
                raise QueueFullError
            self._inside |= new
            self._waiting.extend(prompts)
            self._wake.notify()

    def cancel(self, sequences: Sequence[GeneratedSequence]) -> None:
        """Forget sequences; their places are free from the next turn on."""
        for sequence in sequences:
            sequence.cancelled = True

    def close(self) -> None:
        """Take no more requests, end what runs with an error, and stop."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._run_of is not None:
            wait([self._run_of])

    @torch.inference_mode()
    def _run(self) -> None:
        while self._more():
            try:
                self._turn()
            except Exception as error:  # the next request may fare better
                self._end_all(f"{type(error).__name__}: {error}")
            self._flush()
        self._end_all("the server is shutting down")
        self._flush()

    def _more(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._inside or self._closing)
            return not self._closing

    def _turn(self) -> None:
        self._drop()
        self._admit()
        self._prefill_prompts()
        if self._batch.sequences:
            self._step()

    def _drop(self) -> None:
        """What was cancelled or has run out of time leaves, wherever it is."""
        now = time.monotonic()
        with self._wake:
            gone = {sequence for sequence in self._inside if sequence.cancelled or now > sequence.deadline}
        if not gone:
            return
        running = [sequence for sequence in self._batch.sequences if sequence in gone]
        for sequence in gone:
            if sequence.cancelled:
                self._forget(sequence, "cancelled")
            elif sequence in running:
                rest, position = sequence.text.finish(), sequence.position
                self._emit(SequenceOutput(sequence, rest, position=position, finish="length"))
            else:
                self._emit(SequenceOutput(sequence, finish="error", error=TIMEOUT))
        self._batch.change(leave=running)
        with self._wake:
            for queue in (self._waiting, self._prefilling):
                for prompt in queue:
                    prompt.sequences = [sequence for sequence in prompt.sequences if sequence not in gone]
                kept = [prompt for prompt in queue if prompt.sequences]
                queue.clear()
                queue.extend(kept)

    def _admit(self) -> None:
        """In the order in which they came, as far as there are places."""
        with self._wake:
            taken = len(self._batch.sequences) + sum(len(prompt.sequences) for prompt in self._prefilling)
            while self._waiting and taken + len(self._waiting[0].sequences) <= self.limits.max_batch:
                taken += len(self._waiting[0].sequences)
                self._prefilling.append(self._waiting.popleft())

    def _prefill_prompts(self) -> None:
        """A chunk of each prompt in turn, until time is up: short ones don't wait for long ones."""
        started = time.perf_counter()
        begun: list[tuple[GeneratedSequence, ModelState]] = []
        while self._prefilling:
            prompt = self._prefilling.popleft()
            for output in self._prefill.prefill_chunk(prompt):
                self._emit(output)
            if prompt.complete:
                begun += self._begin(prompt)
            else:
                self._prefilling.append(prompt)
            if (self._batch.sequences or begun) and time.perf_counter() - started > PREFILL_SECONDS:
                break
        self._batch.change(join=begun)

    def _begin(self, prompt: Prompt) -> list[tuple[GeneratedSequence, ModelState]]:
        """The first token of every sequence of a prefilled prompt; those that go on, with their state."""
        state = prompt.state
        assert state is not None
        logits = state.logits[:, : self._vocabulary]
        going = []
        for sequence in prompt.sequences:
            sequence.position, sequence.cached = prompt.position, prompt.cached
            if sequence.max_tokens == 0:
                self._emit(SequenceOutput(sequence, position=sequence.position, finish="length"))
                continue
            (token,) = sample_batch(logits, [sequence.sampler])
            if self._take(sequence, token, logits, []):
                going.append((sequence, state.model_state))
        return going

    def _step(self) -> None:
        drawn = self._batch.step()
        self.metrics.step.observe(drawn.seconds)
        ended = []
        for row, (sequence, token) in enumerate(zip(drawn.sequences, drawn.tokens, strict=True)):
            if sequence is not None:
                sequence.position += 1
                if not self._take(sequence, token, drawn.logits[row : row + 1], [1e3 * drawn.seconds]):
                    ended.append(sequence)
        self._batch.change(leave=ended)

    def _take(self, sequence: GeneratedSequence, token: int, logits: Tensor, step_ms: list[float]) -> bool:
        """Tell of a token drawn from logits (1, V); whether the sequence goes on."""
        sequence.drawn.append(token)
        output = SequenceOutput(sequence, position=sequence.position, step_ms=step_ms)
        if token == self._eos:
            output.finish = "stop"
        else:
            output.tokens = 1
            output.text = sequence.text.push(token)
            if sequence.logprobs is not None:
                output.scores = score_tokens(logits, [token], sequence.logprobs)
            if sequence.text.stopped:
                output.finish = "stop"
            elif len(sequence.drawn) >= sequence.max_tokens:
                output.finish = "length"
        if output.finish:
            output.text += sequence.text.finish()
            if sequence.text.stopped:  # by what was held back
                output.finish = "stop"
        self._emit(output)
        return output.finish is None

    def _emit(self, output: SequenceOutput) -> None:
        self._outputs.append(output)
        self.metrics.new_tokens.inc(output.tokens)
        if output.finish:
            self._forget(output.sequence, output.finish)

    def _forget(self, sequence: GeneratedSequence, reason: Finish | str) -> None:
        self.metrics.finished.labels(reason).inc()
        with self._wake:
            self._inside.discard(sequence)

    def _end_all(self, error: str) -> None:
        with self._wake:
            for sequence in list(self._inside):
                self._emit(SequenceOutput(sequence, finish="error", error=error))
            self._waiting.clear()
        self._prefilling.clear()
        self._batch.change(leave=self._batch.sequences)

    def _flush(self) -> None:
        outputs, self._outputs = self._outputs, []
        if outputs:
            self._deliver(outputs)
        running = len(self._batch.sequences)
        reading = sum(len(prompt.sequences) for prompt in self._prefilling)
        waiting = max(0, len(self._inside) - running - reading)
        self.load = {"running": running, "reading": reading, "waiting": waiting}
        for name, count in self.load.items():
            getattr(self.metrics, name).set(count)
        self.metrics.state_bytes.set(running * self.row_bytes)
        self.metrics.cache_bytes.set(self._prefill.cache.bytes)
