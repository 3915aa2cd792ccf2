"""Constrained output: JSON by a schema, or text by a regular expression, with llguidance.

After each token, the parser of llguidance gives the tokens that can follow; the logits of all others become
minus infinity. Schemas and expressions may come from strangers: their size, and the work and memory of their
parser, are limited.
"""

from __future__ import annotations

import importlib.util
import json
import math
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tnnlm.errors import UserError, one_line
from tnnlm.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LONGEST_SCHEMA = 1 << 16
"""Largest number of characters of a schema."""
LONGEST_REGEX = 1 << 12
"""Largest number of characters of a regular expression."""
MULTIPLES = 1000
"""Largest product of the numbers of ``multipleOf`` in a schema, each of which is the size of a table."""
START_SECONDS = 0.25
"""Processor time that the first tokens of a grammar may take together, in seconds."""
LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}
"""Limits of the parser, of which a unit takes between 0.02 and 0.07 microseconds by the documentation of
llguidance, and a state of the lexer up to 2 kB."""
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""White space of JSON: any amount of it would let a model write nothing else."""
_MISSING = (
    "constrained output needs the package llguidance",
    "install it, or the extra [constrained] of tnnlm",
)


def check_installed(where: str) -> None:
    """Check that llguidance is installed.

    Args:
        where: Place that the error message starts with.

    Raises:
        UserError: If it isn't.
    """
    if importlib.util.find_spec("llguidance") is None:
        raise UserError(
            f"{where}: constrained output needs the package llguidance",
            "install it, or the extra [constrained] of tnnlm",
        )


class Grammar:
    """Grammar that generated text follows, from :class:`GrammarCompiler`; all its matchers share a budget."""

    def __init__(self, matcher: LLMatcher, end: int, token_seconds: float | None) -> None:
        """Take a matcher of llguidance at the beginning of a text, the end token, and the time per token."""
        self._matcher, self._end = matcher, end
        self._token_seconds = token_seconds
        self._tokens, self._seconds = 0, 0.0

    def start(self) -> GrammarMatcher:
        """Return the matcher of a new sequence."""
        return GrammarMatcher(self, self._matcher.deep_copy(), self._end)

    def spent(self, seconds: float) -> None:
        """Count the processor time of a token.

        Raises:
            UserError: If tokens take more time than they may.
        """
        self._tokens, self._seconds = self._tokens + 1, self._seconds + seconds
        if self._token_seconds and self._seconds > START_SECONDS + self._token_seconds * self._tokens:
            raise UserError("the grammar takes too much time per token", "use a simpler one")


class GrammarMatcher:
    """Position in a grammar after the tokens of one sequence."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher, end: int) -> None:
        self._grammar, self._matcher, self._end = grammar, matcher, end

    def forbidden(self, vocabulary: int) -> Tensor:
        """Return which tokens can't follow, (V,); the end token can once the text is complete.

        Raises:
            UserError: If the parser exceeds a limit.
        """
        started = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=vocabulary, bitorder="little")
        if not allowed.any():
            allowed[self._end] = 1
        self._grammar.spent(time.thread_time() - started)
        return torch.from_numpy(allowed == 0)

    def took(self, token: int) -> None:
        """Continue after a token.

        Raises:
            UserError: If the token can't follow, or the parser exceeds a limit.
        """
        if token != self._end:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"the grammar can't be continued ({_reason(self._matcher)})", "use a simpler one")


class GrammarCompiler:
    """Compiler of grammars for a tokenizer; used by several threads.

    Args:
        tokenizer: Tokenizer of the model.
        token_seconds: Processor time per token that a grammar may take; None doesn't limit it.
    """

    def __init__(self, tokenizer: TextTokenizer, token_seconds: float | None = None) -> None:
        self._tokenizer = tokenizer
        self._token_seconds = token_seconds
        self._lock = threading.Lock()
        self._prepared: LLTokenizer | None = None

    def json_schema(self, schema: Any, where: str) -> Grammar:
        """Return the grammar of JSON that a schema describes, in one line.

        Args:
            schema: JSON schema as data.
            where: Place that error messages start with.

        Raises:
            UserError: If the schema is too large, invalid, or uses keywords that llguidance lacks, or if
                llguidance is not installed.
        """
        try:
            text, multiples = json.dumps(schema), _product_of_multiples(schema)
        except RecursionError:
            raise UserError(f"{where}: the schema is nested too deeply") from None
        if len(text) > LONGEST_SCHEMA:
            raise UserError(
                f"{where}: the schema has {len(text):,} characters", f"use at most {LONGEST_SCHEMA:,}"
            )
        if not isinstance(schema, dict):
            raise UserError(f"{where}: a schema is an object", 'write {"type": "object", ...}')
        if multiples > MULTIPLES:
            raise UserError(f"{where}: multipleOf needs too large tables", "omit it, or use smaller numbers")
        return self._compiled("schema", text, where)

    def regex(self, pattern: str, where: str) -> Grammar:
        """Return the grammar of text that matches a regular expression as a whole.

        Args:
            pattern: Expression in the syntax of Rust's regex library, without look-around.
            where: Place that error messages start with.

        Raises:
            UserError: If the expression is too long or invalid, or if llguidance is not installed.
        """
        if not 0 < len(pattern) <= LONGEST_REGEX:
            raise UserError(
                f"{where}: the expression has {len(pattern):,} characters", f"use 1 to {LONGEST_REGEX:,}"
            )
        return self._compiled("regular expression", pattern, where)

    def _compiled(self, kind: str, source: str, where: str) -> Grammar:
        check_installed(where)
        from llguidance import LLMatcher, LLParserLimits

        try:
            if kind == "schema":
                grammar = LLMatcher.grammar_from_json_schema(source, overrides=_LAYOUT)
            else:
                grammar = LLMatcher.grammar_from_regex(source)
            limits = LLParserLimits(**LIMITS)
            matcher = LLMatcher(self._vocabulary(where), grammar, log_level=0, limits=limits)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{where}: the {kind} is refused ({one_line(error)})", "correct it") from None
        if matcher.is_error():
            raise UserError(f"{where}: the {kind} is refused ({_reason(matcher)})", "correct or simplify it")
        return Grammar(matcher, self._tokenizer.eos_id, self._token_seconds)

    def _vocabulary(self, where: str) -> LLTokenizer:
        """Return the tokens as llguidance needs them, which takes a while at the first call."""
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._prepared is None:
                if not self._tokenizer.detokenizer.exact:
                    raise UserError(
                        f"{where}: the tokenizer has a decoder by which tokens have no fixed bytes"
                    )
                self._prepared = LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer)))
            return self._prepared


class _Vocabulary:
    """Tokens with their bytes, with the attributes that llguidance reads."""

    bos_token_id = None

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        missing = {*tokenizer.missing_ids(tokenizer.size)}
        detokenizer = tokenizer.detokenizer
        self.special_token_ids = [
            token for token in range(tokenizer.size) if token in missing or detokenizer.is_special(token)
        ]
        self.tokens = [
            f"<missing {token}>".encode() if token in missing else detokenizer.token_bytes(token)
            for token in range(tokenizer.size)
        ]

    def __call__(self, text: bytes | str) -> list[int]:
        """Return the tokens of a text, by which llguidance only tests whether text can be encoded."""
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _product_of_multiples(schema: Any) -> float:
    """Return the product of all numbers of ``multipleOf``, or of their inverses if these are larger."""
    if isinstance(schema, list):
        return math.prod(map(_product_of_multiples, schema))
    if not isinstance(schema, dict):
        return 1.0
    product = math.prod(map(_product_of_multiples, schema.values()))
    own = schema.get("multipleOf")
    if isinstance(own, int | float) and own > 0:
        product *= max(float(own), 1 / own) if own < MULTIPLES else math.inf
    return product


def _reason(matcher: LLMatcher) -> str:
    return one_line(Exception(matcher.get_error()))[:200]
