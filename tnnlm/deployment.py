"""From a checkpoint to a converted folder with its measurements: the library call behind convert.py."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tnnlm.allocator import keep_large_blocks
from tnnlm.checkpoint import TrainedCheckpoint, load_checkpoint
from tnnlm.compiled import compile_step
from tnnlm.config import ConversionConfig
from tnnlm.conversion import ModelReport, attach, convert_layers, convert_model, measure
from tnnlm.conversion.verify import Check, check_gap, check_layers, check_steps
from tnnlm.converted import (
    ConvertedModel,
    check_out_folder,
    load_converted,
    model_fingerprint,
    save_converted,
)
from tnnlm.engine import pack
from tnnlm.errors import DataError, UserError
from tnnlm.evaluation import NLL, add, parallel_nll, ppl_gap, recurrent_nll
from tnnlm.export import check_onnx, export_onnx, export_torch
from tnnlm.model import CausalLM
from tnnlm.model_card import model_card
from tnnlm.packing import PackedCorpus, prepare
from tnnlm.runs import CONVERTED, find_checkpoint

LENGTHS = {1: 1 << 18, 8: 1 << 15}
"""perplexities are measured at these multiples of the training length, on so many tokens at the most;
at the training length that is what training validated on, unless there is very much of it"""
STEPS = 128
"""tokens that ``--verify`` decodes one by one"""


@dataclass
class Conversion:
    """A finished conversion."""

    folder: Path
    source: TrainedCheckpoint
    report: ModelReport
    checks: list[Check] = field(default_factory=list)
    packages: list[Path] = field(default_factory=list)
    """compiled steps, and exports"""
    note: str | None = None
    """why there are no perplexities, if there are none"""


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
) -> Conversion:
    """Convert, measure and write.

    Args:
        target: run or checkpoint; None takes the newest run.
        recipe: method, horizon, tolerance and the like.
        out: folder to write; None is ``RUN/converted``.
        force: replace a converted model at ``out``.
        verify: fill ``checks``.
        compiled: dtypes of weights to compile a step for, beside the model.
        exported: of ``torch`` and ``onnx``, to export it as, beside the model.

    Raises:
        UserError: for unusable input; nothing was written then.
    """
    keep_large_blocks()
    if "onnx" in exported:
        check_onnx()
    path = find_checkpoint(target, runs_dir)
    folder = out or _run_of(path) / CONVERTED
    check_out_folder(folder, force)
    source = load_checkpoint(path)
    started = time.perf_counter()
    horizon, layers = convert_layers(source.model, recipe, _bar)
    seconds = time.perf_counter() - started
    converted = attach(source.model, [layer.params for layer in layers])
    report = measure(source.model, layers, method=recipe.method, horizon=horizon, seconds=seconds)
    done = Conversion(folder, source, report)
    try:
        corpus = prepare(source.config.data, source.config.model.vocab_size, source.config.seed)
        if corpus.tokenizer.fingerprint != source.tokenizer.fingerprint:
            raise DataError("the text of this run has changed")
        _measure_perplexities(source.model, converted, corpus, done)
    except DataError as error:
        done.note = f"no perplexities: {error}"
    if verify:
        _verify(source.model, converted, recipe, done)
    card = model_card(source.config, source.step, source.model, report, done.note)
    save_converted(folder, converted, source.tokenizer, report, force, card)
    whole = ConvertedModel(converted, source.tokenizer, model_fingerprint(converted))
    done.packages = _write_packages(whole, folder, compiled, exported)
    return done


def package_converted(folder: Path, compiled: Sequence[str] = (), exported: Sequence[str] = ()) -> list[Path]:
    """Compile or export a model that is converted already; arguments are those of
    :func:`convert_checkpoint`.

    Returns:
        what was written beside it.

    Raises:
        UserError: if there is none at ``folder``, or what is asked for can't be made here.
    """
    if "onnx" in exported:
        check_onnx()
    return _write_packages(load_converted(folder), folder, compiled, exported)


def _write_packages(
    converted: ConvertedModel, folder: Path, compiled: Sequence[str], exported: Sequence[str]
) -> list[Path]:
    written = []
    for dtype in _bar(compiled, "compiling"):
        try:
            written.append(compile_step(copy.deepcopy(converted.model), folder, dtype))
        except UserError as error:
            raise UserError(f"{folder} is written, but not compiled: {error}") from None
    for form in _bar(exported, "exporting"):
        written.append({"torch": export_torch, "onnx": export_onnx}[form](converted, folder))
    return written


def _bar(items: Sequence[Any], title: str) -> Iterable[Any]:
    return tqdm(items, desc=title, leave=False, disable=None)


def _measure_perplexities(
    model: CausalLM, converted: CausalLM, corpus: PackedCorpus, done: Conversion
) -> None:
    """Of the parallel form, the recurrence, and ETSC and the window at the training length beside it."""
    config = done.source.config
    trained = config.model.max_length
    forms = {"recurrent": converted}
    for dtype in ("bfloat16", "int8"):
        forms[f"{dtype} weights"] = pack(copy.deepcopy(converted), dtype)
    for method in ("etsc", "window"):
        forms[f"{method} {trained}"] = convert_model(model, method=method, horizon=trained)
    ppl: dict[str, dict[str, float]] = {name: {} for name in ("parallel", *forms)}
    for multiple, limit in LENGTHS.items():
        length = multiple * trained
        rows = corpus.rows("val", length, config.data.max_val_tokens)
        # Evenly spaced: the first documents alone are no sample of the text.
        chosen = torch.linspace(0, len(rows) - 1, min(len(rows), max(1, limit // length))).round().long()
        scores: dict[str, list[NLL]] = {name: [] for name in ppl}
        for batch in _bar(
            chosen.split(max(1, 4096 // length)) if len(rows) else (), f"perplexity at {length}"
        ):
            tokens = torch.stack([rows[int(index)] for index in batch])
            scores["parallel"].append(parallel_nll(model, tokens))
            for name, form in forms.items():
                scores[name].append(recurrent_nll(form, tokens, config.conversion.chunk))
        if scores["parallel"]:
            for name, parts in scores.items():
                ppl[name][str(length)] = add(parts).ppl
    done.report.ppl = ppl


def _verify(model: CausalLM, converted: CausalLM, recipe: ConversionConfig, done: Conversion) -> None:
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
    if key in done.report.ppl["parallel"]:
        gap = ppl_gap(done.report.ppl["parallel"][key], done.report.ppl["recurrent"][key])
        done.checks.append(check_gap(gap))


def _run_of(checkpoint: Path) -> Path:
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else folder
