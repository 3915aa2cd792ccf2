"""Run folder with imported weights, which the commands read like that of a training run."""

from __future__ import annotations

import json
from pathlib import Path

from tnnlm.checkpoints.archive import write_archive
from tnnlm.checkpoints.converted import check_tokenizer
from tnnlm.checkpoints.importers.formats import Imported
from tnnlm.checkpoints.locate import IMPORTED, LAST
from tnnlm.checkpoints.settings_file import write_settings
from tnnlm.checkpoints.training import ENTRY, checkpoint_entry
from tnnlm.checksums import file_sha256
from tnnlm.errors import CheckpointError
from tnnlm.files import atomic_folder, check_parents, only_process, write_text
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.empty import without_weights
from tnnlm.tokenizer import TextTokenizer


def check_absent(folder: Path) -> None:
    """Check that an output folder can be created.

    Raises:
        CheckpointError: If it exists: a run is never overwritten.
        UserError: If it can't be created, for example because a parent is a file.
    """
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(f"{folder}: already exists", "choose another --output")
    check_parents(folder)


def write_run(folder: Path, source: Path, imported: Imported, tokenizer: TextTokenizer) -> None:
    """Write a run with imported weights, atomically: config.yaml, tokenizer.json and checkpoints/last.ckpt.

    Args:
        folder: Folder of the run, which must not exist.
        source: File that the weights were read from, for the record in import.json.
        imported: Translated model.
        tokenizer: Tokenizer with the token ids of the model.

    Raises:
        CheckpointError: If the folder exists, another process writes it, or the tokenizer has more tokens
            than the model.
    """
    config = imported.config
    config.name, config.runs_dir = folder.name, str(folder.parent)
    config.data.tokenizer = str(folder / "tokenizer.json")
    config.data.eos_token = tokenizer.eos_token
    with without_weights():
        check_tokenizer(tokenizer, CausalLM(config.model), source)
    refusal = CheckpointError(f"{folder}: another import is writing to it", "choose another --output")
    with only_process(folder, refusal):
        check_absent(folder)
        with atomic_folder(folder) as temporary:
            (temporary / LAST).parent.mkdir()
            write_archive(
                {
                    "state_dict": {f"model.{name}": tensor for name, tensor in imported.weights.items()},
                    "global_step": 0,
                    ENTRY: checkpoint_entry(config, tokenizer, None),
                },
                temporary / LAST,
                folder / LAST,
            )
            write_settings(temporary, config)
            write_text(temporary / "tokenizer.json", tokenizer.to_json())
            origin = {"format": imported.format, "source": source.name, "sha256": file_sha256(source)}
            write_text(temporary / IMPORTED, json.dumps(origin, indent=2))
