"""FastAPI application of the server: routes, API key, limits, and submission of requests to the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tnnlm.errors import one_line
from tnnlm.inference.generator import TextGenerator
from tnnlm.serving.access import cache_partition, key_check
from tnnlm.serving.chat_schemas import ChatRequest
from tnnlm.serving.disconnect import EventStream, while_connected
from tnnlm.serving.json_body import Model, parse_body, schema_of
from tnnlm.serving.middleware import CountAnswers, HeadAsGet, KnownHost, WholeBody
from tnnlm.serving.requests import ParsedRequest
from tnnlm.serving.responses import AnswerTooLargeError, CompletionResponse, SequenceError, error_event
from tnnlm.serving.schemas import (
    ApiError,
    CompletionRequest,
    SamplingRequest,
    on_http_error,
    on_invalid_request,
)
from tnnlm.serving.sequence import SHUTDOWN, TIMEOUT
from tnnlm.serving.service import Service
from tnnlm.serving.settings import Settings
from tnnlm.serving.tokenization import DetokenizeRequest, TokenizeRequest, tokenized

PAGE = Path(__file__).parent / "page"
PARTS = ("page.css", "page.js", "api.js", "chat.js", "output.js", "plot.js")
"""Style sheet and scripts of the page."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of the page; it forbids external resources and inline scripts and styles."""


def create_app(generator: TextGenerator, settings: Settings, executor: Executor | None = None) -> FastAPI:
    """Create the application that serves one model.

    Args:
        generator: Text generator from :func:`tnnlm.inference.engine.open_engine`.
        settings: Model name, API keys, hosts and limits.
        executor: Executor with one thread, preferably the one that loaded the model; see
            :class:`tnnlm.serving.scheduler.Scheduler`.
    """
    service = Service(generator, settings, executor)
    # FastAPI's documentation pages are disabled because they load scripts from a CDN.
    app = FastAPI(title="tnnlm", docs_url=None, redoc_url=None, openapi_url=None, lifespan=service.lifespan)
    app.state.service = service
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid_request)
    app.add_middleware(WholeBody, limit=settings.limits.max_body_bytes)
    app.add_middleware(CountAnswers, counter=service.metrics.responses)
    app.add_middleware(HeadAsGet)
    if settings.allowed_hosts is not None:
        app.add_middleware(KnownHost, hosts=settings.allowed_hosts)
    _add_api(app, service)
    _add_tokenization(app, service)
    _add_page(app)
    return app


def _add_api(app: FastAPI, service: Service) -> None:
    key = Depends(key_check(service.settings.api_keys))

    @app.get("/v1/models", dependencies=[key])
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}", dependencies=[key])
    def model(name: str) -> dict[str, Any]:
        service.parser.check_model(name)
        return service.card()

    post = _poster(app, key)

    @post("/v1/completions", CompletionRequest)
    async def completions(request: Request) -> Response:
        body = await _validated(request, CompletionRequest)
        partition = _partition(service, request, body)
        grammar = await service.grammar(body)
        # Tokenizing a long prompt on the event loop would stall other streams.
        parsed = await asyncio.to_thread(service.parser.parse, body, partition, grammar)
        return await _answer(service, request, body, parsed)

    @post("/v1/chat/completions", ChatRequest)
    async def chat(request: Request) -> Response:
        body = await _validated(request, ChatRequest)
        partition = _partition(service, request, body)
        prompt, grammar = await service.chat.prompt(body.messages), await service.grammar(body)
        parsed = await asyncio.to_thread(service.parse_chat, body, prompt, partition, grammar)
        return await _answer(service, request, body, parsed)

    @app.get("/health")
    def health() -> JSONResponse:
        return JSONResponse(service.health(), 200 if service.scheduler.alive else 503)

    @app.get("/metrics", dependencies=[key])
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json", dependencies=[key], include_in_schema=False)
    def description() -> dict[str, Any]:
        schemas: dict[str, Any] = {}
        for body in (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest):
            schemas |= schema_of(body)
        return app.openapi() | {"components": {"schemas": schemas}}


def _poster(app: FastAPI, key: Any) -> Callable[[str, type[BaseModel]], Callable[[Any], Any]]:
    """Return a decorator of routes that parse bodies themselves, given a path and the model of a body."""

    def post(path: str, body: type[BaseModel]) -> Callable[[Any], Any]:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
        described = {"requestBody": {"content": content, "required": True}}
        return app.post(path, dependencies=[key], response_model=None, openapi_extra=described)

    return post


def _add_tokenization(app: FastAPI, service: Service) -> None:
    post = _poster(app, Depends(key_check(service.settings.api_keys)))

    @post("/tokenize", TokenizeRequest)
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await _validated(request, TokenizeRequest)
        service.parser.check_model(body.model)
        if body.messages is None:
            tokens = await asyncio.to_thread(service.parser.encode, body.prompt or "", body.parse_special)
        else:
            prompt, partition = await service.chat.prompt(body.messages), _partition(service, request, body)
            tokens = await asyncio.to_thread(service.chat_tokens, prompt, partition)
        return await asyncio.to_thread(tokenized, service.parser, tokens, body.return_token_strs)

    @post("/detokenize", DetokenizeRequest)
    async def detokenize(request: Request) -> dict[str, str]:
        body = await _validated(request, DetokenizeRequest)
        service.parser.check_model(body.model)
        return {"prompt": await asyncio.to_thread(service.parser.decode, body.tokens)}


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return _page_file("index.html")

    for name in PARTS:
        app.add_api_route(f"/{name}", partial(_page_file, name), include_in_schema=False)


async def _validated(request: Request, model: type[Model]) -> Model:
    """Return the body of a request, which is validated off the event loop, because it takes a while."""
    raw, kind = await request.body(), request.headers.get("content-type", "")
    return await asyncio.to_thread(parse_body, raw, kind, model)


def _partition(service: Service, request: Request, body: SamplingRequest | TokenizeRequest) -> bytes:
    return cache_partition(request, body.cache_salt, bool(service.settings.api_keys))


async def _answer(
    service: Service, request: Request, body: SamplingRequest, parsed: ParsedRequest
) -> Response:
    """Submit a request and return its answer, or the stream of it."""
    if not body.stream:
        with service.promised(parsed):
            return await _whole(service, parsed, request)
    service.submit(parsed)
    options = body.stream_options
    chunks = parsed.response.stream(options.include_usage, options.include_timing)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    sequences = parsed.response.sequences
    return EventStream(
        _until_the_end(service, parsed.response, chunks),
        headers,
        at_end=lambda: service.scheduler.cancel(sequences),
    )


async def _whole(service: Service, parsed: ParsedRequest, request: Request) -> Response:
    service.submit(parsed)
    try:
        answer = await while_connected(request.receive, parsed.response.whole())
        if answer is None:
            return Response(status_code=499)  # never delivered: the client has disconnected
        return Response(answer, media_type="application/json")
    except SequenceError as error:
        if str(error) == TIMEOUT:
            raise ApiError(503, "the request timed out before its first token; retry later") from None
        raise ApiError(503 if str(error) == SHUTDOWN else 500, str(error)) from None
    except AnswerTooLargeError:
        most = service.settings.limits.max_answer_bytes >> 20
        raise ApiError(400, f"the answer is larger than {most} MiB (--max-answer-mb); ask for less") from None
    except Exception as error:
        service.log.failed(parsed.response.name, error)
        raise ApiError(500, one_line(error)) from None
    finally:
        service.scheduler.cancel(parsed.response.sequences)


async def _until_the_end(
    service: Service, response: CompletionResponse, chunks: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """Yield the chunks of a stream, and an error event if it fails."""
    try:
        async for chunk in chunks:
            yield chunk
    except SequenceError as error:
        yield error_event(str(error))
    except Exception as error:
        service.log.failed(response.name, error)
        yield error_event(one_line(error))


def _page_file(name: str) -> FileResponse:
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
    return FileResponse(PAGE / name, headers=headers | {"Cache-Control": "no-cache"})
