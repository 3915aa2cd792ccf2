"""Strict parsing of JSON bodies: a repeated key is an error, because only one of its values could be used."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from tnnlm.serving.schemas import ApiError


def parse_body(body: bytes) -> Any:
    """Parse a JSON body.

    Raises:
        ApiError: 400 if the body is not JSON, or an object in it has a key twice.
    """
    try:
        return json.loads(body, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None


class StrictRoute(APIRoute):
    """Route that parses JSON bodies with :func:`parse_body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route, which receives a request that parses its body strictly."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        return parse_body(await self.body())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ApiError(400, f"{key[:64]}: is given twice; omit one of the two", key[:64])
            seen.add(key)
    return found
