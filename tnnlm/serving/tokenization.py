"""Tokens of prompts and text of tokens, with the bodies of ``/tokenize`` and ``/detokenize``, as in vLLM."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from tnnlm.serving.chat_schemas import ChatMessage
from tnnlm.serving.logprobs import token_word
from tnnlm.serving.requests import RequestParser
from tnnlm.serving.schemas import STRICT, without_defaults
from tnnlm.serving.settings import MESSAGES


class TokenizeRequest(BaseModel):
    """Body of ``POST /tokenize``: a prompt, or the messages of a chat."""

    model_config = STRICT
    model: str = Field("", max_length=512)
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MESSAGES, validate_default=True)
    add_special_tokens: bool = True
    """Accepted for compatibility and ignored, because no special tokens are added to prompts."""
    return_token_strs: bool = False
    """Whether to return the text of each token."""
    parse_special: bool | None = None
    """Whether the names of special tokens in the prompt are encoded as these tokens; None takes the setting
    of the server."""
    cache_salt: str | None = Field(None, min_length=1, max_length=512)
    """Secret of the client, as in chats, whose tokens depend on the answers that it got before."""

    _unset = model_validator(mode="before")(without_defaults)

    @field_validator("messages")
    @classmethod
    def _one_of_both(cls, value: list[ChatMessage] | None, info: ValidationInfo) -> list[ChatMessage] | None:
        if "prompt" in info.data and (value is None) == (info.data["prompt"] is None):
            raise ValueError("give either prompt or messages")
        return value


class DetokenizeRequest(BaseModel):
    """Body of ``POST /detokenize``."""

    model_config = STRICT
    model: str = Field("", max_length=512)
    tokens: list[int]

    _unset = model_validator(mode="before")(without_defaults)


def tokenized(parser: RequestParser, tokens: list[int], with_text: bool) -> dict[str, Any]:
    """Return the answer of ``/tokenize``; ``with_text`` adds the text of each token."""
    detokenizer = parser.tokenizer.detokenizer
    words = [token_word(detokenizer, token, i == 0) for i, token in enumerate(tokens)] if with_text else None
    most = parser.limits.max_prompt_tokens
    return {"count": len(tokens), "max_model_len": most, "tokens": tokens, "token_strs": words}
