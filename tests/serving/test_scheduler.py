"""Continuous batching: order of prefill and decoding, and outputs independent of other requests."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.servers import tiny_generator
from tnnlm.detokenizer import TextStream
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.linear_choice import choose_linear
from tnnlm.inference.sampling import SamplingParams
from tnnlm.kernels import SGConvConfig
from tnnlm.serving import prefill, scheduler
from tnnlm.serving.metrics import Metrics
from tnnlm.serving.prompt_queue import ClosedError, QueueFullError
from tnnlm.serving.sampler import SequenceSampler
from tnnlm.serving.scheduler import Scheduler
from tnnlm.serving.sequence import GeneratedSequence, Prompt, SequenceOutput, StoppedText, _overlap
from tnnlm.serving.settings import Limits


class Collector:
    """Outputs by sequence, with a function that waits for the end."""

    def __init__(self) -> None:
        self.outputs: dict[GeneratedSequence, list[SequenceOutput]] = {}
        self.order: list[GeneratedSequence] = []
        self.deliveries: list[int] = []
        self._changed = threading.Condition()

    def __call__(self, outputs: list[SequenceOutput]) -> None:
        with self._changed:
            self.deliveries.append(len(outputs))
            for output in outputs:
                self.outputs.setdefault(output.sequence, []).append(output)
                if output.tokens:
                    self.order.append(output.sequence)
            self._changed.notify_all()

    def wait(self, *sequences: GeneratedSequence, tokens: int | None = None) -> None:
        def done(sequence: GeneratedSequence) -> bool:
            outputs = self.outputs.get(sequence, [])
            if tokens is not None and sum(output.tokens for output in outputs) >= tokens:
                return True
            return any(output.finish for output in outputs)

        with self._changed:
            assert self._changed.wait_for(lambda: all(map(done, sequences)), 60)

    def text(self, sequence: GeneratedSequence) -> str:
        return "".join(output.text for output in self.outputs[sequence])

    def finish(self, sequence: GeneratedSequence) -> str | None:
        return self.outputs[sequence][-1].finish


class Bench:
    """Scheduler with a collector of its outputs."""

    def __init__(self, generator: TextGenerator, reproducible: bool = True, **limits: float) -> None:
        self.generator = generator
        self.collector = Collector()
        self.metrics = Metrics()
        most = Limits(**limits)  # type: ignore[arg-type]
        self.scheduler = Scheduler(generator, most, self.metrics, self.collector, reproducible=reproducible)

    def sequence(
        self, tokens: int = 20, *, seed: int | None = None, stops: tuple[str, ...] = (), seconds: float = 60
    ) -> GeneratedSequence:
        sampling = SamplingParams(temperature=0 if seed is None else 1)
        sampler = SequenceSampler(sampling, self.generator.tokenizer.size, seed=seed)
        deadline = time.monotonic() + seconds
        return GeneratedSequence(
            sampler, StoppedText(TextStream(self.generator.tokenizer.detokenizer), stops), tokens, deadline
        )

    def ask(self, prompt: str | list[int], *sequences: GeneratedSequence) -> Prompt:
        ids = self.generator.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        prompt = Prompt(ids, list(sequences))
        self.scheduler.submit([prompt])
        return prompt


@pytest.fixture
def make(generator: TextGenerator) -> Iterator[type[Bench]]:
    made: list[Bench] = []

    def build(other: TextGenerator | None = None, **options: float) -> Bench:
        made.append(Bench(other or generator, **options))  # type: ignore[arg-type]
        made[-1].scheduler.start()
        return made[-1]

    yield build  # type: ignore[misc]
    for bench in made:
        bench.scheduler.close()


PROMPTS = ["the quick", "pack my box with", "a", "fox jumps over " * 20, "dog; " * 90, "zzz qqq"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_text_is_the_same_under_any_load(dtype: str, make: type[Bench]) -> None:
    choice = choose_linear(torch.device("cpu"), dtype)
    if not choice.batch_invariant:
        pytest.skip(f"{choice.name} is not batch-invariant")
    generator = tiny_generator(dtype)
    alone = make(generator)
    expected = []
    for index, prompt in enumerate(PROMPTS * 3):
        sequence = alone.sequence(30 + 7 * index, seed=index if index % 2 else None)
        alone.ask(prompt, sequence)
        alone.collector.wait(sequence)
        expected.append((alone.collector.text(sequence), list(sequence.drawn)))
    assert len({text for text, _ in expected}) == len(expected)
    busy = make(generator, cache_bytes=0)
    sequences = []
    for index, prompt in enumerate(PROMPTS * 3):
        sequences.append(busy.sequence(30 + 7 * index, seed=index if index % 2 else None))
        busy.ask(prompt, sequences[-1])
        time.sleep(0.003 * (index % 4))
    busy.collector.wait(*sequences)
    assert [(busy.collector.text(sequence), sequence.drawn) for sequence in sequences] == expected


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_single_sequence_has_an_idle_row_only_if_bits_must_not_depend_on_the_load(
    reproducible: bool, make: type[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(reproducible=reproducible)
    model, rows = bench.scheduler._batch._model, []
    plain = type(model).step

    def step(self: Any, tokens: torch.Tensor, state: Any) -> Any:
        rows.append(len(tokens))
        return plain(self, tokens, state)

    monkeypatch.setattr(type(model), "step", step)
    bench.ask("the quick", sequence := bench.sequence(9))
    bench.collector.wait(sequence)
    assert {*rows} == {1 + reproducible}
    twins = [bench.sequence(9) for _ in range(2)]
    bench.ask("the quick", *twins)
    bench.collector.wait(*twins)
    assert rows[-1] == 2
    assert {bench.collector.text(twin) for twin in twins} == {bench.collector.text(sequence)}


def test_greedy_text_equals_that_of_the_generator(make: type[Bench], generator: TextGenerator) -> None:
    bench = make()
    sequence = bench.sequence(50)
    bench.ask("the quick", sequence)
    bench.collector.wait(sequence)
    record, pieces = generator.stream(generator.prefill(["the quick"]), 50, SamplingParams(temperature=0))
    assert "".join(pieces) == bench.collector.text(sequence)
    assert record.tokens == [token for token in sequence.drawn if token != generator.tokenizer.eos_id]


def test_outputs_of_short_steps_are_delivered_together(
    make: type[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is delivered at once, and the last one with all before it."""
    monkeypatch.setattr(scheduler, "DELIVERY_SECONDS", math.inf)
    bench = make()
    sequence = bench.sequence(tokens=30)
    bench.ask("the quick", sequence)
    bench.collector.wait(sequence)
    # The step after a prompt belongs to the same iteration.
    assert bench.collector.deliveries == [2, 28]


def test_a_prompt_with_several_sequences_is_prefilled_once(make: type[Bench]) -> None:
    bench = make()
    sequences = [bench.sequence(12, seed=seed) for seed in range(4)]
    prompt = bench.ask("the quick brown fox", *sequences)
    bench.collector.wait(*sequences)
    assert bench.metrics.prompt_tokens._value.get() == len(prompt.tokens)
    assert len({bench.collector.text(sequence) for sequence in sequences}) > 1


def test_a_prompt_is_reused_from_its_state(make: type[Bench]) -> None:
    bench, ids = make(), list(range(3, 290)) * 2
    first, again, longer = bench.sequence(), bench.sequence(), bench.sequence()
    for sequence, prompt, cached in (
        (first, ids, 0),
        (again, ids, len(ids)),
        (longer, ids[:300] + [5] * 9, 256),
    ):
        bench.ask(prompt, sequence)
        bench.collector.wait(sequence)
        assert sequence.cached == cached
    assert bench.collector.text(first) == bench.collector.text(again)
    fresh = make(cache_bytes=0)
    alone = fresh.sequence()
    fresh.ask(ids[:300] + [5] * 9, alone)
    fresh.collector.wait(alone)
    assert fresh.collector.text(alone) == bench.collector.text(longer)


def test_rows_of_multirate_in_different_turns_give_their_own_text(make: type[Bench]) -> None:
    """Sequences take each other's places in a batch of two, and prompts are continued from the cache."""
    generator = tiny_generator(method="multirate", kernel=SGConvConfig(name="sgconv", kernel_dim=2))
    bench = make(generator, max_batch=2, max_queue=9)
    prompts = [generator.tokenizer.encode(text) for text in PROMPTS[:4]]
    prompts.append(prompts[3] + [5] * 9)
    sequences = [bench.sequence(20 + 7 * index) for index in range(len(prompts))]
    for prompt, sequence in zip(prompts, sequences, strict=True):
        bench.ask(prompt, sequence)
    again = bench.sequence(20)
    bench.collector.wait(*sequences)
    bench.ask(prompts[0], again)
    bench.collector.wait(again)
    assert again.cached == len(prompts[0])
    assert again.drawn == sequences[0].drawn
    for index, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        record, pieces = generator.stream(
            generator.prefill_tokens([prompt]), 20 + 7 * index, SamplingParams(temperature=0)
        )
        assert "".join(pieces) == bench.collector.text(sequence)
        assert record.tokens == [token for token in sequence.drawn if token != generator.tokenizer.eos_id]


def test_a_long_prompt_does_not_stall_other_sequences(
    make: type[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    reads: list[tuple[int, int]] = []
    plain = prefill.PrefillWorker.prefill_chunk

    def spy(self: prefill.PrefillWorker, prompt: Prompt) -> list[SequenceOutput]:
        reads.append((len(prompt.tokens), len(bench.collector.order)))
        return plain(self, prompt)

    monkeypatch.setattr(prefill.PrefillWorker, "prefill_chunk", spy)
    monkeypatch.setattr("tnnlm.serving.scheduler.PREFILL_SECONDS", 0.0)
    writer, long, short = bench.sequence(3000), bench.sequence(5), bench.sequence(5)
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


def test_slots_are_limited_and_assigned_in_order(make: type[Bench]) -> None:
    bench = make(max_batch=2, max_queue=3)
    sequences = [bench.sequence(200) for _ in range(5)]
    for sequence in sequences:
        bench.ask("the quick", sequence)
    with pytest.raises(QueueFullError):
        bench.ask("one more", bench.sequence())
    bench.collector.wait(*sequences)
    first = [bench.collector.order.index(sequence) for sequence in sequences]
    assert first == sorted(first)
    for place in range(len(bench.collector.order)):
        assert len(set(bench.collector.order[place : place + 2])) <= 2
    again = bench.sequence(1)
    bench.ask("a", again)
    bench.collector.wait(again)


def test_cancelled_sequences_free_their_slots(make: type[Bench]) -> None:
    bench = make(max_batch=1, max_queue=4)
    endless, waiting, last = bench.sequence(10**7), bench.sequence(10**7), bench.sequence(3)
    for sequence in (endless, waiting, last):
        bench.ask("the quick", sequence)
    bench.collector.wait(endless, tokens=5)
    bench.scheduler.cancel([endless, waiting])
    bench.collector.wait(last)
    assert bench.metrics.finished.labels("cancelled")._value.get() == 2
    assert waiting not in bench.collector.outputs


def test_time_limits(make: type[Bench]) -> None:
    bench = make(max_batch=1)
    writer, waiting = bench.sequence(10**7, seconds=0.5), bench.sequence(5, seconds=0.2)
    bench.ask("the quick", writer)
    bench.ask("the quick", waiting)
    bench.collector.wait(writer, waiting)
    assert bench.collector.finish(writer) == "length"
    assert bench.collector.outputs[waiting][-1].error == "timeout"


def test_stop_strings(make: type[Bench]) -> None:
    bench = make()
    plain = bench.sequence(200)
    bench.ask("the quick", plain)
    bench.collector.wait(plain)
    text = bench.collector.text(plain)
    stop = text[20:26]
    stopped = bench.sequence(200, stops=("never to be seen", stop))
    bench.ask("the quick", stopped)
    bench.collector.wait(stopped)
    assert bench.collector.text(stopped) == text[: text.index(stop)]
    assert bench.collector.finish(stopped) == "stop"


def test_possible_stop_strings_are_buffered(generator: TextGenerator) -> None:
    tokenizer = generator.tokenizer
    text = StoppedText(TextStream(tokenizer.detokenizer), ["dog;!", "zebra"])
    shown = [text.push(token) for token in tokenizer.encode("lazy dog; pack")]
    assert all("d" not in piece or piece.startswith("dog; ") or "pack" in piece for piece in shown[:-1])
    assert "".join(shown) + text.finish() == "lazy dog; pack"
    cut = StoppedText(TextStream(tokenizer.detokenizer), ["dog;"])
    assert "".join(cut.push(token) for token in tokenizer.encode("lazy dog; pack")) == "lazy "
    assert cut.finish() == ""


@settings(max_examples=500, deadline=None)
@given(text=st.text("ab", max_size=12), stop=st.text("ab", min_size=1, max_size=6))
def test_overlap_is_the_longest_beginning_of_a_stop_string(text: str, stop: str) -> None:
    longest = max(n for n in range(len(stop)) if text.endswith(stop[:n]) or n == 0)
    assert _overlap(text, stop) == longest


def test_logits_that_are_not_finite_end_only_their_sequence(
    make: type[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    good, bad, model = bench.sequence(30), bench.sequence(30), bench.scheduler._batch._model
    plain = type(model).step

    def step(self: object, tokens: Any, state: Any) -> Any:
        logits, state = plain(model, tokens, state)
        logits[
            bench.scheduler._batch._sequences.index(bad) if bad in bench.scheduler._batch.sequences else []
        ] = torch.nan
        return logits, state

    monkeypatch.setattr(type(model), "step", step)
    bench.ask("the quick", good, bad)
    bench.collector.wait(good, bad)
    assert "not finite" in bench.collector.outputs[bad][-1].error
    assert bench.collector.finish(good) in ("length", "stop")


def test_a_failure_ends_the_sequences_and_not_the_server(
    make: type[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    with monkeypatch.context() as patch:
        patch.setattr(bench.scheduler._batch._model, "step", lambda *_: 1 / 0)
        sequence, other = bench.sequence(5), bench.sequence(5)
        bench.ask("the quick", sequence, other)
        bench.collector.wait(sequence, other)
    assert "ZeroDivisionError" in bench.collector.outputs[sequence][-1].error
    again = bench.sequence(5)
    bench.ask("the quick", again)
    bench.collector.wait(again)
    assert bench.collector.finish(again) in ("length", "stop")


def test_the_state_of_a_prompt_is_freed_when_its_sequences_run(make: type[Bench]) -> None:
    bench = make(cache_bytes=0)
    sequence = bench.sequence(10**6)
    prompt = bench.ask("the quick", sequence)
    bench.collector.wait(sequence, tokens=2)
    assert prompt.position > 0
    assert prompt.state is None


def test_closing(make: type[Bench]) -> None:
    bench = make()
    sequence = bench.sequence(10**7)
    bench.ask("the quick", sequence)
    bench.collector.wait(sequence, tokens=2)
    bench.scheduler.close()
    assert bench.collector.finish(sequence) == "error"
    with pytest.raises(ClosedError):
        bench.ask("the quick", bench.sequence())


def test_memory_does_not_grow_with_the_context(make: type[Bench]) -> None:
    bench = make()
    sequence = bench.sequence(400)
    bench.ask("the quick", sequence)
    bench.collector.wait(sequence)
    assert bench.metrics.state_bytes._value.get() == 0
    assert bench.scheduler.row_bytes == sum(
        part.numel() * part.element_size() for part in bench.generator.model.init_state(1).tensors
    )
    assert torch.is_inference_mode_enabled() is False
