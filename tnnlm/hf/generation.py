"""``generate()`` on a recurrent state: which cache it uses, and which part of the prompt is new.

Transformers slices a prompt by the length of its cache. With attention, a cache can be cropped, and a token
processed twice; neither is possible with a state, so the cases that need it are handled here.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from transformers import GenerationMixin

from tnnlm.hf.cache import RecurrentCache, state_layer


class RecurrentGenerationMixin(GenerationMixin):
    """``GenerationMixin`` for models whose cache is a recurrent state.

    Transformers recognises the class by the end of its name.
    """

    # Assisted decoding is not possible, because states can't be rolled back.
    _is_stateful = True

    def init_continuous_batching(self, *args: Any, **options: Any) -> NoReturn:
        """Refuse continuous batching, which is built on pages of keys and values.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "continuous batching (cache_implementation='paged', generate_batch) is not supported by a "
            "recurrent model; omit it, or batch requests with tnnlm serve"
        )

    def load_custom_generate(self, *args: Any, **options: Any) -> NoReturn:
        """Load no ``custom_generate/generate.py``, which ``from_pretrained`` would run from any folder.

        With ``trust_remote_code=True``, nothing but the module that convert.py wrote may run, and a converted
        model has no other code. ``from_pretrained`` continues after this error.

        Raises:
            OSError: Always.
        """
        raise OSError("custom_generate: a converted model has no decoding loop of this kind; omit it")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            if generation_config.use_cache is False:
                raise ValueError("use_cache=False: can't be combined with past_key_values; omit one of them")
            state_layer(cache)
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RecurrentCache()

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *rest: Any,
        **options: Any,
    ) -> Any:
        """Process the part of the prompt (B, L) that the cache has not processed, and return the output.

        Raises:
            ValueError: If the prompt is shorter than its cache, or is given as embeddings, or the mask fits
                neither the prompt nor the cache and the prompt together.
        """
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds: not supported by this model; pass input_ids alone")
        cache, length = model_kwargs.get("past_key_values"), input_ids.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        mask = model_kwargs.get("attention_mask")
        # generate() drops a mask without padding, but keeps its length.
        covered = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
        if covered not in (length, past + length):
            raise ValueError(
                f"attention_mask: covers {covered} tokens, but past_key_values holds {past} and input_ids "
                f"{length}; pass the cache that processed the text before input_ids, or the whole text"
            )
        if covered == length and past > length:
            raise ValueError(
                f"input_ids: has {length} tokens, but past_key_values has already processed {past}; pass the "
                "whole text, or new tokens with the attention_mask of the whole text, or omit past_key_values"
            )
        if covered == length and past == length:
            # Transformers would process the whole prompt a second time.
            return self(
                input_ids[:, :0], past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *rest, **options)
