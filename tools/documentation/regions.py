"""Regions of a page that are rendered: figures within a sentence, and blocks.

A figure is ``<!--= EXPRESSION -->text<!--/-->``; a block extends from ``<!-- begin KIND ARGUMENTS -->`` to
``<!-- end -->``, each on a separate line. The comments are invisible where the page is shown.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

from benchmarks.conversion import conversion_table
from benchmarks.report import case_field, memory_table
from benchmarks.report import table as benchmark_table
from benchmarks.serving import serving_table
from benchmarks.speculation import speculation_table
from documentation.plans import memory_table as plan_table
from documentation.records import RECORDS, ROOT, figure, record
from documentation.reference import metrics_table, options_table, settings_table
from documentation.speed import configurations_table, speed_table
from experiments.report import table
from tnnlm.errors import UserError

FIGURE = re.compile(r"<!--=(?P<what>.*?)-->(?P<text>.*?)<!--/-->", re.DOTALL)
BLOCK = re.compile(r"^<!-- begin (?P<what>.*?) -->\n(?P<text>.*?)^<!-- end -->$", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    """Pages that may have regions: README.md and docs, without the pages of experiments."""
    found = (ROOT / "docs").rglob("*.md")
    return [ROOT / "README.md", *sorted(page for page in found if page.parent.name != "results")]


def render(text: str) -> str:
    """Return a page with all its regions rendered.

    Raises:
        UserError: If a region names a record, value or kind that does not exist.
    """
    text = FIGURE.sub(lambda found: f"<!--={found['what']}-->{_figure(found['what'])}<!--/-->", text)
    return BLOCK.sub(
        lambda found: f"<!-- begin {found['what']} -->\n{_block(found['what'])}\n<!-- end -->", text
    )


def absolute_links(text: str, repository: str) -> str:
    """Return a page of the root with absolute links, which work on an index of packages too.

    Args:
        text: The page, whose relative links start at the root.
        repository: Address of the repository, as in ``[project.urls]`` of pyproject.toml; unchanged if empty.
    """

    def absolute(found: re.Match[str]) -> str:
        kind = "raw" if found[1] else "blob"
        return f"{found[1]}[{found[2]}]({repository}/{kind}/main/{found[3]})"

    return re.sub(r"(!?)\[([^]]*)\]\((?!https?:|#)([^)\s]+)\)", absolute, text) if repository else text


def without_regions(text: str) -> str:
    """Return a page without what is rendered."""
    return BLOCK.sub("", FIGURE.sub("", text))


def _figure(what: str) -> str:
    try:
        return figure(what)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"<!--={what}-->: {error}") from None


def _block(what: str) -> str:
    kind, *arguments = what.split()
    try:
        return KINDS[kind](*arguments)
    except (KeyError, TypeError) as error:
        raise UserError(f"<!-- begin {what} -->: {error}", f"known kinds: {', '.join(KINDS)}") from None


def _table(name: str, key: str) -> str:
    return table(record(name)["tables"][key])


def _benchmark(name: str) -> str:
    return benchmark_table(record(name)["result"])


def _mode(name: str) -> str:
    """Return the table of a mode of tools/benchmark.py without contexts and batches."""
    result = record(name)["result"]
    tables = {"serve": serving_table, "convert": conversion_table, "speculate": speculation_table}
    return tables[result["mode"]](result)


def _memory(name: str) -> str:
    return memory_table(record(name)["result"])


def _ratios(name: str, ours: str, *baselines: str) -> str:
    """Our values divided by those of baselines, by case; each is NAME/DTYPE."""
    column = case_field(record(name)["result"]["mode"])
    cases = dict.fromkeys(row[column] for row in record(name)["result"]["results"])
    rows = []
    for baseline in baselines:
        row = {"compared with": baseline.replace("/", ", ")}
        for case in cases:
            try:
                row[f"{case:,}"] = figure(f"{name}/{ours}/{case} over {name}/{baseline}/{case} : .2f")
            except KeyError:  # not every baseline was measured in every case
                continue
        rows.append(row)
    return table(rows)


def _comparison(key: str) -> str:
    """Our values next to a baseline's, from docs/records/comparisons.toml."""
    entries = tomllib.loads((RECORDS / "comparisons.toml").read_text(encoding="utf-8"))[key]
    return table(
        [
            {
                "measurement": entry["measurement"],
                "unit": entry["unit"],
                "tnnlm": figure(f"{entry['ours']} : {entry['format']}"),
                "baseline": entry["baseline"],
                "value of the baseline": figure(f"{entry['theirs']} : {entry['format']}"),
                "tnnlm / baseline": figure(f"{entry['ours']} over {entry['theirs']} : .3g"),
            }
            for entry in entries
        ]
    )


def _text(name: str, key: str) -> str:
    return f"```text\n{record(name)['texts'][key].rstrip()}\n```"


def _provenance(*names: str) -> str:
    """One sentence per record: where its figures come from."""
    lines = []
    for name in names:
        data = record(name)
        lines.append(
            f"Measured by `{data['command']}` on {data['date']} (commit {data['commit']}) on "
            f"{data['machine']} ({data['cpu_level']}), PyTorch {data['torch']}."
        )
    return "\n".join(lines)


KINDS: dict[str, Callable[..., str]] = {
    "table": _table,
    "benchmark": _benchmark,
    "benchmark-memory": _memory,
    "benchmark-mode": _mode,
    "comparison": _comparison,
    "ratios": _ratios,
    "text": _text,
    "provenance": _provenance,
    "settings": settings_table,
    "options": options_table,
    "metrics": metrics_table,
    "dry-run": plan_table,
    "speed": speed_table,
    "configurations": configurations_table,
}
"""Kinds of blocks, by name."""
