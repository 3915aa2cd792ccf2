"""What a server takes on, and what it refuses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from tnnlm.errors import UserError

PROMPTS = 256
"""sequences of one request, prompts times choices"""
STOPS = 16
"""stop strings of a request"""
LOGPROBS = 20
"""alternatives shown per token"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server; every one is a flag of ``tnnlm serve``.

    Raises:
        UserError: for one that is out of range.
    """

    max_batch: int = 256
    """sequences generated at once; further ones wait"""
    max_queue: int = 1024
    """sequences that wait; further ones are refused with 429"""
    max_prompt_tokens: int = 131_072
    """tokens of a prompt"""
    max_tokens: int = 131_072
    """new tokens of a sequence"""
    timeout: float = 600.0
    """seconds for a request, the wait included; then it ends as if its tokens were used up"""
    cache_bytes: int = 256 << 20
    """of states kept for prompts that begin alike; 0 keeps none"""

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            least = 0 if setting.name in ("max_queue", "cache_bytes") else 1
            if not least <= value <= 1 << 40:
                raise UserError(f"{setting.name} {value}: must be at least {least}")

    @property
    def max_body_bytes(self) -> int:
        """Of a request: a prompt at the limit, as a string or as ids, and room for the rest."""
        return (1 << 18) + 24 * self.max_prompt_tokens


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a server, beside its limits."""

    name: str
    """of the model, as clients give it"""
    engine: str = ""
    """what runs, in one line"""
    parameters: int = 0
    api_key: str | None = None
    limits: Limits = field(default_factory=Limits)
