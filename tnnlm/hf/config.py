"""Configuration class for the config.json of a converted folder, for Transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from tnnlm.checkpoints.converted import FORMAT
from tnnlm.checkpoints.hf_files import AUTO_MAP, MODEL_TYPE, code_files
from tnnlm.checkpoints.manifest import CHECKSUMS, REMEDY, update_checksum, verify_folder
from tnnlm.config.loader import model_config_from_dict
from tnnlm.config.schema import ModelConfig
from tnnlm.errors import CheckpointError
from tnnlm.files import write_text
from tnnlm.modules import RecurrentConv
from tnnlm.ops import recurrence
from tnnlm.reading import read_json


class TnnlmConfig(PreTrainedConfig):
    """Configuration of a converted model: the sizes of the model and of every layer's recurrence.

    There is no ``max_position_embeddings``, because a recurrence can process any number of tokens.
    ``n_ctx`` is the context length that lm-evaluation-harness uses.
    """

    model_type = MODEL_TYPE

    checksums: str | None = None
    """Name of the file with the checksums of the folder; None if a version without them wrote it."""
    format: int = FORMAT
    """Version of the folder format, which ``load_converted`` checks."""
    model: dict[str, Any] | None = None
    """Settings under ``model`` in the configuration of the training run."""
    recurrences: list[dict[str, list[int]]] | None = None
    """Shapes of the recurrence's tensors by name, one entry per layer."""
    eos_token: str | None = None
    """End-of-document token."""
    tokenizer_sha256: str | None = None
    """SHA-256 of the tokenizer that the model was trained with."""
    tokenizer_ids_sha256: str | None = None
    """SHA-256 of the tokenizer without its post-processor."""
    missing_ids: list[int] | None = None
    """Rows of the embedding that the tokenizer has no token for; their logits are -inf."""
    model_sha256: str | None = None
    """SHA-256 of all weights."""
    sample_prompts: list[str] | None = None
    """Short prompts from the text that the model was trained on."""
    n_ctx: int | None = None
    """Context length of evaluations, in tokens. The model itself has no limit."""
    use_cache: bool = True
    """Whether ``forward`` returns the recurrent state as ``past_key_values``."""
    tie_word_embeddings: bool = True
    """Whether embedding and head share their weights, which is always the case."""
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def vocab_size(self) -> int | None:
        """Number of embedding rows."""
        return self._size("vocab_size")

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.model = {**(self.model or {}), "vocab_size": size}

    @property
    def hidden_size(self) -> int | None:
        """Width of the model, ``d_model``."""
        return self._size("d_model")

    @property
    def num_hidden_layers(self) -> int | None:
        """Number of layers, ``n_layers``."""
        return self._size("n_layers")

    def sizes(self) -> ModelConfig:
        """Return the settings that a ``CausalLM`` is built with.

        Raises:
            CheckpointError: If this is not the configuration of a converted model.
        """
        if self.model is None or not self.recurrences:
            raise CheckpointError(
                "config.json: is not the configuration of a converted model", "convert the checkpoint again"
            )
        return model_config_from_dict(self.model, "config.json")

    def convs(self) -> list[RecurrentConv]:
        """Return a zero-initialised recurrence per layer, in the default dtype but at least float32.

        Poles are in float64.
        """
        layers = []
        for shapes in self.recurrences or ():
            params = recurrence.from_tensors({name: torch.zeros(shape) for name, shape in shapes.items()})
            layers.append(RecurrentConv(params.to_dtype(torch.get_default_dtype())))
        return layers

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *rest: Any, **options: Any) -> Any:
        """Load config.json after the checksums of a local folder are verified.

        Transformers calls this with ``trust_remote_code=True`` too.

        Raises:
            CheckpointError: If a file of the folder is damaged or was replaced, if config.json names other
                code than that of converted models, which Transformers would run next, or if the folder holds
                an adapter.
        """
        folder = Path(name, options.get("subfolder") or "")
        if folder.is_dir():
            refuse_adapter(folder)
            verify_folder(folder, read_json(folder / "config.json", REMEDY), weights=False)
        found = super().from_pretrained(name, *rest, **options)
        config = found[0] if isinstance(found, tuple) else found
        own = f"{os.fspath(name)}--"  # in front of the names in a model of the Hub
        for key, code in dict(getattr(config, "auto_map", None) or {}).items():
            if str(code).removeprefix(own) != AUTO_MAP.get(key):
                raise CheckpointError(
                    f"config.json: auto_map has {code!r} for {key}, which is not code of tnnlm",
                    "omit trust_remote_code, and import tnnlm.hf instead",
                )
        return found

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write config.json, the Python code that its ``auto_map`` refers to, and checksums."""
        self.auto_map = AUTO_MAP
        self.checksums = CHECKSUMS
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in code_files().items():
            write_text(folder / name, text)
        super().save_pretrained(save_directory, **options)
        update_checksum(folder, "config.json")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing, because Transformers would copy this module into every saved folder."""

    def _size(self, name: str) -> int | None:
        return None if self.model is None else int(self.model[name])


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter, which Transformers loads by itself if PEFT is installed.

    adapter_config.json names modules that PEFT imports, and other weights. No converted folder has one.

    Raises:
        CheckpointError: If the folder holds one.
    """
    path = folder / "adapter_config.json"
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: a converted model has no adapter", "delete it")
