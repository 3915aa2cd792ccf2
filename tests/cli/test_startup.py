"""Commands that decode import neither PyTorch's compiler nor the libraries of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.models import FAMILIES, tiny_config
from tests.support.started import COMPILER, modules_after
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.empty import without_weights

RUN = Path(__file__).parents[1] / "fixtures" / "version_0.1.0" / "runs" / "old"
SLOW = COMPILER | {"lightning", "transformers", "datasets", "omegaconf", "rich", "matplotlib"}


@pytest.mark.parametrize("model", ["converted", "checkpoints/last.ckpt"])
def test_generating_imports_only_what_decoding_needs(model: str) -> None:
    words = ["--model", str(RUN / model), "--prompt", "def ", "--max-new-tokens", "3", "--device", "cpu"]
    assert SLOW & modules_after("generate", words) == set()


@pytest.mark.parametrize("kernel", ["tno", "rtf", "hyena"])
def test_models_without_weights_have_the_shapes_of_others(kernel: str) -> None:
    config = tiny_config(kernel=FAMILIES[kernel]())
    with without_weights():
        empty = CausalLM(config)
    expected = CausalLM(config).state_dict()
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in expected.items()}
    assert all(tensor.is_meta for tensor in empty.parameters())
    with without_weights():
        pass
    assert torch.nn.Linear(2, 2).weight.abs().sum() > 0, "the mode ends with the context"
