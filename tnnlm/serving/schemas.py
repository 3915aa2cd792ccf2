"""Schemas of the OpenAI API: parameters of all requests, those of completions, and error responses."""

from __future__ import annotations

from typing import Any, Literal, cast

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from starlette.exceptions import HTTPException

from tnnlm.inference.grammar import LONGEST_REGEX
from tnnlm.serving.settings import LOGPROBS, PROMPTS, STOPS

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""Configuration of models of bodies, in which nothing is converted or ignored."""
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
_KINDS |= {408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error"}

INT64 = 2**63 - 1
"""Largest integer of a field."""
_NEUTRAL: dict[str, Any] = {"typical_p": 1, "length_penalty": 1, "min_tokens": 0}
_NEUTRAL |= {"use_beam_search": False, "ignore_eos": False, "skip_special_tokens": True, "store": False}
_NEUTRAL |= {"tools": [], "tool_choice": "none", "functions": [], "modalities": ["text"]}
_NEUTRAL |= {"add_generation_prompt": True, "continue_final_message": False, "service_tier": "auto"}
"""Parameters of OpenAI, vLLM and TGI that clients send by default, at values that change nothing."""


class ApiError(HTTPException):
    """API error with HTTP status, a message of one line, and the invalid parameter."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
        self.param, self.code = param, code


def without_nulls(data: Any) -> Any:
    """Drop the nulls of an object, which many clients send for parameters that are not set."""
    return (
        {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data
    )


def without_defaults(data: Any) -> Any:
    """Drop nulls, and parameters of other servers at the values with which they change nothing."""
    data = without_nulls(data)
    if not isinstance(data, dict):
        return data
    return {key: value for key, value in data.items() if not _changes_nothing(key, value)}


def _changes_nothing(key: str, value: Any) -> bool:
    if key not in _NEUTRAL or isinstance(value, dict):
        return False
    # True equals 1 in Python, but is no number in JSON.
    return bool(value == _NEUTRAL[key]) and isinstance(value, bool) == isinstance(_NEUTRAL[key], bool)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(part) is int for part in value)


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = STRICT
    include_usage: bool = False
    """Whether to send token usage in a last chunk."""
    include_timing: bool = False
    """Whether to add context length and step time to each chunk; an extension of the OpenAI API."""
    include_obfuscation: bool = False
    """Accepted for compatibility and ignored."""

    _nulls = model_validator(mode="before")(without_nulls)


class NamedSchema(BaseModel):
    """JSON schema with its name."""

    model_config = STRICT
    name: str = Field(max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool = True
    """Accepted for compatibility and ignored, because the schema always holds."""

    _nulls = model_validator(mode="before")(without_nulls)


class ResponseFormat(BaseModel):
    """Format of generated text."""

    model_config = STRICT
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = Field(None, validate_default=True)

    _nulls = model_validator(mode="before")(without_nulls)

    @field_validator("json_schema")
    @classmethod
    def _only_with_its_type(cls, value: NamedSchema | None, info: ValidationInfo) -> NamedSchema | None:
        if "type" in info.data and (value is not None) != (info.data["type"] == "json_schema"):
            raise ValueError("belongs to the type json_schema; give both, or none of them")
        return value

    @property
    def grammar(self) -> dict[str, Any] | None:
        """JSON schema of the text; None for any text."""
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.json_schema


class SamplingRequest(BaseModel):
    """Parameters that the bodies of all endpoints have that generate text."""

    model_config = STRICT
    model: str = Field("", max_length=512)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, ge=0, le=1)
    """Cumulative probability of the most likely tokens to sample from; 0 is greedy decoding."""
    top_k: int = Field(0, ge=-1, le=INT64)
    """Number of most likely tokens to sample from; 0 or -1 disables it. An extension of the OpenAI API."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Smallest probability of a token relative to that of the most likely one. An extension of the OpenAI
    API, as in vLLM."""
    n: int = Field(1, ge=1, le=PROMPTS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: list[str] = Field(default_factory=list, max_length=STOPS)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    """Divisor of positive logits, and factor of negative ones, of tokens of the prompt and the completion. An
    extension of the OpenAI API, as in vLLM."""
    logit_bias: dict[str, float] = Field(default_factory=dict)
    response_format: ResponseFormat | None = None
    guided_regex: str | None = Field(None, min_length=1, max_length=LONGEST_REGEX)
    """Regular expression that the text matches as a whole. An extension of the OpenAI API, as in vLLM."""
    user: str | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=512)
    """Secret of the client, whose prompts reuse only cached states of prompts with the same salt, as in
    vLLM. An extension of the OpenAI API."""

    _unset = model_validator(mode="before")(without_defaults)

    @property
    def new_tokens(self) -> int | None:
        """Maximum number of tokens to generate for each sequence; None for the default of the server."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int | None:
        """Number of most likely tokens to score at each position; None for no log-probabilities."""
        raise NotImplementedError

    @field_validator("guided_regex")
    @classmethod
    def _one_grammar(cls, value: str | None, info: ValidationInfo) -> str | None:
        other = info.data.get("response_format")
        if value is not None and other is not None and other.grammar is not None:
            raise ValueError("can't be combined with response_format; omit one of the two")
        return value

    @field_validator("stream_options")
    @classmethod
    def _only_if_streamed(cls, value: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if not info.data.get("stream", True):  # stream is missing if it is invalid
            raise ValueError("only applies to stream=true; omit it")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _list_of_stops(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _stops_of_length(cls, value: list[str]) -> list[str]:
        if not all(0 < len(stop) <= 512 for stop in value):
            raise ValueError("each stop string must have from 1 to 512 characters")
        return value


class CompletionRequest(SamplingRequest):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0, le=INT64)
    best_of: int | None = Field(None, ge=1, le=PROMPTS)
    logprobs: int | None = Field(None, ge=0, le=LOGPROBS)
    echo: bool = False
    suffix: str | None = None
    parse_special: bool | None = None
    """Whether the names of special tokens in a string prompt are encoded as these tokens; None takes the
    setting of the server. An extension of the OpenAI API."""
    return_token_ids: bool = False
    """Whether to add the ids of the tokens to each choice, ``prompt_token_ids`` and ``token_ids``, as in
    vLLM. An extension of the OpenAI API."""

    @property
    def new_tokens(self) -> int:
        """Maximum number of tokens to generate for each sequence."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Number of most likely tokens to score at each position; None for no log-probabilities."""
        return self.logprobs

    @field_validator("prompt", mode="before")
    @classmethod
    def _known_prompt(cls, value: Any) -> Any:
        """Check the type of the prompt, to report one error instead of one per member of the union."""
        parts = value if isinstance(value, list) else [value]
        texts = all(isinstance(part, str) for part in parts)
        ids = value is parts and (_are_ids(parts) or all(_are_ids(part) for part in parts))
        if not parts or not (texts or ids):
            raise ValueError(
                "expected a string, a list of strings, a list of token ids, or a list of such lists"
            )
        return value

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("not supported, because this model generates left to right; omit it")
        return value

    @field_validator("best_of")
    @classmethod
    def _no_best_of(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value != info.data.get("n", value):  # n is missing if it is invalid
            raise ValueError("not supported unless it equals n; omit it")
        return value

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts as a list of strings or a list of lists of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return cast("list[list[int]]", [self.prompt] if isinstance(self.prompt[0], int) else self.prompt)


def error_response(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: Any = None
) -> JSONResponse:
    """Return an error response in the format of the OpenAI API.

    ``message`` may contain control characters and invalid Unicode, which are replaced.
    """
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": _printable(message), "type": kind, "param": param and _printable(param), "code": code}
    return JSONResponse({"error": error}, status, headers=headers)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Convert an HTTP error of the application or of Starlette to an error response."""
    assert isinstance(error, HTTPException)
    message, param, code = str(error.detail), None, None
    if isinstance(error, ApiError):
        param, code = error.param, error.code
    elif error.status_code in (404, 405):  # raised by the router
        message, code = _no_such_route(request, error), "unknown_url"
    return error_response(error.status_code, message, param, code, error.headers)


def _no_such_route(request: Request, error: HTTPException) -> str:
    """Return the message about a path or a method that no route has, with those that exist."""
    called = f"{request.method} {request.url.path[:128]}"
    allowed = (error.headers or {}).get("Allow")
    if allowed:
        return f"{called}: this path does not support the method; use {allowed}"
    known = [
        f"{method} {route.path.replace(':path', '')}"
        for route in request.app.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in sorted(route.methods or ())
    ]
    return f"{called}: no such endpoint; use one of {', '.join(known)}"


async def on_invalid_request(request: Request, error: Exception) -> JSONResponse:
    """Convert a validation error to an error response that reports the first problem in one line."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part)[:64] for part in first["loc"][1:]]
    name = where[0] if where else None
    message = first["msg"]
    if first["type"] == "value_error":  # raised by a validator above
        message = str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        message = "no such parameter"
    if first["type"] == "missing" and not where:
        message = "the request has no JSON body; send one with Content-Type: application/json"
    return error_response(400, f"{'.'.join(where)}: {message}" if where else message, name)
