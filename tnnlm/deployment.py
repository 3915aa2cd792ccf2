"""From a checkpoint to a converted folder with its measurements: the library call behind convert.py."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tnnlm.checkpoint import TrainedCheckpoint, check_out_folder, load_checkpoint, save_converted
from tnnlm.conversion import ConversionReport, convert_model, measure, model_horizon
from tnnlm.conversion.verify import Check, check_gap, check_layers, check_steps
from tnnlm.errors import DataError
from tnnlm.evaluation import add, parallel_nll, ppl_gap, recurrent_nll
from tnnlm.model import CausalLM
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
    report: ConversionReport
    checks: list[Check] = field(default_factory=list)
    note: str | None = None
    """why there are no perplexities, if there are none"""


def convert_checkpoint(
    target: str | None,
    *,
    out: Path | None,
    method: str,
    horizon: int | str,
    force: bool,
    verify: bool,
    runs_dir: Path = Path("runs"),
) -> Conversion:
    """Convert, measure and write.

    Args:
        target: run or checkpoint; None takes the newest run.
        out: folder to write; None is ``RUN/converted``.
        method, horizon: see :func:`tnnlm.conversion.convert_model`.
        force: replace a converted model at ``out``.
        verify: fill ``checks``.

    Raises:
        UserError: for unusable input; nothing was written then.
    """
    path = find_checkpoint(target, runs_dir)
    folder = out or _run_of(path) / CONVERTED
    check_out_folder(folder, force)
    source = load_checkpoint(path)
    started = time.perf_counter()
    lags = model_horizon(source.model, horizon)
    converted = convert_model(source.model, method=method, horizon=lags)
    seconds = time.perf_counter() - started
    report = measure(source.model, converted, method=method, horizon=lags, seconds=seconds)
    done = Conversion(folder, source, report)
    try:
        corpus = prepare(source.config.data, source.config.model.vocab_size, source.config.seed)
        if corpus.tokenizer.fingerprint != source.tokenizer.fingerprint:
            raise DataError("the text of this run has changed")
        _measure_perplexities(source.model, converted, corpus, done)
    except DataError as error:
        done.note = f"no perplexities: {error}"
    if verify:
        _verify(source.model, converted, done)
    save_converted(folder, converted, source.tokenizer, report, force)
    return done


def show_report(done: Conversion) -> None:
    """Print the measurements, what the horizon leaves out, and what to run next."""
    console = Console()
    report = done.report
    table = Table(
        title=f"{done.source.path} (step {done.source.step}) by {report.method}, horizon {report.horizon}"
    )
    for column in ("layer", "order", "relative tap error", "l1 error", "tail energy", "state"):
        table.add_column(column, justify="right")
    for index, layer in enumerate(report.layers):
        table.add_row(
            str(index),
            str(layer.order),
            f"{layer.relative_tap_error:.1e}",
            f"{layer.l1_error:.1e}",
            f"{layer.tail_energy:.1e}",
            f"{layer.state_bytes / 1024:,.0f} KiB",
        )
    console.print(table)
    lines = [f"converted in {report.seconds:.2f} s; state {report.state_bytes:,} bytes per sequence"]
    for length, parallel in report.ppl["parallel"].items():
        recurrent = report.ppl["recurrent"][length]
        gap = ppl_gap(parallel, recurrent)
        lines.append(
            f"perplexity at {length}: parallel {parallel:.4f}, recurrent {recurrent:.4f}, gap {gap:+.1e}"
        )
    lines += [f"note: {text}" for text in (done.note, report.warning) if text]
    for check in done.checks:
        verdict = "ok" if check.passed else "FAILED"
        lines.append(f"verify: {check.name}: {check.error:.1e}, at most {check.threshold:.0e}: {verdict}")
    lines.append(f"wrote {done.folder}/; next: python generate.py --model {done.folder} --prompt TEXT")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _measure_perplexities(
    model: CausalLM, converted: CausalLM, corpus: PackedCorpus, done: Conversion
) -> None:
    config = done.source.config
    ppl = done.report.ppl
    for multiple, limit in LENGTHS.items():
        length = multiple * config.model.max_length
        rows = corpus.rows("val", length, config.data.max_val_tokens)
        # Evenly spaced: the first documents alone are no sample of the text.
        chosen = torch.linspace(0, len(rows) - 1, min(len(rows), max(1, limit // length))).round().long()
        scores = []
        batches = chosen.split(max(1, 4096 // length)) if len(rows) else ()
        for batch in tqdm(batches, desc=f"perplexity at {length}", disable=None):
            tokens = torch.stack([rows[int(index)] for index in batch])
            recurrent = recurrent_nll(converted, tokens, config.conversion.chunk)
            scores.append((parallel_nll(model, tokens), recurrent))
        if scores:
            ppl["parallel"][str(length)] = add(parallel for parallel, _ in scores).ppl
            ppl["recurrent"][str(length)] = add(recurrent for _, recurrent in scores).ppl


def _verify(model: CausalLM, converted: CausalLM, done: Conversion) -> None:
    generator = torch.Generator().manual_seed(0)
    length = min(STEPS, done.report.horizon)
    tokens = torch.randint(done.source.tokenizer.size, (1, length), generator=generator)
    done.checks = [
        check_layers(model, converted, min(64, done.report.horizon)),
        check_steps(model, converted, tokens),
    ]
    key = str(model.config.max_length)
    if key in done.report.ppl["parallel"]:
        gap = ppl_gap(done.report.ppl["parallel"][key], done.report.ppl["recurrent"][key])
        done.checks.append(check_gap(gap))


def _run_of(checkpoint: Path) -> Path:
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else folder
