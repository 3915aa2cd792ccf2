"""A converted model at a terminal: streamed text, several samples, a conversation. Behind generate.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TextIO

import torch

from tnnlm.conversion.convert import recurrences
from tnnlm.errors import UserError
from tnnlm.generation import MAX_NEW_TOKENS, Context, Continuation, Sampling, TextGenerator
from tnnlm.ops.recurrence import state_bytes
from tnnlm.runs import load_for_decoding


class Decoder:
    """A loaded model with its sampling settings and random stream."""

    def __init__(self, generator: TextGenerator, sampling: Sampling, max_new_tokens: int, seed: int) -> None:
        if not 0 <= max_new_tokens <= MAX_NEW_TOKENS:
            raise UserError(f"{max_new_tokens} new tokens: must be from 0 to {MAX_NEW_TOKENS:,}")
        self.generator = generator
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.random = torch.Generator(generator.device).manual_seed(seed)

    @classmethod
    def load(
        cls,
        target: str | None,
        runs_dir: Path,
        device: str,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
    ) -> Decoder:
        """Find and load a converted model.

        Raises:
            UserError: if there is none, it is damaged, or the device or a number can't be used.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            where = torch.device(device)
            torch.zeros(1, device=where)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
        _, (model, tokenizer) = load_for_decoding(target, runs_dir)
        return cls(TextGenerator(model.to(where), tokenizer), sampling, max_new_tokens, seed)

    def show(self, prompt: str, n_samples: int, out: TextIO) -> None:
        """Write the prompt and its continuation as it comes; several samples under a line each."""
        context = self.generator.read(prompt)
        for index in range(n_samples):
            if n_samples > 1:
                out.write(f"--- sample {index + 1}\n")
            out.write(prompt)
            self._stream(context, out)
            out.write("\n")

    def measure(self, prompt: str, n_samples: int) -> dict[str, Any]:
        """Text and measurements as plain data; ``text`` and the times are the first sample's."""
        context = self.generator.read(prompt)
        records = [self._stream(context, None) for _ in range(n_samples)]
        result = {
            "prompt": prompt,
            "text": records[0].text,
            "prompt_tokens": context.n_tokens,
            "new_tokens": len(records[0].tokens),
            "prefill_seconds": context.seconds,
            "seconds_per_token": records[0].seconds_per_token,
            "state_bytes": sum(state_bytes(params) for params in recurrences(self.generator.model)),
        }
        if n_samples > 1:
            result["samples"] = [record.text for record in records]
        return result

    def converse(self, prompt: str | None, source: TextIO, out: TextIO) -> None:
        """Read lines and continue each on top of everything before; the state stays the same size."""
        context: Context | None = None
        while True:
            if prompt is None:
                if source.isatty():
                    out.write("> ")
                    out.flush()
                prompt = source.readline()
                if not prompt:
                    return
            if prompt.strip():
                context = self._stream(self.generator.read(prompt, context), out).context
                out.write("\n")
            prompt = None

    def _stream(self, context: Context, out: TextIO | None) -> Continuation:
        record, pieces = self.generator.write(context, self.max_new_tokens, self.sampling, self.random)
        for piece in pieces:
            if out is not None:
                out.write(piece)
                out.flush()
        if out is not None and out.isatty():
            speed = f"{len(record.tokens)} tokens, {1e3 * record.seconds_per_token:.1f} ms each"
            sys.stderr.write(f"\n[{speed}]")
        return record
