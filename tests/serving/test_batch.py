"""Running batch: each row keeps the state of its sequence, whatever the layout of states in memory."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from tests.serving.test_scheduler import Bench
from tests.support.steps import METHODS, converted, whole
from tnnlm.inference.aot import CompiledModel, _Step
from tnnlm.inference.batch_step import BatchStep
from tnnlm.inference.engine import optimize_for_decoding
from tnnlm.inference.generator import TextGenerator
from tnnlm.models.causal_lm import ModelState
from tnnlm.serving.batch import RunningBatch
from tnnlm.serving.sequence import GeneratedSequence

CASES = [("packed", "balanced"), *(("compiled", method) for method in METHODS)]
"""Engines with conversion methods."""


def generator_of(engine: str, method: str) -> TextGenerator:
    tokenizer = whole(converted(method)).tokenizer
    model = optimize_for_decoding(converted(method), "float32")
    if engine == "packed":
        return TextGenerator(model, tokenizer)
    # The packages are replaced by what they compile, which changes states in place, with channels last.
    return TextGenerator(CompiledModel(model, _Step(model), BatchStep(model)), tokenizer)


def last_logits(generator: TextGenerator, rows: list[list[int]]) -> torch.Tensor:
    """Return the logits (B, V) after sequences of different lengths, without a step."""
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    logits, _ = generator.model.prefill(padded, generator.model.init_state(len(rows)), lengths, keep=1)
    return generator.token_logits(logits[:, 0])


@pytest.mark.parametrize(("engine", "method"), CASES)
@torch.inference_mode()
def test_rows_of_sequences_that_left_are_idle_or_taken_by_others(engine: str, method: str) -> None:
    """Sequences join and leave in random order; each keeps the state of the tokens it was given."""
    generator = generator_of(engine, method)
    batch, model = RunningBatch(generator), generator.model
    rng = random.Random(0)
    sequence_of = Bench(generator).sequence
    tokens: dict[GeneratedSequence, list[int]] = {}
    given: list[tuple[ModelState, ModelState]] = []
    widest = 0
    for _ in range(60):
        leave = [sequence for sequence in tokens if rng.random() < 0.1]
        new = [sequence_of() for _ in range(rng.choice((0, 0, 1, 3, 7)))]
        states = []
        for sequence in new:
            prompt = rng.choices(range(3, 290), k=3)
            states.append(model.prefill(torch.tensor([prompt]), model.init_state(1))[1])
            sequence.drawn = [rng.randrange(3, 290)]
            tokens[sequence] = prompt
        given += [(state, state.copy()) for state in states]
        batch.change(leave, list(zip(new, states, strict=True)), expected=rng.choice((0, 2)))
        for sequence in leave:
            del tokens[sequence]
        assert {*batch.sequences} == {*tokens}
        assert len(batch._sequences) - len(tokens) <= len(batch._sequences) // 4
        widest = max(widest, len(batch._sequences) - len(tokens))
        if not tokens:
            assert batch._state is None
            continue
        for sequence, own in tokens.items():
            own.append(sequence.drawn[-1])
        expected = last_logits(generator, list(tokens.values()))
        drawn = batch.step()
        for sequence, logits in zip(tokens, expected, strict=True):
            torch.testing.assert_close(drawn.logits[drawn.sequences.index(sequence)], logits)
            sequence.drawn.append(rng.randrange(3, 290))
    assert widest > 2, "some rows were idle"
    # The prefix cache holds these states, so that the batch must not change them in place.
    for state, before in given:
        assert all(map(torch.equal, state.tensors, before.tensors))
