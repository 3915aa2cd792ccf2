"""The state of a converted model in the place of ``past_key_values``."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from tnnlm.models.causal_lm import CausalLM, ModelState


class RecurrentCache:
    """A :class:`tnnlm.models.causal_lm.ModelState` and how many positions it has read; of one size at any
    length.

    ``forward`` puts the next state into it, as Transformers' own caches do: ``copy.copy`` forks it, for
    the states themselves are never changed in place. A state can't forget: nothing can be cropped.
    """

    is_compileable = False
    """Transformers compiles no step that reads it"""

    def __init__(self) -> None:
        self.state: ModelState | None = None
        self._positions = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions read, pads included: what generate() cuts its inputs by."""
        return self._positions

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: any number of positions."""
        return -1

    def take(self, model: CausalLM, batch_size: int) -> ModelState:
        """The state to go on from, new if nothing was read yet.

        Raises:
            ValueError: if it is of another number of rows.
        """
        if self.state is None:
            return model.init_state(batch_size)
        rows = self.state.layers[0][0].shape[0] if self.state.layers else batch_size
        if rows != batch_size:
            raise ValueError(f"past_key_values is of {rows} rows, the input of {batch_size}")
        return self.state

    def put(self, state: ModelState, positions: int) -> None:
        """Replace the state by the one ``positions`` later."""
        self.state = state
        self._positions += positions

    def reset(self) -> None:
        """Forget everything."""
        self.state = None
        self._positions = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows that beam search goes on with, in its order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take rows by index (R,); a row may come up more than once."""
        if self.state is not None:
            self.state = self.state.select(indices.to(self.state.layers[0][0].device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, side by side."""
        if self.state is not None:
            rows = torch.arange(self.state.layers[0][0].shape[0])
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Always raises: what a recurrence has read is part of its state."""
        raise ValueError("a recurrent state can't be cropped: copy it before what may have to be undone")
