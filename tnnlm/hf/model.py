"""A converted model as a ``PreTrainedModel``: ``forward`` and ``generate()`` on the recurrent state.

It holds a :class:`tnnlm.models.causal_lm.CausalLM` and calls its ``read`` and ``step``; all that is here is
what Transformers wants around them: masks, caches, losses, saving.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tnnlm.checkpoints.converted import model_fingerprint
from tnnlm.hf.cache import RecurrentCache
from tnnlm.hf.config import TnnlmConfig
from tnnlm.inference.generator import PREFILL_CHUNK
from tnnlm.models.causal_lm import CausalLM, ModelState

# Transformers replaces torch.linspace while it builds a model. PyTorch notes at the first use of a device
# context which functions it sends there, for good: used first inside that time, it would leave linspace out.
with torch.device("meta"):
    torch.empty(0)


class TnnlmForCausalLM(PreTrainedModel, GenerationMixin):
    """A converted language model: constant time and memory per token, any number of tokens.

    For inference: recurrences are converted, not trained, and ``forward`` builds no graph. Poles are
    float64, residues, windows and states float32 at least, whatever ``dtype`` the weights have.
    """

    config_class = TnnlmConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    # One device holds it all: hooks that move inputs stand before ``forward``, not ``step``.
    _no_split_modules = ("CausalLM",)
    # States can't be rolled back, so no assisted decoding.
    _is_stateful = True

    def __init__(self, config: TnnlmConfig) -> None:
        super().__init__(config)
        self.model = CausalLM(config.sizes(), config.convs())
        self.post_init()
        self.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Read tokens, from an empty state or on top of ``past_key_values``.

        Args:
            input_ids: (B, L), the new tokens alone.
            attention_mask: (B, L) or (B, past + L), 0 at pads, wherever they stand: a pad leaves the state
                as it is. Logits at a pad are those after the last token before it.
            past_key_values: goes on from there; filled with the state after these tokens if ``use_cache``.
            labels: (B, L) token ids or -100; the loss is of predicting each from those before.
            use_cache: return the state; default: the configuration's, which is True.
            logits_to_keep: only the last so many positions (0: all), or positions by index.
            inputs_embeds: refused.
            output_hidden_states, output_attentions: refused.
            return_dict: False returns a tuple.
            loss_options: for the loss, such as ``num_items_in_batch``.

        Returns:
            ``loss`` if labels were given, ``logits`` (B, K, V), ``past_key_values``.

        Raises:
            ValueError: for what is refused, and shapes that don't fit.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("this model reads token ids: give input_ids, not inputs_embeds")
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids is {tuple(input_ids.shape)}: expected rows of at least one token")
        if output_hidden_states or output_attentions:
            raise ValueError("this model returns logits and its state: no hidden_states, no attentions")
        cache = past_key_values if past_key_values is not None else RecurrentCache()
        # Converted, not trained: and without gradients convolutions take their fast path.
        with torch.no_grad():
            logits, state = self._read(input_ids, attention_mask, cache, logits_to_keep)
        keep = self.config.use_cache if use_cache is None else use_cache
        if keep:
            cache.put(state, input_ids.shape[1])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **loss_options)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if keep else None)
        return out.to_tuple() if return_dict is False else out

    def train(self, mode: bool = True) -> TnnlmForCausalLM:
        """Refuse to train.

        Raises:
            ValueError: if ``mode`` is True.
        """
        if mode:
            raise ValueError("a converted model can't be trained: train with train.py, and convert again")
        super().train(False)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, which is the head as well."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding, and so the head."""
        self.model.embedding = value

    def get_output_embeddings(self) -> None:
        """None: the head has no weights of its own."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder that Transformers and, with the tokenizer beside it, ``load_converted`` read."""
        self.config.model_sha256 = model_fingerprint(self.model)
        super().save_pretrained(save_directory, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: Transformers would copy this module into every folder that is saved."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RecurrentCache()

    def _read(
        self, tokens: Tensor, mask: Tensor | None, cache: RecurrentCache, keep: int | Tensor
    ) -> tuple[Tensor, ModelState]:
        """Logits (B, K, V) at the positions to keep, and the state after the last token of every row."""
        state = cache.take(self.model, len(tokens))
        new = _new_mask(mask, tokens)
        length = tokens.shape[1]
        if length == 1:
            active = None if new is None else new[:, 0]
            logits, state = self.model.step(tokens[:, 0], state, active)
            return logits[:, None], state
        index = torch.arange(length, device=tokens.device)
        index = (index[-keep:] if isinstance(keep, int) else index[keep]).expand(len(tokens), -1)
        lengths = None
        if new is not None:
            # Rows without their pads, in order: whatever side they were padded on, they end in pads now.
            tokens = tokens.gather(1, (~new).long().argsort(dim=1, stable=True))
            lengths = new.sum(1)
            index = (new.cumsum(1) - 1).clamp(min=0).gather(1, index)
        first, kept = int(index.min()) // PREFILL_CHUNK * PREFILL_CHUNK, []
        for start in range(0, length, PREFILL_CHUNK):
            part = tokens[:, start : start + PREFILL_CHUNK]
            own = None if lengths is None else (lengths - start).clamp(0, part.shape[1])
            x, state = self.model.read(part, state, own)
            if start >= first:
                kept.append(x)
        x = torch.cat(kept, dim=1)
        x = x.gather(1, (index - first)[:, :, None].expand(-1, -1, x.shape[2]))
        return self.model.logits(x), state


def _new_mask(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The mask (B, L) of the new tokens as booleans; None if there is no pad among them."""
    if mask is None:
        return None
    rows, length = tokens.shape
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < length:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}: expected ({rows}, {length}), or longer by what was "
            "read before"
        )
    new = mask[:, mask.shape[1] - length :].bool()
    return None if bool(new.all()) else new
