"""Low-rank adapters: training, resuming, and checkpoints whose adapters are merged when they are loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.scripts import assert_refused
from tests.support.training_runs import assert_same_run
from tests.training.test_initial import SCHEDULE, SHORT, done
from tnnlm.checkpoints.adapters import without_adapters
from tnnlm.checkpoints.locate import load_trained
from tnnlm.training.trainable import build_trainable

LORA = ("init.lora.rank=3", "init.lora.alpha=12", "optim.lr=0.05", *SCHEDULE)


def test_missing_peft_is_refused_with_its_extra(
    run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    refused = script("train", *SHORT, *LORA, "init.weights=tiny", "name=new")
    assert_refused(refused, "init.lora.rank=3: needs the package peft", "-e '.[lora]'")


def test_merged_weights_are_the_sum_of_base_and_scaled_product() -> None:
    down, up, base = torch.randn(3, 5), torch.randn(4, 3), torch.randn(4, 5)
    names = ("a.base_layer.weight", "a.base_layer.bias", "a.lora_A.default.weight", "a.lora_B.default.weight")
    weights = dict(zip(names, (base, base[:, 0], down, up), strict=True)) | {"b.weight": base}
    found = without_adapters(weights, 3, 1.5)
    assert found.keys() == {"a.weight", "a.bias", "b.weight"}
    torch.testing.assert_close(found["a.weight"], base + 0.5 * up @ down, rtol=0, atol=1e-6)
    assert torch.equal(found["b.weight"], base)
    for missing in names[0], *names[2:]:
        with pytest.raises(KeyError):
            without_adapters({name: value for name, value in weights.items() if name != missing}, 3, 1.5)
    with pytest.raises(ValueError, match="another shape"):
        without_adapters(weights, 4, 1.5)


def test_run_with_adapters_resumes_exactly_and_merges_wherever_it_is_loaded(
    run_here: Path, script: Any
) -> None:
    pytest.importorskip("peft")
    start = (*SHORT, *LORA, "init.weights=tiny", "trainer.sample_tokens=3", "init.lora.dropout=0.1")
    out = done(script("train", *start, "name=whole"))
    done(script("train", *start, "name=part", "trainer.max_steps=2"))
    done(script("train", "--resume", "part", "trainer.max_steps=4"))
    assert_same_run(Path("runs/whole"), Path("runs/part"))

    base, merged = load_trained(run_here), load_trained("runs/whole")
    saved = torch.load("runs/whole/checkpoints/last.ckpt", weights_only=True)
    unmerged = build_trainable(merged.config)
    stored = {name.removeprefix("model."): tensor for name, tensor in saved["state_dict"].items()}
    unmerged.load_state_dict({name: stored[name] for name in unmerged.state_dict()})
    tokens = torch.randint(merged.tokenizer.size, (2, 31))
    assert not torch.allclose(base.model(tokens), merged.model(tokens), rtol=0, atol=1e-3)
    torch.testing.assert_close(unmerged.eval()(tokens), merged.model(tokens), rtol=0, atol=1e-5)

    adapters = [name for name in stored if ".lora_" in name]
    assert len(saved["optimizer_states"][0]["state"]) == len(adapters) == 2 * 4 * 2
    assert not [name for name in stored if "conv" in name and ".lora_" in name]
    for name, tensor in base.model.state_dict().items():
        held = stored.get(name, stored.get(f"{name.rpartition('.')[0]}.base_layer.{name.rpartition('.')[2]}"))
        assert torch.equal(held, tensor), name
    assert f"{sum(stored[name].numel() for name in adapters):,} parameters and" in out

    planned = done(script("train", *start, "init.lora.targets=blocks.1.*", "--dry-run"))
    assert f"params: {sum(stored[name].numel() for name in adapters) // 2:,} trainable" in planned
    assert "estimated as if all weights were trained" in planned

    done(script("convert", "runs/whole", "--method", "window", "--no-compile", "--verify"))
    done(script("generate", "--model", "runs/whole", "--prompt", "The", "--max-new-tokens", "3"))
    still = ("optim.lr=1e-12", "optim.weight_decay=0", "init.weights=whole", "init.lora.targets=*.glu.*")
    done(script("train", *SHORT, *LORA[:2], *still, "name=again"))
    again = load_trained("runs/again").model
    torch.testing.assert_close(again(tokens), merged.model(tokens), rtol=0, atol=1e-5)
    refused = script("train", *SHORT, *LORA, "init.weights=tiny", "init.lora.targets=*.rpe.*", "name=new")
    assert_refused(refused, "init.lora.targets=*.rpe.*: matches no linear layer")
