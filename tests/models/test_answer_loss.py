"""Loss of answers only: prompt tokens have no loss and no gradient, in training and in both validations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.support.models import tiny_config
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import convert_model
from tnnlm.evaluation import parallel_nll, recurrent_nll
from tnnlm.models.batches import PADDING, AnswerBatch, inputs_of, unscored
from tnnlm.models.causal_lm import CausalLM
from tnnlm.ops import cross_entropy


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(tiny_config()).double()


def answers(rows: int = 3, length: int = 17) -> AnswerBatch:
    """Return a batch whose second row has no answer, and whose third ends in padding."""
    torch.manual_seed(1)
    mask = torch.rand(rows, length) < 0.4
    mask[1] = False
    mask[2, 10:] = False
    return AnswerBatch(torch.randint(300, (rows, length + 1)), mask)


def reference(logits: Tensor, batch: AnswerBatch) -> Tensor:
    """Return the summed loss of the answers, token by token."""
    places = batch.mask.nonzero().tolist()
    logp = logits.log_softmax(-1)
    return -sum((logp[b, t, batch.rows[b, t + 1]] for b, t in places), start=logits.new_zeros(()))


# All logits at once, and chunks that do not divide the answers.
@pytest.mark.parametrize("most", [1 << 22, 5 * 300])
def test_loss_is_the_mean_over_answers_with_its_gradients(
    model: CausalLM, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_MOST_ON_CPU", most)
    batch, parameters = answers(), list(model.parameters())
    expected = reference(model(batch.rows[:, :-1]), batch) / batch.mask.sum()
    loss = model.loss(batch.rows, batch.mask)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    found, right = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_prompt_tokens_have_no_gradient_as_targets(model: CausalLM) -> None:
    batch = answers()
    logits = model(batch.rows[:, :-1]).detach().requires_grad_()
    (slope,) = torch.autograd.grad(reference(logits, batch), logits)
    assert not slope[~batch.mask].any()
    changed = batch.rows.clone()
    last = int(batch.mask[0].nonzero().max())
    changed[0, last + 2 :] = 7  # tokens after the last answer of a row
    changed[1] = 5  # a row without an answer
    for rows in (batch.rows, changed):
        model.zero_grad()
        model.loss(rows, batch.mask).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if rows is batch.rows:
            first = gradients
    for one, other in zip(first, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_full_mask_gives_the_loss_of_all_tokens(model: CausalLM) -> None:
    batch = answers()
    found = model.loss(batch.rows, torch.ones_like(batch.mask))
    torch.testing.assert_close(found, model.loss(batch.rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize("most", [1 << 22, 300])
def test_batch_without_answers_has_zero_loss_and_gradient(
    model: CausalLM, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_MOST_ON_CPU", most)
    batch = answers()
    loss = model.loss(batch.rows, torch.zeros_like(batch.mask))
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_divisor_makes_accumulated_batches_the_mean_over_their_answers(model: CausalLM) -> None:
    batch, parameters = answers(4), list(model.parameters())
    total = int(batch.mask.sum())
    parts = zip(batch.rows.split(1), batch.mask.split(1), strict=True)
    loss = sum(model.loss(rows, mask, total / 4) for rows, mask in parts) / 4
    expected = model.loss(batch.rows, batch.mask)
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    found, right = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_both_validations_score_answers_only(model: CausalLM) -> None:
    batch = answers()
    rows = batch.marked
    torch.testing.assert_close(inputs_of(rows), batch.rows)
    expected = float(reference(model(batch.rows[:, :-1]), batch).detach())
    parallel = parallel_nll(model, rows)
    converted = convert_model(model, ConversionConfig(method="etsc", horizon=32))
    recurrent = recurrent_nll(converted, rows, chunk=5)
    assert parallel.tokens == recurrent.tokens == int(batch.mask.sum())
    assert parallel.total == pytest.approx(expected, abs=1e-9)
    assert recurrent.total == pytest.approx(expected, abs=1e-4)


def test_negative_entries_of_rows_are_padding_or_unscored_tokens() -> None:
    rows = torch.tensor([[3, -5, 0, PADDING]])
    assert inputs_of(rows).tolist() == [[3, 3, 0, 0]]
    assert torch.equal(unscored(unscored(rows)), rows)
    assert inputs_of(functional.pad(rows, (0, 1), value=PADDING)).tolist() == [[3, 3, 0, 0, 0]]
