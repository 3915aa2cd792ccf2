"""The running batch: who reads and writes when, and that nobody's text depends on it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from servers import tiny_generator
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.linear_choice import choose_linear
from tnnlm.inference.sampling import Sampling
from tnnlm.serving import prefill as reader
from tnnlm.serving.metrics import Metrics
from tnnlm.serving.sampler import RowSampler
from tnnlm.serving.scheduler import Batcher, ClosedError, QueueFullError
from tnnlm.serving.sequence import Event, Job, Reading, StoppedText
from tnnlm.serving.settings import Limits


class Collector:
    """Events by text, and a way to wait for the end."""

    def __init__(self) -> None:
        self.events: dict[Job, list[Event]] = {}
        self.order: list[Job] = []
        self._changed = threading.Condition()

    def __call__(self, events: list[Event]) -> None:
        with self._changed:
            for event in events:
                self.events.setdefault(event.job, []).append(event)
                if event.tokens:
                    self.order.append(event.job)
            self._changed.notify_all()

    def wait(self, *jobs: Job, tokens: int | None = None) -> None:
        def done(job: Job) -> bool:
            events = self.events.get(job, [])
            if tokens is not None and sum(event.tokens for event in events) >= tokens:
                return True
            return any(event.finish for event in events)

        with self._changed:
            assert self._changed.wait_for(lambda: all(map(done, jobs)), 60)

    def text(self, job: Job) -> str:
        return "".join(event.text for event in self.events[job])

    def finish(self, job: Job) -> str | None:
        return self.events[job][-1].finish


class Bench:
    """A batcher with its collector."""

    def __init__(self, generator: TextGenerator, **limits: float) -> None:
        self.generator = generator
        self.collector = Collector()
        self.metrics = Metrics()
        self.batcher = Batcher(generator, Limits(**limits), self.metrics, self.collector)  # type: ignore[arg-type]

    def job(
        self, tokens: int = 20, *, seed: int | None = None, stops: tuple[str, ...] = (), seconds: float = 60
    ) -> Job:
        sampling = Sampling(temperature=0 if seed is None else 1)
        sampler = RowSampler(sampling, self.generator.tokenizer.size, seed=seed)
        deadline = time.monotonic() + seconds
        return Job(sampler, StoppedText(self.generator.tokenizer, stops), tokens, deadline)

    def ask(self, prompt: str | list[int], *jobs: Job) -> Reading:
        ids = self.generator.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        reading = Reading(ids, list(jobs))
        self.batcher.submit([reading])
        return reading


@pytest.fixture
def make(generator: TextGenerator) -> Iterator[type[Bench]]:
    made: list[Bench] = []

    def build(other: TextGenerator | None = None, **limits: float) -> Bench:
        made.append(Bench(other or generator, **limits))
        made[-1].batcher.start()
        return made[-1]

    yield build  # type: ignore[misc]
    for bench in made:
        bench.batcher.close()


PROMPTS = ["the quick", "pack my box with", "a", "fox jumps over " * 20, "dog; " * 90, "zzz qqq"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_is_the_same_under_any_load(dtype: str, make: type[Bench]) -> None:
    choice = choose_linear(torch.device("cpu"), dtype)
    if not choice.batch_invariant:
        pytest.skip(f"{choice.name} gives a row other bits in other batches")
    generator = tiny_generator(dtype)
    alone = make(generator)
    expected = []
    for index, prompt in enumerate(PROMPTS * 3):
        job = alone.job(30 + 7 * index, seed=index if index % 2 else None)
        alone.ask(prompt, job)
        alone.collector.wait(job)
        expected.append((alone.collector.text(job), list(job.drawn)))
    assert len({text for text, _ in expected}) == len(expected)
    busy = make(generator, cache_bytes=0)
    jobs = []
    for index, prompt in enumerate(PROMPTS * 3):
        jobs.append(busy.job(30 + 7 * index, seed=index if index % 2 else None))
        busy.ask(prompt, jobs[-1])
        time.sleep(0.003 * (index % 4))
    busy.collector.wait(*jobs)
    assert [(busy.collector.text(job), job.drawn) for job in jobs] == expected


def test_greedy_text_is_generates(make: type[Bench], generator: TextGenerator) -> None:
    bench = make()
    job = bench.job(50)
    bench.ask("the quick", job)
    bench.collector.wait(job)
    record, pieces = generator.write(generator.read("the quick"), 50, Sampling(temperature=0))
    assert "".join(pieces) == bench.collector.text(job)
    assert record.tokens == [token for token in job.drawn if token != generator.tokenizer.eos_id]


def test_texts_of_a_prompt_are_read_once(make: type[Bench]) -> None:
    bench = make()
    jobs = [bench.job(12, seed=seed) for seed in range(4)]
    reading = bench.ask("the quick brown fox", *jobs)
    bench.collector.wait(*jobs)
    assert bench.metrics.prompt_tokens._value.get() == len(reading.prompt)
    assert len({bench.collector.text(job) for job in jobs}) > 1


def test_a_prompt_is_reused_from_its_state(make: type[Bench]) -> None:
    bench, ids = make(), list(range(3, 290)) * 2
    first, again, longer = bench.job(), bench.job(), bench.job()
    for job, prompt, cached in ((first, ids, 0), (again, ids, len(ids)), (longer, ids[:300] + [5] * 9, 256)):
        bench.ask(prompt, job)
        bench.collector.wait(job)
        assert job.cached == cached
    assert bench.collector.text(first) == bench.collector.text(again)
    fresh = make(cache_bytes=0)
    alone = fresh.job()
    fresh.ask(ids[:300] + [5] * 9, alone)
    fresh.collector.wait(alone)
    assert fresh.collector.text(alone) == bench.collector.text(longer)


def test_a_long_prompt_stalls_nobody(make: type[Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    reads: list[tuple[int, int]] = []
    plain = reader.Reader.read_chunk

    def spy(self: reader.Reader, reading: Reading) -> list[Event]:
        reads.append((len(reading.prompt), len(bench.collector.order)))
        return plain(self, reading)

    monkeypatch.setattr(reader.Reader, "read_chunk", spy)
    monkeypatch.setattr("tnnlm.serving.scheduler.READ_SECONDS", 0.0)
    writer, long, short = bench.job(3000), bench.job(5), bench.job(5)
    bench.ask("the quick", writer)
    bench.collector.wait(writer, tokens=3)
    bench.ask([7] * 2000, long)
    bench.ask("a", short)
    bench.collector.wait(long, short)
    order = bench.collector.order
    assert order.index(short) < order.index(long)
    between = [after - before for (_, before), (_, after) in itertools.pairwise(reads[1:])]
    assert between
    assert max(between) <= 8, "a step after every chunk"
    assert all(step > 0 for step in between)


def test_places_are_limited_and_given_in_order(make: type[Bench]) -> None:
    bench = make(max_batch=2, max_queue=3)
    jobs = [bench.job(200) for _ in range(5)]
    for job in jobs:
        bench.ask("the quick", job)
    with pytest.raises(QueueFullError):
        bench.ask("one more", bench.job())
    bench.collector.wait(*jobs)
    first = [bench.collector.order.index(job) for job in jobs]
    assert first == sorted(first)
    for place in range(len(bench.collector.order)):
        assert len(set(bench.collector.order[place : place + 2])) <= 2
    again = bench.job(1)
    bench.ask("a", again)
    bench.collector.wait(again)


def test_cancelled_texts_free_their_place(make: type[Bench]) -> None:
    bench = make(max_batch=1, max_queue=4)
    endless, waiting, last = bench.job(10**7), bench.job(10**7), bench.job(3)
    for job in (endless, waiting, last):
        bench.ask("the quick", job)
    bench.collector.wait(endless, tokens=5)
    bench.batcher.cancel([endless, waiting])
    bench.collector.wait(last)
    assert bench.metrics.finished.labels("cancelled")._value.get() == 2
    assert waiting not in bench.collector.events


def test_time_limits(make: type[Bench]) -> None:
    bench = make(max_batch=1)
    writer, waiting = bench.job(10**7, seconds=0.5), bench.job(5, seconds=0.2)
    bench.ask("the quick", writer)
    bench.ask("the quick", waiting)
    bench.collector.wait(writer, waiting)
    assert bench.collector.finish(writer) == "length"
    assert bench.collector.events[waiting][-1].error == "timeout"


def test_stop_strings(make: type[Bench]) -> None:
    bench = make()
    plain = bench.job(200)
    bench.ask("the quick", plain)
    bench.collector.wait(plain)
    text = bench.collector.text(plain)
    stop = text[20:26]
    stopped = bench.job(200, stops=("never to be seen", stop))
    bench.ask("the quick", stopped)
    bench.collector.wait(stopped)
    assert bench.collector.text(stopped) == text[: text.index(stop)]
    assert bench.collector.finish(stopped) == "stop"


def test_stop_strings_are_held_back_while_uncertain(generator: TextGenerator) -> None:
    tokenizer = generator.tokenizer
    text = StoppedText(tokenizer, ["dog;!", "zebra"])
    shown = [text.push(token) for token in tokenizer.encode("lazy dog; pack")]
    assert all("d" not in piece or piece.startswith("dog; ") or "pack" in piece for piece in shown[:-1])
    assert "".join(shown) + text.finish() == "lazy dog; pack"
    cut = StoppedText(tokenizer, ["dog;"])
    assert "".join(cut.push(token) for token in tokenizer.encode("lazy dog; pack")) == "lazy "
    assert cut.finish() == ""


def test_a_failure_ends_the_texts_and_not_the_server(
    make: type[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    with monkeypatch.context() as patch:
        patch.setattr(bench.batcher._rows._model, "step", lambda *_: 1 / 0)
        job, other = bench.job(5), bench.job(5)
        bench.ask("the quick", job, other)
        bench.collector.wait(job, other)
    assert "ZeroDivisionError" in bench.collector.events[job][-1].error
    again = bench.job(5)
    bench.ask("the quick", again)
    bench.collector.wait(again)
    assert bench.collector.finish(again) in ("length", "stop")


@pytest.mark.parametrize("grace", [0.0, 30.0])
def test_closing(make: type[Bench], grace: float) -> None:
    bench = make()
    tokens = 300 if grace else 10**7
    job = bench.job(tokens)
    bench.ask("the quick", job)
    bench.collector.wait(job, tokens=2)
    bench.batcher.close(grace)
    assert bench.collector.finish(job) == ("length" if grace else "error")
    with pytest.raises(ClosedError):
        bench.ask("the quick", bench.job())


def test_memory_does_not_grow_with_what_was_read(make: type[Bench]) -> None:
    bench = make()
    job = bench.job(400)
    bench.ask("the quick", job)
    bench.collector.wait(job)
    assert bench.metrics.state_bytes._value.get() == 0
    assert bench.batcher.row_bytes == sum(
        part.numel() * part.element_size()
        for layer in bench.generator.model.init_state(1).layers
        for part in layer
    )
    assert torch.is_inference_mode_enabled() is False
