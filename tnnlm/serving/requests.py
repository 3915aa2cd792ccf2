"""Validation and tokenization of requests, up to the prompts and sequences that the scheduler takes."""

from __future__ import annotations

import time
from typing import NamedTuple

from tnnlm.detokenizer import TextStream
from tnnlm.errors import UserError
from tnnlm.inference.prompts import encode_prompt
from tnnlm.inference.sampling import SamplingParams
from tnnlm.serving.answer import ID_BYTES, answer_bytes
from tnnlm.serving.logprobs import LogprobsFormat
from tnnlm.serving.responses import CompletionResponse
from tnnlm.serving.sampler import SequenceSampler
from tnnlm.serving.schemas import ApiError, CompletionRequest
from tnnlm.serving.sequence import GeneratedSequence, Prompt, StoppedText
from tnnlm.serving.settings import Settings
from tnnlm.tokenizer import TextTokenizer


class ParsedRequest(NamedTuple):
    """Validated request: its response, and its prompts for the scheduler."""

    response: CompletionResponse
    prompts: list[Prompt]
    answer_bytes: int
    """Estimated size of the answer in bytes."""


class RequestParser:
    """Parser of requests that tokenizes prompts and checks token ids, lengths and names against the model."""

    def __init__(self, tokenizer: TextTokenizer, settings: Settings) -> None:
        self.tokenizer = tokenizer
        self.model = settings.name
        self.limits = settings.limits
        self._parse_special = settings.parse_special
        self._missing = {*tokenizer.missing_ids(tokenizer.size)}

    def check_model(self, name: str) -> None:
        """Check that a request is for the served model; an empty name is accepted.

        Raises:
            ApiError: 404 for another model.
        """
        if name not in ("", self.model):
            raise ApiError(
                404, f"model: {name!r} is not served here; use {self.model!r}", "model", "model_not_found"
            )

    def parse(self, request: CompletionRequest, partition: bytes = b"") -> ParsedRequest:
        """Return the prompts and sequences of a request, ready for the scheduler.

        Args:
            request: Validated body.
            partition: Part of the prefix cache for its prompts.

        Raises:
            ApiError: 400 or 404, with the invalid parameter.
        """
        arrived = time.monotonic()
        self.check_model(request.model)
        if request.max_tokens > self.limits.max_tokens:
            message = f"max_tokens: must be at most {self.limits.max_tokens:,} (--max-tokens)"
            raise ApiError(400, message, "max_tokens")
        given = request.prompts()
        most = self.limits.rows_per_request
        if len(given) * request.n > most:
            raise ApiError(400, f"n: prompts times n must be at most {most} (--max-request-rows)", "n")
        special = self._parse_special if request.parse_special is None else request.parse_special
        rows = [self._tokens(prompt, special) for prompt in given]
        size = self._size(request, rows)
        bias = self._bias(request.logit_bias)
        sampling = SamplingParams(temperature=request.temperature, top_k=request.top_k, top_p=request.top_p)
        streams, echoes = zip(*(self._begin(tokens, request.echo) for tokens in rows), strict=True)
        sequences = []
        for index in range(len(rows) * request.n):
            sampler = SequenceSampler(
                sampling,
                self.tokenizer.size,
                seed=request.seed,
                index=index,
                bias=bias,
                presence=request.presence_penalty,
                frequency=request.frequency_penalty,
            )
            text = StoppedText(streams[index // request.n].fork(), request.stop)
            deadline = arrived + self.limits.timeout
            sequences.append(
                GeneratedSequence(sampler, text, request.max_tokens, deadline, logprobs=request.logprobs)
            )
        scored = request.logprobs if request.echo else None
        prompts = [
            Prompt(tokens, sequences[i * request.n : (i + 1) * request.n], scored, echoes[i], partition)
            for i, tokens in enumerate(rows)
        ]
        formats = [part for tokens in rows for part in self._formats(tokens, request.echo, request.n)]
        most_bytes = self.limits.max_answer_bytes
        response = CompletionResponse(
            self.model, prompts, formats, request.stream, most_bytes, request.return_token_ids
        )
        return ParsedRequest(response, prompts, size)

    def _size(self, request: CompletionRequest, rows: list[list[int]]) -> int:
        """Return the estimated size of the answer in bytes.

        Raises:
            ApiError: 400 if the answer, or the prompts together, are too large.
        """
        read = sum(map(len, rows))
        if read > self.limits.max_prompt_tokens:
            limit = f"at most {self.limits.max_prompt_tokens:,} (--max-prompt-tokens)"
            message = f"prompt: the prompts have {read:,} tokens together; send {limit} per request"
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        tokens = request.n * (len(rows) * request.max_tokens + (read if request.echo else 0))
        size, most = answer_bytes(tokens, request.logprobs), self.limits.max_answer_bytes
        if request.return_token_ids:
            size += ID_BYTES * request.n * (len(rows) * request.max_tokens + read)
        if size <= most:
            return size
        scores = "" if request.logprobs is None else f" with {request.logprobs} logprobs"
        fields = [
            name
            for name in ("n", "max_tokens", "echo", "logprobs", "return_token_ids")
            if getattr(request, name)
        ]
        raise ApiError(
            400,
            f"{fields[0]}: the answer may have {tokens:,} tokens{scores}, about {size >> 20:,} MiB; reduce "
            f"{', '.join(fields)} to stay below {most >> 20} MiB (--max-answer-mb)",
            fields[0],
        )

    def _begin(self, tokens: list[int], echo: bool) -> tuple[TextStream, str]:
        """Return the detokenizer that completions continue, and the text of the prompt if it is echoed.

        The text contains the names of special tokens; bytes at its end that are no character yet are left to
        the completion.
        """
        detokenizer = self.tokenizer.detokenizer
        if not echo:
            return TextStream(detokenizer, started=self._has_text(tokens)), ""
        stream = TextStream(detokenizer)
        return stream, "".join([stream.push(token, show_special=True) for token in tokens])

    def _formats(self, tokens: list[int], echo: bool, n: int) -> list[LogprobsFormat]:
        started = not echo and self._has_text(tokens)
        n_prompt, detokenizer = len(tokens) if echo else 0, self.tokenizer.detokenizer
        return [LogprobsFormat(detokenizer, started, n_prompt, self.tokenizer.eos_id) for _ in range(n)]

    def _has_text(self, tokens: list[int]) -> bool:
        return not all(self.tokenizer.detokenizer.is_special(token) for token in tokens)

    def _tokens(self, prompt: str | list[int], parse_special: bool) -> list[int]:
        if isinstance(prompt, str):
            try:
                tokens = encode_prompt(self.tokenizer, prompt, parse_special)
            except UserError as error:
                raise ApiError(400, str(error), "prompt") from None
        else:
            tokens = prompt
            if not all(0 <= token < self.tokenizer.size for token in tokens):
                raise ApiError(
                    400, f"prompt: token ids must be from 0 to {self.tokenizer.size - 1}", "prompt"
                )
            if unknown := self._missing.intersection(tokens):
                raise ApiError(
                    400, f"prompt: the vocabulary has no token with the id {min(unknown)}", "prompt"
                )
        if not tokens:
            raise ApiError(400, "prompt: is empty; give at least one token id", "prompt")
        if len(tokens) > self.limits.max_prompt_tokens:
            limit = f"shorten it to at most {self.limits.max_prompt_tokens:,} (--max-prompt-tokens)"
            raise ApiError(
                400, f"prompt: has {len(tokens):,} tokens; {limit}", "prompt", "context_length_exceeded"
            )
        return tokens

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        bias = {}
        for key, value in given.items():
            known = key.isascii() and key.isdigit() and len(key) < 10 and int(key) < self.tokenizer.size
            known = known and key == str(int(key))  # 05 and 5 would be one id with two values
            if not known or int(key) in self._missing:
                raise ApiError(400, f"logit_bias: {key[:32]!r} is not a token id", "logit_bias")
            if not -100 <= value <= 100:
                raise ApiError(400, f"logit_bias: {value} must be from -100 to 100", "logit_bias")
            bias[int(key)] = value
        return bias
