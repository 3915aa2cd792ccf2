"""Saved states: generation continues exactly, and other models are refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.models import FAMILIES, tiny_config
from tests.support.training_runs import tiny_run
from tnnlm.checkpoints.converted import model_fingerprint
from tnnlm.conversion import convert_model
from tnnlm.errors import CheckpointError
from tnnlm.inference.engine import EngineInfo
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.sampling import SamplingParams
from tnnlm.inference.session import GenerationSession
from tnnlm.inference.state_file import FORMER, load_state, save_state
from tnnlm.models.causal_lm import CausalLM
from tnnlm.tokenizer import train_bpe
from tnnlm.training.run import train

HOT = SamplingParams(temperature=1.5)


def writer_of(method: str, text: str = "the cat sat on the mat") -> TextGenerator:
    torch.manual_seed(0)
    kernel = FAMILIES[{"companion": "rtf", "multirate": "sgconv"}.get(method, "tno")]()
    model = convert_model(CausalLM(tiny_config(kernel=kernel)).eval(), method=method)
    tokenizer = train_bpe([text], 300, "<|endoftext|>", 1, False)
    return TextGenerator(model, tokenizer, model_fingerprint(model))


@pytest.mark.parametrize("method", ["balanced", "window", "companion", "multirate"])
def test_continuing_from_a_file_equals_an_unbroken_run(method: str) -> None:
    writer, random = writer_of(method), torch.Generator().manual_seed(3)
    first, pieces = writer.stream(writer.prefill(["the cat"]), 10, HOT, random)
    list(pieces)
    save_state(Path("a.state"), writer, first.state, random)
    expected, pieces = writer.stream(first.state, 10, HOT, random)
    list(pieces)
    state, stream = load_state(Path("a.state"), writer_of(method))
    assert state.n_tokens == first.state.n_tokens
    assert stream is not None
    other = torch.Generator().manual_seed(99)
    other.set_state(stream)
    found, pieces = writer.stream(state, 10, HOT, other)
    list(pieces)
    assert found.tokens == expected.tokens
    assert torch.equal(found.state.logits, expected.state.logits)


def test_several_rows_are_kept_and_the_stream_is_optional() -> None:
    writer = writer_of("balanced")
    state = writer.prefill(["the", "cat sat"])
    save_state(Path("b.state"), writer, state)
    found, stream = load_state(Path("b.state"), writer)
    assert stream is None
    assert found.lengths == state.lengths
    assert torch.equal(found.logits, state.logits)
    assert not list(Path().glob("*.tmp"))


def test_another_model_or_tokenizer_or_file_is_refused() -> None:
    writer = writer_of("balanced")
    save_state(Path("a.state"), writer, writer.prefill(["the"]))
    with pytest.raises(CheckpointError, match="another model"):
        load_state(Path("a.state"), writer_of("window"))
    other = writer_of("balanced", "quite other words for a tokenizer")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        load_state(Path("a.state"), other)
    with pytest.raises(CheckpointError, match="no such file"):
        load_state(Path("none.state"), writer)
    data = Path("a.state").read_bytes()
    for damaged in (data[:-7], b"", b"text"):
        Path("bad.state").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"bad\.state: is not a saved state"):
            load_state(Path("bad.state"), writer)


def changed_file(path: Path, change: str) -> None:
    """Rewrite a state file with one fault."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), "kind": FORMER}  # without a checksum, which would tell of any fault
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
    first = "layers.0.window"
    if change == "missing":
        del tensors[first]
    elif change == "no logits":
        del tensors["logits"]
    elif change == "unknown":
        tensors["layers.99.window"] = torch.zeros(1)
    elif change == "shape":
        tensors[first] = torch.zeros(1, 2, 3)
    elif change == "dtype":
        tensors[first] = tensors[first].half()
    elif change == "rows":
        tensors["logits"] = tensors["logits"][:1]
    elif change == "integer logits":
        tensors["logits"] = tensors["logits"].long()
    elif change == "no lengths":
        del metadata["lengths"]
    else:
        metadata["lengths"] = change
    save_file(tensors, path, metadata)


DAMAGED = {
    "missing": "layers.0.window is missing",
    "no logits": "logits is missing",
    "unknown": "layers.99.window is no part",
    "shape": "layers.0.window is not of the shape",
    "dtype": "layers.0.window is not of the shape and dtype",
    "rows": "logits is not of the shape",
    "integer logits": "logits is not of a floating-point dtype",
    **dict.fromkeys(("[]", "{}", "[1.5, 2]", "[true, 2]", "[-1, 2]", "3"), "its lengths are not"),
    **dict.fromkeys(("no lengths", "[1", "[" * 100_000, "[1, 2, 3]"), ""),
}


def test_a_damaged_state_is_refused_in_one_line() -> None:
    writer = writer_of("balanced")
    state = writer.prefill(["the", "cat"])
    for change, message in DAMAGED.items():
        save_state(Path("a.state"), writer, state)
        changed_file(Path("a.state"), change)
        with pytest.raises(CheckpointError) as caught:
            load_state(Path("a.state"), writer)
        assert str(caught.value).startswith(f"a.state: is damaged ({message}"), change[:12]
        assert "\n" not in str(caught.value)


def test_a_state_of_another_recurrence_is_refused_without_fingerprints() -> None:
    writer, other = writer_of("balanced"), writer_of("window")
    writer.fingerprint = other.fingerprint = ""
    save_state(Path("a.state"), writer, writer.prefill(["the"]))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_state(Path("a.state"), other)


@pytest.mark.parametrize("random", [torch.zeros(16, dtype=torch.uint8), torch.zeros(5056)])
def test_random_numbers_of_another_device_need_a_seed(random: torch.Tensor) -> None:
    writer = writer_of("balanced")
    info = EngineInfo(name="eager", device="cpu", dtype="float32", linear="plain")
    session = GenerationSession(writer, HOT, 2, 0, info)
    save_state(Path("a.state"), writer, writer.prefill(["the"]), SimpleNamespace(get_state=lambda: random))
    with pytest.raises(CheckpointError, match=r"a\.state: its random number generator .*; give --seed"):
        session.load_state(Path("a.state"), reseed=False)
    session.load_state(Path("a.state"), reseed=True)


def test_fingerprint_follows_every_weight() -> None:
    model = writer_of("balanced").model
    assert isinstance(model, CausalLM)
    before = model_fingerprint(model)
    assert writer_of("balanced").fingerprint == before
    model.blocks[1].mixer.conv.poles[0, 0] += 1e-12
    assert model_fingerprint(model) != before


def test_generate_saves_continues_and_generates_batches(script: Any) -> None:
    train(tiny_run("name=tiny", "trainer.max_steps=4"), None)
    assert script("convert", "runs/tiny").code == 0
    whole = script("generate", "--prompt", "The text", "--seed", "1", "--max-new-tokens", "12", "--json")
    start = script(
        *("generate", "--prompt", "The text", "--seed", "1", "--max-new-tokens", "5"),
        *("--json", "--save-state", "t.state"),
    )
    rest = script("generate", "--load-state", "t.state", "--max-new-tokens", "7", "--json")
    assert rest.code == 0, rest.err
    texts = [json.loads(result.out)["text"] for result in (whole, start, rest)]
    assert texts[0] == texts[1] + texts[2]
    more = script(
        *("generate", "--load-state", "t.state", "--prompt", " and", "--temperature", "0"),
        *("--max-new-tokens", "3", "--save-state", "t.state"),
    )
    assert more.code == 0, more.err
    assert more.out.startswith(" and")
    Path("lines.txt").write_text("The first\n\nA second line of words\n")
    batch = script("generate", "--prompts", "lines.txt", "--max-new-tokens", "4", "--save-state", "two.state")
    assert batch.code == 0, batch.err
    assert batch.out.count("--- ") == 2
    lines = json.loads(script("generate", "--prompts", "lines.txt", "--json", "--temperature", "0").out)
    for sample in lines["samples"]:
        alone = script("generate", "--prompt", sample["prompt"], "--json", "--temperature", "0")
        assert json.loads(alone.out)["text"] == sample["text"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "none.txt"], "none.txt"),
        (["--prompts", "empty.txt"], "no prompt"),
        (["--prompts", "one.txt", "--prompt", "a"], "--prompts"),
        (["--prompt", "a", "--save-state", "x", "--num-samples", "2"], "--save-state"),
    ],
)
def test_incompatible_options_are_refused(script: Any, words: list[str], said: str) -> None:
    Path("empty.txt").write_text("\n \n")
    Path("one.txt").write_text("one\n")
    result = script("generate", *words)
    assert result.code == 2
    assert said in result.err
    assert result.err.count("\n") == 1


def test_an_empty_conversation_has_no_state_to_save(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny_run("name=tiny", "trainer.max_steps=2"), None)
    assert script("convert", "runs/tiny").code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    refused = script("generate", "--interactive", "--save-state", "s")
    assert refused.code == 2
    assert "there was no prompt" in refused.err
    assert not Path("s").exists()


def test_state_of_two_rows_needs_two_prompts(script: Any) -> None:
    train(tiny_run("name=tiny", "trainer.max_steps=2"), None)
    assert script("convert", "runs/tiny").code == 0
    Path("lines.txt").write_text("The first\nA second\n")
    assert (
        script("generate", "--prompts", "lines.txt", "--max-new-tokens", "2", "--save-state", "s").code == 0
    )
    assert (
        script("generate", "--prompts", "lines.txt", "--load-state", "s", "--max-new-tokens", "2").code == 0
    )
    refused = script("generate", "--prompt", "one", "--load-state", "s")
    assert refused.code == 2
    assert "2 rows" in refused.err
