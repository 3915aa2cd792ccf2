"""Cache that holds the recurrent state of a converted model, passed as ``past_key_values``.

A cache of Transformers is a list of layers. Here it has one layer, which holds the state of the whole model.
An empty cache of another class, such as ``DynamicCache()``, is given this layer at its first use.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from tnnlm.models.causal_lm import ModelState


class StateLayer(CacheLayerMixin):
    """Recurrent state of constant size, with the number of positions that were processed.

    State tensors are never changed in place, so that a shallow copy is a fork. A state can't be cropped,
    because tokens can't be removed from it.
    """

    is_compileable = False
    """Transformers must not compile the decoding step with this cache."""
    supports_early_init = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Reset to the initial state."""
        self.state: ModelState | None = None
        self.last: Tensor | None = None
        """Hidden state (B, D) of the last token of every row, from which its logits can be computed again."""
        self.positions = 0

    def put(self, state: ModelState, last: Tensor, positions: int) -> None:
        """Store the state after ``positions`` further positions."""
        self.state, self.last = state, last
        self.positions += positions

    def get_seq_length(self) -> int:
        """Return the number of processed positions, with padding; ``generate()`` skips them in its input."""
        return self.positions

    def get_max_length(self) -> int:
        """Return -1, because the number of positions is not limited."""
        return -1

    # The name in early versions of Transformers 5.
    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of positions after ``query_length`` further ones, and their offset, 0."""
        return self.positions + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select and reorder rows for beam search, by index (R,)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows by index (R,); a row may be selected several times."""
        if self.state is not None and self.last is not None:
            rows = indices.to(self.last.device)
            self.state, self.last = self.state.select(rows), self.last.index_select(0, rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times; copies of a row are adjacent."""
        if self.last is not None:
            self.batch_select_indices(torch.arange(len(self.last)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Accept 0, as Transformers calls it, and nothing else.

        Raises:
            ValueError: If tokens are to be removed, which a recurrent state does not allow.
        """
        if tokens_to_remove != 0:
            raise ValueError(
                "past_key_values: a recurrent state can't be cropped; copy the cache before the tokens that "
                "may be removed, or process the shorter text again"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Refuse keys and values like :meth:`update`."""
        self.update(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> NoReturn:
        """Refuse the keys and values of another model.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "past_key_values: holds the state of a recurrent model, not keys and values; omit it, or pass a "
            "cache of this model"
        )


class RecurrentCache(Cache):
    """Cache of a converted model, whose size is constant; ``copy.copy`` forks it at no cost.

    ``forward`` replaces the state in the cache, as it does in the caches of Transformers.
    """

    def __init__(self) -> None:
        super().__init__(layers=[StateLayer()])

    def __copy__(self) -> RecurrentCache:
        fork = RecurrentCache()
        fork.layers = [copy.copy(layer) for layer in self.layers]
        return fork

    @property
    def state(self) -> ModelState | None:
        """Current state, or None if nothing was processed yet."""
        state: ModelState | None = self.layers[0].state
        return state


def state_layer(cache: Any) -> StateLayer:
    """Return the layer with the state of a cache; an empty cache of another class is given one.

    Raises:
        ValueError: If ``cache`` is not a cache, or holds the keys and values of another model.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise ValueError(
            f"past_key_values: has type {type(cache).__name__}, which can't hold a recurrent state; omit it, "
            "or pass the cache that this model returned"
        )
    if len(cache.layers) == 1 and isinstance(cache.layers[0], StateLayer):
        return cache.layers[0]
    if any(not isinstance(layer, CacheLayerMixin) or layer.get_seq_length() > 0 for layer in cache.layers):
        raise ValueError(
            f"past_key_values: is the {type(cache).__name__} of another model; omit it, or pass the cache "
            "that this model returned"
        )
    # In place: a caller that passes one cache for several turns finds the state in it, as with other models.
    cache.layers[:] = [StateLayer()]
    layer: StateLayer = cache.layers[0]
    return layer
