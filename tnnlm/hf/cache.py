"""Cache that holds the recurrent state of a converted model, passed as ``past_key_values``."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from tnnlm.models.causal_lm import CausalLM, ModelState


class RecurrentCache:
    """Recurrent state of constant size, with the number of positions that were processed.

    ``forward`` replaces the state in the cache, as it does in the caches of Transformers. State tensors are
    never changed in place, so ``copy.copy`` is enough to fork a cache. A state can't be cropped, because
    tokens can't be removed from it.
    """

    is_compileable = False
    """Transformers must not compile the decoding step with this cache."""

    def __init__(self) -> None:
        self.state: ModelState | None = None
        self._positions = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of processed positions, with padding; ``generate()`` skips them in its input."""
        return self._positions

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return -1, because the number of positions is not limited."""
        return -1

    def take(self, model: CausalLM, batch_size: int) -> ModelState:
        """Return the current state, or an initial state if nothing was processed yet.

        Raises:
            ValueError: If the state has another number of rows than ``batch_size``.
        """
        if self.state is None:
            return model.init_state(batch_size)
        rows = self.state.layers[0][0].shape[0] if self.state.layers else batch_size
        if rows != batch_size:
            raise ValueError(f"past_key_values: has {rows} rows, but the input has {batch_size}")
        return self.state

    def put(self, state: ModelState, positions: int) -> None:
        """Store the state after ``positions`` further positions."""
        self.state = state
        self._positions += positions

    def reset(self) -> None:
        """Reset the cache to its initial state."""
        self.state = None
        self._positions = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select and reorder rows for beam search, by index (R,)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows by index (R,); a row may be selected several times."""
        if self.state is not None:
            self.state = self.state.select(indices.to(self.state.layers[0][0].device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times; copies of a row are adjacent."""
        if self.state is not None:
            rows = torch.arange(self.state.layers[0][0].shape[0])
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Raise an error, because tokens can't be removed from a recurrent state.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "past_key_values: a recurrent state can't be cropped; copy the cache before speculative tokens"
        )
