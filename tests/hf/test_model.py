"""A converted folder as a ``PreTrainedModel``: logits, masks, losses, dtypes, saving, refusals."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf.conftest import TEXT, Opened, open_folder, write_folder
from tnnlm.checkpoint import load_converted
from tnnlm.generation import PREFILL_CHUNK
from tnnlm.model import CausalLM
from tnnlm.tokenizer import TextTokenizer

CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@torch.no_grad()
def own_logits(opened: Opened, tokens: Tensor) -> Tensor:
    logits, _ = opened.inner.prefill(tokens, opened.inner.init_state(len(tokens)))
    return logits


def some_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(290, (rows, length), generator=torch.Generator().manual_seed(3))


def test_logits_are_the_own_models(opened: Opened) -> None:
    tokens = some_tokens(2, PREFILL_CHUNK)
    out = opened.model(tokens)
    assert torch.equal(out.logits, own_logits(opened, tokens))
    assert out.past_key_values.get_seq_length() == PREFILL_CHUNK
    assert not out.logits.requires_grad


def test_long_input_goes_in_chunks(balanced: Opened) -> None:
    tokens = some_tokens(2, 2 * PREFILL_CHUNK + 70)
    logits = balanced.model(tokens).logits
    torch.testing.assert_close(logits, own_logits(balanced, tokens), **CLOSE)
    last = balanced.model(tokens, logits_to_keep=1).logits
    torch.testing.assert_close(last, logits[:, -1:], **CLOSE)
    chosen = torch.tensor([3, 600, 1000])
    found = balanced.model(tokens, logits_to_keep=chosen).logits
    torch.testing.assert_close(found, logits[:, chosen], **CLOSE)


def test_past_passed_back_gives_the_same_logits(opened: Opened) -> None:
    tokens = some_tokens(2, 40)
    expected = own_logits(opened, tokens)
    past, start = None, 0
    # One token and several, in any order: what counts is the length of the input, not of the past.
    for length in (1, 7, 1, 1, 20, 10):
        out = opened.model(tokens[:, start : start + length], past_key_values=past)
        torch.testing.assert_close(out.logits, expected[:, start : start + length], **CLOSE)
        past, start = out.past_key_values, start + length
    assert past.get_seq_length() == 40


def test_use_cache_false_leaves_the_past_alone(balanced: Opened) -> None:
    tokens = some_tokens(1, 20)
    past = balanced.model(tokens[:, :10]).past_key_values
    first = balanced.model(tokens[:, 10:], past_key_values=past, use_cache=False)
    assert first.past_key_values is None
    assert past.get_seq_length() == 10
    assert torch.equal(balanced.model(tokens[:, 10:], past_key_values=past).logits, first.logits)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_pads_leave_the_state_as_it_is(opened: Opened, side: str) -> None:
    lengths, width = (1, 5, 12, 8), 12
    mask = torch.zeros(4, width, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    for row, length in enumerate(lengths):
        places = {
            "left": torch.arange(width - length, width),
            "right": torch.arange(length),
            "holes": torch.randperm(width, generator=generator)[:length].sort().values,
        }[side]
        mask[row, places] = 1
    tokens, more = some_tokens(4, width), some_tokens(4, 6)
    out = opened.model(tokens, attention_mask=mask)
    followed = opened.model(more, past_key_values=out.past_key_values)
    for row in range(4):
        alone = tokens[row : row + 1, mask[row].bool()]
        expected = own_logits(opened, torch.cat((alone, more[row : row + 1]), dim=1))[0]
        torch.testing.assert_close(
            out.logits[row, mask[row].bool()], expected[: alone.shape[1]], rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(followed.logits[row], expected[alone.shape[1] :], rtol=1e-3, atol=1e-3)
    # Pads at the end: the logits there are those of the last token.
    if side == "right":
        torch.testing.assert_close(out.logits[1, -1], out.logits[1, 4], rtol=0, atol=0)


def test_single_pad_is_an_identity(opened: Opened) -> None:
    tokens = some_tokens(2, 9)
    past = opened.model(tokens[:, :4]).past_key_values
    opened.model(tokens[:, 4:5], past_key_values=past, attention_mask=torch.tensor([[1], [0]]))
    logits = opened.model(tokens[:, 5:], past_key_values=past).logits
    torch.testing.assert_close(logits[0], own_logits(opened, tokens[:1])[0, 5:], **CLOSE)
    without = torch.cat((tokens[1:, :4], tokens[1:, 5:]), dim=1)
    torch.testing.assert_close(logits[1], own_logits(opened, without)[0, 4:], **CLOSE)


def test_labels_give_the_mean_of_those_that_count(balanced: Opened) -> None:
    tokens = some_tokens(3, 20)
    labels = tokens.clone()
    labels[0, :7] = -100
    losses = torch.nn.functional.cross_entropy(
        own_logits(balanced, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    counted = (labels[:, 1:] != -100).flatten()
    out = balanced.model(tokens, labels=labels)
    assert float(out.loss) == pytest.approx(float(losses[counted].mean()), rel=1e-5)
    as_tuple = balanced.model(tokens, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], out.loss)
    assert torch.equal(as_tuple[1], out.logits)


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


def test_config_has_the_names_that_others_look_for(balanced: Opened) -> None:
    config = balanced.model.config
    sizes = balanced.inner.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (300, 16, 2)
    assert config.sizes() == sizes
    assert not hasattr(config, "max_position_embeddings")
    assert balanced.model.num_parameters() == sum(p.numel() for p in balanced.inner.parameters())


def test_saved_again_serves_both(opened: Opened, tmp_path: Path) -> None:
    opened.model.save_pretrained(tmp_path / "again")
    opened.tokenizer.save_pretrained(tmp_path / "again")
    again = open_folder(tmp_path / "again")
    tokens = some_tokens(2, 30)
    assert torch.equal(again.model(tokens).logits, opened.model(tokens).logits)
    assert torch.equal(again.inner(tokens), opened.inner(tokens))
    assert again.own.tokenizer.encode(TEXT) == opened.own.tokenizer.encode(TEXT)
    assert load_converted(tmp_path / "again").fingerprint == load_converted(opened.folder).fingerprint
    assert again.model.generation_config.suppress_tokens == opened.model.generation_config.suppress_tokens
    # The model's code isn't copied: one small file points to the package.
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == {"modeling_tnnlm.py"}


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
    parts = [part for layer in out.past_key_values.state.layers for part in layer]
    assert {part.dtype for part in parts} == {torch.float32}
    model.save_pretrained(tmp_path / "rounded")
    assert json.loads((tmp_path / "rounded/config.json").read_text())["dtype"] == str(dtype).split(".")[1]


def test_float64_runs_in_float64(balanced: Opened) -> None:
    model = open_folder(balanced.folder, dtype=torch.float64).model
    tokens = some_tokens(1, 30)
    out = model(tokens)
    assert out.logits.dtype == torch.float64
    assert {part.dtype for layer in out.past_key_values.state.layers for part in layer} == {torch.float64}
    torch.testing.assert_close(out.logits.float(), balanced.model(tokens).logits, **CLOSE)


def test_copies_and_pickles(balanced: Opened) -> None:
    tokens = some_tokens(1, 12)
    expected = balanced.model(tokens)
    for model in (copy.deepcopy(balanced.model), pickle.loads(pickle.dumps(balanced.model))):
        assert torch.equal(model(tokens).logits, expected.logits)
    past = pickle.loads(pickle.dumps(expected.past_key_values))
    after = balanced.model(tokens, past_key_values=past).logits
    assert torch.equal(after, balanced.model(tokens, past_key_values=expected.past_key_values).logits)


def test_cache_repeats_selects_and_resets_its_rows(opened: Opened) -> None:
    tokens, more = some_tokens(2, 8), some_tokens(6, 5)
    cache = opened.model(tokens).past_key_values
    cache.batch_repeat_interleave(3)
    fork = copy.copy(cache)
    repeated = opened.model(more, past_key_values=cache).logits
    whole = torch.cat((tokens.repeat_interleave(3, 0), more), dim=1)
    torch.testing.assert_close(repeated, own_logits(opened, whole)[:, 8:], **CLOSE)
    order = torch.tensor([5, 0, 0])
    fork.reorder_cache(order)
    assert fork.get_seq_length() == 8
    picked = opened.model(more[:3], past_key_values=fork).logits
    whole = torch.cat((tokens.repeat_interleave(3, 0)[order], more[:3]), dim=1)
    torch.testing.assert_close(picked, own_logits(opened, whole)[:, 8:], **CLOSE)
    with pytest.raises(ValueError, match="is of 3 rows, the input of 6"):
        opened.model(more, past_key_values=fork)
    with pytest.raises(ValueError, match="cropped"):
        fork.crop(1)
    fork.reset()
    assert torch.equal(opened.model(more, past_key_values=fork).logits, opened.model(more).logits)


def test_what_it_is_not_made_for_is_refused(balanced: Opened) -> None:
    tokens = some_tokens(2, 5)
    with pytest.raises(ValueError, match="can't be trained"):
        balanced.model.train()
    assert not balanced.model.training
    assert not balanced.model(tokens, labels=tokens).loss.requires_grad
    with pytest.raises(ValueError, match="give input_ids"):
        balanced.model(inputs_embeds=torch.zeros(2, 5, 16))
    with pytest.raises(ValueError, match="no hidden_states"):
        balanced.model(tokens, output_hidden_states=True)
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 4\)"):
        balanced.model(tokens, attention_mask=torch.ones(2, 4))


def test_import_of_the_package_makes_the_architecture_known(balanced: Opened) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    import tnnlm.hf

    model = AutoModelForCausalLM.from_pretrained(balanced.folder)
    assert type(model) is tnnlm.hf.TnnlmForCausalLM
    assert type(AutoConfig.from_pretrained(balanced.folder)) is tnnlm.hf.TnnlmConfig
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert isinstance(fresh.model, CausalLM)
    assert torch.isfinite(fresh(some_tokens(1, 4)).logits).all()


def test_folder_without_the_files_of_transformers_still_loads(balanced: Opened, tmp_path: Path) -> None:
    """As one written before there were any."""
    old = {"format", "model", "eos_token", "tokenizer_sha256", "model_sha256"}
    for name in ("tokenizer.json", "model.safetensors", "conversion.json"):
        (tmp_path / name).write_bytes((balanced.folder / name).read_bytes())
    config = json.loads((balanced.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in old}))
    tokens = some_tokens(1, 9)
    assert torch.equal(load_converted(tmp_path).model(tokens), balanced.inner(tokens))


@pytest.mark.parametrize(
    ("family", "method", "window"),
    [("tno", "etsc", 40), ("rtf", "companion", 2048), ("tno", "auto", 4096)],
)
def test_evaluations_read_no_further_than_a_conversion_is_right(
    family: str, method: str, window: int, tmp_path: Path
) -> None:
    """The kernel's rest past the horizon of 40 lags counts, unless the recurrence has it as well."""
    changes = {}
    if window > 2048:  # dies out within the horizon, and was trained on longer rows than the default
        from tnnlm.config import TNOConfig

        changes = {"max_length": 4096, "kernel": TNOConfig(rpe_dim=8, rpe_layers=2, decay=0.5)}
    folder = write_folder(tmp_path / "out", family, method, **changes)
    assert json.loads((folder / "config.json").read_text())["n_ctx"] == window
