"""Conversion of a checkpoint to a folder with its measurements, the library function behind convert.py."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.checkpoints.converted import (
    ConvertedModel,
    check_out_folder,
    check_unchanged,
    load_converted,
    model_fingerprint,
    save_converted,
    save_report,
)
from tnnlm.checkpoints.locate import CONVERTED, find_checkpoint
from tnnlm.checkpoints.training import TrainedCheckpoint, load_checkpoint
from tnnlm.config.schema import ConversionConfig
from tnnlm.conversion import convert_layers, measure
from tnnlm.conversion.companion import OWN_METHODS, check_kernel
from tnnlm.conversion.verify import Check, check_gap, check_layers, check_steps
from tnnlm.data.packing import prepare
from tnnlm.data.report import read_report
from tnnlm.deployment.model_card import model_card
from tnnlm.deployment.perplexity import Perplexities, measure_perplexities
from tnnlm.deployment.save import only_writer
from tnnlm.errors import DataError, collect_failure
from tnnlm.evaluation import ppl_gap
from tnnlm.files import write_text
from tnnlm.inference.aot import compile_step
from tnnlm.inference.aot_package import check_compiler
from tnnlm.inference.engine import usable_device
from tnnlm.inference.export import check_onnx, export_onnx, export_torch
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.capabilities import switched_off
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
    packages: list[Path]
    """Compiled steps and exports that were written."""
    note: str | None
    """Reason why perplexities were not measured, or None."""
    failures: dict[str, str]
    """Optional steps that failed, with the reason."""


def convert_checkpoint(
    target: str | None,
    recipe: ConversionConfig,
    *,
    out: Path | None,
    force: bool,
    verify: bool,
    compiled: Sequence[str] = (),
    exported: Sequence[str] = (),
    license: str | None = None,
    runs_dir: Path = Path("runs"),
    device: str = "cpu",
    trust: Trust = NO_CODE,
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
        compiled: Weight dtypes for which a compiled step is added to the folder.
        exported: Export formats to add to the folder: ``torch``, ``onnx``.
        license: License identifier on the Hugging Face Hub, for the model card; None if not stated.
        runs_dir: Folder of the runs.
        device: Device on which layers are converted, one at a time, and perplexities are measured.
            ``auto`` is a GPU if there is one. The written files don't depend on it, except for rounding.
        trust: Whether the kernel module of the checkpoint may run although this machine hasn't run it before.

    Raises:
        UserError: If the input is unusable, or an optional file can't be made on this machine. Nothing
            is written in this case.
    """
    keep_large_blocks()
    limit_threads()
    check_packages(compiled, exported)
    where = usable_device(device)
    elsewhere = None if where.type == "cpu" else where
    path = find_checkpoint(target, runs_dir)
    folder = _out_folder(out or _run_of(path) / CONVERTED, force)
    source = load_checkpoint(path, trust)
    _check_method(source, recipe.method)
    with only_writer(folder):
        model, report = _convert(source, recipe, elsewhere)
        save_converted(folder, model, source.tokenizer, report, force)
        written = ConvertedModel(model, source.tokenizer, model_fingerprint(model))
        with _explained_interrupt(folder):
            return _complete(
                source, written, report, recipe, folder, verify, compiled, exported, license, elsewhere
            )


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
    horizon, layers = convert_layers(source.model, recipe, _bar, device=device)
    seconds = time.perf_counter() - started
    # The copy shares the weights: the model may fill most of the memory.
    model = attach(source.model, [layer.params for layer in layers], shared=True)
    report = measure(
        source.model,
        layers,
        method=recipe.method,
        horizon=horizon,
        seconds=seconds,
        progress=_bar,
        device=device,
    )
    return model, report


@contextmanager
def _explained_interrupt(folder: Path) -> Iterator[None]:
    """Let a Ctrl-C after the model is written say what the folder holds, and how to complete it."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{folder} holds the converted model, but the remaining steps were skipped; "
            "run the same command with --force to convert again and complete them"
        ) from None


def _complete(
    source: TrainedCheckpoint,
    written: ConvertedModel,
    report: ModelReport,
    recipe: ConversionConfig,
    folder: Path,
    verify: bool,
    compiled: Sequence[str],
    exported: Sequence[str],
    license: str | None,
    device: torch.device | None,
) -> ConversionResult:
    """Measure, check, describe and package the written model, and collect failures in the result."""
    failures: dict[str, str] = {}
    found, note = _perplexities(source, written.model, device)
    report = replace(report, **found._asdict()) if found else report
    with collect_failure(failures, "conversion.json"):
        check_unchanged(folder, written.fingerprint)
        save_report(folder, report)
    checks: list[Check] = []
    if verify:
        with collect_failure(failures, "verify"):
            checks = _checks(source, written.model, recipe, report)
    with collect_failure(failures, "model card"):
        card = model_card(source.config, source.step, source.model, report, note, license)
        check_unchanged(folder, written.fingerprint)
        write_text(folder / "README.md", card)
    packages, missing = _write_packages(written, folder, compiled, exported)
    return ConversionResult(folder, source, report, checks, packages, note, failures | missing)


def package_converted(
    folder: Path, compiled: Sequence[str] = (), exported: Sequence[str] = ()
) -> tuple[list[Path], dict[str, str]]:
    """Compile or export a model that is already converted.

    Args:
        folder: Folder of the converted model.
        compiled: Weight dtypes for which a compiled step is added to the folder.
        exported: Export formats to add to the folder: ``torch``, ``onnx``.

    Returns:
        Files and folders that were written, and steps that failed with the reason.

    Raises:
        UserError: If ``folder`` holds no converted model, or a requested file can't be made on this
            machine.
    """
    limit_threads()
    check_packages(compiled, exported)
    if folder.is_symlink():
        folder = folder.resolve()
    with only_writer(folder):
        return _write_packages(load_converted(folder), folder, compiled, exported)


def check_packages(compiled: Sequence[str], exported: Sequence[str]) -> None:
    """Check, before any work is done, that these optional files can be made on this machine.

    Raises:
        UserError: If they can't; the message says what is missing.
    """
    switched_off()  # Raises for an unknown name in TNNLM_WITHOUT.
    if compiled:
        check_compiler()
    if "onnx" in exported:
        check_onnx()


def _write_packages(
    converted: ConvertedModel, folder: Path, compiled: Sequence[str], exported: Sequence[str]
) -> tuple[list[Path], dict[str, str]]:
    written: list[Path] = []
    failures: dict[str, str] = {}
    for dtype in _bar(compiled, "compiling"):
        with collect_failure(failures, f"--compile {dtype}"):
            check_unchanged(folder, converted.fingerprint)
            written.append(compile_step(copy.deepcopy(converted.model), folder, dtype, converted.fingerprint))
    for target in _bar(exported, "exporting"):
        with collect_failure(failures, {"torch": "--export", "onnx": "--onnx"}[target]):
            check_unchanged(folder, converted.fingerprint)
            written.append({"torch": export_torch, "onnx": export_onnx}[target](converted, folder))
    return written, failures


def _bar(items: Sequence[Any], title: str) -> Iterable[Any]:
    return tqdm(items, desc=title, leave=False, disable=None)


def _perplexities(
    source: TrainedCheckpoint, converted: CausalLM, device: torch.device | None
) -> tuple[Perplexities | None, str | None]:
    """Return the perplexities on the run's validation split, or None and the reason if that fails."""
    found = None
    failures: dict[str, str] = {}
    with collect_failure(failures, "perplexities"):
        if source.step == 0:  # imported: the configuration names data, but the weights were not trained on it
            raise DataError("the training data of imported weights is not known")
        corpus = prepare(source.config.data, source.config.model.vocab_size, source.config.seed)
        trained_on = read_report(source.path.parent.parent)
        changed = trained_on is not None and trained_on.change(corpus.report) is not None
        if changed or corpus.tokenizer.fingerprint != source.tokenizer.fingerprint:
            raise DataError("the data of this run has changed")
        found = measure_perplexities(source.model, converted, corpus, source.config, device)
    return found, failures.get("perplexities")


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
    if key in report.ppl["parallel"] and key in report.ppl.get("recurrent", {}):
        checks.append(check_gap(ppl_gap(report.ppl["parallel"][key], report.ppl["recurrent"][key])))
    return checks


def _run_of(checkpoint: Path) -> Path:
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else folder
