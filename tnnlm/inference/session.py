"""A converted model at a terminal: streamed text, several samples, a conversation. Behind generate.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from tnnlm.errors import UserError
from tnnlm.inference.engine import EngineInfo
from tnnlm.inference.generator import Completion, GenerationState, TextGenerator, check_new_tokens, join
from tnnlm.inference.load import load_engine
from tnnlm.inference.sampling import SamplingParams
from tnnlm.inference.state_file import load_state, save_state
from tnnlm.machine.threads import limit_threads
from tnnlm.models.causal_lm import state_bytes


class GenerationSession:
    """A loaded model with its sampling settings and random stream."""

    def __init__(
        self,
        generator: TextGenerator,
        sampling: SamplingParams,
        max_new_tokens: int,
        seed: int,
        engine: EngineInfo,
    ) -> None:
        check_new_tokens(max_new_tokens)
        self.generator = generator
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.engine = engine
        """what runs"""
        self.random = torch.Generator(generator.device).manual_seed(seed)
        self.state: GenerationState | None = None
        """after the last token, or as loaded"""

    @classmethod
    def load(
        cls,
        target: str | None,
        runs_dir: Path,
        device: str,
        sampling: SamplingParams,
        max_new_tokens: int,
        seed: int,
        dtype: str,
        engine: str,
    ) -> GenerationSession:
        """Find and load a converted model.

        Raises:
            UserError: if there is none, it is damaged, or the device or a number can't be used.
        """
        limit_threads()
        loaded = load_engine(target, runs_dir, device=device, dtype=dtype, engine=engine)
        return cls(loaded.generator, sampling, max_new_tokens, seed, loaded.info)

    def load_state(self, path: Path, reseed: bool) -> None:
        """Go on from a saved state, and from its random stream unless ``reseed``.

        Raises:
            CheckpointError: if it is missing, damaged, or another model's.
        """
        self.state, random = load_state(path, self.generator)
        if random is not None and not reseed:
            self.random.set_state(random)

    def save_state(self, path: Path) -> None:
        """Write the state after the last token.

        Raises:
            UserError: if there was no token.
        """
        if self.state is None:
            raise UserError(f"--save-state {path}: there was no prompt, so there is no state to keep")
        save_state(path, self.generator, self.state, self.random)

    def show(self, prompt: str | None, n_samples: int, out: TextIO) -> None:
        """Write the prompt and its continuation as it comes; several samples are generated
        together and written in turn."""
        state = self._state_after(prompt)
        if n_samples == 1:
            out.write(prompt or "")
            self.state = self._stream(state, out).state
            out.write("\n")
            return
        for index, record in enumerate(self._batch(state.select([0] * n_samples))):
            out.write(f"--- sample {index + 1}\n{prompt or ''}{record.text}\n")

    def show_batch(self, prompts: Sequence[str], out: TextIO) -> None:
        """Continue several prompts together, then write each with its continuation."""
        self._check_rows(len(prompts))
        records = self._batch(self.generator.prefill(prompts, self.state))
        for prompt, record in zip(prompts, records, strict=True):
            out.write(f"--- {prompt}\n{record.text}\n")

    def measure(self, prompt: str | None, n_samples: int) -> dict[str, Any]:
        """Text and measurements as plain data; ``text`` and the times are the first sample's."""
        state = self._state_after(prompt)
        if n_samples == 1:
            records = [self._stream(state, None)]
            self.state = records[0].state
        else:
            records = self._batch(state.select([0] * n_samples))
        result = self._measured(state, records[0]) | {"prompt": prompt or "", "text": records[0].text}
        if n_samples > 1:
            result["samples"] = [record.text for record in records]
        return result

    def measure_batch(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Texts and measurements of a batch; times are those of the whole."""
        self._check_rows(len(prompts))
        state = self.generator.prefill(prompts, self.state)
        records = self._batch(state)
        longest = max(records, key=lambda record: len(record.tokens))
        texts = [{"prompt": p, "text": r.text} for p, r in zip(prompts, records, strict=True)]
        return self._measured(state, longest) | {"samples": texts}

    def converse(self, prompt: str | None, source: TextIO, out: TextIO) -> None:
        """Read lines and continue each on top of everything before; the state stays the same size."""
        while True:
            if prompt is None:
                if source.isatty():
                    out.write("> ")
                    out.flush()
                prompt = source.readline()
                if not prompt:
                    return
            if prompt.strip():
                self.state = self._stream(self._state_after(prompt), out).state
                out.write("\n")
            prompt = None

    def _measured(self, state: GenerationState, record: Completion) -> dict[str, Any]:
        return {
            "prompt_tokens": state.n_tokens,
            "new_tokens": len(record.tokens),
            "prefill_seconds": state.seconds,
            "seconds_per_token": record.seconds_per_token,
            "state_bytes": state_bytes(self.generator.model.init_state(1)),
            "engine": str(self.engine),
            "engine_info": asdict(self.engine),
        }

    def _state_after(self, prompt: str | None) -> GenerationState:
        """After the prompt, on top of what came before; without a prompt, that alone."""
        self._check_rows(1)
        if prompt is None and self.state is not None:
            return self.state
        return self.generator.prefill([prompt or ""], self.state)

    def _check_rows(self, prompts: int) -> None:
        if self.state is not None and len(self.state.lengths) != prompts:
            raise UserError(
                f"the loaded state has {len(self.state.lengths)} rows, and there are {prompts} prompts",
                "give as many",
            )

    def _batch(self, state: GenerationState) -> list[Completion]:
        records = self.generator.generate(state, self.max_new_tokens, self.sampling, self.random)
        self.state = join([record.state for record in records])
        return records

    def _stream(self, state: GenerationState, out: TextIO | None) -> Completion:
        record, pieces = self.generator.stream(state, self.max_new_tokens, self.sampling, self.random)
        for piece in pieces:
            if out is not None:
                out.write(piece)
                out.flush()
        if out is not None and out.isatty():
            speed = f"{len(record.tokens)} tokens, {1e3 * record.seconds_per_token:.1f} ms each"
            sys.stderr.write(f"\n[{speed}]")
        return record
