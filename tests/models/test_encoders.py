"""Bidirectional models: context on both sides, padding, and the tied head of the masked language model."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import FAMILIES, tiny_config
from tnnlm.config.schema import Config
from tnnlm.conversion import convert_model
from tnnlm.errors import CheckpointError, ConfigError, UserError
from tnnlm.kernels import TwoSidedKernel
from tnnlm.models.batches import LabelledBatch, MaskedBatch
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.encoders import MaskedLM, SequenceClassifier
from tnnlm.models.factory import build_model
from tnnlm.modules import BiConv
from tnnlm.ops.reference import toeplitz_two_sided_dense

LENGTH = 20


def masked_lm(family: str = "tno", **changes: object) -> MaskedLM:
    """Return a masked language model in float64 with random kernel parameters."""
    model = MaskedLM(tiny_config(kernel=FAMILIES[family](), **changes)).double().eval()
    for block in model.layers:
        for parameter in block.mixer.conv.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def reached(model: MaskedLM, at: int) -> torch.Tensor:
    """Return which positions change when the token at ``at`` changes, (L,)."""
    tokens = torch.randint(300, (1, LENGTH))
    changed = tokens.clone()
    changed[0, at] = (tokens[0, at] + 1) % 300
    return (model(tokens) - model(changed)).abs().amax((0, 2)) > 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_bi_conv_is_the_dense_product(family: str) -> None:
    kernel = TwoSidedKernel(FAMILIES[family](), 6, 32).double()
    x = torch.randn(2, LENGTH, 6, dtype=torch.float64)
    expected = toeplitz_two_sided_dense(x, kernel(LENGTH))
    torch.testing.assert_close(BiConv(kernel)(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at", [0, 9, LENGTH - 1])
def test_a_change_anywhere_changes_outputs_on_both_sides(family: str, at: int) -> None:
    assert reached(masked_lm(family), at).all()


def test_a_causal_masked_model_sees_the_past_alone() -> None:
    assert reached(masked_lm(causal=True), 9).tolist() == [False] * 9 + [True] * 11


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(causal: bool) -> None:
    model = masked_lm(causal=causal)
    tokens = torch.randint(300, (3, LENGTH))
    mask = torch.arange(LENGTH) < torch.tensor([[7], [LENGTH], [1]])
    padded = model(tokens, mask=mask)
    other = model(torch.where(mask, tokens, 5), mask=mask)
    torch.testing.assert_close(padded[mask], other[mask], rtol=0, atol=1e-10)
    torch.testing.assert_close(padded[0, :7], model(tokens[:1, :7])[0], rtol=0, atol=1e-10)


def test_logits_at_positions_are_those_of_all_positions() -> None:
    model, tokens = masked_lm(), torch.randint(300, (2, LENGTH))
    positions = torch.tensor([[3, 0, 19], [5, 5, 6]])
    some = model(tokens, positions)
    assert some.shape == (2, 3, 300)
    torch.testing.assert_close(
        some, torch.stack([row[at] for row, at in zip(model(tokens), positions, strict=True)])
    )


def test_masked_loss_is_the_mean_over_masked_tokens() -> None:
    model, tokens = masked_lm(), torch.randint(300, (2, LENGTH))
    batch = MaskedBatch(tokens, torch.tensor([[1, 4], [0, 7]]), torch.randint(300, (2, 2)))
    chances = model(tokens, batch.positions).softmax(-1).gather(2, batch.targets[:, :, None])
    torch.testing.assert_close(model.loss(batch).double(), -chances.log().mean(), rtol=1e-6, atol=0)
    assert not any("head" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_parameter_that_is_used(family: str) -> None:
    model = masked_lm(family)
    batch = MaskedBatch(torch.randint(300, (2, LENGTH)), torch.tensor([[1], [4]]), torch.tensor([[3], [9]]))
    model.loss(batch).backward()
    # The last taps of the reverse kernel may be unused, but DDP needs a gradient for each trained parameter.
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    silent = {name for name, gradient in trained.items() if not gradient.any()}
    assert all("reverse" in name for name in silent)


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = masked_lm().train()
    batch = MaskedBatch(torch.randint(300, (2, LENGTH)), torch.tensor([[1], [4]]), torch.tensor([[3], [9]]))
    expected = torch.autograd.grad(model.loss(batch), list(model.parameters()))
    model.recompute = True
    for a, b in zip(torch.autograd.grad(model.loss(batch), list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_classifier_ignores_padding() -> None:
    model = SequenceClassifier(tiny_config(n_classes=5)).double().eval()
    tokens, lengths = torch.randint(300, (3, LENGTH)), torch.tensor([7, LENGTH, 1])
    logits = model(tokens, lengths)
    assert logits.shape == (3, 5)
    for row, length in enumerate(lengths.tolist()):
        alone = model(tokens[row : row + 1, :length])
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=0, atol=1e-10)


def test_classifier_learns_which_token_comes_first() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(tiny_config(n_classes=2, vocab_size=257)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        labels = torch.randint(2, (16,))
        tokens = torch.where(torch.arange(2) == labels[:, None], 1, 2)
        padded = torch.nn.functional.pad(tokens, (0, 6), value=1)
        loss = model.loss(LabelledBatch(padded, torch.full((16,), 2), labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_causal_is_as_the_task_needs_unless_set() -> None:
    kinds = {"causal": CausalLM, "masked": MaskedLM, "classify": SequenceClassifier}
    for task, kind in kinds.items():
        model = build_model(Config(task=task, model=tiny_config()))
        assert type(model) is kind
        assert model.causal == (task == "causal")
    with pytest.raises(ConfigError, match=r"model\.causal=false"):
        CausalLM(tiny_config(causal=False))


def test_a_bidirectional_model_has_no_recurrent_form() -> None:
    with pytest.raises(UserError, match="no recurrent form"):
        convert_model(masked_lm())  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="parallel form"):
        masked_lm().layers[0].mixer.conv.init_state(1)
