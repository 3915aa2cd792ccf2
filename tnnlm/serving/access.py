"""Keys of the API, and the part of the prefix cache that belongs to a client."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Coroutine, Sequence

from fastapi import Request

from tnnlm.serving.schemas import ApiError


def key_check(keys: Sequence[str]) -> Callable[[Request], Coroutine[None, None, None]]:
    """Return a dependency that refuses requests without one of the keys (401), if there are keys."""
    accepted = [f"Bearer {key}".encode() for key in keys]

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        # Compared with every key, so that the time does not tell which one is nearest.
        if accepted and not sum(hmac.compare_digest(given, own) for own in accepted):
            message = "missing or wrong API key; send the header Authorization: Bearer KEY"
            error = ApiError(401, message, None, "invalid_api_key")
            error.headers = {"WWW-Authenticate": "Bearer"}
            raise error

    return check


def cache_partition(request: Request, salt: str | None, by_key: bool) -> bytes:
    """Return the partition of the prefix cache for a request, 32 bytes.

    Clients are told apart by their key; without keys, by their address. ``salt`` separates clients that share
    these.
    """
    client = request.client.host if request.client else ""
    who = request.headers.get("authorization", "") if by_key else client
    return hashlib.blake2b(repr((who, salt)).encode(), digest_size=32).digest()
