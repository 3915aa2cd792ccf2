"""Runs of a stranger, whose files name or carry code that leaves a trace when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.models import FAMILIES, tiny_config
from tnnlm.checkpoints.training import checkpoint_entry
from tnnlm.config.loader import config_to_yaml
from tnnlm.config.schema import Config
from tnnlm.models.causal_lm import CausalLM
from tnnlm.tokenizer import TextTokenizer, train_bpe

MODULE = """
from pathlib import Path
from tnnlm.kernels import TNOConfig, TNOKernel, register_kernel
Path({trace!r}).touch()
register_kernel("theirs", TNOConfig)(TNOKernel)
"""
"""Kernel module that creates a file when it runs."""


def tokenizer() -> TextTokenizer:
    return train_bpe(["the cat sat on the mat"], 300, "<eos>", 1, False)


def write_module(path: Path, trace: str) -> Path:
    """Write a kernel module that registers the kernel ``theirs`` and creates ``trace``."""
    path.write_text(MODULE.format(trace=str(Path(trace).absolute())), encoding="utf-8")
    return path


def write_run(folder: Path, **kernel: Any) -> Path:
    """Write a run with random weights, whose settings of the kernel are changed to ``kernel``."""
    torch.manual_seed(0)
    config = Config(model=tiny_config(kernel=FAMILIES["tno"](), vocab_size=300))
    config.data.source, config.data.files, config.data.vocab_size = "files", ["text.txt"], 300
    config.data.eos_token, config.trainer.accelerator = "<eos>", "cpu"
    model, own = CausalLM(config.model), tokenizer()
    entry = checkpoint_entry(config, own, None)
    entry["config"]["model"]["kernel"] |= kernel
    (folder / "checkpoints").mkdir(parents=True)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(
        {"state_dict": weights, "global_step": 0, "tnnlm": entry}, folder / "checkpoints" / "last.ckpt"
    )
    for name, value in kernel.items():
        setattr(config.model.kernel, name, value)
    (folder / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text(own.to_json(), encoding="utf-8")
    return folder
