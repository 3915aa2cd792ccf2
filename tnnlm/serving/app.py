"""FastAPI application of the server: routes, API key, limits, and submission of requests to the scheduler."""

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
from tnnlm.serving.json_body import StrictRoute
from tnnlm.serving.middleware import CountAnswers, HeadAsGet, WholeBody
from tnnlm.serving.responses import CompletionResponse
from tnnlm.serving.schemas import ApiError, CompletionRequest, on_http_error, on_invalid_request
from tnnlm.serving.service import Service
from tnnlm.serving.settings import Settings

PAGE = Path(__file__).parent / "page"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of the page; it forbids external resources and inline scripts and styles."""


def create_app(generator: TextGenerator, settings: Settings, executor: Executor | None = None) -> FastAPI:
    """Create the application that serves one model.

    Args:
        generator: Text generator from :func:`tnnlm.inference.engine.open_engine`.
        settings: Model name, API key and limits.
        executor: Executor with one thread, preferably the one that loaded the model; see
            :class:`tnnlm.serving.scheduler.Scheduler`.
    """
    service = Service(generator, settings, executor)
    # FastAPI's documentation pages are disabled because they load scripts from a CDN.
    app = FastAPI(title="tnnlm", docs_url=None, redoc_url=None, lifespan=service.lifespan)
    app.router.route_class = StrictRoute
    app.state.service = service
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid_request)
    app.add_middleware(WholeBody, limit=settings.limits.max_body_bytes)
    app.add_middleware(CountAnswers, counter=service.metrics.responses)
    app.add_middleware(HeadAsGet)
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

    @app.post("/v1/chat/completions", dependencies=[key], include_in_schema=False)
    def chat() -> None:
        raise ApiError(404, "this model has no chat template; use /v1/completions")

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
            raise HTTPException(404)
        return _page_file(f"page.{kind}")

    return app


async def _complete(service: Service, body: CompletionRequest, request: Request) -> Response:
    # Tokenizing a long prompt on the event loop would stall other streams.
    parsed = await asyncio.to_thread(service.parser.parse, body)
    response = parsed.response
    service.submit(response, parsed.prompts)
    if body.stream:
        options = body.stream_options
        chunks = response.stream(options.include_usage, options.include_timing)
        stream = _cancelled_with(service, response, chunks)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
    whole = asyncio.ensure_future(response.whole())
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            return Response(status_code=499)  # never delivered: the client has disconnected
        return JSONResponse(whole.result())
    except TimeoutError:
        raise ApiError(503, "the request timed out before its first token; retry later") from None
    except RuntimeError as error:
        raise ApiError(500, str(error)) from None
    finally:
        service.scheduler.cancel(response.sequences)
        whole.cancel()
        gone.cancel()


async def _cancelled_with(
    service: Service, response: CompletionResponse, chunks: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """Yield the chunks of a stream and cancel its sequences when it ends or its client disconnects."""
    try:
        async for chunk in chunks:
            yield chunk
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
            message = "missing or wrong API key; send the header Authorization: Bearer KEY"
            error = ApiError(401, message, None, "invalid_api_key")
            error.headers = {"WWW-Authenticate": "Bearer"}
            raise error

    return check


def _page_file(name: str) -> FileResponse:
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
    return FileResponse(PAGE / name, headers=headers | {"Cache-Control": "no-cache"})
