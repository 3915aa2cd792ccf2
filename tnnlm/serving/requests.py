"""From a request as it came to what the scheduler takes, or a refusal that says why."""

from __future__ import annotations

import time
from typing import NamedTuple

from tnnlm.inference.sampling import SamplingParams
from tnnlm.serving.responses import CompletionResponse
from tnnlm.serving.sampler import SequenceSampler
from tnnlm.serving.schemas import ApiError, CompletionRequest
from tnnlm.serving.sequence import GeneratedSequence, Prompt, StoppedText
from tnnlm.serving.settings import PROMPTS, Limits
from tnnlm.tokenizer import TextTokenizer


class ParsedRequest(NamedTuple):
    """A request that was accepted."""

    response: CompletionResponse
    prompts: list[Prompt]


class RequestParser:
    """Checks what a schema can't: ids, lengths, names; tokenizes."""

    def __init__(self, tokenizer: TextTokenizer, model: str, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.limits = limits

    def check_model(self, name: str) -> None:
        """Refuse any model but the one that is served.

        Raises:
            ApiError: 404.
        """
        if name not in ("", self.model):
            raise ApiError(404, f"no model {name!r} here: it is {self.model!r}", "model", "model_not_found")

    def parse(self, request: CompletionRequest) -> ParsedRequest:
        """The sequences that a request asks for, ready to be submitted.

        Raises:
            ApiError: 400 or 404, with the parameter that is wrong.
        """
        arrived = time.monotonic()
        self.check_model(request.model)
        if request.max_tokens > self.limits.max_tokens:
            raise ApiError(400, f"max_tokens: at most {self.limits.max_tokens:,} here", "max_tokens")
        given = request.prompts()
        most = min(PROMPTS, self.limits.max_batch)
        if len(given) * request.n > most:
            raise ApiError(400, f"prompts times n: at most {most} texts per request", "n")
        rows = [self._tokens(prompt) for prompt in given]
        bias = self._bias(request.logit_bias)
        sampling = SamplingParams(temperature=request.temperature, top_k=request.top_k, top_p=request.top_p)
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
            text = StoppedText(self.tokenizer, request.stop)
            deadline = arrived + self.limits.timeout
            sequences.append(
                GeneratedSequence(sampler, text, request.max_tokens, deadline, logprobs=request.logprobs)
            )
        scored = request.logprobs if request.echo else None
        prompts = [
            Prompt(tokens, sequences[i * request.n : (i + 1) * request.n], scored)
            for i, tokens in enumerate(rows)
        ]
        return ParsedRequest(CompletionResponse(self.model, self.tokenizer, prompts, request.echo), prompts)

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            try:
                tokens = self.tokenizer.encode(prompt)
            except (TypeError, UnicodeEncodeError):
                raise ApiError(400, "prompt: is not valid Unicode", "prompt") from None
        else:
            tokens = prompt
            if not all(0 <= token < self.tokenizer.size for token in tokens):
                raise ApiError(400, f"prompt: token ids are from 0 to {self.tokenizer.size - 1}", "prompt")
        if not tokens:
            raise ApiError(400, "prompt: is empty; give at least one character", "prompt")
        if len(tokens) > self.limits.max_prompt_tokens:
            limit = f"at most {self.limits.max_prompt_tokens:,} here"
            raise ApiError(
                400, f"prompt: {len(tokens):,} tokens; {limit}", "prompt", "context_length_exceeded"
            )
        return tokens

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        bias = {}
        for key, value in given.items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < self.tokenizer.size):
                raise ApiError(400, f"logit_bias: {key[:32]!r} is no token id", "logit_bias")
            if not -100 <= value <= 100:
                raise ApiError(400, f"logit_bias: {value} is not from -100 to 100", "logit_bias")
            bias[int(key)] = value
        return bias
