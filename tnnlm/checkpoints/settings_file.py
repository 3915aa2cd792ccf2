"""Settings of a run in config.yaml, whose last line is a checksum of the others."""

from __future__ import annotations

from pathlib import Path

from tnnlm.checksums import is_verified_text, signed_text
from tnnlm.config.loader import config_to_yaml
from tnnlm.config.schema import Config
from tnnlm.files import write_text
from tnnlm.reading import read_text

SETTINGS_FILE = "config.yaml"
_REMEDY = "restore it, and change settings with key=value"


def write_settings(folder: Path, config: Config) -> None:
    """Write config.yaml into the folder of a run, atomically."""
    write_text(folder / SETTINGS_FILE, signed_text(config_to_yaml(config)))


def take_own_tokenizer(config: Config, run: Path) -> None:
    """Let a configuration name the tokenizer.json of its run if the file that it names was deleted.

    It is a copy, such as of the tokenizer of another run whose weights this one started from.
    """
    own = run / "tokenizer.json"
    named = config.data.tokenizer
    if named is not None and named.endswith(".json") and not Path(named).exists() and own.is_file():
        config.data.tokenizer = str(own)


def verify_settings(run: Path) -> bool:
    """Verify the checksum of a run's config.yaml, and return whether it has one; older versions wrote none.

    A file that the user passes with ``--config`` is not verified: it may be an edited copy.

    Raises:
        CheckpointError: If the file is missing, unreadable, damaged or was edited.
    """
    path = run / SETTINGS_FILE
    return is_verified_text(path, read_text(path, _REMEDY), _REMEDY)
