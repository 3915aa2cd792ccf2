"""Continuous batching over fixed-size states: a text joins and leaves the running batch at any step.

One thread owns the model. Each of its turns reads a little of the waiting prompts and takes one step of
all texts that are being written, so that a long prompt stalls nobody for longer than a chunk.
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
from tnnlm.serving.batch import Rows
from tnnlm.serving.logprobs import score_tokens
from tnnlm.serving.metrics import Metrics
from tnnlm.serving.prefill import Reader
from tnnlm.serving.prefix_cache import PrefixCache
from tnnlm.serving.sampler import draw
from tnnlm.serving.sequence import TIMEOUT, Event, Finish, Job, Reading
from tnnlm.serving.settings import Limits

READ_SECONDS = 0.05
"""of a turn go to prompts while texts are being written, or one chunk if that takes longer"""


class QueueFullError(Exception):
    """More texts wait than the limits allow."""


class ClosedError(Exception):
    """The server takes no more requests."""


class Batcher:
    """``submit`` and ``cancel`` may be called from any thread; events are delivered from its own."""

    def __init__(
        self,
        generator: TextGenerator,
        limits: Limits,
        metrics: Metrics,
        deliver: Callable[[list[Event]], None],
        executor: Executor | None = None,
    ) -> None:
        """Args:
        generator: the model.
        limits: of batch, queue and cache.
        metrics: to be counted in.
        deliver: takes the events of a turn.
        executor: of one thread, best that which loaded the model: OpenMP keeps workers for every thread
            that ever computed, and once they outnumber the cores none waits actively (measured: steps
            take 1.5 times as long). None makes one.
        """
        self.limits, self.metrics = limits, metrics
        self.row_bytes = state_bytes(generator.model.init_state(1))
        """of state per text"""
        self.load = {"running": 0, "reading": 0, "waiting": 0}
        """texts, as of the last turn"""
        self._deliver = deliver
        self._eos, self._vocabulary = generator.tokenizer.eos_id, generator.tokenizer.size
        self._reader = Reader(generator, PrefixCache(limits.cache_bytes), metrics)
        self._rows = Rows(generator)
        self._wake = threading.Condition()
        self._waiting: deque[Reading] = deque()
        self._reading: deque[Reading] = deque()
        self._inside: set[Job] = set()
        self._events: list[Event] = []
        self._closing: float | None = None
        self._executor = executor or ThreadPoolExecutor(1, "batcher")
        self._run_of: Future[None] | None = None

    def start(self) -> None:
        """Begin to take turns."""
        self._run_of = self._executor.submit(self._run)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._run_of is not None and not self._run_of.done() and self._closing is None

    def submit(self, readings: Sequence[Reading]) -> None:
        """Take on the prompts of a request, all or none; ``max_batch`` texts of a prompt at the most.

        Raises:
            QueueFullError: if too many texts wait.
            ClosedError: after :meth:`close`.
        """
        new = {job for reading in readings for job in reading.jobs}
        with self._wake:
            if not self.alive:
                raise ClosedError
            if len(self._inside) + len(new) > self.limits.max_batch + self.limits.max_queue:
                raise QueueFullError
            self._inside |= new
            self._waiting.extend(readings)
            self._wake.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Forget texts; their places are free from the next turn on."""
        for job in jobs:
            job.cancelled = True

    def close(self, grace: float = 0.0) -> None:
        """Take no more requests, finish what runs within ``grace`` seconds, end the rest, and stop."""
        with self._wake:
            self._closing = time.monotonic() + grace
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
            while not self._inside:
                if self._closing is not None:
                    return False
                self._wake.wait()
            return self._closing is None or time.monotonic() < self._closing

    def _turn(self) -> None:
        self._drop()
        self._admit()
        self._read()
        if self._rows.jobs:
            self._step()

    def _drop(self) -> None:
        """What was cancelled or has run out of time leaves, wherever it is."""
        now = time.monotonic()
        with self._wake:
            gone = {job for job in self._inside if job.cancelled or now > job.deadline}
        if not gone:
            return
        written = [job for job in self._rows.jobs if job in gone]
        for job in gone:
            if job.cancelled:
                self._forget(job, "cancelled")
            elif job in written:
                self._emit(Event(job, job.text.finish(), position=job.position, finish="length"))
            else:
                self._emit(Event(job, finish="error", error=TIMEOUT))
        self._rows.change(leave=written)
        with self._wake:
            for queue in (self._waiting, self._reading):
                for reading in queue:
                    reading.jobs = [job for job in reading.jobs if job not in gone]
                kept = [reading for reading in queue if reading.jobs]
                queue.clear()
                queue.extend(kept)

    def _admit(self) -> None:
        """In the order in which they came, as far as there are places."""
        with self._wake:
            taken = len(self._rows.jobs) + sum(len(reading.jobs) for reading in self._reading)
            while self._waiting and taken + len(self._waiting[0].jobs) <= self.limits.max_batch:
                taken += len(self._waiting[0].jobs)
                self._reading.append(self._waiting.popleft())

    def _read(self) -> None:
        """A chunk of each prompt in turn, until time is up: short ones don't wait for long ones."""
        started = time.perf_counter()
        begun: list[tuple[Job, ModelState]] = []
        while self._reading:
            reading = self._reading.popleft()
            for event in self._reader.read_chunk(reading):
                self._emit(event)
            if reading.whole:
                begun += self._begin(reading)
            else:
                self._reading.append(reading)
            if (self._rows.jobs or begun) and time.perf_counter() - started > READ_SECONDS:
                break
        self._rows.change(join=begun)

    def _begin(self, reading: Reading) -> list[tuple[Job, ModelState]]:
        """The first token of every text of a prompt that was read; those that go on, with their state."""
        context = reading.context
        assert context is not None
        logits = context.logits[:, : self._vocabulary]
        going = []
        for job in reading.jobs:
            job.position, job.cached = reading.position, reading.cached
            if job.max_tokens == 0:
                self._emit(Event(job, position=job.position, finish="length"))
                continue
            (token,) = draw(logits, [job.sampler])
            if self._take(job, token, logits, []):
                going.append((job, context.state))
        return going

    def _step(self) -> None:
        drawn = self._rows.step()
        self.metrics.step.observe(drawn.seconds)
        ended = []
        for row, (job, token) in enumerate(zip(drawn.jobs, drawn.tokens, strict=True)):
            if job is not None:
                job.position += 1
                if not self._take(job, token, drawn.logits[row : row + 1], [1e3 * drawn.seconds]):
                    ended.append(job)
        self._rows.change(leave=ended)

    def _take(self, job: Job, token: int, logits: Tensor, step_ms: list[float]) -> bool:
        """Tell of a token drawn from logits (1, V); whether the text goes on."""
        job.drawn.append(token)
        event = Event(job, position=job.position, step_ms=step_ms)
        if token == self._eos:
            event.finish = "stop"
        else:
            event.tokens = 1
            event.text = job.text.push(token)
            if job.logprobs is not None:
                event.scores = score_tokens(logits, [token], job.logprobs)
            if job.text.stopped:
                event.finish = "stop"
            elif len(job.drawn) >= job.max_tokens:
                event.finish = "length"
        if event.finish:
            event.text += job.text.finish()
            if job.text.stopped:  # by what was held back
                event.finish = "stop"
        self._emit(event)
        return event.finish is None

    def _emit(self, event: Event) -> None:
        self._events.append(event)
        self.metrics.new_tokens.inc(event.tokens)
        if event.finish:
            self._forget(event.job, event.finish)

    def _forget(self, job: Job, reason: Finish | str) -> None:
        self.metrics.finished.labels(reason).inc()
        with self._wake:
            self._inside.discard(job)

    def _end_all(self, error: str) -> None:
        with self._wake:
            for job in list(self._inside):
                self._emit(Event(job, finish="error", error=error))
            self._waiting.clear()
        self._reading.clear()
        self._rows.clear()

    def _flush(self) -> None:
        events, self._events = self._events, []
        if events:
            self._deliver(events)
        running, reading = len(self._rows.jobs), sum(len(reading.jobs) for reading in self._reading)
        waiting = max(0, len(self._inside) - running - reading)
        self.load = {"running": running, "reading": reading, "waiting": waiting}
        for name, count in self.load.items():
            getattr(self.metrics, name).set(count)
        self.metrics.state_bytes.set(running * self.row_bytes)
        self.metrics.cache_bytes.set(self._reader.cache.bytes)
