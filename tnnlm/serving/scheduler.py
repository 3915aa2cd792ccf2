"""Scheduler with continuous batching over fixed-size states: sequences join and leave the batch at any step.

One thread runs the model. Each iteration prefills chunks of the queued prompts for a limited time, then runs
one step of the running batch, so that a long prompt delays running sequences by at most that time or one
chunk. An exception ends the sequences whose work raised it: those of a prompt, or one row of the batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait

import torch

from tnnlm.errors import UserError, one_line
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.sampling import NOT_FINITE
from tnnlm.models.causal_lm import ModelState, state_bytes
from tnnlm.serving.batch import RunningBatch
from tnnlm.serving.endings import Endings
from tnnlm.serving.event_log import EventLog
from tnnlm.serving.logprobs import TokenScore, score_rows
from tnnlm.serving.metrics import Metrics
from tnnlm.serving.prefill import PrefillWorker
from tnnlm.serving.prefix_cache import PrefixCache
from tnnlm.serving.prompt_queue import ClosedError, PromptQueue, remove_sequences
from tnnlm.serving.sampler import NO_TOKEN, sample_batch
from tnnlm.serving.sequence import (
    SHUTDOWN,
    TIMEOUT,
    Beginning,
    Finish,
    GeneratedSequence,
    Prompt,
    SequenceOutput,
)
from tnnlm.serving.settings import Limits

PREFILL_SECONDS = 0.05
"""Seconds of prefill per iteration while a batch is running; at least one chunk is processed."""

DELIVERY_SECONDS = 0.01
"""Seconds between two deliveries of outputs if steps are shorter, unless a sequence begins or ends.

Each delivery wakes the server's event loop and its clients, which take CPU time from the steps.
"""


class Scheduler:
    """Scheduler of prefill and decoding for one model.

    ``submit`` and ``cancel`` may be called from any thread; outputs are delivered from the scheduler's
    thread.
    """

    def __init__(
        self,
        generator: TextGenerator,
        limits: Limits,
        metrics: Metrics,
        deliver: Callable[[list[SequenceOutput]], None],
        executor: Executor | None = None,
        log: EventLog | None = None,
        reproducible: bool = False,
    ) -> None:
        """Set up the scheduler without starting it.

        Args:
            generator: Text generator with the model and its tokenizer.
            limits: Limits of batch, queue and prefix cache.
            metrics: Metrics to update.
            deliver: Function that receives the outputs of an iteration.
            executor: Executor with one thread, preferably the one that loaded the model. OpenMP keeps a pool
                of workers for each thread that ran an operator; once the workers outnumber the cores, none
                waits actively (measured: steps take 1.5 times as long). None creates an executor.
            log: Log of the server; None creates one.
            reproducible: Whether outputs have the same bits under any load; see
                :class:`tnnlm.serving.settings.Settings`.
        """
        self.limits, self.metrics = limits, metrics
        self.row_bytes = state_bytes(generator.model.init_state(1))
        """Size of the state of one sequence in bytes."""
        self.load = {"running": 0, "reading": 0, "waiting": 0}
        """Number of sequences running, in prefill (reading) and waiting, as of the last iteration."""
        self._deliver, self._log = deliver, log or EventLog()
        self._eos, self._token_logits = generator.tokenizer.eos_id, generator.token_logits
        cache = PrefixCache(limits.cache_bytes)
        self.endings = Endings(generator.tokenizer, cache, self._log)
        """Ends of sequences, whose states are in the prefix cache."""
        self._prefill = PrefillWorker(generator, cache, metrics)
        self._batch = RunningBatch(generator, reproducible)
        self._queue = PromptQueue(limits.max_batch + limits.max_queue)
        self._prefilling: deque[Prompt] = deque()
        self._outputs: list[SequenceOutput] = []
        self._delivered = 0.0
        self._executor = executor or ThreadPoolExecutor(1, "scheduler")
        self._run_of: Future[None] | None = None

    def start(self) -> None:
        """Start the scheduler's loop on its thread."""
        self._run_of = self._executor.submit(self._run)

    @property
    def alive(self) -> bool:
        """Whether the scheduler accepts requests."""
        return self._run_of is not None and not self._run_of.done() and not self._queue.closing

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Queue all prompts of a request, each with at most ``max_batch`` sequences, or raise.

        Raises:
            QueueFullError: If too many sequences are waiting.
            ClosedError: If the scheduler is not running.
        """
        with self._queue.changed:  # so that it is not closed in between
            if not self.alive:
                raise ClosedError
            self._queue.submit(prompts)

    def cancel(self, sequences: Sequence[GeneratedSequence]) -> None:
        """Cancel sequences; they are removed in the next iteration."""
        for sequence in sequences:
            sequence.cancelled = True

    def close(self) -> None:
        """Reject new requests, end all sequences with an error, and stop."""
        self._queue.close()
        if self._run_of is not None:
            wait([self._run_of])

    @torch.inference_mode()
    def _run(self) -> None:
        while self._queue.more():
            try:
                self._iterate()
            except Exception as error:  # outside the work of a sequence, so that all are in doubt
                self._log.failed("all sequences ended", error)
                self._end_all(one_line(error))
            self._flush()
        self._end_all(SHUTDOWN)
        self._flush()

    def _iterate(self) -> None:
        for work in (self._drop, self._admit, self._prefill_prompts):
            work()
        if self._batch.sequences:
            self._step()

    def _drop(self) -> None:
        """Remove sequences that were cancelled or timed out from the batch and the queues."""
        gone = self._queue.ended(time.monotonic())
        if not gone:
            return
        running = [sequence for sequence in self._batch.sequences if sequence in gone]
        for sequence in gone:
            if sequence.cancelled:
                self._forget(sequence, "cancelled")
            elif sequence in running:
                self._finish(sequence)
            else:
                self._emit(SequenceOutput(sequence, finish="error", error=TIMEOUT))
        self._change(leave=running)
        self._queue.remove(gone)
        remove_sequences(self._prefilling, gone)

    def _admit(self) -> None:
        """Move waiting prompts to prefill, first come first served, while the batch has room for them."""
        taken = len(self._batch.sequences) + sum(len(prompt.sequences) for prompt in self._prefilling)
        self._prefilling.extend(self._queue.take(self.limits.max_batch - taken))

    def _prefill_prompts(self) -> None:
        """Prefill chunks of prompts round-robin for a limited time; short ones don't wait for long ones."""
        started, most = time.perf_counter(), min(PREFILL_SECONDS, self._batch.pause)
        begun: list[tuple[GeneratedSequence, ModelState]] = []
        while self._prefilling:
            prompt = self._prefilling.popleft()
            try:
                for output in self._prefill.prefill_chunk(prompt):
                    self._emit(output)
                if prompt.complete:
                    begun += self._begin(prompt)
                else:
                    self._prefilling.append(prompt)
            except Exception as error:
                self._fail(prompt.sequences, error)
            if (self._batch.sequences or begun) and time.perf_counter() - started > most:
                break
        self._change(join=begun)

    def _begin(self, prompt: Prompt) -> list[tuple[GeneratedSequence, ModelState]]:
        """Sample the first token of each sequence of a prompt; return those that continue, with states."""
        state = prompt.state
        assert state is not None
        logits = self._token_logits(state.logits)
        going = []
        for sequence in prompt.sequences:
            sequence.position, sequence.cached = prompt.position, prompt.cached
            sequence.beginning = Beginning(prompt.tokens, prompt.partition, prompt.text, prompt.lead)
            if sequence.max_tokens == 0:
                self._finish(sequence)
                continue
            tokens = sample_batch(logits, [sequence.sampler])
            (score,) = score_rows(logits, tokens, [sequence.logprobs])
            self.metrics.first_token.observe(time.monotonic() - sequence.arrived)
            if self._take(sequence, tokens[0], score, []):
                going.append((sequence, state.model_state))
        prompt.state = None  # the batch copies it, and the prompt lives as long as its request
        return going

    def _step(self) -> None:
        try:
            drawn = self._batch.step()
        except Exception as error:
            # The rows share the step, and it may have changed their states, so that none can be repeated.
            self._fail(self._batch.sequences, error)
            self._batch.clear()
            return
        self.metrics.step.observe(drawn.seconds)
        wanted = [None if sequence is None else sequence.logprobs for sequence in drawn.sequences]
        scores = score_rows(drawn.logits, drawn.tokens, wanted)
        ended = []
        for row, sequence in enumerate(drawn.sequences):
            if sequence is not None:
                sequence.position += 1
                if not self._take(sequence, drawn.tokens[row], scores[row], [1e3 * drawn.seconds]):
                    ended.append(sequence)
                    self.endings.keep(sequence, self._batch, row, drawn.logits)
                elif sequence.text.held:
                    self.endings.mark(sequence, self._batch, row, drawn.logits)
        self._change(leave=ended)

    def _take(
        self,
        sequence: GeneratedSequence,
        token: int | Exception,
        score: TokenScore | Exception | None,
        step_ms: list[float],
    ) -> bool:
        """Emit a sampled token with its score; return whether the sequence continues."""
        try:
            if isinstance(token, Exception):
                raise token
            if isinstance(score, Exception):
                raise score
            if token == NO_TOKEN:
                raise UserError(NOT_FINITE)
            output = sequence.advance(token, self._eos, score)
        except Exception as error:
            self._fail([sequence], error)
            return False
        output.step_ms = step_ms
        self._emit(output)
        return output.finish is None

    def _finish(self, sequence: GeneratedSequence) -> None:
        """End a sequence at its limit of tokens or time, with the text that is still buffered."""
        try:
            rest, position = sequence.text.finish(), sequence.position
            self._emit(SequenceOutput(sequence, rest, position=position, finish="length"))
        except Exception as error:
            self._fail([sequence], error)

    def _change(
        self,
        leave: Sequence[GeneratedSequence] = (),
        join: Sequence[tuple[GeneratedSequence, ModelState]] = (),
    ) -> None:
        """Change the batch; if it can't take the new sequences, they fail, and the others continue."""
        expected = sum(len(prompt.sequences) for prompt in self._prefilling)
        try:
            self._batch.change(leave, join, expected)
        except Exception as error:
            self._fail([sequence for sequence, _ in join], error)
            if leave:
                self._fail(self._batch.sequences, error)
                self._batch.clear()

    def _fail(self, sequences: Sequence[GeneratedSequence], error: Exception) -> None:
        """End the sequences that have not ended with the error of their work, and write it to the log."""
        ended = self._queue.inside(sequences)
        self._log.failed(f"{len(ended)} sequence(s) ended", error)
        for sequence in ended:
            self._emit(SequenceOutput(sequence, finish="error", error=one_line(error)))

    def _emit(self, output: SequenceOutput) -> None:
        self._outputs.append(output)
        self.metrics.new_tokens.inc(output.tokens)
        if output.finish:
            self._forget(output.sequence, output.finish)

    def _forget(self, sequence: GeneratedSequence, reason: Finish | str) -> None:
        self.metrics.finished.labels(reason).inc()
        self._queue.forget(sequence)

    def _end_all(self, error: str) -> None:
        for sequence in self._queue.clear():
            self._emit(SequenceOutput(sequence, finish="error", error=error))
        self._prefilling.clear()
        self._batch.clear()

    def _flush(self) -> None:
        running = len(self._batch.sequences)
        now = time.monotonic()
        # Nothing waits for a delivery while prompts are processed, or in an empty batch.
        busy = self._prefilling or len(self._queue) > running or not running
        ready = busy or now - self._delivered >= DELIVERY_SECONDS
        if self._outputs and (ready or any(map(_at_a_limit, self._outputs))):
            outputs, self._outputs, self._delivered = self._outputs, [], now
            self._deliver(outputs)
        reading = sum(len(prompt.sequences) for prompt in self._prefilling)
        waiting = max(0, len(self._queue) - running - reading)
        self.load = {"running": running, "reading": reading, "waiting": waiting}
        self.metrics.set_load(self.load, running * self.row_bytes, self._prefill.cache.bytes)


def _at_a_limit(output: SequenceOutput) -> bool:
    """Return whether an output is the first or the last one of its sequence."""
    return output.finish is not None or (output.tokens == 1 and not output.step_ms)
