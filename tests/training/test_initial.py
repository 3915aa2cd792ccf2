"""Runs that start from weights: what they take, how they resume, and what is refused before writing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from tests.support.scripts import Result, assert_refused
from tests.support.training_runs import SETTINGS, assert_same_run
from tests.support.unchanged import files_under
from tnnlm.checkpoints.locate import load_trained
from tnnlm.cli import run

SHORT = (
    *(word for word in SETTINGS if not word.startswith("model.")),
    "trainer.max_steps=4",
    "trainer.val_every_n_steps=2",
    "trainer.log_every_n_steps=2",
    "checkpoint.every_n_steps=2",
    "trainer.sample_tokens=0",
    "conversion.method=window",
)
STILL = (*SHORT, "optim.lr=1e-12", "optim.weight_decay=0")
"""Settings with which the weights are unchanged by training."""


SCHEDULE = ("optim.warmup_steps=1", "optim.schedule_steps=4")
"""Schedule of a run of 4 steps, also where it is interrupted."""


def assert_equal_weights(a: str | Path, b: str | Path) -> None:
    left, right = (load_trained(run).model.state_dict() for run in (a, b))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=0, atol=1e-9)


def done(result: Result) -> str:
    assert result.code == 0, result.err
    return result.out


def test_converted_folder_and_hub_name_begin_where_their_run_ended(
    run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(script("convert", str(run_here), "--no-compile", "--no-perplexity"))
    shutil.move(run_here / "converted", "folder")
    out = done(script("train", *STILL, "init.weights=folder", "name=a"))
    assert "weights: those of folder\n" in out
    assert_equal_weights(run_here, "runs/a")
    summary = json.loads(Path("runs/a/summary.json").read_text())
    assert summary["init_weights"] == str(Path("folder").absolute())
    assert summary["params_frozen"] == 0
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        if name != "someone/model":
            raise OSError("no network")
        asked.append(name)
        return "folder"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refused = script("train", *STILL, "init.weights=someone/else", "name=b")
    assert_refused(
        refused, "init.weights=someone/else: no such run, file or folder, and not found on the Hub"
    )
    done(script("train", *STILL, "init.weights=someone/model", "name=b"))
    assert asked == ["someone/model"]
    assert_equal_weights(run_here, "runs/b")
    assert load_trained("runs/b").config.init.weights == "someone/model"
    done(script("convert", "runs/b", "--no-compile", "--no-perplexity"))
    card = Path("runs/b/converted/README.md").read_text()
    assert "base_model: someone/model" in card
    done(script("convert", "runs/a", "--no-compile", "--no-perplexity"))
    card = Path("runs/a/converted/README.md").read_text()
    assert "`folder`" in card
    assert str(Path.cwd()) not in card


def test_folder_without_kernels_decodes_and_is_refused_as_weights(run_here: Path, script: Any) -> None:
    done(script("convert", str(run_here), "--no-compile", "--no-perplexity", "--inference-only"))
    assert not (run_here / "converted/kernels.safetensors").exists()
    done(script("generate", "--model", str(run_here), "--prompt", "The", "--max-new-tokens", "3"))
    before = files_under(Path.cwd())
    refused = script("train", *SHORT, f"init.weights={run_here}/converted")
    assert_refused(refused, "--inference-only", "kernels")
    assert files_under(Path.cwd()) == before


def test_damaged_kernels_are_refused_as_weights_alone(run_here: Path, script: Any) -> None:
    done(script("convert", str(run_here), "--no-compile", "--no-perplexity"))
    path = run_here / "converted/kernels.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert_refused(script("train", *SHORT, f"init.weights={run_here}/converted"), "kernels.safetensors")
    done(script("generate", "--model", str(run_here), "--prompt", "The", "--max-new-tokens", "3"))


def test_interrupted_run_from_weights_goes_on_exactly_without_them(run_here: Path, script: Any) -> None:
    copied = Path(shutil.copy(run_here / "checkpoints/best.ckpt", "alone.ckpt"))
    frozen = ("init.freeze=embedding.*", "init.freeze=*.mixer.conv.*")
    start = (*SHORT, *SCHEDULE, f"init.weights={copied}", *frozen)
    done(script("train", *start, "name=whole"))
    done(script("train", *start, "name=part", "trainer.max_steps=2"))
    shutil.rmtree(run_here)
    copied.unlink()
    shutil.rmtree(Path("cache/tokenizers"))
    refused = script("train", "--resume", "part", "trainer.max_steps=4", "init.freeze=[]")
    assert_refused(refused, "init.freeze", "can't be changed on resume")
    done(script("train", "--resume", "part", "trainer.max_steps=4"))
    assert_same_run(Path("runs/whole"), Path("runs/part"))


def test_frozen_parameters_stay_bit_equal_without_optimizer_state(run_here: Path, script: Any) -> None:
    frozen = ("embedding.weight", "blocks.0.")
    words = ("init.weights=tiny", "init.freeze=[embedding.*, blocks.0.*]", "name=frozen")
    out = done(script("train", *SHORT, "optim.lr=0.01", *words))
    before, after = (load_trained(run).model.state_dict() for run in (run_here, "runs/frozen"))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved
    assert not [name for name in moved if name.startswith(frozen)]
    saved = torch.load("runs/frozen/checkpoints/last.ckpt", weights_only=True)
    known = dict(load_trained(run_here).model.named_parameters())
    trained = {name for name in known if not name.startswith(frozen)}
    assert len(saved["optimizer_states"][0]["state"]) == len(trained)
    summary = json.loads(Path("runs/frozen/summary.json").read_text())
    sizes = {name: parameter.numel() for name, parameter in known.items()}
    assert summary["params"] == sum(sizes[name] for name in trained)
    assert summary["params_frozen"] == sum(sizes.values()) - summary["params"]
    assert f"and {summary['params_frozen']:,} frozen ones" in out
    planned = done(script("train", *SHORT, *words, "--dry-run"))
    assert f"params: {summary['params']:,} trainable, {summary['params_frozen']:,} frozen, and " in planned
    assert "estimated memory" in planned


def test_data_is_prepared_with_the_tokenizer_of_the_weights(run_here: Path, script: Any) -> None:
    text = Path("text.txt").read_text(encoding="utf-8")
    Path("other.txt").write_text(text[20_000:40_000], encoding="utf-8")
    words = [*SHORT, "data.files=[other.txt]", "init.weights=tiny", "name=other"]
    assert run("prepare-data", words) == 0
    prepared = sorted(Path("cache").rglob("tokenizer.json"))
    done(script("train", *words))
    assert sorted(Path("cache").rglob("tokenizer.json")) == prepared
    assert load_trained("runs/other").tokenizer.fingerprint == load_trained(run_here).tokenizer.fingerprint


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["init.weights=tiny", "model.d_model=48"], "model.d_model=32; omit model.d_model=48"),
        (
            ["init.weights=tiny", "model.kernel.name=rtf"],
            "model.kernel.name=tno; omit model.kernel.name=rtf, or",
        ),
        (["init.weights="], "init.weights: is empty; write null"),
        (["init.weights=tiny", "data.tokenizer=null"], "data.tokenizer=null"),
        (["init.weights=tiny", "data.eos_token=<|end|>"], "data.eos_token=<|end|>"),
        (["init.weights=tinny"], "did you mean tiny?"),
        (["init.weights=runs/none"], "runs/none: no such run"),
        (["init.weights=tiny", "init.freeze=blocks.0"], "did you mean blocks.0.*?"),
        (["init.weights=tiny", "init.freeze=embeding.weight"], "did you mean embedding.weight"),
        (["init.weights=tiny", "init.freeze=[*]"], "leaves nothing to train"),
        (["init.lora.rank=4"], "set init.weights too"),
        (["init.weights=tiny", "init.lora.alpha=4"], "set init.lora.rank too"),
        (["init.weights=tiny", "init.lora.rank=4", "init.freeze=embedding.*"], "init.freeze"),
        (["init.weights=tiny", "--init-from", "tiny"], "--init-from: init.weights is given as well"),
    ],
)
def test_unsuitable_start_is_refused_before_anything_is_written(
    words: list[str], named: str, run_here: Path, script: Any
) -> None:
    before = files_under(Path.cwd())
    assert_refused(script("train", *SHORT, "name=new", *words), named)
    assert files_under(Path.cwd()) == before


def test_settings_of_a_named_file_override_those_of_the_weights(run_here: Path, script: Any) -> None:
    Path("own.yaml").write_text("init: {weights: tiny}\nmodel: {n_layers: 3}\n")
    refused = script("train", *SHORT, "--config", "own.yaml")
    assert_refused(refused, "model.n_layers=2; omit model.n_layers=3")
    Path("own.yaml").write_text("init: {weights: tiny}\nmodel: {dropout: 0.1, max_length: 64}\nname: own\n")
    out = done(script("train", *STILL, "--config", "own.yaml"))
    assert "trained at 32 tokens, each kernel continues: its position network" in out
    assert load_trained("runs/own").config.model.dropout == 0.1
    assert_equal_weights(run_here, "runs/own")
