"""The validation and the checkpoints of a step share one conversion of its weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.support.training_runs import tiny_run
from tnnlm.conversion import convert_kernels
from tnnlm.errors import UserError
from tnnlm.kernels import Kernel
from tnnlm.models.factory import build_model
from tnnlm.models.surgery import kernels
from tnnlm.training import conversions
from tnnlm.training.conversions import SharedConversion
from tnnlm.training.run import train


class Held(Callback):
    """Callback that records how many recurrences the model holds in each training step."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Record the number."""
        self.layers.append(len(pl_module.task.recurrences))


@pytest.mark.parametrize("average", [(), ("trainer.ema_decay=0.8", "trainer.precision=32-true")])
def test_weights_are_converted_once(monkeypatch: pytest.MonkeyPatch, average: tuple[str, ...]) -> None:
    seen: list[list[torch.Tensor]] = []

    def counting(found: list[Kernel], *rest: Any) -> Any:
        seen.append([tensor.clone() for kernel in found for tensor in kernel.state_dict().values()])
        return convert_kernels(found, *rest)

    monkeypatch.setattr(conversions, "convert_kernels", counting)
    held = Held()
    every = ("trainer.max_steps=4", "trainer.val_every_n_steps=2", "checkpoint.every_n_steps=2")
    train(tiny_run(*every, *average), extra_callbacks=[held])
    assert len(seen) == 3  # the initial weights, and those of steps 2 and 4
    for before, after in pairwise(seen):
        assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert held.layers == [0, 0, 0, 0]


def test_changed_weights_are_converted_again_and_a_failure_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_run()
    model = build_model(config)
    shared = SharedConversion(config)
    first = shared.of(kernels(model))
    assert shared.of(kernels(model)) is first
    with torch.no_grad():
        next(kernels(model)[1].parameters()).add_(1e-3)
    assert shared.of(kernels(model)) is not first
    shared.release()
    calls: list[int] = []

    def fail(*_: Any) -> Any:
        calls.append(1)
        raise UserError("no", "never")

    monkeypatch.setattr(conversions, "convert_kernels", fail)
    for _ in range(2):
        with pytest.raises(UserError, match="no"):
            shared.of(kernels(model))
    assert len(calls) == 1
