"""A training run from configuration to summary: the function that train.py calls."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

from tnnlm.chat.stored import TOKENIZER_CONFIG
from tnnlm.checkpoints.hf_files import tokenizer_settings
from tnnlm.checkpoints.locate import LAST
from tnnlm.checkpoints.settings_file import write_settings
from tnnlm.checkpoints.training import ENTRY, read_checkpoint
from tnnlm.config.loader import config_to_dict
from tnnlm.config.schema import Config
from tnnlm.conversion.checks import check_training
from tnnlm.data.datamodule import TextDataModule
from tnnlm.data.prompts import with_prompts
from tnnlm.data.report import DataReport, write_report
from tnnlm.data.tasks import load_task_data
from tnnlm.errors import OS_PROBLEMS, CheckpointError, collect_failure, command
from tnnlm.files import check_parents, only_process, write_text
from tnnlm.inference.aot_package import check_compiler_cache
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.threads import limit_threads
from tnnlm.models.surgery import all_decay
from tnnlm.tokenizer import TextTokenizer
from tnnlm.training.announce import announce
from tnnlm.training.callbacks.checkpoint import NOTHING_SAVED, CheckpointLast
from tnnlm.training.callbacks.first_step import FirstStep
from tnnlm.training.callbacks.resumed_optimizer import RestoreOptimizerSettings
from tnnlm.training.callbacks.skip_steps import SkipBadSteps
from tnnlm.training.components import check_components
from tnnlm.training.data_check import check_data
from tnnlm.training.estimate import check_accelerator, check_devices
from tnnlm.training.fsdp import choose_strategy
from tnnlm.training.initial import InitialWeights, weights_for
from tnnlm.training.lit_module import LitModel
from tnnlm.training.loggers.console import show_line
from tnnlm.training.optim import check_optimizer
from tnnlm.training.quiet import quieten
from tnnlm.training.resume import began, begin_at, check_outputs, check_resumable
from tnnlm.training.slurm import begin_job
from tnnlm.training.summary import plot_loss, show_summary, write_summary
from tnnlm.training.tasks import VALIDATION_TASKS
from tnnlm.training.test_split import final_scores
from tnnlm.training.trainable import check_trainable_parts, n_frozen
from tnnlm.training.trainer import build_trainer


def train(
    config: Config,
    run: Path | None = None,
    extra_callbacks: list[Callback] | None = None,
    *,
    source: Path = LAST,
    job: str | None = None,
    initial: InitialWeights | None = None,
) -> dict[str, Any]:
    """Train, validate and save a run.

    Args:
        config: The full configuration.
        run: Folder of the run to resume; None starts a new run under ``config.runs_dir``.
        extra_callbacks: Callbacks to add after the default ones.
        source: Checkpoint to resume from, LAST or PREVIOUS.
        job: Name of the job to record with the run, so that the job can find it again. With a job, ``run``
            may be one that was killed before its first checkpoint; it then starts from scratch.
        initial: Weights that a new run starts from; None loads those of ``init.weights``, if it is set.

    Returns:
        Content of summary.json; empty on ranks other than 0.

    Raises:
        UserError: If the input is invalid, or another process trains the run. Nothing was written. A resumed
            run is not changed before its first optimizer step has succeeded, so that one that runs out of
            memory can be resumed as before.
        TrainingStopped: If a signal stopped the training. The run was saved.
        TrainingDiverged: If the weights are not finite or too many steps were skipped. The last good
            checkpoint is kept.
    """
    keep_large_blocks()
    limit_threads()
    quieten()
    with ExitStack() as locks:
        if run is not None:
            _lock(locks, run)
        if initial is None and (run is None or (job is not None and not began(run))):
            initial = weights_for(config)
        start = _resolve(config, run, source, job, initial)
        if run is None:
            _lock(locks, start.folder)
        return _train(config, run, start, extra_callbacks or [], initial)


def _lock(locks: ExitStack, run: Path) -> None:
    """Let no other process train a run until ``locks`` is closed; only rank 0 of the training locks it.

    Raises:
        CheckpointError: If another process trains the run.
    """
    if is_main_process() and run.is_dir():
        refusal = CheckpointError(
            f"{run}: is being trained by another process", "wait until it ends, or start a new run"
        )
        locks.enter_context(only_process(run.resolve(), refusal))


def _train(
    config: Config,
    run: Path | None,
    start: _Start,
    extra: list[Callback],
    initial: InitialWeights | None,
) -> dict[str, Any]:
    """Train a run whose input is valid."""
    lightning.seed_everything(config.seed, verbose=False)
    last = CheckpointLast(start.folder / LAST, config.checkpoint.every_n_steps)
    trainer = _build(config, start, last, extra, new=run is None)
    module, data = LitModel(config), TextDataModule(config)
    if initial is not None and start.step is None:
        initial.copy_to(module.model)
    if trainer.global_rank == 0:
        announce(config, module.model, start.folder, start.report, start.checkpoint, start.step)
        if initial is not None and start.step is None:
            show_line(initial.line())
        if start.step is None:
            _record(config, start)
        for logger in trainer.loggers[len(trainer.loggers) - len(config.trainer.loggers) :]:
            logger.log_hyperparams(config_to_dict(config))
    _fit(trainer, module, data, start.checkpoint, last)
    return _summarise(trainer, module, data, last) if trainer.global_rank == 0 else {}


class _Start(NamedTuple):
    """Validated starting point of a run."""

    strategy: str | Strategy
    """Strategy for the Trainer."""
    folder: Path
    """Folder of the run; on other ranks than 0 of a new run, its parent."""
    tokenizer: TextTokenizer | None
    """Tokenizer of the data; None on other processes than the main one."""
    report: DataReport
    """Report of the data; empty on other processes than the main one."""
    step: int | None
    """Step of the checkpoint to resume from; None for a new run."""
    checkpoint: Path | None
    """Checkpoint to resume from; None for a new run."""


def _resolve(
    config: Config, run: Path | None, source: Path, job: str | None, initial: InitialWeights | None
) -> _Start:
    """Validate all input before the folder of the run is created or changed."""
    check_accelerator(config)
    check_devices(config)
    strategy = choose_strategy(config)
    check_training(config)
    check_components(config)
    check_optimizer(config.optim)
    check_trainable_parts(config)
    if config.trainer.compile:
        check_compiler_cache()
    if run is None:
        check_parents(config.runs_folder / config.name)
    step = None
    if run is not None and (job is None or began(run)):
        step = check_resumable(config, run, source, verify=is_main_process())
    elif run is not None:
        check_outputs(run)
    # Every rank waits here until the data is prepared, because the ranks meet later, within a timeout.
    data = load_task_data(config)
    if not is_main_process():
        # Rank 0 chooses the folder, which is broadcast to the callbacks that write files.
        folder = run or config.runs_folder
        return _Start(strategy, folder, None, DataReport(), step, None if step is None else folder / source)
    tokenizer, report = data.tokenizer, with_prompts(config, data)
    if initial is not None:
        initial.check_tokenizer(tokenizer)
    if run is None and job is not None:
        folder = begin_job(job, config, partial(_new_folder, config))
    else:
        folder = run or _new_folder(config)
    if step is None:
        return _Start(strategy, folder, tokenizer, report, None, None)
    check_data(folder, config, report)
    _check_tokenizer(folder, source, tokenizer)
    return _Start(strategy, folder, tokenizer, report, step, folder / source)


def _build(
    config: Config, start: _Start, last: CheckpointLast, extra: list[Callback], *, new: bool
) -> lightning.Trainer:
    """Build the trainer; if that fails, delete the folder of a new run."""
    own = [last, SkipBadSteps(config.trainer, last), RestoreOptimizerSettings(config)]
    if start.step is not None:
        own.append(FirstStep(partial(_continue_run, config, start)))
    try:
        return build_trainer(config, start.strategy, start.folder, start.step, [*own, *extra], start.report)
    except BaseException:
        if new and is_main_process():
            shutil.rmtree(start.folder)
        raise


def _record(config: Config, start: _Start) -> None:
    """Write the tokenizer, the configuration and the data report of a new run."""
    assert start.tokenizer is not None
    _write_tokenizer(start.folder, start.tokenizer)
    write_settings(start.folder, config)
    write_report(start.folder, start.report)


def _continue_run(config: Config, start: _Start) -> None:
    """Change the folder of a resumed run: its checkpoint, its samples and its configuration."""
    assert start.step is not None
    assert start.checkpoint is not None
    assert start.tokenizer is not None
    begin_at(start.folder, start.checkpoint.relative_to(start.folder), start.step)
    write_settings(start.folder, config)
    _write_tokenizer(start.folder, start.tokenizer)  # it may be damaged
    write_report(start.folder, start.report)  # a run of an earlier version has none


def _write_tokenizer(folder: Path, tokenizer: TextTokenizer) -> None:
    """Write the tokenizer, with its chat template as Transformers stores it."""
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    if tokenizer.chat_template is not None:
        write_text(folder / TOKENIZER_CONFIG, tokenizer_settings(tokenizer))


def _summarise(
    trainer: lightning.Trainer, module: LitModel, data: TextDataModule, last: CheckpointLast
) -> dict[str, Any]:
    """Score the test split if there is one, write summary.json and loss.png, and print the summary."""
    config, folder, report = data.config, last.run, with_prompts(data.config, data.opened)
    task = VALIDATION_TASKS[config.task]
    tested = final_scores(folder, config, trainer.strategy.root_device) if config.task == "classify" else {}
    summary = write_summary(
        folder,
        task=task,
        params=module.model.n_params,
        frozen=n_frozen(module.model),
        initial=config.init.weights,
        data=report,
        tokens_seen=data.tokens_at(trainer.global_step),
        train_seconds=last.train_seconds,
        tested=tested,
    )
    failures: dict[str, str] = {}
    with collect_failure(failures, "loss.png"):
        plot_loss(folder)
    for name, reason in failures.items():
        show_line(f"warning: {folder / name}: {reason}")
    recipe = [] if not task.converts or all_decay(module.model) else ["--method", "auto"]
    unknown = "TEXT" if config.data.format == "text" else None
    prompt = next(iter(report.prompts), unknown)
    show_summary(folder, summary, task, prompt, Console(), recipe)
    return summary


def is_main_process() -> bool:
    """Return whether this process is, or will be, rank 0 of the training."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


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
        if error.errno not in OS_PROBLEMS:
            raise
        what = OS_PROBLEMS[error.errno].reason
        advice = NOTHING_SAVED
        if last.saved_step is not None:
            advice = (
                f"fix this and resume from step {last.saved_step} with: "
                f"{command('train', '--resume', last.run)}"
            )
        raise CheckpointError(
            f"{error.filename or last.run}: {what}",
            f"training stopped after step {trainer.global_step}; {advice}",
        ) from None


def _check_tokenizer(folder: Path, source: Path, tokenizer: TextTokenizer) -> None:
    """Compare the tokenizer with that of the checkpoint, from which a damaged tokenizer.json is restored."""
    if read_checkpoint(folder / source)[ENTRY]["tokenizer"] != tokenizer.to_json():
        raise CheckpointError(
            f"{folder}: its data or tokenizer has changed", "restore the original data, or start a new run"
        )


def _new_folder(config: Config) -> Path:
    """Create runs/NAME, or runs/NAME-2 and so on if it exists, since a run is never overwritten."""
    root = config.runs_folder
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = root / (config.name if number == 1 else f"{config.name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
