"""DataLoader that measures how long its reader waits for batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader


@dataclass
class Wait:
    """Time that a training has waited for batches."""

    seconds: float = 0.0


class TimedLoader(DataLoader[Any]):
    """DataLoader that adds the time that each batch takes to a :class:`Wait`."""

    wait = Wait()
    """Where the time is added; set it to an own one after the loader is made."""

    def __iter__(self) -> Any:
        """Return an iterator over the batches."""
        return self._timed(super().__iter__())

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.wait.seconds += time.perf_counter() - began
            yield batch
