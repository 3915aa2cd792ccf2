"""Conversion of a checkpoint to a folder with its measurements, the library function behind convert.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.checkpoints.converted import (
    ConvertedModel,
    check_out_folder,
    model_fingerprint,
    save_converted,
)
from tnnlm.checkpoints.locate import CONVERTED, find_checkpoint
from tnnlm.checkpoints.prompts import usable_prompts
from tnnlm.checkpoints.settings_file import take_own_tokenizer
from tnnlm.checkpoints.training import TrainedCheckpoint, load_checkpoint
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import convert_layers, measure
from tnnlm.conversion.companion import OWN_METHODS, check_kernel
from tnnlm.conversion.verify import Check, check_gap, check_layers, check_steps
from tnnlm.data.report import read_report
from tnnlm.data.tasks import open_corpus
from tnnlm.deployment.bars import bar
from tnnlm.deployment.card_metadata import NOTHING_STATED, Stated
from tnnlm.deployment.description import Description
from tnnlm.deployment.packages import (
    NO_PACKAGES,
    Packages,
    announcements,
    check_packages,
    possible,
    write_packages,
)
from tnnlm.deployment.perplexity import INTERRUPTED, Corpus, Perplexities, measure_perplexities
from tnnlm.deployment.save import only_writer
from tnnlm.errors import DataError, collect_failure, command
from tnnlm.files import check_no_link
from tnnlm.inference.engine import usable_device
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.threads import limit_threads
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach, kernels
from tnnlm.trust import NO_CODE, Trust

STEPS = 128
"""Number of tokens that ``--verify`` decodes one at a time."""


@dataclass(frozen=True)
class ConversionResult:
    """Result of a conversion whose model was written, even if optional steps failed."""

    folder: Path
    source: TrainedCheckpoint
    report: ModelReport
    checks: list[Check]
    note: str | None
    """Reason why perplexities were not measured, or None."""
    failures: dict[str, str]
    """Optional steps that failed, with the reason."""
    prompts: tuple[str, ...] = ()
    """Short prompts from the text of the run; none if they are not known."""
    planned: list[str] = field(default_factory=list)
    """Announcements of the steps that are compiled next, one line each."""
    packages: list[Path] = field(default_factory=list)
    """Compiled steps and exports that were written."""
    notes: list[str] = field(default_factory=list)
    """Reasons why a step that was not required isn't compiled."""


def convert_checkpoint(
    target: str | None,
    recipe: ConversionConfig,
    *,
    out: Path | None,
    force: bool,
    verify: bool,
    packages: Packages = NO_PACKAGES,
    perplexity_tokens: int | None = None,
    stated: Stated = NOTHING_STATED,
    runs_dir: Path = Path("runs"),
    device: str = "cpu",
    inference_only: bool = False,
    trust: Trust = NO_CODE,
    on_complete: Callable[[ConversionResult], None] | None = None,
) -> ConversionResult:
    """Convert a checkpoint and write the model, then measure it and add the measurements to its folder.

    Failures after the model is written don't stop the remaining steps. Measurements, the model card,
    compiled steps and exports that fail are listed in ``failures``, ``note`` or ``report.not_measured``.

    Args:
        target: Run or checkpoint; None takes the newest run.
        recipe: Method, horizon, tolerance and further settings of the conversion.
        out: Output folder; None takes ``RUN/converted``.
        force: Replace a converted model at ``out``.
        verify: Run the checks of ``--verify`` and return them in ``checks``.
        packages: Compiled steps and exports to add to the folder.
        perplexity_tokens: Number of tokens of each length that perplexities are measured on; None measures as
            many as take about half a minute, and 0 measures none.
        stated: License, languages and data sets for the model card.
        runs_dir: Folder of the runs.
        device: Device on which layers are converted, one at a time, and perplexities are measured.
            ``auto`` is a GPU if there is one. The written files don't depend on it, except for rounding.
        inference_only: Omit the kernels, without which no run can start from the folder.
        trust: Whether the kernel module of the checkpoint may run although this machine hasn't run it before.
        on_complete: Called once the folder is complete, before ``packages`` are added to it.

    Raises:
        UserError: If the input is unusable, or an optional file can't be made on this machine. Nothing
            is written in this case.
    """
    keep_large_blocks()
    limit_threads()
    check_packages(packages)
    stated.check()
    where = usable_device(device)
    elsewhere = None if where.type == "cpu" else where
    path = find_checkpoint(target, runs_dir)
    folder = _out_folder(out or _own_folder(path), force)
    source = load_checkpoint(path, trust)
    _check_method(source, recipe.method)
    with only_writer(folder):
        model, report = _convert(source, recipe, elsewhere)
        kept = None if inference_only else source.model
        prompts = _prompts(source)
        save_converted(folder, model, source.tokenizer, report, force, kept, prompts)
        written = ConvertedModel(model, source.tokenizer, model_fingerprint(model))
        described = Description(source, written, folder, stated, prompts)
        with _explained_interrupt(
            f"{folder} holds the converted model, with what was measured until now; "
            "run the same command with --force to convert again and complete it"
        ):
            found, note = _perplexities(source, model, report, perplexity_tokens, elsewhere, described)
            checks = _verify(source, model, recipe, found, described.failures) if verify else []
            described.publish(found, note)
        done = ConversionResult(folder, source, found, checks, note, described.failures, prompts)
        if elsewhere is not None:
            packages = packages.without_optional()  # a compiled step runs on the CPU
        return _package(done, written, packages, on_complete)


def _own_folder(checkpoint: Path) -> Path:
    """Return the folder of the converted model in the run of a checkpoint, which may be a stranger's.

    Raises:
        UserError: If it is a link, by which ``--force`` would replace a folder elsewhere.
    """
    folder = _run_of(checkpoint) / CONVERTED
    check_no_link(folder, "delete the link, or name the folder to write with --out")
    return folder


def _out_folder(folder: Path, force: bool) -> Path:
    """Return the folder to write, which is the target of a link, after checking that it can be written."""
    check_out_folder(folder, force)
    return folder.resolve() if folder.is_symlink() else folder


def _check_method(source: TrainedCheckpoint, method: str) -> None:
    """Check that a method that only some kernels have can convert the kernel of this model."""
    if method in OWN_METHODS:
        name = source.config.model.kernel.name
        check_kernel(kernels(source.model)[0], name, method, f"--method {method}")


def _convert(
    source: TrainedCheckpoint, recipe: ConversionConfig, device: torch.device | None
) -> tuple[CausalLM, ModelReport]:
    """Return the converted model, which shares the weights of the source, and the report of its layers."""
    started = time.perf_counter()
    horizon, layers = convert_layers(source.model, recipe, bar, device=device)
    seconds = time.perf_counter() - started
    # The copy shares the weights: the model may fill most of the memory.
    model = attach(source.model, [layer.params for layer in layers], shared=True)
    report = measure(
        source.model,
        layers,
        method=recipe.method,
        horizon=horizon,
        seconds=seconds,
        progress=bar,
        device=device,
    )
    return model, report


@contextmanager
def _explained_interrupt(explanation: str) -> Iterator[None]:
    """Let a Ctrl-C after the model is written say what the folder holds, and how to complete it."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(explanation) from None


def _package(
    done: ConversionResult,
    converted: ConvertedModel,
    packages: Packages,
    on_complete: Callable[[ConversionResult], None] | None,
) -> ConversionResult:
    """Compile and export the model into its complete folder, and return the result with what was written."""
    with _explained_interrupt(
        f"{done.folder} is complete but for compiled steps and exports; "
        f"add them with: {command('convert', done.folder, *packages.options)}"
    ):
        packages, notes = possible(packages, converted.model, done.folder)
        done = replace(done, planned=announcements(packages, converted.model, done.folder))
        if on_complete is not None:
            on_complete(done)
        made = write_packages(converted, done.folder, packages)
    return replace(
        done, packages=made.packages, failures=done.failures | made.failures, notes=[*notes, *made.notes]
    )


def _perplexities(
    source: TrainedCheckpoint,
    converted: CausalLM,
    report: ModelReport,
    tokens: int | None,
    device: torch.device | None,
    described: Description,
) -> tuple[ModelReport, str | None]:
    """Return the report with perplexities on the run's validation split, and the reason if there are none."""
    if tokens == 0:
        return report, "switched off with --no-perplexity"
    described.publish(report, INTERRUPTED)
    measured = report

    def keep(found: Perplexities) -> None:
        nonlocal measured
        measured = replace(report, **found._asdict())
        described.publish(measured, None)

    failures: dict[str, str] = {}
    with collect_failure(failures, "perplexities"):
        corpus = _corpus_of(source)
        keep(measure_perplexities(source.model, converted, corpus, source.config, device, tokens, keep))
    return measured, failures.get("perplexities")


def _corpus_of(source: TrainedCheckpoint) -> Corpus:
    """Return the data that a checkpoint was trained on.

    Raises:
        UserError: If it is not known, not available or has changed.
    """
    if source.step == 0:  # imported: the configuration names data, but the weights were not trained on it
        raise DataError("the training data of imported weights is not known")
    if not source.own_data:
        raise DataError("the weights were trained on batches of another loader, whose text is not known")
    run = source.path.parent.parent
    take_own_tokenizer(source.config, run)
    corpus = open_corpus(source.config)
    trained_on = read_report(run)
    changed = trained_on is not None and trained_on.change(corpus.report) is not None
    if changed or corpus.tokenizer.fingerprint != source.tokenizer.fingerprint:
        raise DataError("the data of this run has changed")
    return corpus


def _prompts(source: TrainedCheckpoint) -> tuple[str, ...]:
    """Return the prompts that the run of a checkpoint stored with the report of its data."""
    try:
        report = read_report(_run_of(source.path)) if source.own_data and source.step else None
    except DataError:  # whatever needs the report raises it
        return ()
    return usable_prompts(report.prompts) if report is not None else ()


def _verify(
    source: TrainedCheckpoint,
    converted: CausalLM,
    recipe: ConversionConfig,
    report: ModelReport,
    failures: dict[str, str],
) -> list[Check]:
    """Return the checks of ``--verify``, or none and the reason in ``failures`` if they fail to run."""
    checks: list[Check] = []
    with collect_failure(failures, "verify"):
        checks.extend(_checks(source, converted, recipe, report))
    return checks


def _checks(
    source: TrainedCheckpoint, converted: CausalLM, recipe: ConversionConfig, report: ModelReport
) -> list[Check]:
    """Return the checks of ``--verify`` against slow reference implementations."""
    model, generator = source.model, torch.Generator().manual_seed(0)
    tokens = torch.randint(source.tokenizer.size, (1, min(STEPS, report.horizon)), generator=generator)
    exact = recipe.method in ("etsc", "window")
    allowed = 0.0 if exact else max(layer.relative_tap_error for layer in report.layers)
    if recipe.order is None and not exact:
        allowed = recipe.tolerance
    checks = [
        check_layers(model, converted, min(64, report.horizon), allowed),
        check_steps(model if exact else converted, converted, tokens),
    ]
    key = str(model.config.max_length)
    if key in report.ppl_gap.get("recurrent", {}):
        checks.append(check_gap(report.ppl_gap["recurrent"][key]))
    return checks


def _run_of(checkpoint: Path) -> Path:
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else folder
