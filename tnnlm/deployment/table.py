"""A finished conversion as tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tnnlm.checkpoints.certificate import ModelReport
from tnnlm.deployment.perplexity import perplexity_cells
from tnnlm.deployment.pipeline import ConversionResult
from tnnlm.errors import command


def show_conversion(done: ConversionResult, console: Console) -> None:
    """Print the certificate, the perplexities of all forms, the checks, and what to run next."""
    report = done.report
    title = f"{done.source.path} (step {done.source.step}) by {report.method}, horizon {report.horizon}"
    console.print(_layers(report, title))
    if report.ppl["parallel"]:
        console.print(_perplexities(report))
    sizes = (
        (report.state_bytes, "per sequence"),
        (report.etsc_state_bytes, "by ETSC at the training length"),
        (report.window_state_bytes, "by the exact window"),
        (report.kv_cache_bytes, "by a Transformer's cache at 2,048 tokens"),
    )
    lines = [f"converted in {report.seconds:.2f} s"]
    lines.append("state: " + ", ".join(f"{size:,} bytes {what}" for size, what in sizes))
    if report.method == "auto":
        lines += [f"layer {i}: {layer.method}, {layer.reason}" for i, layer in enumerate(report.layers)]
    lines += [
        f"perplexity with {form}: not measured here: {why}" for form, why in report.not_measured.items()
    ]
    no_perplexities = f"no perplexities: {done.note}" if done.note else None
    lines += [f"note: {text}" for text in (no_perplexities, report.warning) if text]
    for check in done.checks:
        verdict = "ok" if check.passed else "FAILED"
        lines.append(f"verify: {check.name}: {check.error:.1e}, at most {check.threshold:.0e}: {verdict}")
    lines += [f"wrote {path}" for path in done.packages]
    lines += [f"FAILED: {step}: {why}" for step, why in done.failures.items()]
    lines.append(f"wrote {done.folder}/; next: {command('generate')} --model {done.folder} --prompt TEXT")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _layers(report: ModelReport, title: str) -> Table:
    """Columns: errors of the taps and in l1, energy past the horizon, Hankel ratio, largest pole, state."""
    table = Table(title=title)
    for name in ("layer", "order", "taps", "l1", "tail", "Hankel", "pole", "KiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, layer in enumerate(report.layers):
        table.add_row(str(index), *layer.figures(), f"{layer.state_bytes / 1024:,.1f}")
    return table


def _perplexities(report: ModelReport) -> Table:
    table = Table(title="perplexity (gap to parallel)")
    table.add_column("form")
    for length in report.ppl["parallel"]:
        table.add_column(f"{length} tokens", justify="right")
    for form, cells in perplexity_cells(report).items():
        name = {"parallel": "parallel (FFT)", "recurrent": f"recurrent, {report.method}"}.get(form, form)
        table.add_row(name, *cells)
    return table
