"""Whether a checkpoint in the folder of a run is one of that run, and not a valid one of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tnnlm.config.checks import leaves
from tnnlm.config.interpolation import StoredInterpolation
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.errors import CheckpointError, UserError
from tnnlm.tokenizer import TextTokenizer, load_tokenizer

FIXED = ("seed", "task", "model.", "init.", "data.mask", "data.protocol", "data.listops", "data.lra.task")
"""Settings, or groups of them, that never change in a run."""
PLACES = ("name", "runs_dir", "model.kernel.module", "model.kernel.module_sha256")
"""Settings that may differ between a run and its checkpoint: a run and its kernel module may be moved, and
what module runs is decided by :mod:`tnnlm.config.kernel_module`."""


def check_member(path: Path, config: Config, tokenizer: TextTokenizer) -> None:
    """Check a checkpoint against config.yaml and tokenizer.json of the run in whose folder it is.

    A checkpoint outside of a run can't be checked, and neither file is needed: one that is missing or damaged
    is not compared. An interpolation in config.yaml is refused all the same.

    Args:
        path: The checkpoint.
        config: Settings that it contains.
        tokenizer: Tokenizer that it contains.

    Raises:
        CheckpointError: If a setting differs that is fixed in a run, or the tokenizer.
        StoredInterpolation: If config.yaml contains an interpolation.
    """
    folder = path.absolute().parent
    run = folder.parent
    if folder.name != "checkpoints" or not (run / "config.yaml").is_file():
        return
    remedy = "restore the checkpoint of this run, or copy this one to another folder"
    try:
        recorded = _fixed(load_config(run / "config.yaml", saved=True))
    except StoredInterpolation:
        raise
    except UserError:
        return
    own = _fixed(config)
    for key in own:
        if key in recorded and own[key] != recorded[key]:
            raise CheckpointError(
                f"{path}: is of another run, it has {key}={own[key]} and config.yaml {recorded[key]}", remedy
            )
    try:
        there = load_tokenizer(str(run / "tokenizer.json"), tokenizer.eos_token).fingerprint
    except UserError:
        return
    if there != tokenizer.fingerprint:
        raise CheckpointError(f"{path}: is of another run, its tokenizer is not tokenizer.json", remedy)


def _fixed(config: Config) -> dict[str, Any]:
    found = {key: value for key, value, _ in leaves(config)}
    return {key: found[key] for key in found if key.startswith(FIXED) and key not in PLACES}
