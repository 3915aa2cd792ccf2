"""``PreTrainedModel`` for converted models, with ``forward`` and ``generate()`` on the recurrent state.

The class wraps a :class:`tnnlm.models.causal_lm.CausalLM` and calls its ``read`` and ``step``. This module
adds only what Transformers needs around them: attention masks, caches, losses and saving.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tnnlm.checkpoints.converted import model_fingerprint
from tnnlm.checkpoints.manifest import REMEDY, verify_folder, warn_edited, write_checksums
from tnnlm.checkpoints.weights import check_finite
from tnnlm.errors import CheckpointError
from tnnlm.hf.cache import RecurrentCache, StateLayer, state_layer
from tnnlm.hf.config import TnnlmConfig, refuse_adapter
from tnnlm.hf.generation import RecurrentGenerationMixin
from tnnlm.inference.generator import PREFILL_CHUNK
from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.models.vocabulary import mask_missing
from tnnlm.reading import read_json

# Transformers replaces torch.linspace while it builds a model. PyTorch records at the first use of a device
# context, once and for all, which functions the context affects. If this were during the replacement,
# linspace would be missing for the rest of the process.
with torch.device("meta"):
    torch.empty(0)


class TnnlmForCausalLM(RecurrentGenerationMixin, PreTrainedModel):
    """Converted causal language model with constant time and memory per token, and no context limit.

    The model is for inference only: recurrences are converted, not trained, and ``forward`` builds no
    autograd graph. Poles are float64; residues, windows and states are at least float32, whatever ``dtype``
    the weights have.
    """

    config_class = TnnlmConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    # The model must be on one device: hooks that move inputs run before ``forward``, but not before ``step``.
    _no_split_modules = ("CausalLM",)

    def __init__(self, config: TnnlmConfig) -> None:
        super().__init__(config)
        self.model = CausalLM(config.sizes(), config.convs())
        self.post_init()
        self.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute logits of new tokens, from an initial state or from ``past_key_values``.

        Args:
            input_ids: Token ids (B, L), new tokens only. With a cache, L may be 0: the logits are then those
                of the last token that the cache has processed, (B, 1, V).
            attention_mask: Mask (B, L) or (B, past + L), 0 at padding in any position. Padding does not
                change the state, and its logits are those of the last token before it.
            past_key_values: Cache with the state to continue from, or an empty cache of any class. It is
                updated with the state after these tokens if ``use_cache``.
            labels: Token ids (B, L), -100 where ignored, for the next-token loss.
            use_cache: Whether to return the state; None takes ``config.use_cache``, which defaults to True.
            logits_to_keep: Number of last positions to compute logits for (0: all), or a tensor of positions.
            inputs_embeds: Not supported.
            output_hidden_states: Not supported.
            output_attentions: Not supported.
            return_dict: Whether to return an output object (None or True) or a tuple (False).
            loss_options: Further arguments of the loss function, such as ``num_items_in_batch``.

        Returns:
            Output with ``loss`` if labels are given, ``logits`` (B, K, V) and ``past_key_values``. Logits of
            ids that the tokenizer does not have are -inf.

        Raises:
            ValueError: If an unsupported argument is given, or a shape does not fit.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("input_ids: required, and inputs_embeds is not supported; pass input_ids alone")
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids: expected ids of shape (B, L), not {_described(input_ids)}")
        if output_hidden_states or output_attentions:
            raise ValueError("output_hidden_states, output_attentions: not supported; omit them")
        cache = past_key_values if past_key_values is not None else RecurrentCache()
        layer = state_layer(cache)
        # A converted model is not trained, and without gradients the convolutions take their fast path.
        with torch.no_grad():
            features, state, last = self._read(input_ids, attention_mask, layer, logits_to_keep)
            logits = mask_missing(self.model.logits(features), self.config.missing_ids or ())
        keep = self.config.use_cache if use_cache is None else use_cache
        if keep:
            layer.put(state, last, input_ids.shape[1])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **loss_options)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if keep else None)
        return out.to_tuple() if return_dict is False else out

    def train(self, mode: bool = True) -> TnnlmForCausalLM:
        """Keep the model in eval mode, because a converted model can't be trained.

        Raises:
            ValueError: If ``mode`` is True.
        """
        if mode:
            raise ValueError(
                "train(): a converted model can't be trained; train with train.py, then convert again"
            )
        super().train(False)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding, whose weights are also those of the head."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding and thereby the weights of the head."""
        self.model.embedding = value
        self.model.config = replace(self.model.config, vocab_size=value.num_embeddings)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *rest: Any,
        **options: Any,
    ) -> nn.Embedding:
        """Resize the embedding to the ids that the tokenizer has now, and mask rows that only pad it."""
        before = self.model.config.vocab_size
        embedding: nn.Embedding = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, *rest, **options
        )
        rows = self.model.config.vocab_size
        if rows != before:
            missing = self.config.missing_ids or []
            self.config.missing_ids = _missing_ids(missing, before, new_num_tokens, rows)
            chosen = [id for id in self.generation_config.suppress_tokens or () if id not in missing]
            self.generation_config.suppress_tokens = [*chosen, *self.config.missing_ids] or None
        return embedding

    def get_output_embeddings(self) -> None:
        """Return None, because the head uses the weights of the embedding."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder for Transformers and, once the tokenizer is saved there too, ``load_converted``."""
        self.config.model_sha256 = model_fingerprint(self.model)
        super().save_pretrained(save_directory, **options)
        write_checksums(Path(save_directory))

    @classmethod
    def from_pretrained(cls, name: Any, *rest: Any, **options: Any) -> TnnlmForCausalLM:
        """Load a model after the checksums of a local folder are verified.

        Raises:
            CheckpointError: If a file of the folder is damaged or was replaced, it holds an adapter, or a
                weight is not finite. Weights from elsewhere are compared with the SHA-256 in config.json,
                unless they are to be loaded in another dtype.
        """
        folder, verified = Path(name or "", options.get("subfolder") or ""), False
        if name is not None and folder.is_dir():
            refuse_adapter(folder)
            verified = verify_folder(folder, read_json(folder / "config.json", REMEDY))
            warn_edited(folder)
        found: Any = super().from_pretrained(name, *rest, **options)
        model = found[0] if isinstance(found, tuple) else found  # with output_loading_info
        values = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
        check_finite(values, folder)
        if not verified and _as_stored(options) and len(values) == len(model.state_dict()):
            _check_fingerprint(model, folder)
        made: TnnlmForCausalLM = found
        return made

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing, because Transformers would copy this module into every saved folder."""

    @cached_property
    def _state_shapes(self) -> list[torch.Size]:
        return [part.shape[1:] for part in self.model.init_state(0).tensors]

    def _state(self, cache: StateLayer, rows: int) -> tuple[ModelState, Tensor]:
        """Return the state to continue from, and the hidden states (B, D) of the last tokens."""
        if cache.state is None or cache.last is None:
            weight = self.model.embedding.weight
            return self.model.init_state(rows), weight.new_zeros(rows, weight.shape[1])
        if [part.shape[1:] for part in cache.state.tensors] != self._state_shapes:
            raise ValueError("past_key_values: holds the state of another model; omit it")
        if len(cache.last) != rows:
            raise ValueError(
                f"past_key_values: has {len(cache.last)} rows, but the input has {rows}; repeat its rows "
                "with batch_repeat_interleave, or omit it"
            )
        return cache.state, cache.last

    def _read(
        self, tokens: Tensor, mask: Tensor | None, cache: StateLayer, keep: int | Tensor
    ) -> tuple[Tensor, ModelState, Tensor]:
        """Return hidden states (B, K, D) at positions to keep, the state, and those (B, D) at the end."""
        rows, length = tokens.shape
        state, last = self._state(cache, rows)
        new = _new_mask(mask, tokens, cache.positions)
        if length == 0:
            if cache.state is None:
                raise ValueError("input_ids: is empty; give at least one token")
            return last[:, None], state, last
        try:
            if length == 1:
                active = None if new is None else new[:, 0]
                x, state = self.model.advance(tokens[:, 0], state, active)
                last = x if active is None else torch.where(active[:, None], x, last)
                return last[:, None], state, last
            return self._read_chunks(tokens, new, state, last, keep)
        except IndexError as error:
            rows = self.model.embedding.num_embeddings
            raise ValueError(f"input_ids, logits_to_keep: {error}; ids are from 0 to {rows - 1}") from None

    def _read_chunks(
        self, tokens: Tensor, new: Tensor | None, state: ModelState, last: Tensor, keep: int | Tensor
    ) -> tuple[Tensor, ModelState, Tensor]:
        length = tokens.shape[1]
        # Number of the row's tokens up to each position; 0 before the first one.
        count = torch.arange(1, length + 1, device=tokens.device).expand_as(tokens)
        lengths = None
        if new is not None:
            # Move padding to the end of every row, whichever side it was on; the order of tokens is kept.
            tokens = tokens.gather(1, (~new).long().argsort(dim=1, stable=True))
            count, lengths = new.cumsum(1), new.sum(1)
        kept = count[:, -keep:] if isinstance(keep, int) else count[:, keep]
        index = torch.cat((kept, count[:, -1:]), dim=1)
        lowest = int(index.masked_fill(index == 0, length).min()) - 1
        first, parts = lowest // PREFILL_CHUNK * PREFILL_CHUNK, []
        for start in range(0, length, PREFILL_CHUNK):
            part = tokens[:, start : start + PREFILL_CHUNK]
            own = None if lengths is None else (lengths - start).clamp(0, part.shape[1])
            x, state = self.model.read(part, state, own)
            if start >= first:
                parts.append(x)
        x = torch.cat(parts, dim=1)
        x = x.gather(1, (index - 1 - first).clamp(min=0)[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.where((index > 0)[:, :, None], x, last[:, None])
        return x[:, :-1], state, x[:, -1]


def _as_stored(options: dict[str, Any]) -> bool:
    """Return whether options of ``from_pretrained`` leave all weights unchanged."""
    dtypes = (options.get("dtype"), options.get("torch_dtype"))
    return set(dtypes) <= {None, "auto"} and options.get("quantization_config") is None


def _check_fingerprint(model: TnnlmForCausalLM, where: Path) -> None:
    """Compare loaded weights with the SHA-256 in config.json, if it has one.

    Raises:
        CheckpointError: If they differ.
    """
    stated = model.config.model_sha256
    if stated is not None and model_fingerprint(model.model) != stated:
        raise CheckpointError(
            f"{where}: the weights are damaged or were replaced (config.json states another hash)", REMEDY
        )


def _missing_ids(missing: list[int], before: int, tokens: int | None, rows: int) -> list[int]:
    """Return the ids without a token after a resize from ``before`` rows to ``rows``.

    Args:
        missing: Ids without a token before.
        before: Number of rows before.
        tokens: Number of ids that the tokenizer has now; None means as many as before.
        rows: Number of rows, which may be more than ``tokens``.
    """
    if tokens is None:
        return [id for id in (*missing, *range(before, rows)) if id < rows]
    padding = before
    while padding - 1 in missing:
        padding -= 1
    gaps = [id for id in missing if id < min(padding, tokens)]
    return [*gaps, *range(tokens, rows)]


def _described(tokens: Tensor) -> str:
    return f"{tokens.dtype} of shape {tuple(tokens.shape)}".removeprefix("torch.")


def _new_mask(mask: Tensor | None, tokens: Tensor, past: int) -> Tensor | None:
    """Return the mask (B, L) of the new tokens as booleans, or None if none of them is padding."""
    if mask is None:
        return None
    rows, length = tokens.shape
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] not in (length, past + length):
        with_past = f" or ({rows}, {past + length})" if past else ""
        raise ValueError(
            f"attention_mask: expected shape ({rows}, {length}){with_past}, not {tuple(mask.shape)}; it "
            "covers the new tokens, or the tokens in past_key_values and the new ones"
        )
    new = mask[:, mask.shape[1] - length :].bool()
    return None if bool(new.all()) else new
