"""Figures of README.md and docs come from committed records, and reference tables from the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from documentation.plans import memory_table
from documentation.records import PROVENANCE, RECORDS, figure
from documentation.regions import BLOCK, FIGURE, absolute_links, pages, render, without_regions
from record_demo import SAMPLE_LINES, texts_of
from tests.support.scripts import ROOT
from tnnlm.errors import UserError

UNITS = (
    r"tokens/s|tokens per second|ms|milliseconds|seconds?|minutes?|GB/s|GFLOP/s|TFLOP/s|MiB|KiB|GiB|MB|kB|"
    r"bytes|times|M parameters|M tokens|million|bits per byte|%|x"
)
MEASURED = re.compile(
    rf"(?<![\w.^-])\d[\d,]*(\.\d+)?(e-?\d+)? ?({UNITS})(?![\w/])|perplexit(y|ies) (of |is )?\d|\d\.\d+e-\d+"
)
"""Pattern of a number with the unit of a measurement."""
STATED = json.loads((RECORDS / "stated.json").read_text(encoding="utf-8"))
"""Phrases by page whose number is no measurement (arithmetic, a limit, a default), and the reason."""
CHECKED_ELSEWHERE = {"docs/reference/configurations.md": "tests/config/test_shipped_configs.py"}
"""Pages whose figures another test compares with the code."""


def name_of(page: Path) -> str:
    """Return the path of a page relative to the root."""
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_page_is_rendered_from_its_records(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert render(text) == text, "out of date: python tools/render_docs.py"


@pytest.mark.parametrize(
    "page", [page for page in pages() if name_of(page) not in CHECKED_ELSEWHERE], ids=name_of
)
def test_measured_figures_of_a_page_come_from_a_record(page: Path) -> None:
    text = without_regions(page.read_text(encoding="utf-8"))
    text = re.sub(r"^```.*?^```$|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE)
    for phrase in STATED.get(name_of(page), ()):
        assert phrase in text, f"stated.json: {phrase!r} is no longer on the page"
        text = text.replace(phrase, "")
    found = [text[max(0, match.start() - 40) : match.end()] for match in MEASURED.finditer(text)]
    assert not found, "put them into a record of docs/records, or a reason into stated.json"


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.json")), ids=lambda path: path.stem)
def test_record_says_where_it_comes_from(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    if path.stem != "stated":
        assert all(data.get(key) for key in PROVENANCE)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", data["date"])
        assert {"values", "tables", "texts", "result"} & set(data)


def test_every_record_is_shown() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in pages())
    text += (RECORDS / "comparisons.toml").read_text(encoding="utf-8")
    for path in RECORDS.glob("*.json"):
        assert path.stem == "stated" or re.search(rf"[ \"]{path.stem}[ /]", text), path.stem


def test_figures_are_formatted() -> None:
    assert figure("demo/params : ,.0f") == "4,504,576"
    assert figure("demo/orders") == "20, 17, 3, 3"
    ratio = figure("decode/tnnlm-balanced-compiled/float32/8192 over decode/llama.cpp-F32/float32/8192 : .2f")
    ours, theirs = (
        float(figure(f"decode/{name}/float32/8192")) for name in ("tnnlm-balanced-compiled", "llama.cpp-F32")
    )
    assert float(ratio) == pytest.approx(ours / theirs, abs=5e-3)


@pytest.mark.parametrize(
    "text",
    [
        "<!--= nothing/params -->1<!--/-->",
        "<!--= demo/nothing -->1<!--/-->",
        "<!--= decode/llama.cpp-F32/float32/77 -->1<!--/-->",
        "<!--= demo/params : nonsense -->1<!--/-->",
        "<!-- begin nothing demo -->\n<!-- end -->",
        "<!-- begin table demo nothing -->\n<!-- end -->",
    ],
)
def test_region_without_a_record_is_reported(text: str) -> None:
    with pytest.raises(UserError, match="<!--"):
        render(text)


def test_output_of_the_demo_is_taken_from_its_log() -> None:
    steps = [f"step {step}/4  loss 5.0" for step in range(1, 5)]
    log = "\n".join(["pip", ".venv/bin/python train.py", "runs/demo: 4 parameters", *steps, "table"])
    log += "\n.venv/bin/python convert.py --verify\nlayers\nok\n.venv/bin/python generate.py --prompt x\n"
    texts = texts_of(log + "word\n" * 99)
    assert texts["train"].splitlines() == ["runs/demo: 4 parameters", steps[0], "...", *steps[2:]]
    assert texts["convert"] == "layers\nok\n"
    assert texts["generate"].split() == ["word"] * SAMPLE_LINES
    with pytest.raises(UserError, match="complete make demo"):
        texts_of(".venv/bin/python train.py\nstep 1/4\n")


def test_memory_of_a_plan_is_that_of_a_dry_run(script: Any) -> None:
    table = memory_table("tnn_125m_fineweb", "data.batch_size=2").splitlines()
    assert table[0].startswith("`tnn_125m_fineweb`, `data.batch_size=2`: 125,758,464 parameters")
    words = ("data.batch_size=2", "trainer.strategy=fsdp", "trainer.devices=8", "trainer.num_nodes=8")
    words += ("trainer.accelerator=cuda",)
    plan = json.loads(script("train", "--config", "tnn_125m_fineweb", "--dry-run", "--json", *words).out)
    row = next(line for line in table if line.startswith("| fsdp |"))
    assert row.split(" | ") == ["| fsdp", "-", row.split(" | ")[2], f"{plan['memory_bytes'] / 2**30:.1f} |"]


def test_links_of_the_readme_can_be_absolute() -> None:
    text = "![a](docs/a.svg) [b](docs/b.md#c) [d](https://e.org) [f](#g)"
    assert absolute_links(text, "") == text
    assert absolute_links(text, "https://h.org/i") == (
        "![a](https://h.org/i/raw/main/docs/a.svg) [b](https://h.org/i/blob/main/docs/b.md#c) "
        "[d](https://e.org) [f](#g)"
    )


def test_regions_are_found_and_removed() -> None:
    text = "a <!--= demo/params -->1<!--/--> b\n<!-- begin metrics -->\nold\n<!-- end -->\nc"
    assert FIGURE.search(text)
    assert BLOCK.search(text)
    assert without_regions(text) == "a  b\n\nc"
