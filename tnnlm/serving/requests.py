"""Validation and tokenization of requests, up to the prompts and sequences that the scheduler takes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

from tnnlm.detokenizer import TextStream
from tnnlm.errors import UserError
from tnnlm.inference.grammar import Grammar
from tnnlm.inference.prompts import encode_prompt
from tnnlm.inference.sampling import SamplingParams
from tnnlm.serving.answer import ID_BYTES, answer_bytes
from tnnlm.serving.chat import ChatPrompt
from tnnlm.serving.chat_schemas import ChatRequest
from tnnlm.serving.logprobs import ChatLogprobsFormat, LogprobsFormat
from tnnlm.serving.responses import CompletionResponse
from tnnlm.serving.sampler import SequenceSampler
from tnnlm.serving.schemas import ApiError, CompletionRequest, SamplingRequest
from tnnlm.serving.sequence import GeneratedSequence, Prompt, StoppedText
from tnnlm.serving.settings import CHAT_TOKENS, Settings
from tnnlm.serving.wire import CHAT, COMPLETION
from tnnlm.tokenizer import TextTokenizer

SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
"""Names of the parameters of sampling, which requests have too."""


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

    def encode(self, prompt: str, parse_special: bool | None) -> list[int]:
        """Return the tokens of a prompt; without ``parse_special``, the setting of the server holds.

        Raises:
            ApiError: 400 if it is empty, too long, or no text of the tokenizer.
        """
        return self._tokens(prompt, self._parse_special if parse_special is None else parse_special)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, with the names of special tokens.

        Raises:
            ApiError: 400 if there are too many, or one is no token.
        """
        stream, text = self._begin(self._tokens(tokens, False, "tokens"), echo=True)
        return text + stream.finish()

    def check_model(self, name: str) -> None:
        """Check that a request is for the served model; an empty name is accepted.

        Raises:
            ApiError: 404 for another model.
        """
        if name not in ("", self.model):
            raise ApiError(
                404, f"model: {name!r} is not served here; use {self.model!r}", "model", "model_not_found"
            )

    def parse(
        self, request: CompletionRequest, partition: bytes = b"", grammar: Grammar | None = None
    ) -> ParsedRequest:
        """Return the prompts and sequences of a request, ready for the scheduler.

        Args:
            request: Validated body.
            partition: Part of the prefix cache for its prompts.
            grammar: Grammar of the completions.

        Raises:
            ApiError: 400 or 404, with the invalid parameter.
        """
        arrived = time.monotonic()
        given = request.prompts()
        self._check(request, len(given))
        special = self._parse_special if request.parse_special is None else request.parse_special
        rows = [self._tokens(prompt, special) for prompt in given]
        size = self._size(request, rows)
        streams, echoes = zip(*(self._begin(tokens, request.echo) for tokens in rows), strict=True)
        sequences = self._sequences(request, arrived, rows, streams, grammar)
        scored = request.logprobs if request.echo else None
        prompts = [
            Prompt(tokens, sequences[i * request.n : (i + 1) * request.n], scored, echoes[i], partition)
            for i, tokens in enumerate(rows)
        ]
        formats = [part for tokens in rows for part in self._formats(tokens, request.echo, request.n)]
        most_bytes = self.limits.max_answer_bytes
        response = CompletionResponse(
            *(self.model, prompts, formats, request.stream, most_bytes),
            token_ids=request.return_token_ids,
        )
        return ParsedRequest(response, prompts, size)

    def parse_chat(
        self,
        request: ChatRequest,
        prompt: ChatPrompt,
        tokens: list[int],
        partition: bytes = b"",
        grammar: Grammar | None = None,
    ) -> ParsedRequest:
        """Return the prompt and sequences of a chat, ready for the scheduler.

        Args:
            request: Validated body.
            prompt: Text of its messages.
            tokens: Token ids of this text.
            partition: Part of the prefix cache for its prompt.
            grammar: Grammar of the answers.

        Raises:
            ApiError: 400 or 404, with the invalid parameter.
        """
        arrived = time.monotonic()
        self._check(request, 1)
        if not tokens:
            raise ApiError(400, "messages: the chat template makes no text of them", "messages")
        size = self._size(request, [tokens])
        stream = TextStream(self.tokenizer.detokenizer, started=self._has_text(tokens))
        sequences = self._sequences(request, arrived, [tokens], [stream], grammar, prompt.lead)
        read = Prompt(tokens, sequences, partition=partition, text=prompt.text)
        scores = ChatLogprobsFormat(self.tokenizer.detokenizer, self.tokenizer.eos_id)
        most = self.limits.max_answer_bytes
        formats = [scores] * request.n
        response = CompletionResponse(self.model, [read], formats, request.stream, most, CHAT)
        return ParsedRequest(response, [read], size)

    def _check(self, request: SamplingRequest, n_prompts: int) -> None:
        """Check the model and the numbers of sequences and tokens.

        Raises:
            ApiError: 400 or 404, with the invalid parameter.
        """
        self.check_model(request.model)
        name = _limit_name(request)
        if self._new_tokens(request) > self.limits.max_tokens:
            raise ApiError(400, f"{name}: must be at most {self.limits.max_tokens:,} (--max-tokens)", name)
        most = self.limits.rows_per_request
        if n_prompts * request.n > most:
            raise ApiError(400, f"n: prompts times n must be at most {most} (--max-request-rows)", "n")

    def _new_tokens(self, request: SamplingRequest) -> int:
        given = request.new_tokens
        return min(CHAT_TOKENS, self.limits.max_tokens) if given is None else given

    def _sequences(
        self,
        request: SamplingRequest,
        arrived: float,
        rows: Sequence[Sequence[int]],
        streams: Sequence[TextStream],
        grammar: Grammar | None,
        lead: str = "",
    ) -> list[GeneratedSequence]:
        """Return the sequences of all prompts, whose tokens are ``rows``."""
        bias = self._bias(request.logit_bias)
        sampling = SamplingParams(**{name: getattr(request, name) for name in SAMPLING})
        tokens, deadline = self._new_tokens(request), arrived + self.limits.timeout
        sequences = []
        for index in range(len(streams) * request.n):
            sampler = SequenceSampler(
                sampling,
                self.tokenizer.size,
                seed=request.seed,
                index=index,
                prompt=rows[index // request.n],
                bias=bias,
                matcher=None if grammar is None else grammar.start(),
            )
            text = StoppedText(streams[index // request.n].fork(), request.stop, lead)
            scores = request.alternatives
            sequences.append(GeneratedSequence(sampler, text, tokens, deadline, logprobs=scores))
        return sequences

    def _size(self, request: SamplingRequest, rows: list[list[int]]) -> int:
        """Return the estimated size of the answer in bytes.

        Raises:
            ApiError: 400 if the answer, or the prompts together, are too large.
        """
        read, chat = sum(map(len, rows)), isinstance(request, ChatRequest)
        if read > self.limits.max_prompt_tokens:
            name, prompts = ("messages", "messages") if chat else ("prompt", "prompts")
            limit = f"at most {self.limits.max_prompt_tokens:,} (--max-prompt-tokens)"
            message = f"{name}: the {prompts} have {read:,} tokens together; send {limit} per request"
            raise ApiError(400, message, name, "context_length_exceeded")
        echoed = read if isinstance(request, CompletionRequest) and request.echo else 0
        tokens = request.n * (len(rows) * self._new_tokens(request) + echoed)
        scale = (CHAT if chat else COMPLETION).score_scale
        size, most = answer_bytes(tokens, request.alternatives, scale), self.limits.max_answer_bytes
        if isinstance(request, CompletionRequest) and request.return_token_ids:
            size += ID_BYTES * request.n * (len(rows) * request.max_tokens + read)
        if size <= most:
            return size
        scores = "" if request.alternatives is None else f" with {request.alternatives} logprobs"
        names = ("n", _limit_name(request), "echo", "logprobs", "return_token_ids")
        fields = [name for name in names if getattr(request, name, None)]
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

    def _tokens(self, prompt: str | list[int], parse_special: bool, name: str = "prompt") -> list[int]:
        if isinstance(prompt, str):
            try:
                tokens = encode_prompt(self.tokenizer, prompt, parse_special)
            except UserError as error:
                raise ApiError(400, str(error), name) from None
        else:
            tokens = prompt
            if not all(0 <= token < self.tokenizer.size for token in tokens):
                raise ApiError(
                    400, f"{name}: token ids must be from 0 to {self.tokenizer.size - 1}", "prompt"
                )
            if unknown := self._missing.intersection(tokens):
                raise ApiError(
                    400, f"{name}: the vocabulary has no token with the id {min(unknown)}", "prompt"
                )
        if not tokens:
            raise ApiError(400, f"{name}: is empty; give at least one token id", name)
        if len(tokens) > self.limits.max_prompt_tokens:
            limit = f"shorten it to at most {self.limits.max_prompt_tokens:,} (--max-prompt-tokens)"
            raise ApiError(
                400, f"{name}: has {len(tokens):,} tokens; {limit}", name, "context_length_exceeded"
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


def _limit_name(request: SamplingRequest) -> str:
    """Return the name of the parameter that limits the number of new tokens."""
    given = getattr(request, "max_completion_tokens", None)
    return "max_tokens" if given is None else "max_completion_tokens"
