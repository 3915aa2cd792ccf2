"""``PreTrainedModel`` for converted models, with ``forward`` and ``generate()`` on the recurrent state.

The class wraps a :class:`tnnlm.models.causal_lm.CausalLM` and calls its ``read`` and ``step``. This module
adds only what Transformers needs around them: attention masks, caches, losses and saving.
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

# Transformers replaces torch.linspace while it builds a model. PyTorch records at the first use of a device
# context, once and for all, which functions the context affects. If this were during the replacement,
# linspace would be missing for the rest of the process.
with torch.device("meta"):
    torch.empty(0)


class TnnlmForCausalLM(PreTrainedModel, GenerationMixin):
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
    # Assisted decoding is not possible, because states can't be rolled back.
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
        """Compute logits of new tokens, from an initial state or from ``past_key_values``.

        Args:
            input_ids: Token ids (B, L), new tokens only.
            attention_mask: Mask (B, L) or (B, past + L), 0 at padding in any position. Padding does not
                change the state, and its logits are those of the last token before it.
            past_key_values: Cache with the state to continue from. It is updated with the state after these
                tokens if ``use_cache``.
            labels: Token ids (B, L), -100 where ignored, for the next-token loss.
            use_cache: Whether to return the state; None takes ``config.use_cache``, which defaults to True.
            logits_to_keep: Number of last positions to compute logits for (0: all), or a tensor of positions.
            inputs_embeds: Not supported.
            output_hidden_states: Not supported.
            output_attentions: Not supported.
            return_dict: Whether to return an output object (None or True) or a tuple (False).
            loss_options: Further arguments of the loss function, such as ``num_items_in_batch``.

        Returns:
            Output with ``loss`` if labels are given, ``logits`` (B, K, V) and ``past_key_values``.

        Raises:
            ValueError: If an unsupported argument is given, or a shape does not fit.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("input_ids: required, and inputs_embeds is not supported; pass input_ids alone")
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids: expected shape (B, L) with L >= 1, not {tuple(input_ids.shape)}")
        if output_hidden_states or output_attentions:
            raise ValueError(
                "output_hidden_states, output_attentions: not supported by this model; omit them"
            )
        cache = past_key_values if past_key_values is not None else RecurrentCache()
        # A converted model is not trained, and without gradients the convolutions take their fast path.
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

    def get_output_embeddings(self) -> None:
        """Return None, because the head uses the weights of the embedding."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder for Transformers and, once the tokenizer is saved there too, ``load_converted``."""
        self.config.model_sha256 = model_fingerprint(self.model)
        super().save_pretrained(save_directory, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing, because Transformers would copy this module into every saved folder."""

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
        """Return logits (B, K, V) at positions to keep, and the state after the last token of every row."""
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
            # Move padding to the end of every row, whichever side it was on; the order of tokens is kept.
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
    """Return the mask (B, L) of the new tokens as booleans, or None if none of them is padding."""
    if mask is None:
        return None
    rows, length = tokens.shape
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < length:
        raise ValueError(
            f"attention_mask: expected shape ({rows}, {length}), or longer by the tokens in past_key_values, "
            f"not {tuple(mask.shape)}"
        )
    new = mask[:, mask.shape[1] - length :].bool()
    return None if bool(new.all()) else new
