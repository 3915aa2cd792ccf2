"""From a checkpoint to a converted folder with its measurements: the library call behind convert.py."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
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
from tnnlm.deployment.perplexity import measure_perplexities
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


@dataclass
class ConversionResult:
    """A finished conversion."""

    folder: Path
    source: TrainedCheckpoint
    report: ModelReport
    checks: list[Check] = field(default_factory=list)
    packages: list[Path] = field(default_factory=list)
    """compiled steps, and exports"""
    note: str | None = None
    """why there are no perplexities, if there are none"""
    failures: dict[str, str] = field(default_factory=dict)
    """optional steps that failed, with the reason; the converted model stands all the same"""


def convert_checkpoint(
    target: str | None,
    recipe: ConversionConfig,
    *,
    out: Path | None,
    force: bool,
    verify: bool,
    compiled: Sequence[str] = (),
    exported: Sequence[str] = (),
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
        return _convert(source, recipe, folder, force, verify, compiled, exported)


def _only_writer(folder: Path) -> AbstractContextManager[None]:
    return only_process(
        folder, CheckpointError(f"{folder}: another convert.py writes it: wait until it is done")
    )


def _convert(
    source: TrainedCheckpoint,
    recipe: ConversionConfig,
    folder: Path,
    force: bool,
    verify: bool,
    compiled: Sequence[str],
    exported: Sequence[str],
) -> ConversionResult:
    started = time.perf_counter()
    horizon, layers = convert_layers(source.model, recipe, _bar)
    seconds = time.perf_counter() - started
    converted = attach(source.model, [layer.params for layer in layers])
    report = measure(source.model, layers, method=recipe.method, horizon=horizon, seconds=seconds)
    save_converted(folder, converted, source.tokenizer, report, force)
    done = ConversionResult(folder, source, report)
    whole = ConvertedModel(converted, source.tokenizer, model_fingerprint(converted))
    try:
        _measure(whole, done)
        if verify:
            with collect_failure(done.failures, "verify"):
                _verify(source.model, converted, recipe, done)
        with collect_failure(done.failures, "model card"):
            card = model_card(source.config, source.step, source.model, report, done.note)
            check_unchanged(folder, whole.fingerprint)
            write_text(folder / "README.md", card)
        done.packages = _write_packages(whole, folder, compiled, exported, done.failures)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{folder} holds the converted model, without what was not done yet; "
            "the same command with --force does all of it"
        ) from None
    return done


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
    failures: dict[str, str] = {}
    if folder.is_symlink():
        folder = folder.resolve()
    with _only_writer(folder):
        return _write_packages(load_converted(folder), folder, compiled, exported, failures), failures


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
    converted: ConvertedModel,
    folder: Path,
    compiled: Sequence[str],
    exported: Sequence[str],
    failures: dict[str, str],
) -> list[Path]:
    written = []
    for dtype in _bar(compiled, "compiling"):
        with collect_failure(failures, f"--compile {dtype}"):
            check_unchanged(folder, converted.fingerprint)
            written.append(compile_step(copy.deepcopy(converted.model), folder, dtype, converted.fingerprint))
    for form in _bar(exported, "exporting"):
        with collect_failure(failures, {"torch": "--export", "onnx": "--onnx"}[form]):
            check_unchanged(folder, converted.fingerprint)
            written.append({"torch": export_torch, "onnx": export_onnx}[form](converted, folder))
    return written


def _bar(items: Sequence[Any], title: str) -> Iterable[Any]:
    return tqdm(items, desc=title, leave=False, disable=None)


def _measure(converted: ConvertedModel, done: ConversionResult) -> None:
    """Perplexities, into the report and conversion.json; none if the run's text is gone."""
    source = done.source
    failures: dict[str, str] = {}
    step = "perplexities"
    with collect_failure(failures, step):
        corpus = prepare(source.config.data, source.config.model.vocab_size, source.config.seed)
        if corpus.tokenizer.fingerprint != source.tokenizer.fingerprint:
            raise DataError("the text of this run has changed")
        measure_perplexities(source.model, converted.model, corpus, source.config, done.report)
    done.note = failures.get(step)
    with collect_failure(done.failures, "conversion.json"):
        check_unchanged(done.folder, converted.fingerprint)
        save_report(done.folder, done.report)


def _verify(model: CausalLM, converted: CausalLM, recipe: ConversionConfig, done: ConversionResult) -> None:
    generator = torch.Generator().manual_seed(0)
    horizon = done.report.horizon
    tokens = torch.randint(done.source.tokenizer.size, (1, min(STEPS, horizon)), generator=generator)
    exact = recipe.method in ("etsc", "window")
    allowed = 0.0 if exact else max(layer.relative_tap_error for layer in done.report.layers)
    if recipe.order is None and not exact:
        allowed = recipe.tolerance
    done.checks = [
        check_layers(model, converted, min(64, horizon), allowed),
        check_steps(model if exact else converted, converted, tokens),
    ]
    key = str(model.config.max_length)
    if key in done.report.ppl["parallel"] and key in done.report.ppl.get("recurrent", {}):
        gap = ppl_gap(done.report.ppl["parallel"][key], done.report.ppl["recurrent"][key])
        done.checks.append(check_gap(gap))


def _run_of(checkpoint: Path) -> Path:
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else folder
