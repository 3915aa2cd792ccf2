"""Progress bars of a conversion, which are shown in a terminal only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm


def bar(items: Sequence[Any], title: str) -> Iterable[Any]:
    """Iterate over items under a progress bar, which disappears at its end."""
    return tqdm(items, desc=title, leave=False, disable=None)
