"""The HTTP application: routes, keys, limits, and the way from a request to the scheduler and back."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from tnnlm.inference.generator import TextGenerator
from tnnlm.serving.middleware import CountAnswers, WholeBody
from tnnlm.serving.responses import CompletionResponse
from tnnlm.serving.schemas import ApiError, CompletionRequest, on_http_error, on_invalid_request
from tnnlm.serving.service import Service
from tnnlm.serving.settings import Settings

PAGE = Path(__file__).parent / "page"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""of the page: nothing from elsewhere, nothing inline"""


def create_app(generator: TextGenerator, settings: Settings, executor: Executor | None = None) -> FastAPI:
    """The application for one model.

    Args:
        generator: from :func:`tnnlm.inference.engine.open_engine`.
        settings: name, key, limits.
        executor: of one thread, best that which loaded the model; see ``serving.scheduler``.
    """
    service = Service(generator, settings, executor)
    # Without the framework's documentation pages: they load scripts from elsewhere.
    app = FastAPI(title="tnnlm", docs_url=None, redoc_url=None, lifespan=service.lifespan)
    app.state.service = service
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid_request)
    app.add_middleware(WholeBody, limit=settings.limits.max_body_bytes)
    app.add_middleware(CountAnswers, counter=service.metrics.responses)
    key = Depends(_key_check(settings.api_key))

    @app.get("/v1/models", dependencies=[key])
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}", dependencies=[key])
    def model(name: str) -> dict[str, Any]:
        service.parser.check_model(name)
        return service.card()

    @app.post("/v1/completions", dependencies=[key], response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _complete(service, body, request)

    @app.post("/v1/chat/completions", dependencies=[key])
    def chat() -> None:
        raise ApiError(404, "this model continues text and has no chat format: use /v1/completions")

    @app.get("/health")
    def health() -> JSONResponse:
        return JSONResponse(service.health(), 200 if service.scheduler.alive else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return _page_file("index.html")

    @app.get("/page.{kind}", include_in_schema=False)
    def page_part(kind: str) -> FileResponse:
        if kind not in ("css", "js"):
            raise ApiError(404, "not found")
        return _page_file(f"page.{kind}")

    return app


async def _complete(service: Service, body: CompletionRequest, request: Request) -> Response:
    # Tokenizing a long prompt must not hold up the streams of others.
    parsed = await asyncio.to_thread(service.parser.parse, body)
    response = parsed.response
    service.submit(response, parsed.prompts)
    if body.stream:
        options = body.stream_options
        pieces = response.stream(options.include_usage, options.include_timing)
        stream = _cancelled_with(service, response, pieces)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
    whole = asyncio.ensure_future(response.whole())
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            return Response(status_code=499)  # to nobody
        return JSONResponse(whole.result())
    except TimeoutError:
        raise ApiError(503, "no place became free in time; try again later") from None
    except RuntimeError as error:
        raise ApiError(500, str(error)) from None
    finally:
        service.scheduler.cancel(response.sequences)
        whole.cancel()
        gone.cancel()


async def _cancelled_with(
    service: Service, response: CompletionResponse, pieces: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """A stream whose sequences are cancelled when it ends, as when its client goes away."""
    try:
        async for piece in pieces:
            yield piece
    finally:
        service.scheduler.cancel(response.sequences)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _key_check(api_key: str | None) -> Callable[[Request], None]:
    def check(request: Request) -> None:
        if api_key is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            message = "missing or wrong API key (Authorization: Bearer KEY)"
            error = ApiError(401, message, None, "invalid_api_key")
            error.headers = {"WWW-Authenticate": "Bearer"}
            raise error

    return check


def _page_file(name: str) -> FileResponse:
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
    return FileResponse(PAGE / name, headers=headers | {"Cache-Control": "no-cache"})
