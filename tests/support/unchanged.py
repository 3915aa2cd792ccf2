"""Check that a refused start or resume changes no file of any run."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tnnlm.errors import UserError


def files_under(folder: Path) -> dict[str, str]:
    """Return the hash of every file under a folder, by path; lock files are no files of a run."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.suffix != ".lock"
    }


def watch_refusals(patch: pytest.MonkeyPatch) -> None:
    """Wrap the checks at the beginning of ``train``: if they refuse, no file may have changed.

    Nothing is wrapped in test modules that do not train.
    """
    module: Any = sys.modules.get("tnnlm.training.run")
    if module is None:
        return
    before: dict[str, str] = {}

    def wrapped(name: str) -> Any:
        real = getattr(module, name)

        def call(config: Any, *args: Any, **named: Any) -> Any:
            folder = Path(config.runs_dir)
            if name == "_resolve":
                before.clear()
                before.update(files_under(folder))
            try:
                return real(config, *args, **named)
            except UserError:
                assert files_under(folder) == before, f"a refused run changed files under {folder}"
                raise

        return call

    for name in ("_resolve", "_build"):
        patch.setattr(module, name, wrapped(name))
