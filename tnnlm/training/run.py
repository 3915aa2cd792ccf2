"""One run from configuration to summary: the library call behind train.py."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

from tnnlm.checkpoints.locate import LAST
from tnnlm.config.loader import config_to_yaml
from tnnlm.config.schema import Config
from tnnlm.data.datamodule import TextDataModule
from tnnlm.data.tasks import load_task_data
from tnnlm.errors import OS_ADVICE, CheckpointError, ConfigError, command
from tnnlm.files import write_text
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.threads import limit_threads
from tnnlm.tokenizer import TextTokenizer
from tnnlm.training.callbacks.checkpoint import NOTHING_SAVED, CheckpointLast
from tnnlm.training.callbacks.resumed_optimizer import RestoreOptimizerSettings
from tnnlm.training.callbacks.skip_steps import SkipBadSteps
from tnnlm.training.estimate import estimate_run
from tnnlm.training.fsdp import choose_strategy
from tnnlm.training.lit_module import LitModel
from tnnlm.training.resume import began, begin_at, check_resumable
from tnnlm.training.slurm import record_job
from tnnlm.training.summary import plot_loss, show_summary, write_summary
from tnnlm.training.tasks import VALIDATION_TASKS
from tnnlm.training.test_split import final_scores
from tnnlm.training.trainer import build_trainer


def train(
    config: Config,
    run: Path | None = None,
    extra_callbacks: list[Callback] | None = None,
    *,
    source: Path = LAST,
    job: str | None = None,
) -> dict[str, Any]:
    """Train, validate and save a run.

    Args:
        config: all settings.
        run: folder of a run to continue; None starts a new one under ``config.runs_dir``.
        extra_callbacks: appended to the run's own.
        source: the checkpoint to continue from, LAST or PREVIOUS.
        job: name under which a new run is recorded, so that the job can find it again. ``run`` may
            then be one that was killed before its first checkpoint: it begins anew.

    Returns:
        the content of summary.json (empty on ranks other than 0).

    Raises:
        UserError: for unusable input; nothing was written then.
        TrainingStopped: when it was asked to stop; the run was saved.
        TrainingDiverged: when loss or weights are beyond use; the last good checkpoint is kept.
    """
    keep_large_blocks()
    limit_threads()
    quieten()
    strategy = choose_strategy(config)
    resume_step = None
    if run is not None and (job is None or began(run)):
        resume_step = check_resumable(config, run, source)
    folder, tokenizer = _open_folder(config, run, source, job, resume_step)
    lightning.seed_everything(config.seed, verbose=False)
    last = CheckpointLast(folder / LAST, config.checkpoint.every_n_steps)
    guards: list[Callback] = [last, SkipBadSteps(config.trainer, last), RestoreOptimizerSettings(config)]
    try:
        trainer = build_trainer(config, strategy, folder, resume_step, [*guards, *(extra_callbacks or [])])
    except ConfigError:
        if run is None and is_main_process():
            shutil.rmtree(folder)  # new, with nothing trained in it
        raise
    module, data = LitModel(config), TextDataModule(config)
    if trainer.global_rank == 0:
        assert tokenizer is not None
        write_text(folder / "tokenizer.json", tokenizer.to_json())
        write_text(folder / "config.yaml", config_to_yaml(config))
        _show_start(config, folder, resume_step)
    _fit(trainer, module, data, None if resume_step is None else folder / source, last)
    return _summarise(trainer, module, data, folder, last) if trainer.global_rank == 0 else {}


def _summarise(
    trainer: lightning.Trainer, module: LitModel, data: TextDataModule, folder: Path, last: CheckpointLast
) -> dict[str, Any]:
    """Score the test split, write summary.json and loss.png, and show them."""
    config = data.config
    task = VALIDATION_TASKS[config.task]
    tested = final_scores(folder, config, trainer.strategy.root_device) if config.task == "classify" else {}
    summary = write_summary(
        folder,
        task=task,
        params=module.model.n_params,
        tokens_seen=data.samples_at(trainer.global_step) * config.model.max_length,
        train_seconds=last.train_seconds,
        tested=tested,
    )
    plot_loss(folder)
    show_summary(folder, summary, task, config.trainer.sample_prompt or "The", Console())
    return summary


def is_main_process() -> bool:
    """Whether this process is rank 0 of the training, or will be."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def _open_folder(
    config: Config, run: Path | None, source: Path, job: str | None, resume_step: int | None
) -> tuple[Path, TextTokenizer | None]:
    """The run's folder, ready to be written to, and on the main process the tokenizer of its text."""
    if not is_main_process():
        # Rank 0 chooses the name: it is broadcast to the callbacks that write.
        return run or Path(config.runs_dir), None
    # Before anything is written, so that unusable text leaves no run behind. The other ranks find it in
    # the cache, after Lightning's barrier.
    tokenizer = load_task_data(config).tokenizer
    folder = run or _new_folder(config)
    if job is not None:
        record_job(folder, job)
    if resume_step is not None:
        _check_tokenizer(folder, tokenizer)
        begin_at(folder, source, resume_step)
    return folder, tokenizer


def _fit(
    trainer: lightning.Trainer,
    module: LitModel,
    data: TextDataModule,
    path: Path | None,
    last: CheckpointLast,
) -> None:
    try:
        trainer.fit(module, data, ckpt_path=path, weights_only=True)
    except OSError as error:
        if error.errno not in OS_ADVICE:
            raise
        what = OS_ADVICE[error.errno].partition(":")[0]
        go_on = NOTHING_SAVED
        if last.saved_step is not None:
            go_on = f"go on from step {last.saved_step} with: {command('train')} --resume {last.run}"
        raise CheckpointError(
            f"{error.filename or last.run}: {what}",
            f"stopped after step {trainer.global_step}; when that is mended {go_on}",
        ) from None


def _check_tokenizer(folder: Path, tokenizer: TextTokenizer) -> None:
    path = folder / "tokenizer.json"
    if path.is_file() and path.read_text(encoding="utf-8") != tokenizer.to_json():
        raise CheckpointError(
            f"{folder}: its text or tokenizer has changed", "it can only be continued on the same"
        )


def _new_folder(config: Config) -> Path:
    """runs/NAME, or runs/NAME-2 ... if that is taken: a run is never overwritten."""
    root = Path(config.runs_dir)
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = root / (config.name if number == 1 else f"{config.name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def _show_start(config: Config, folder: Path, resume_step: int | None) -> None:
    plan = estimate_run(config)
    start = "" if resume_step is None else f", continuing at step {resume_step}"
    line = (
        f"{folder}: {plan.params:,} parameters, {config.trainer.max_steps:,} steps of "
        f"{plan.tokens_per_update:,} tokens, {plan.precision}{start}"
    )
    Console().print(line, markup=False, highlight=False, soft_wrap=True)


def quieten() -> None:
    """Lightning's greetings, and warnings about choices that were made on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # rows come from memory-mapped files
        ".*exists and is not empty.*",  # the run's folder is ours
        ".*your dataloader is not resumable.*",  # the sampler starts where the checkpoint says
        ".*LeafSpec.*is deprecated.*",  # inside Lightning
        ".*WeightAveraging callback with a model that overrides.*",  # which only compiles
    ):
        warnings.filterwarnings("ignore", message=message)
