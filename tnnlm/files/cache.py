"""The user's cache folder of this package."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Return the user's cache folder of this package, $TNNLM_CACHE or ~/.cache/tnnlm, which may not exist."""
    # Path.expanduser fails for an unknown user.
    return Path(os.path.expanduser(os.environ.get("TNNLM_CACHE") or "~/.cache/tnnlm"))
