"""Loading of saved models (invariant 8 of CONTRIBUTING.md), and error messages for damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.converted import HORIZON, measure_model, write_converted
from tests.support.models import FAMILIES, tiny_config
from tnnlm.checkpoints.converted import load_converted, save_converted
from tnnlm.checkpoints.locate import find_checkpoint, find_run, load_for_decoding
from tnnlm.checkpoints.manifest import write_checksums
from tnnlm.checkpoints.training import (
    ENTRY,
    attached_ssm,
    checkpoint_entry,
    from_attached,
    load_checkpoint,
)
from tnnlm.checkpoints.weights import load_weights
from tnnlm.config.schema import Config, ConversionConfig
from tnnlm.conversion import convert_layers, convert_model
from tnnlm.errors import CheckpointError, UserError
from tnnlm.models.causal_lm import CausalLM
from tnnlm.tokenizer import TextTokenizer, train_bpe


@pytest.fixture
def tokenizer() -> TextTokenizer:
    return train_bpe(["some words and some more words"], 300, "<|endoftext|>", 1, False)


def write_run(run: Path, tokenizer: TextTokenizer, ssm: bool = True, method: str = "etsc") -> CausalLM:
    """Write a run folder with a checkpoint in the format of the training loop."""
    config = Config(model=tiny_config())
    model = CausalLM(config.model).eval()
    _, layers = convert_layers(model, ConversionConfig(method=method, horizon=HORIZON))
    attached = attached_ssm([layer.params for layer in layers], method, HORIZON) if ssm else None
    data = {
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
        "global_step": 7,
        ENTRY: checkpoint_entry(config, tokenizer, attached),
    }
    (run / "checkpoints").mkdir(parents=True)
    for name in ("best", "last"):
        torch.save(data, run / "checkpoints" / f"{name}.ckpt")
    return model


@pytest.mark.parametrize("method", ["etsc", "window", "auto"])
def test_converted_model_loads_with_the_same_logits(tokenizer: TextTokenizer, method: str) -> None:
    converted = write_converted(Path("out"), tokenizer, method)
    loaded = load_converted(Path("out"))
    tokens = torch.randint(300, (2, 20))
    assert torch.equal(loaded.model(tokens), converted(tokens))
    expected, _ = converted.step(tokens[:, 0], converted.init_state(2))
    found, _ = loaded.model.step(tokens[:, 0], loaded.model.init_state(2))
    assert torch.equal(found, expected)
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert not loaded.model.training
    report = json.loads(Path("out/conversion.json").read_text())
    assert report["method"] == method
    assert set(report["layers"][0]) >= {"order", "relative_tap_error", "l1_error", "tail_energy"}


@pytest.mark.parametrize("method", ["etsc", "window", "auto"])
def test_checkpoint_loads_with_the_same_logits(tokenizer: TextTokenizer, method: str) -> None:
    model = write_run(Path("runs/a"), tokenizer, method=method)
    checkpoint = load_checkpoint(Path("runs/a/checkpoints/best.ckpt"))
    tokens = torch.randint(300, (2, 20))
    assert torch.equal(checkpoint.model(tokens), model(tokens))
    attached = from_attached(checkpoint).model
    assert torch.equal(attached(tokens), convert_model(model, method=method, horizon=HORIZON)(tokens))


def test_loaded_bf16_model_keeps_its_recurrence_in_float32(tokenizer: TextTokenizer) -> None:
    write_converted(Path("out"), tokenizer)
    full, half = load_converted(Path("out")).model, load_converted(Path("out")).model.to(torch.bfloat16)
    assert half.embedding.weight.dtype == torch.bfloat16
    for name, buffer in full.named_buffers():
        assert torch.equal(buffer, dict(half.named_buffers())[name])
    tokens = torch.randint(300, (1, 20))
    torch.testing.assert_close(half(tokens).float(), full(tokens), rtol=0, atol=0.15)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other torch file", "missing", "text"])
def test_unusable_checkpoint_is_reported(tokenizer: TextTokenizer, damage: str) -> None:
    write_run(Path("runs/a"), tokenizer)
    path = Path("runs/a/checkpoints/best.ckpt")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "foreign":
        torch.save({"state_dict": {}, "global_step": 1}, path)
    elif damage == "other torch file":
        torch.save(torch.zeros(3), path)
    elif damage == "text":
        path.write_text("hello")
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"best\.ckpt"):
        load_checkpoint(path)


def test_weights_that_do_not_fit_are_reported(tokenizer: TextTokenizer) -> None:
    write_run(Path("runs/a"), tokenizer)
    path = Path("runs/a/checkpoints/best.ckpt")
    data = torch.load(path, weights_only=True)
    for change in ({"d_model": 8}, {"n_layers": 3}):
        broken = {**data, ENTRY: {**data[ENTRY], "config": json.loads(json.dumps(data[ENTRY]["config"]))}}
        broken[ENTRY]["config"]["model"].update(change)
        torch.save(broken, path)
        with pytest.raises(UserError, match="don't fit its configuration"):
            load_checkpoint(path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_converted_model_is_reported(tokenizer: TextTokenizer, file: str, damage: str) -> None:
    write_converted(Path("out"), tokenizer)
    path = Path("out") / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="out"):
        load_converted(Path("out"))


def test_converted_model_with_shapes_of_no_kernel_is_reported(tokenizer: TextTokenizer) -> None:
    model = CausalLM(tiny_config(kernel=FAMILIES["sgconv"]()))
    converted = convert_model(model, method="multirate")
    report = measure_model(model, converted, method="multirate", horizon=32)
    save_converted(Path("out"), converted, tokenizer, report)
    tensors = load_file("out/model.safetensors")
    tensors["blocks.1.mixer.conv.near"] = tensors["blocks.1.mixer.conv.near"][1:].clone()
    save_file(tensors, "out/model.safetensors")
    write_checksums(Path("out"))
    with pytest.raises(UserError, match=r"out: is damaged \(layer 1, shapes near \(15, "):
        load_converted(Path("out"))


def test_tokenizer_that_does_not_fit_is_refused(tokenizer: TextTokenizer) -> None:
    write_converted(Path("out"), tokenizer)
    other = train_bpe(["quite different text, quite different merges " * 9], 290, "<|endoftext|>", 1, False)
    Path("out/tokenizer.json").write_text(other.to_json())
    with pytest.raises(UserError, match="not the one this model was trained with"):
        load_converted(Path("out"))
    large = train_bpe(
        ["".join(chr(i) + chr(i + 1) for i in range(40, 900))] * 3, 400, "<|endoftext|>", 1, False
    )
    assert large.size > 300
    Path("out/tokenizer.json").write_text(large.to_json())
    with pytest.raises(UserError, match="the model only 300"):
        load_converted(Path("out"))


def test_save_converted_replaces_converted_models_only(tokenizer: TextTokenizer) -> None:
    write_converted(Path("out"), tokenizer)
    model = CausalLM(tiny_config()).eval()
    converted = convert_model(model, horizon=4)
    report = measure_model(model, converted, method="etsc", horizon=4)
    with pytest.raises(UserError, match="--force"):
        save_converted(Path("out"), converted, tokenizer, report)
    save_converted(Path("out"), converted, tokenizer, report, force=True)
    assert json.loads(Path("out/conversion.json").read_text())["horizon"] == 4
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="won't replace"):
        save_converted(Path("mine"), converted, tokenizer, report, force=True)
    assert Path("mine/thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in Path().iterdir()) == ["mine", "out"]


def test_runs_are_found_by_name_path_and_age(tokenizer: TextTokenizer) -> None:
    runs = Path("runs")
    with pytest.raises(UserError, match=r"train\.py"):
        find_run(None, runs)
    write_run(runs / "old", tokenizer)
    write_run(runs / "new", tokenizer, ssm=False)
    assert find_run(None, runs) == find_run("new", runs) == find_run("runs/new", runs) == runs / "new"
    assert (
        find_checkpoint("old", runs)
        == find_checkpoint("runs/old", runs)
        == runs / "old/checkpoints/best.ckpt"
    )
    assert find_checkpoint("runs/old/checkpoints/last.ckpt", runs).name == "last.ckpt"
    with pytest.raises(UserError, match="no such run"):
        find_run("other", runs)
    with pytest.raises(UserError, match="no such checkpoint"):
        find_checkpoint("runs/old/checkpoints/x.ckpt", runs)


def test_load_for_decoding_prefers_the_converted_model(tokenizer: TextTokenizer) -> None:
    runs = Path("runs")
    write_run(runs / "a", tokenizer)
    assert load_for_decoding(None, runs)[0] == runs / "a/checkpoints/best.ckpt"
    write_converted(runs / "a/converted", tokenizer)
    for target in (None, "a", "runs/a", "runs/a/converted"):
        assert load_for_decoding(target, runs)[0] == runs / "a/converted"
    write_run(runs / "b", tokenizer, ssm=False)
    assert load_for_decoding(None, runs)[0] == runs / "a/converted"
    with pytest.raises(UserError, match=r"is not converted; run: python convert\.py runs/b"):
        load_for_decoding("b", runs)
    with pytest.raises(UserError, match="neither a converted model nor a run"):
        load_for_decoding("runs", runs)


def test_error_about_weights_names_all_that_are_missing_or_unexpected() -> None:
    model = CausalLM(tiny_config())
    weights = model.state_dict()
    del weights["embedding.weight"]
    weights |= {f"blocks.9.extra{index}": torch.zeros(1) for index in range(5)}
    with pytest.raises(CheckpointError) as refused:
        load_weights(model, weights, Path("here"))
    assert "missing: embedding.weight; unexpected: blocks.9.extra0" in str(refused.value)
    assert "blocks.9.extra2, 2 more)" in str(refused.value)


def test_a_tensor_that_is_larger_than_its_storage_is_refused(tokenizer: TextTokenizer) -> None:
    write_run(Path("run"), tokenizer)
    path = Path("run/checkpoints/best.ckpt")
    data = torch.load(path, weights_only=True)
    name = next(key for key, value in data["state_dict"].items() if value.dim() == 2)
    data["state_dict"][name] = torch.zeros(1, 1).expand(1 << 20, 1 << 20)
    torch.save(data, path)
    with pytest.raises(CheckpointError, match="has more elements than are stored"):
        load_checkpoint(path)
