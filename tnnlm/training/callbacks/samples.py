"""Samples that the model generates at each validation."""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from tnnlm.errors import UserError, one_line
from tnnlm.files import append_text
from tnnlm.inference.chat import encode_chats
from tnnlm.inference.generator import GenerationState, TextGenerator
from tnnlm.inference.sampling import SamplingParams
from tnnlm.models.causal_lm import CausalLM
from tnnlm.training.lit_module import LitModel, tokenizer_of
from tnnlm.training.loggers.console import show_line
from tnnlm.training.tasks import CausalTask


class SampleWriter(Callback):
    """Callback that appends a sample of the converted model to samples.txt and logs it as text."""

    def __init__(self, path: Path, prompt: str, n_tokens: int, *, chat: bool = False) -> None:
        """Append samples to ``path``; with ``chat``, the prompt is a message by the chat template."""
        self._chat = chat
        self.path = path
        self.prompt = prompt
        self.n_tokens = n_tokens

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Generate one sample, with a separate random generator so that training is not affected."""
        assert isinstance(pl_module, LitModel)
        task, model = pl_module.task, pl_module.model
        assert isinstance(task, CausalTask)
        assert isinstance(model, CausalLM)
        if not task.recurrences or not self.n_tokens:
            return
        with task.recurrent_form(model):
            if trainer.is_global_zero:
                self._write(trainer, TextGenerator(model, tokenizer_of(trainer)))

    def _prompted(self, writer: TextGenerator) -> GenerationState:
        """Return the state after the prompt, or after an end token if there is none or it has no tokens."""
        try:
            if self.prompt and self._chat:
                return writer.prefill_tokens(encode_chats(writer.tokenizer, [self.prompt]).rows)
            if self.prompt:
                return writer.prefill([self.prompt])
        except UserError as error:  # the tokenizer of other data may not know the default prompt
            show_line(f"warning: trainer.sample_prompt: {error.reason}; samples begin without it")
            self.prompt = ""
        return writer.prefill_tokens([[writer.tokenizer.eos_id]])

    def _write(self, trainer: lightning.Trainer, writer: TextGenerator) -> None:
        generator = torch.Generator(writer.device).manual_seed(trainer.global_step)
        state = self._prompted(writer)
        record, chunks = writer.stream(state, self.n_tokens, SamplingParams(), generator)
        for _ in chunks:
            pass
        text, step = f"{self.prompt}{record.text}", trainer.global_step
        try:
            append_text(self.path, f"--- step {step}\n{text}\n\n")
        except (OSError, UserError) as error:  # a sample is no reason to stop the training
            show_line(f"warning: {self.path}: {one_line(error)}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # TensorBoard renders Markdown, which would drop line breaks and indentation outside of code.
                logger.experiment.add_text("sample", f"```\n{text}\n```", step)
            elif isinstance(logger, WandbLogger):
                logger.log_text("sample", columns=["step", "text"], data=[[str(step), text]], step=step)
