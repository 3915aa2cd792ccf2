"""A converted folder's config.json as Transformers reads and writes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from tnnlm.checkpoints.converted import FORMAT
from tnnlm.checkpoints.hf_files import AUTO_MAP, MODEL_TYPE, SHIM, SHIM_TEXT
from tnnlm.config.loader import model_config_from_dict
from tnnlm.config.schema import ModelConfig
from tnnlm.errors import CheckpointError
from tnnlm.files import write_text
from tnnlm.modules import RecurrentConv
from tnnlm.ops import recurrence


class TnnlmConfig(PreTrainedConfig):
    """Sizes of the model and of every layer's recurrence.

    There is no ``max_position_embeddings``: a recurrence reads and writes any number of tokens. ``n_ctx``
    is the window that lm-evaluation-harness cuts text into.
    """

    model_type = MODEL_TYPE

    format: int = FORMAT
    """of the folder, as ``load_converted`` wants it"""
    model: dict[str, Any] | None = None
    """the settings under ``model`` that training had"""
    recurrences: list[dict[str, list[int]]] | None = None
    """per layer the shapes of its tensors, by name"""
    eos_token: str | None = None
    """the end-of-document token"""
    tokenizer_sha256: str | None = None
    """of the tokenizer that the model was trained with"""
    tokenizer_ids_sha256: str | None = None
    """of the same without its post-processor"""
    model_sha256: str | None = None
    """of all weights"""
    n_ctx: int | None = None
    """tokens of an evaluation's window"""
    use_cache: bool = True
    """return the state"""
    tie_word_embeddings: bool = True
    """always so"""
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def vocab_size(self) -> int | None:
        """Entries of the embedding."""
        return self._size("vocab_size")

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.model = {**(self.model or {}), "vocab_size": size}

    @property
    def hidden_size(self) -> int | None:
        """``d_model``."""
        return self._size("d_model")

    @property
    def num_hidden_layers(self) -> int | None:
        """``n_layers``."""
        return self._size("n_layers")

    def sizes(self) -> ModelConfig:
        """The settings that a ``CausalLM`` is built with.

        Raises:
            CheckpointError: if this is no converted model's configuration.
        """
        if self.model is None or self.recurrences is None:
            raise CheckpointError("config.json: has no sizes of a converted model", "convert again")
        return model_config_from_dict(self.model, "config.json")

    def convs(self) -> list[RecurrentConv]:
        """A recurrence of zeros per layer, in the default dtype but never below float32; poles in float64."""
        layers = []
        for shapes in self.recurrences or ():
            params = recurrence.from_tensors({name: torch.zeros(shape) for name, shape in shapes.items()})
            layers.append(RecurrentConv(params.to_dtype(torch.get_default_dtype())))
        return layers

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write config.json, and the file that its ``auto_map`` names."""
        self.auto_map = AUTO_MAP
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / SHIM, SHIM_TEXT)
        super().save_pretrained(save_directory, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: Transformers would copy this module into every folder that is saved."""

    def _size(self, name: str) -> int | None:
        return None if self.model is None else int(self.model[name])
