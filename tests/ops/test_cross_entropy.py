"""Cross-entropy of a linear head in chunks: values, gradients, mixed precision and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.models import tiny_config
from tnnlm.models.batches import MaskedBatch
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.encoders import MaskedLM
from tnnlm.ops import cross_entropy
from tnnlm.ops.cross_entropy import IGNORED, linear_cross_entropy

TOKENS, WIDTH, WORDS = 23, 7, 61


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, weights, and targets of which some are not scored."""
    features = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(WORDS, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.randint(WORDS, (TOKENS,))
    targets[[0, 9, 22]] = IGNORED
    return features, weight, targets


def plain(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of logits that are kept."""
    logits = functional.linear(features, weight)
    return functional.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)


def assert_same(a: Tensor, b: Tensor, inputs: list[Tensor]) -> None:
    """Assert that two losses and their gradients in float64 are equal to 1e-10."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    gradients = (torch.autograd.grad(3 * loss, inputs) for loss in (a, b))
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


# One row at a time, a chunk that does not divide the tokens, and all at once.
@pytest.mark.parametrize("most", [1, 5 * WORDS, TOKENS * WORDS])
def test_chunks_give_loss_and_gradients_of_kept_logits(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_MOST_ON_CPU", most)
    features, weight, targets = example()
    loss = linear_cross_entropy(features, weight, targets)
    assert_same(loss, plain(features, weight, targets), [features, weight])
    frozen = linear_cross_entropy(features, weight.detach(), targets)
    assert torch.autograd.grad(frozen, features)[0].shape == features.shape
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(features, weight, targets), loss)
    nothing = torch.full_like(targets, IGNORED)
    assert linear_cross_entropy(features, weight, nothing).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_as_accurate_as_kept_logits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_MOST_ON_CPU", 5 * WORDS)
    features, weight, targets = example(torch.float32)
    exact = plain(features.double(), weight.double(), targets).float()
    references = torch.autograd.grad(exact, [features, weight])
    with torch.autocast("cpu", dtype):
        losses = [head(features, weight, targets) for head in (linear_cross_entropy, plain)]
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    gradients = [torch.autograd.grad(1024 * loss, [features, weight]) for loss in losses]
    for ours, theirs, reference in zip(*gradients, references, strict=True):
        assert ours.dtype == torch.float32
        assert (ours / 1024 - reference).norm() <= 1.2 * (theirs / 1024 - reference).norm()


def test_logits_of_all_tokens_are_never_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_MOST_ON_CPU", 4 * WORDS)
    features, weight, targets = example()
    sizes = []
    for head in (linear_cross_entropy, plain):
        with Largest() as mode:
            head(features, weight, targets).backward()
        sizes.append(mode.size)
    assert sizes == [weight.numel(), TOKENS * WORDS]


def test_models_with_tied_embeddings_train_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    causal, masked = CausalLM(tiny_config()).double(), MaskedLM(tiny_config()).double()
    rows = torch.randint(300, (2, 12))
    positions = torch.tensor([[1, 4, 7], [0, 2, 11]])
    batch = MaskedBatch(rows, positions, rows.gather(1, positions))
    pairs: tuple[tuple[Any, Any], ...] = ((causal, rows), (masked, batch))
    for model, given in pairs:
        whole = model.loss(given)
        with monkeypatch.context() as patch:
            patch.setattr(cross_entropy, "_MOST_ON_CPU", 5 * 300)
            chunked = model.loss(given)
        assert type(whole.grad_fn) is not type(chunked.grad_fn)
        assert_same(chunked, whole, list(model.parameters()))
