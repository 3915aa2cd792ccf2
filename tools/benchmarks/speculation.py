"""Mode speculate: tokens per second with and without speculative decoding, of the same model and engine.

Three kinds of sequences are decoded: greedy completions of Python sources; the sources themselves, where a
pass accepts what the source says next (replayed); and their tokens in random order, in which nothing can be
predicted. The sources are those of PyTorch, which a model that was trained on Python's standard library has
not seen. The latter two don't depend on the weights. What is decoded follows the first tokens of a source, in
which proposals are looked up, so that the gain depends on their number (``--contexts``).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.report import table
from tnnlm.cli.usage import trust_of
from tnnlm.config.schema import ModelConfig
from tnnlm.inference.generator import GenerationState, TextGenerator
from tnnlm.inference.load import load_engine
from tnnlm.inference.sampling import SamplingParams, sample
from tnnlm.inference.speculation import speculate
from tnnlm.machine.capabilities import describe_cpu

GREEDY = SamplingParams(temperature=0)
CONTEXTS = 512, 2048
"""Numbers of tokens of a source before those that are decoded."""
_SMALLEST_FILE = 20_000
"""Smallest source in bytes; shorter ones have too few tokens."""


def measure_speculation(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """Measure the three kinds of sequences on a trained model, sources interleaved."""
    files, length, rounds = (3, 192, 1) if args.quick else (8, 512, 2)
    contexts = args.contexts or CONTEXTS
    engine = load_engine(
        args.model,
        Path("runs"),
        device="cpu",
        dtype=args.dtype,
        engine=args.engine,
        trust=trust_of(args),
        speculate=args.speculate,
    )
    # The same sources for all contexts.
    sources = source_tokens(engine.generator, files, max(contexts) + length)
    rows = []
    for context in contexts:
        given = [tokens[: context + length] for tokens in sources]
        shuffled = [[*tokens[:context], *_shuffled(tokens[context:])] for tokens in given]
        complete = partial(_complete, engine.generator, length=length)
        replay = partial(_replay, engine.generator)
        for name, run, texts in (
            ("greedy completions", complete, given),
            ("replayed sources", replay, given),
            ("replayed in random order", replay, shuffled),
        ):
            row = _measure(run, texts, context, engine.generator, rounds)
            rows.append({"name": name, "context": context, **row})
    return {
        "mode": "speculate",
        "cpu": describe_cpu(),
        "engine": str(engine.info),
        "proposals": args.speculate,
        "results": rows,
    }


def show_speculation(result: dict[str, Any]) -> str:
    """Return the engine, and a table of the kinds."""
    return f"{result['engine']}, proposals by {result['proposals']}\n\n{speculation_table(result)}"


def speculation_table(result: dict[str, Any]) -> str:
    """Return a table of the kinds of sequences."""
    lines = [
        {
            "sequences": row["name"],
            "context": f"{row['context']:,}",
            "tokens/s without": f"{row['tokens_per_second_without']:,.0f}",
            "tokens/s with": f"{row['tokens_per_second']:,.0f}",
            "ratio": f"{row['ratio']:.2f}",
            "tokens per pass": f"{row['tokens_per_pass']:.2f}",
            "accepted": f"{row['accepted_share']:.0%}",
        }
        for row in result["results"]
    ]
    return table(lines)


def source_tokens(generator: TextGenerator, files: int, length: int) -> list[list[int]]:
    """Return the first tokens of a fixed choice of PyTorch's Python sources, at most ``length`` of each."""
    paths = sorted(Path(torch.__file__).parent.rglob("*.py"))
    large = [path for path in paths if path.stat().st_size >= _SMALLEST_FILE]
    random.Random(0).shuffle(large)
    texts = (path.read_text(encoding="utf-8") for path in large)
    encoded = (generator.tokenizer.encode(text)[:length] for text in texts)
    return [tokens for tokens, _ in zip((t for t in encoded if len(t) == length), range(files), strict=False)]


def _shuffled(tokens: Sequence[int]) -> list[int]:
    order = list(tokens)
    random.Random(0).shuffle(order)
    return order


def _measure(
    run: Callable[[Sequence[int], GenerationState, dict[str, int]], int],
    sequences: Sequence[Sequence[int]],
    context: int,
    generator: TextGenerator,
    rounds: int,
) -> dict[str, Any]:
    """Time a case with and without speculation, alternately on every sequence."""
    speculation, counts = generator.speculation, dict.fromkeys(("passes", "proposed", "accepted"), 0)
    seconds, tokens = {True: 0.0, False: 0.0}, 0
    for turn in range(rounds + 1):  # the first warms up
        for text in sequences:
            state = generator.prefill_tokens([text[:context]])
            for speculates in (turn % 2 == 0, turn % 2 == 1):
                generator.speculation = speculation if speculates else None
                found = dict(counts)
                started = time.perf_counter()
                made = run(text, state, found)
                if turn:
                    seconds[speculates] += time.perf_counter() - started
                    if speculates:
                        counts, tokens = found, tokens + made
    generator.speculation = speculation
    return {
        "tokens": tokens,
        "tokens_per_second_without": tokens / seconds[False],
        "tokens_per_second": tokens / seconds[True],
        "ratio": seconds[False] / seconds[True],
        "tokens_per_pass": tokens / counts["passes"],
        "accepted_share": counts["accepted"] / max(1, counts["proposed"]),
    }


def _complete(
    generator: TextGenerator, text: Sequence[int], state: GenerationState, counts: dict[str, int], length: int
) -> int:
    record, pieces = generator.stream(state, length, GREEDY)
    for _ in pieces:
        pass
    for name in counts:
        counts[name] += getattr(record, name)
    return len(record.tokens)


def _replay(
    generator: TextGenerator, text: Sequence[int], state: GenerationState, counts: dict[str, int]
) -> int:
    """Decode a text as if the model had chosen its tokens."""
    assert state.history is not None
    rest = text[len(state.history[0]) :]
    chooser, length = _Source(generator, rest), len(rest)
    model_state, logits = state.model_state, state.logits
    if generator.speculation is None:
        for _ in range(length):
            with torch.inference_mode():  # for each token, as in a stream
                token = chooser.choose(logits)
                logits, model_state = generator.model.step(torch.tensor([token]), model_state)
        return length
    proposer = generator.speculation.start(state.history[0], GREEDY, None)
    costs = generator.speculation.costs(1, GREEDY)
    runs = speculate(generator.model, model_state, logits, length, -1, chooser, proposer, costs)
    for run in runs:
        counts["passes"] += 1
        counts["proposed"] += run.proposed
        counts["accepted"] += len(run.tokens) - 1
    return length


class _Source:
    """Chooser that takes as long as greedy decoding, and chooses the tokens of a text."""

    def __init__(self, generator: TextGenerator, tokens: Sequence[int]) -> None:
        self._generator = generator
        self._rest = iter(tokens)

    def choose(self, logits: Tensor) -> int:
        """Return the next token of the text."""
        int(sample(self._generator.token_logits(logits), GREEDY))
        return next(self._rest)

    def check(self, logits: Tensor, proposed: Sequence[int], drawn_from: Tensor | None) -> list[int]:
        """Return the next tokens of the text, up to the first that isn't the proposed one."""
        sample(self._generator.token_logits(logits), GREEDY).tolist()
        tokens: list[int] = []
        for token in proposed:
            tokens.append(next(self._rest))
            if tokens[-1] != token:
                break
        return tokens
