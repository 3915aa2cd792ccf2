"""Summary of a conversion, as tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.deployment.perplexity import perplexity_cells
from tnnlm.deployment.pipeline import ConversionResult
from tnnlm.errors import command


def show_conversion(done: ConversionResult, console: Console) -> None:
    """Print the certificate, the perplexities of all variants, the checks, and what is compiled next."""
    report = done.report
    title = f"{done.source.path} (step {done.source.step}), method {report.method}, horizon {report.horizon}"
    console.print(_layers(report, title))
    if report.ppl["parallel"]:
        console.print(_perplexities(report))
    sizes = (
        (report.state_bytes, "per sequence"),
        (report.etsc_state_bytes, "with ETSC at the training length"),
        (report.window_state_bytes, "with the exact window"),
        (report.kv_cache_bytes, "for the KV cache of a Transformer at 2,048 tokens"),
    )
    lines = [f"converted in {report.seconds:.2f} s"]
    lines.append("state: " + ", ".join(f"{size:,} bytes {what}" for size, what in sizes))
    if report.method == "auto":
        lines += [f"layer {i}: {layer.method}, {layer.reason}" for i, layer in enumerate(report.layers)]
    lines += [
        f"perplexity with {name}: not measured here: {why}" for name, why in report.not_measured.items()
    ]
    lines += [
        f"perplexity with {name}: measured with the taps of the recurrence; steps differ by {nats:.1e} nats "
        "per token on a sample"
        for name, nats in report.step_difference.items()
    ]
    no_perplexities = f"no perplexities: {done.note}" if done.note else None
    lines += [f"note: {text}" for text in (no_perplexities, report.warning) if text]
    for check in done.checks:
        verdict = "ok" if check.passed else "FAILED"
        lines.append(f"verify: {check.name}: {check.error:.1e}, threshold {check.threshold:.0e}: {verdict}")
    _print([*lines, *done.planned], console)


def show_packages(done: ConversionResult, console: Console) -> None:
    """Print the files that were compiled or exported, all failures, and the next command to run."""
    lines = [f"wrote {path}" for path in done.packages]
    lines += [f"note: {text}" for text in done.notes]
    lines += [f"FAILED: {step}: {why}" for step, why in done.failures.items()]
    prompt = next(iter(done.prompts), "TEXT")
    lines.append(
        f"wrote {done.folder}/; next: {command('generate', '--model', done.folder, '--prompt', prompt)}"
    )
    _print(lines, console)


def _print(lines: list[str], console: Console) -> None:
    for line in lines:
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _layers(report: ModelReport, title: str) -> Table:
    """Return the table of layers: order, tap and l1 error, tail energy, Hankel ratio, largest pole, state."""
    # A Text, because a path may contain what rich reads as markup.
    table = Table(title=Text(title, style="table.title"))
    for name in ("layer", "order", "taps", "l1", "tail", "Hankel", "pole", "KiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, layer in enumerate(report.layers):
        table.add_row(str(index), *layer.figures(), f"{layer.state_bytes / 1024:,.1f}")
    return table


def _perplexities(report: ModelReport) -> Table:
    protocol = "" if report.protocol == "documents" else f", protocol {report.protocol}"
    table = Table(title=f"perplexity (gap to parallel ± standard error){protocol}")
    table.add_column("variant")
    for length in report.ppl["parallel"]:
        table.add_column(f"{length} tokens", justify="right")
    for name, cells in perplexity_cells(report).items():
        shown = {"parallel": "parallel (FFT)", "recurrent": f"recurrent, {report.method}"}.get(name, name)
        table.add_row(shown, *cells)
    return table
