"""Generation at a terminal for generate.py: streaming, several samples, batches, interactive mode."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from tnnlm.coverage import coverage
from tnnlm.errors import CheckpointError, UserError
from tnnlm.inference.engine import EngineInfo
from tnnlm.inference.generator import Completion, GenerationState, TextGenerator, check_new_tokens, join
from tnnlm.inference.grammar import Grammar
from tnnlm.inference.sampling import SamplingParams
from tnnlm.inference.state_file import load_state, save_state
from tnnlm.models.causal_lm import state_bytes


class GenerationSession:
    """Loaded model with its sampling parameters and random number generator."""

    def __init__(
        self,
        generator: TextGenerator,
        sampling: SamplingParams,
        max_new_tokens: int,
        seed: int,
        engine: EngineInfo,
        grammar: Grammar | None = None,
    ) -> None:
        check_new_tokens(max_new_tokens)
        self.generator = generator
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.grammar = grammar
        """Grammar of all completions; None for any text."""
        self.engine = engine
        """Description of the engine that runs the model."""
        self.random = torch.Generator(generator.device).manual_seed(seed)
        self.state: GenerationState | None = None
        """State after the last token, or as loaded; None before the first prompt."""

    def load_state(self, path: Path, reseed: bool) -> None:
        """Continue from a saved state, and from its random number generator unless ``reseed``.

        Raises:
            CheckpointError: If the file is missing or corrupt, or belongs to another model or tokenizer;
                without ``reseed`` also if it was saved on another kind of device.
        """
        self.state, random = load_state(path, self.generator)
        if random is None or reseed:
            return
        try:
            self.random.set_state(random)
        except (RuntimeError, TypeError):  # another size on a GPU than on the CPU, or damaged
            raise CheckpointError(
                f"{path}: its random number generator is not one of {self.generator.device}", "give --seed"
            ) from None

    def save_state(self, path: Path) -> None:
        """Save the state after the last token.

        Raises:
            UserError: If there was no prompt.
        """
        if self.state is None:
            raise UserError(f"--save-state {path}: there was no prompt, so there is no state to save")
        save_state(path, self.generator, self.state, self.random)

    def show(self, prompt: str | None, n_samples: int, out: TextIO) -> None:
        """Print the prompt and stream its completion; several samples are generated as a batch first."""
        state = self._state_after(prompt)
        if n_samples == 1:
            out.write(prompt or "")
            self.state = self.stream(state, out).state
            out.write("\n")
            return
        for index, record in enumerate(self._batch(state.select([0] * n_samples))):
            out.write(f"--- sample {index + 1}\n{prompt or ''}{record.text}\n")

    def show_batch(self, prompts: Sequence[str], out: TextIO) -> None:
        """Generate completions of several prompts as a batch, then print each after its prompt."""
        records = self._batch(self._prefill(prompts))
        for prompt, record in zip(prompts, records, strict=True):
            out.write(f"--- {prompt}\n{record.text}\n")

    def measure(self, prompt: str | None, n_samples: int) -> dict[str, Any]:
        """Generate, and return text and measurements as plain data.

        ``text`` and timings are those of the first sample.
        """
        state = self._state_after(prompt)
        if n_samples == 1:
            records = [self.stream(state, None)]
            self.state = records[0].state
        else:
            records = self._batch(state.select([0] * n_samples))
        result = self._measured(state, records[0]) | {"prompt": prompt or "", "text": records[0].text}
        if n_samples > 1:
            result["samples"] = [record.text for record in records]
        return result

    def measure_batch(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Generate a batch, and return completions and measurements as data; timings cover the batch."""
        state = self._prefill(prompts)
        records = self._batch(state)
        longest = max(records, key=lambda record: len(record.tokens))
        texts = [{"prompt": p, "text": r.text} for p, r in zip(prompts, records, strict=True)]
        return self._measured(state, longest) | {"samples": texts}

    def measure_rows(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Generate completions of rows of token ids, and return them and measurements as plain data.

        The rows are a batch, whose longest completion the timings are of.
        """
        state = self.generator.prefill_tokens(rows)
        records = [self.stream(state, None)] if len(rows) == 1 else self._batch(state)
        longest = max(records, key=lambda record: len(record.tokens))
        return self._measured(state, longest) | {"samples": [record.text for record in records]}

    def converse(self, prompt: str | None, source: TextIO, out: TextIO) -> None:
        """Generate a completion for each line of input; the state carries over the whole conversation.

        A line that is no prompt is reported on stderr and doesn't change the state.

        Args:
            prompt: Prompt before the first line, if any.
            source: Lines of input.
            out: Stream that completions are written to.

        Raises:
            UserError: If ``prompt`` is invalid, or the loaded state has several rows.
        """
        self._check_rows(1)
        if prompt is not None and prompt.strip():
            self._answer(prompt, out)
        answer_lines(source, out, lambda line: self._answer(line, out))

    def _answer(self, prompt: str, out: TextIO) -> None:
        """Generate a completion of a line, and continue from it with the next one."""
        self.state = self.stream(self._state_after(prompt), out).state
        out.write("\n")

    def _measured(self, state: GenerationState, record: Completion) -> dict[str, Any]:
        measured = {
            "prompt_tokens": state.n_tokens,
            "new_tokens": len(record.tokens),
            "prefill_seconds": state.seconds,
            "seconds_per_token": record.seconds_per_token,
            "state_bytes": state_bytes(self.generator.model.init_state(1)),
            "engine": str(self.engine),
            "engine_info": asdict(self.engine),
        }
        if self.generator.speculation is not None:
            measured["tokens_per_pass"] = record.tokens_per_pass
            measured["accepted_share"] = record.accepted_share
        return measured

    def _state_after(self, prompt: str | None) -> GenerationState:
        """Prefill the prompt on top of the current state; without a prompt, return the current state."""
        if prompt is None and self.state is not None:
            self._check_rows(1)
            return self.state
        return self._prefill([prompt or ""])

    def _prefill(self, prompts: Sequence[str]) -> GenerationState:
        """Prefill prompts on top of the current state, and warn of characters that the tokenizer loses."""
        self._check_rows(len(prompts))
        state = self.generator.prefill(prompts, self.state)
        found = coverage(self.generator.tokenizer, prompts)
        if found.unknown:
            sys.stderr.write(
                f"warning: {found.unknown:,} of {found.characters:,} characters of the prompt are unknown to "
                "the tokenizer\n"
            )
        return state

    def _check_rows(self, prompts: int) -> None:
        if self.state is not None and len(self.state.lengths) != prompts:
            raise UserError(
                f"--load-state: the state has {len(self.state.lengths)} rows for {prompts} prompts",
                "give one prompt per row",
            )

    def _batch(self, state: GenerationState) -> list[Completion]:
        limit, random = self.max_new_tokens, self.random
        records = self.generator.generate(state, limit, self.sampling, random, self.grammar)
        self.state = join([record.state for record in records])
        return records

    def stream(
        self, state: GenerationState, out: TextIO | None, *, stripped: bool = False, closing: str = ""
    ) -> Completion:
        """Generate a completion of a state, which is streamed to ``out`` if that is given.

        Args:
            state: State to continue.
            out: Stream that the completion is written to.
            stripped: Whether white space at its beginning is not shown.
            closing: Text that ends the completion and is not shown; empty for none.
        """
        limit, random = self.max_new_tokens, self.random
        record, chunks = self.generator.stream(state, limit, self.sampling, random, self.grammar)
        for chunk in ended_by(closing, chunks) if closing else chunks:
            shown = chunk.lstrip() if stripped else chunk
            stripped = stripped and not shown
            if out is not None:
                out.write(shown)
                out.flush()
        if out is not None and out.isatty():
            speed = f"{len(record.tokens)} tokens, {1e3 * record.seconds_per_token:.1f} ms per token"
            if self.generator.speculation is not None:
                speed += f", {record.tokens_per_pass:.1f} tokens per pass"
            sys.stderr.write(f"\n[{speed}]")
        return record


def ended_by(closing: str, chunks: Iterator[str]) -> Iterator[str]:
    """Yield chunks of text up to a closing text, which may be spread over several of them."""
    held = ""
    for chunk in chunks:
        held += chunk
        text, found, _ = held.partition(closing)
        if found:
            yield text
            return
        sizes = range(min(len(held), len(closing) - 1), 0, -1)
        begun = next((size for size in sizes if closing.startswith(held[-size:])), 0)
        text, held = held[: len(held) - begun], held[len(held) - begun :]
        if text:
            yield text
    yield held


def answer_lines(source: TextIO, out: TextIO, answer: Callable[[str], None]) -> None:
    """Call ``answer`` for each line of ``source`` that isn't blank; an error of a line is reported on stderr.

    A terminal shows ``> `` on ``out`` before each line.
    """
    while True:
        if source.isatty():
            out.write("> ")
            out.flush()
        line = source.readline()
        if not line:
            if source.isatty():  # The prompt of the shell begins a line.
                out.write("\n")
            return
        if line.strip():
            try:
                answer(line)
            except UserError as error:
                out.flush()
                print(f"error: {error}", file=sys.stderr)
