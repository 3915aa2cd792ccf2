"""Scenarios on a pretended GPU, which return what they observed."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from tests.support.pretend import cuda, decoding, ranks
from tests.support.pretend.tensors import LEDGER
from tests.support.training_runs import tiny_run
from tnnlm.config.schema import ConversionConfig
from tnnlm.deployment.pipeline import convert_checkpoint
from tnnlm.kernels import KERNEL_SCHEMAS, build_kernel
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train

GPU = ("trainer.accelerator=gpu", "trainer.devices=1", "model.max_length=16", "data.max_val_tokens=200")


class Observe(Callback):
    """Callback that tells the ledger the optimizer step, and reads its launches before every step."""

    def __init__(self) -> None:
        self.launches: dict[int, int] = {}
        """Number of launches before an optimizer step."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Let the ledger ask the trainer."""
        LEDGER.step = lambda: trainer.global_step

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the launches before the first batch of an optimizer step."""
        self.launches.setdefault(trainer.global_step, LEDGER.launches.total())


class Overflow(Observe):
    """Callback that makes the gradients of some steps overflow, as float16 does at a high scale."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.scales: list[float] = []
        """Scale of the loss at the start of training, and at its end."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Read the scale of the loss."""
        super().on_train_start(trainer, pl_module)
        self._read_scale(trainer)

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Make one gradient infinite."""
        if trainer.global_step in self.steps:
            gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
            gradient.view(-1)[0] = float("inf")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Read the scale of the loss again."""
        self._read_scale(trainer)

    def _read_scale(self, trainer: lightning.Trainer) -> None:
        plugin = trainer.precision_plugin
        assert isinstance(plugin, MixedPrecision)
        assert plugin.scaler is not None
        self.scales.append(plugin.scaler.get_scale())


def one_gpu(*words: str) -> dict[str, Any]:
    """Train on one GPU."""
    with cuda.pretended_cuda():
        observed = Observe()
        summary = train(tiny_run(*GPU, *words), extra_callbacks=[observed])
    before = [observed.launches[step] for step in sorted(observed.launches)]
    return {"summary": summary, "steps": [b - a for a, b in pairwise(before)]}


def float16(*words: str) -> dict[str, Any]:
    """Train with a first and a last step that overflow, resume, convert, and generate on one GPU."""
    config = tiny_run(*GPU, "trainer.precision=16-mixed", *words)
    run, steps = Path(config.runs_dir, config.name), config.trainer.max_steps
    with cuda.pretended_cuda(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        first, then = Overflow(0, steps - 1), Overflow()
        train(config, extra_callbacks=[first])
        more = [f"trainer.{key}={steps + 1}" for key in ("max_steps", "val_every_n_steps")]
        summary = train(resumed_config(run, more), run, extra_callbacks=[then])
        LEDGER.step = lambda: -1
        decoded = decoding.decode_run(run, (("packed", "float32"), ("graph", "float32")), serve=False)
    scales, messages = [*first.scales, *then.scales], [str(warning.message) for warning in warned]
    return {"summary": summary, "scales": scales, "warnings": messages, **decoded}


def resumed(*words: str) -> dict[str, Any]:
    """Train half of the steps on one GPU, and the other half as a resumed run."""
    with cuda.pretended_cuda():
        config = tiny_run(*GPU, *words)
        steps, config.trainer.max_steps = config.trainer.max_steps, config.trainer.max_steps // 2
        train(config, extra_callbacks=[Observe()])
        run = Path(config.runs_dir, config.name)
        train(resumed_config(run, [f"trainer.max_steps={steps}"]), run, extra_callbacks=[Observe()])
    return {}


def ddp(*words: str) -> dict[str, Any]:
    """Train as one of two ranks."""
    with cuda.pretended_cuda(2), ranks.two_ranks():
        train(
            tiny_run(*GPU, "trainer.strategy=ddp", "trainer.devices=2", *words), extra_callbacks=[Observe()]
        )
    return {"collectives": [[*what, n] for what, n in ranks.COLLECTIVES.items()]}


def decoded(*words: str) -> dict[str, Any]:
    """Train, convert, generate by every engine and serve on one GPU."""
    config = tiny_run(*GPU, *words)
    with cuda.pretended_cuda():
        summary = train(config, extra_callbacks=[Observe()])
        LEDGER.step = lambda: -1
        return {"summary": summary, **decoding.decode_run(Path(config.runs_dir, config.name))}


def conversion(*words: str) -> dict[str, Any]:
    """Convert the run ``tiny`` of the current folder on one GPU, to the folder ``gpu``."""
    with cuda.pretended_cuda():
        recipe = ConversionConfig(method=words[0])
        done = convert_checkpoint("tiny", recipe, out=Path("gpu"), force=False, verify=True, device="cuda")
    return {
        "ppl": done.report.ppl,
        "not_measured": done.report.not_measured,
        "note": done.note,
        "failures": done.failures,
        "checks": [check.passed for check in done.checks],
        "errors": [layer.relative_tap_error for layer in done.report.layers],
    }


def taps(*names: str) -> dict[str, Any]:
    """Compute the taps of kernels and their gradients on one GPU."""
    with cuda.pretended_cuda():
        for name in names:
            kernel = build_kernel(KERNEL_SCHEMAS[name](name=name), 4, 32).to("cuda")
            LEDGER.step = lambda name=name: name  # type: ignore[misc]
            kernel(32).square().sum().backward()
            LEDGER.step = lambda: -1
    return {}


SCENARIOS = {
    scenario.__name__: scenario for scenario in (one_gpu, float16, resumed, ddp, decoded, conversion, taps)
}
"""Scenarios by name."""
