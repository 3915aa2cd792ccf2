"""Runs of several real processes over gloo on loopback, forked from a server that preloads all imports."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import lightning
import matplotlib.pyplot  # noqa: F401  imported before processes are forked, because every run needs it
import pytest
import torch
import torch.distributed.checkpoint.state_dict
import torch.utils.tensorboard
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tests.support.nccl import AsNccl
from tests.support.training_runs import SETTINGS, row_marks
from tnnlm.config.loader import load_config
from tnnlm.training.resume import resumed_config
from tnnlm.training.run import train


class Watch(Callback):
    """Callback that records on every rank whether gradients were reduced, all rows, and the final metrics."""

    def __init__(self, collectives: AsNccl | None = None) -> None:
        self.collectives = collectives
        self.gradients: list[float | None] = []
        self.rows: list[list[int]] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Let the record of collectives ask the trainer for the step."""
        if self.collectives is not None:
            self.collectives.step = lambda: trainer.global_step

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record a fingerprint of each row."""
        self.rows.append(row_marks(batch))

    def on_after_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record the absolute gradient sum of this rank; None while a sharded gradient is not yet reduced."""
        gradient = pl_module.model.embedding.weight.grad  # type: ignore[union-attr]
        self.gradients.append(None if gradient is None else _total(gradient))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write rank<N>.pt into the working folder."""
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        held = {
            "metrics": metrics,
            "gradients": self.gradients,
            "world_size": trainer.world_size,
            "rows": self.rows,
        }
        if self.collectives is not None:
            held["collectives"] = [[*what, n] for what, n in self.collectives.collectives.items()]
            held["syncs"] = [[*what, n] for what, n in self.collectives.syncs.items()]
        torch.save(held, f"rank{trainer.global_rank}.pt")


def run_ranks(n: int, *words: str, resume: str | None = None, as_nccl: bool = False) -> list[dict[str, Any]]:
    """Train on ``n`` processes, started as by torchrun, and return the records of each rank.

    With ``as_nccl`` they contain collectives and host synchronisations; see :class:`AsNccl`.
    """
    arguments = rank_arguments(n, *words, resume=resume, as_nccl=as_nccl)
    codes = run_processes(train_as_rank, arguments)
    logs = "\n".join(Path(f"rank{rank}.log").read_text() for rank in range(n))
    assert codes == [0] * n, f"{codes}\n{logs}"
    return [torch.load(f"rank{rank}.pt", weights_only=True) for rank in range(n)]


def rank_arguments(
    n: int, *words: str, resume: str | None = None, as_nccl: bool = False
) -> list[tuple[Any, ...]]:
    """Return the arguments of :func:`train_as_rank` for each of ``n`` ranks."""
    changes = [f"trainer.devices={n}", *words]
    if resume is None:
        own_kernel = any(word.startswith("model.kernel.name=") for word in words)
        own_data = any(word.startswith("data.source=") for word in words)
        settings = [w for w in SETTINGS if not (own_data and w.startswith("data."))]
        changes = [w for w in settings if not (own_kernel and w.startswith("model.kernel."))] + changes
    port = str(free_port())
    given = (n, port, os.getcwd(), dict(os.environ), changes, resume, as_nccl)
    return [(rank, *given) for rank in range(n)]


def run_processes(target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> list[int | None]:
    """Call ``target`` in one process for each tuple of arguments, and return their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.ranks"])
    processes = [context.Process(target=target, args=given) for given in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the fork server imports its preload
        for process in processes:
            process.start()
    for process in processes:
        process.join(timeout=300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # ends processes that still wait for one that failed
    return codes


def free_port() -> int:
    """Return a free TCP port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_as_rank(
    rank: int,
    n: int,
    port: str,
    folder: str,
    environment: dict[str, str],
    words: list[str],
    run: str | None,
    as_nccl: bool,
) -> None:
    """Train in ``folder`` as one of ``n`` ranks, with the environment variables of torchrun."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "GROUP_RANK": 0}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="test")
    rank_zero_only.rank = rank  # lightning set it from the environment when it was imported, which was before
    torch.set_num_threads(1)
    with (
        open(f"rank{rank}.log", "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            config = load_config(None, words) if run is None else resumed_config(Path(run), words)
            mode = AsNccl() if as_nccl else None
            with contextlib.ExitStack() as stack:
                if mode is not None:
                    stack.enter_context(mode.everywhere())
                    # The loss of a vocabulary as large as those of models that need several GPUs.
                    stack.enter_context(mock.patch("tnnlm.ops.cross_entropy._MOST_ON_CPU", 4096))
                train(config, None if run is None else Path(run), extra_callbacks=[Watch(mode)])
        except BaseException:
            traceback.print_exc()
            log.flush()
            # Exit at once, because the other ranks wait for this one in a collective.
            os._exit(1)
    sys.stdout.flush()


def _total(gradient: torch.Tensor) -> float:
    full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return float(full.double().abs().sum())
