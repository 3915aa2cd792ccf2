"""Schemas of the OpenAI chat completions API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from tnnlm.serving.schemas import INT64, STRICT, SamplingRequest, without_nulls
from tnnlm.serving.settings import LOGPROBS, MESSAGES


class ChatMessage(BaseModel):
    """Message of a conversation."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: str
    """Text; of several text parts, the text of all of them in lines, as in vLLM."""
    name: str | None = Field(None, max_length=256)

    _nulls = model_validator(mode="before")(without_nulls)

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(map(_is_text, value)):
            raise ValueError('expected a string or a list of parts {"type": "text", "text": "..."}')
        return "\n".join(part["text"] for part in value)


def _is_text(part: Any) -> bool:
    if not isinstance(part, dict) or {*part} != {"type", "text"}:
        return False
    return part["type"] == "text" and isinstance(part["text"], str)


class ChatRequest(SamplingRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=INT64)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT64)
    """Another name of ``max_tokens``, which has no default but that of the server."""
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=LOGPROBS)
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None

    @property
    def new_tokens(self) -> int | None:
        """Maximum number of tokens to generate for each answer; None for the default of the server."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """Number of most likely tokens to score at each position; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise ValueError("differs from max_tokens, its older name; omit one of the two")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs", True):  # logprobs is missing if it is invalid
            raise ValueError("needs logprobs=true")
        return value

    @field_validator("tools", "tool_choice", "functions", "function_call")
    @classmethod
    def _no_tools(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("tool calls are not supported; omit it, or ask for JSON with response_format")
        return value
