"""Converted folders in Transformers: files, dtypes, and saving again."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.converted import measure_model
from tests.support.hf_folders import (
    CLOSE,
    HORIZON,
    TEXT,
    Opened,
    lively_model,
    make_tokenizer,
    open_folder,
    own_logits,
    some_tokens,
    write_folder,
)
from tnnlm.checkpoints.converted import load_converted, save_converted
from tnnlm.checkpoints.manifest import CODE
from tnnlm.conversion import convert_model
from tnnlm.errors import CheckpointError
from tnnlm.hf import TnnlmConfig, TnnlmForCausalLM
from tnnlm.kernels import TNOConfig
from tnnlm.models.causal_lm import CausalLM
from tnnlm.tokenizer import TextTokenizer


def test_tokenizer_gives_the_same_ids(balanced: Opened) -> None:
    own: TextTokenizer = balanced.own.tokenizer
    for text in (
        TEXT,
        "",
        " <|endoftext|> spelt out<|endoftext|>",
        "\n\n\t  caf\u00e9 \U0001f600",
        "'s . , n't",
    ):
        ids = balanced.tokenizer(text)["input_ids"]
        assert ids == own.encode(text)
        assert balanced.tokenizer.decode(ids) == own.decode(ids) == text
    ends = [*own.encode("The"), own.eos_id]
    assert balanced.tokenizer.decode(ends, skip_special_tokens=True) == own.decode(ends) == "The"
    assert balanced.tokenizer.eos_token_id == balanced.tokenizer.pad_token_id == own.eos_id
    assert balanced.tokenizer.bos_token_id is None
    assert set(balanced.tokenizer(TEXT)) == {"input_ids", "attention_mask"}


def test_config_has_the_attributes_that_other_libraries_read(balanced: Opened) -> None:
    config = balanced.model.config
    sizes = balanced.inner.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (300, 16, 2)
    assert config.sizes() == sizes
    assert not hasattr(config, "max_position_embeddings")
    assert balanced.model.num_parameters() == sum(p.numel() for p in balanced.inner.parameters())


def test_saved_folder_loads_in_transformers_and_in_tnnlm(opened: Opened, tmp_path: Path) -> None:
    opened.model.save_pretrained(tmp_path / "again")
    opened.tokenizer.save_pretrained(tmp_path / "again")
    again = open_folder(tmp_path / "again")
    tokens = some_tokens(2, 30)
    assert torch.equal(again.model(tokens).logits, opened.model(tokens).logits)
    assert torch.equal(again.inner(tokens), opened.inner(tokens))
    assert again.own.tokenizer.encode(TEXT) == opened.own.tokenizer.encode(TEXT)
    assert load_converted(tmp_path / "again").fingerprint == load_converted(opened.folder).fingerprint
    assert again.model.generation_config.suppress_tokens == opened.model.generation_config.suppress_tokens
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == {*CODE}


def test_folder_without_a_file_that_transformers_does_not_need_loads_with_a_warning(
    opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(opened.folder, tmp_path / "copy")
    (folder / "generation_config.json").unlink()
    (folder / "README.md").write_text("A model card of the user's.")
    TnnlmForCausalLM.from_pretrained(folder)
    assert any("generation_config.json: was changed" in line for line in caplog.messages)


def test_subfolder_is_verified(opened: Opened, tmp_path: Path) -> None:
    folder = shutil.copytree(opened.folder, tmp_path / "repository/inner")
    TnnlmForCausalLM.from_pretrained(folder.parent, subfolder="inner")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged"):
        TnnlmForCausalLM.from_pretrained(folder.parent, subfolder="inner")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["loaded", "cast"])
def test_recurrences_stay_precise(opened: Opened, dtype: torch.dtype, how: str, tmp_path: Path) -> None:
    if how == "loaded":
        model = open_folder(opened.folder, dtype=dtype).model
    else:
        model = copy.deepcopy(opened.model)
        model = model.half() if dtype == torch.float16 else model.to(dtype)
    assert model.dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    stored = dict(opened.inner.named_buffers())
    for name, buffer in model.model.named_buffers():
        assert torch.equal(buffer, stored[name])
        assert buffer.dtype == (torch.float64 if name.endswith("poles") else torch.float32)
    out = model(some_tokens(1, 9))
    assert out.logits.dtype == dtype
    parts = out.past_key_values.state.tensors
    assert {part.dtype for part in parts} == {torch.float32}
    model.save_pretrained(tmp_path / "rounded")
    assert json.loads((tmp_path / "rounded/config.json").read_text())["dtype"] == str(dtype).split(".")[1]


def test_float64_runs_in_float64(balanced: Opened) -> None:
    model = open_folder(balanced.folder, dtype=torch.float64).model
    tokens = some_tokens(1, 30)
    out = model(tokens)
    assert out.logits.dtype == torch.float64
    assert {part.dtype for part in out.past_key_values.state.tensors} == {torch.float64}
    torch.testing.assert_close(out.logits.float(), balanced.model(tokens).logits, **CLOSE)


def test_import_of_the_package_makes_the_architecture_known(balanced: Opened) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    import tnnlm.hf

    model = AutoModelForCausalLM.from_pretrained(balanced.folder)
    assert type(model) is tnnlm.hf.TnnlmForCausalLM
    assert type(AutoConfig.from_pretrained(balanced.folder)) is tnnlm.hf.TnnlmConfig
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert isinstance(fresh.model, CausalLM)
    assert torch.isfinite(fresh(some_tokens(1, 4)).logits[..., :290]).all()


def test_folder_without_the_files_of_transformers_still_loads(balanced: Opened, tmp_path: Path) -> None:
    """Folders that were written before Transformers was supported still load."""
    old = {"format", "model", "eos_token", "tokenizer_sha256", "model_sha256"}
    for name in ("tokenizer.json", "model.safetensors", "conversion.json"):
        (tmp_path / name).write_bytes((balanced.folder / name).read_bytes())
    config = json.loads((balanced.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in old}))
    tokens = some_tokens(1, 9)
    assert torch.equal(load_converted(tmp_path).model(tokens), balanced.inner(tokens))


def test_adapter_in_a_folder_is_refused(balanced: Opened, tmp_path: Path) -> None:
    """With PEFT, Transformers would load it and import the modules that it names."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "theirs"
    shutil.copytree(balanced.folder, folder)
    named = {"base_model_name_or_path": "elsewhere", "auto_mapping": {"parent_library": "evil"}}
    (folder / "adapter_config.json").write_text(json.dumps(named))
    for load in (AutoModelForCausalLM, TnnlmForCausalLM, TnnlmConfig):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json: a converted model has no adapter"):
            load.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="has no adapter"):
        TnnlmForCausalLM.from_pretrained(folder, config=balanced.model.config)


@pytest.mark.parametrize(
    ("family", "method", "window"),
    [("tno", "etsc", 40), ("rtf", "companion", 2048), ("tno", "auto", 4096)],
)
def test_context_length_of_evaluations_ends_where_the_conversion_is_exact(
    family: str, method: str, window: int, tmp_path: Path
) -> None:
    """Taps past the horizon of 40 lags limit the context length, unless the recurrence has them too."""
    changes = {}
    if window > 2048:  # the kernel decays within the horizon, and max_length exceeds the default of 2048
        changes = {"max_length": 4096, "kernel": TNOConfig(rpe_dim=8, rpe_layers=2, decay=0.5)}
    folder = write_folder(tmp_path / "out", family, method, **changes)
    assert json.loads((folder / "config.json").read_text())["n_ctx"] == window


def test_resized_embedding_is_saved_with_its_size(balanced: Opened, tmp_path: Path) -> None:
    model = open_folder(balanced.folder).model
    model.resize_token_embeddings(310)
    model.save_pretrained(tmp_path / "more")
    balanced.tokenizer.save_pretrained(tmp_path / "more")
    again = open_folder(tmp_path / "more")
    assert again.model.config.vocab_size == again.inner.config.vocab_size == 310
    assert again.model(some_tokens(1, 3)).logits.shape == (1, 3, 310)


def test_loading_leaves_device_contexts_unchanged(balanced: Opened) -> None:
    # A new process, in which the first device context is the one that Transformers enters.
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; "
        "A.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "with torch.device('meta'): print(torch.linspace(0, 1, 3).device)"
    )
    command = [sys.executable, "-c", code, str(balanced.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "meta"


def test_published_wiring_keeps_its_final_norm_and_scale(tmp_path: Path) -> None:
    model = lively_model(final_norm="layer", embed_scale=True)
    assert isinstance(model.norm, torch.nn.LayerNorm)
    torch.nn.init.normal_(model.norm.weight)
    torch.nn.init.normal_(model.norm.bias)
    converted = convert_model(model, method="window", horizon=HORIZON)
    report = measure_model(model, converted, method="window", horizon=HORIZON)
    save_converted(tmp_path / "c", converted, make_tokenizer(), report)
    opened, tokens = open_folder(tmp_path / "c"), some_tokens(2, 9)
    size = opened.own.tokenizer.size
    with torch.no_grad():
        expected = model(tokens)[..., :size]
        torch.testing.assert_close(opened.model(tokens).logits[..., :size], expected, **CLOSE)
        torch.testing.assert_close(own_logits(opened, tokens)[..., :size], expected, **CLOSE)
