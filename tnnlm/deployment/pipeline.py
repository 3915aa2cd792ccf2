"""From a checkpoint to a converted folder with its measurements: the library call behind convert.py."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
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
from tnnlm.conversion.verify import Check, check_gap, check_layers, check_steps
from tnnlm.data.packing import prepare
from tnnlm.deployment.model_card import model_card
from tnnlm.deployment.perplexity import Perplexities, measure_perplexities
from tnnlm.errors import CheckpointError, DataError, collect_failure
from tnnlm.evaluation import ppl_gap
from tnnlm.files import only_process, write_text
from tnnlm.inference.aot import check_compiler, compile_step
from tnnlm.inference.export import check_onnx, export_onnx, export_torch
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.capabilities import switched_off
from tnnlm.machine.threads import limit_threads
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach

STEPS = 128
"""tokens that ``--verify`` decodes one by one"""


@dataclass(frozen=True)
class ConversionResult:
    """A finished conversion: the model is written, whatever else failed."""

    folder: Path
    source: TrainedCheckpoint
    report: ModelReport
    checks: list[Check]
    packages: list[Path]
    """compiled steps, and exports"""
    note: str | None
    """why there are no perplexities, if there are none"""
    failures: dict[str, str]
    """optional steps that failed, with the reason"""


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
) -> ConversionResult:
    """Convert and write, then measure, and write the measurements beside it.

    Whatever fails once the model is written, a measurement, the model card, a compiled step, an export,
    ends in ``failures``, ``note`` or ``report.not_measured``, and the rest goes on.

    Args:
        target: run or checkpoint; None takes the newest run.
        recipe: method, horizon, tolerance and the like.
        out: folder to write; None is ``RUN/converted``.
        force: replace a converted model at ``out``.
        verify: fill ``checks``.
        compiled: dtypes of weights to compile a step for, beside the model.
        exported: of ``torch`` and ``onnx``, to export it as, beside the model.
        license: of the model, for its card, as the hub names it; None: not stated.

    Raises:
        UserError: for unusable input, or an optional file that can't be made here; nothing was written then.
    """
    keep_large_blocks()
    limit_threads()
    check_packages(compiled, exported)
    path = find_checkpoint(target, runs_dir)
    folder = out or _run_of(path) / CONVERTED
    check_out_folder(folder, force)
    if folder.is_symlink():
        folder = folder.resolve()  # what a link names is replaced, not the link
    source = load_checkpoint(path)
    with _only_writer(folder):
        started = time.perf_counter()
        horizon, layers = convert_layers(source.model, recipe, _bar)
        seconds = time.perf_counter() - started
        model = attach(source.model, [layer.params for layer in layers])
        report = measure(source.model, layers, method=recipe.method, horizon=horizon, seconds=seconds)
        save_converted(folder, model, source.tokenizer, report, force)
        written = ConvertedModel(model, source.tokenizer, model_fingerprint(model))
        try:
            return _complete(source, written, report, recipe, folder, verify, compiled, exported, license)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{folder} holds the converted model, without what was not done yet; "
                "the same command with --force does all of it"
            ) from None


def _only_writer(folder: Path) -> AbstractContextManager[None]:
    return only_process(
        folder, CheckpointError(f"{folder}: another convert.py writes it", "wait until it is done")
    )


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
) -> ConversionResult:
    """Measure, check, describe and package the written model; failures are named, and lose nothing."""
    failures: dict[str, str] = {}
    found, note = _perplexities(source, written.model)
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
    """Compile or export a model that is converted already; arguments are those of
    :func:`convert_checkpoint`.

    Returns:
        what was written beside it, and what failed, with the reason.

    Raises:
        UserError: if there is none at ``folder``, or what is asked for can't be made here.
    """
    limit_threads()
    check_packages(compiled, exported)
    if folder.is_symlink():
        folder = folder.resolve()
    with _only_writer(folder):
        return _write_packages(load_converted(folder), folder, compiled, exported)


def check_packages(compiled: Sequence[str], exported: Sequence[str]) -> None:
    """Whether these optional files can be made on this machine: asked before any work is done.

    Raises:
        UserError: if not, saying what is missing.
    """
    switched_off()  # a wrong name is an error before any work
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
    for form in _bar(exported, "exporting"):
        with collect_failure(failures, {"torch": "--export", "onnx": "--onnx"}[form]):
            check_unchanged(folder, converted.fingerprint)
            written.append({"torch": export_torch, "onnx": export_onnx}[form](converted, folder))
    return written, failures


def _bar(items: Sequence[Any], title: str) -> Iterable[Any]:
    return tqdm(items, desc=title, leave=False, disable=None)


def _perplexities(source: TrainedCheckpoint, converted: CausalLM) -> tuple[Perplexities | None, str | None]:
    """Of both forms on the run's validation text; or None, and why, as when the text is gone."""
    found = None
    failures: dict[str, str] = {}
    with collect_failure(failures, "perplexities"):
        corpus = prepare(source.config.data, source.config.model.vocab_size, source.config.seed)
        if corpus.tokenizer.fingerprint != source.tokenizer.fingerprint:
            raise DataError("the text of this run has changed")
        found = measure_perplexities(source.model, converted, corpus, source.config)
    return found, failures.get("perplexities")


def _checks(
    source: TrainedCheckpoint, converted: CausalLM, recipe: ConversionConfig, report: ModelReport
) -> list[Check]:
    """What ``--verify`` compares with slow references."""
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
