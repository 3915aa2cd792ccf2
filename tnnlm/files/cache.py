"""The user's cache folder of this package."""

from __future__ import annotations

import os
from pathlib import Path

from tnnlm.errors import UserError


def cache_root() -> Path:
    """Return the user's cache folder of this package, $TNNLM_CACHE or ~/.cache/tnnlm, which may not exist.

    Raises:
        UserError: If the user has no home folder, as in a container with an unknown user and without $HOME. A
            folder ``~`` in the current one, which may be a stranger's, is never taken for it.
    """
    # Path.expanduser fails for an unknown user.
    found = os.path.expanduser(os.environ.get("TNNLM_CACHE") or "~/.cache/tnnlm")
    if found.startswith("~"):
        raise UserError(f"{found}: there is no such home folder", "set TNNLM_CACHE to a private folder")
    return Path(found)
