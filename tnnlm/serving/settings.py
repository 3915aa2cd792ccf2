"""Settings and limits of the server."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from tnnlm.errors import UserError

PROMPTS = 256
"""Maximum number of sequences per request: prompts times ``n``."""
STOPS = 16
"""Maximum number of stop strings per request."""
MESSAGES = 1024
"""Maximum number of messages of a conversation."""
CHAT_TOKENS = 2048
"""Maximum number of tokens of an answer in a chat whose request gives none."""
LOGPROBS = 20
"""Maximum number of alternatives per token in ``logprobs``."""
BUFFER_BYTES = 1 << 20
"""Bytes of output per sequence that wait for a client which does not read; beyond it the sequence ends."""
_MOST = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the server; each corresponds to an option of ``tnnlm serve``.

    Raises:
        UserError: If a limit is out of range.
    """

    max_batch: int = 256
    """Maximum number of sequences in the running batch; further ones wait."""
    max_queue: int = 1024
    """Maximum number of waiting sequences; further requests are rejected with HTTP status 429."""
    max_prompt_tokens: int = 131_072
    """Maximum number of tokens in a prompt."""
    max_tokens: int = 131_072
    """Maximum number of tokens to generate per sequence."""
    max_request_rows: int = 64
    """Maximum number of sequences of one request, prompts times ``n``, and never more than ``max_batch``."""
    max_answer_bytes: int = 32 << 20
    """Maximum size of the answer to one request in bytes, over all its sequences."""
    max_connections: int = 2048
    """Maximum number of open connections; further ones are closed at once."""
    send_timeout: float = 30.0
    """Seconds for which a client may leave a full send buffer unread; then its connection is closed."""
    timeout: float = 600.0
    """Timeout of a request in seconds, queueing included; running sequences then finish with ``length``."""
    cache_bytes: int = 256 << 20
    """Size of the prefix cache in bytes; 0 disables it."""

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            least = 0 if setting.name in ("max_queue", "cache_bytes") else 1
            if not least <= value <= _MOST:
                raise UserError(f"{setting.name} {value}: must be from {least} to {_MOST:,}")

    @property
    def rows_per_request(self) -> int:
        """Maximum number of sequences of one request."""
        return min(self.max_request_rows, self.max_batch, PROMPTS)

    @property
    def max_body_bytes(self) -> int:
        """Maximum size of a request body in bytes, enough for a prompt of ``max_prompt_tokens`` tokens."""
        return (1 << 18) + 24 * self.max_prompt_tokens


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the server."""

    name: str
    """Model name reported by the API."""
    engine: str = ""
    """Description of the engine in one line."""
    parameters: int = 0
    """Number of parameters of the model."""
    prompts: tuple[str, ...] = ()
    """Short prompts from the text of the model, the first of which the page shows where one is typed."""
    api_keys: tuple[str, ...] = ()
    """API keys, one of which clients must send; without keys, everyone is served."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names and addresses in the Host header of requests that are served; None serves all."""
    parse_special: bool = False
    """Whether the names of special tokens in a prompt are encoded as these tokens, unless a request says."""
    reproducible: bool = False
    """Whether a batch of one sequence gets an idle row, with which the packed engine gives every sequence the
    same bits under any load; see ``batch_invariant`` of :class:`tnnlm.inference.engine.EngineInfo`."""
    limits: Limits = field(default_factory=Limits)
    """Limits of requests, batch, queue and prefix cache."""
