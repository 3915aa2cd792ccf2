"""Documentation site: it builds with strict links and anchors, and its pages load nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tnnlm
from tests.support.scripts import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # In another process, because mkdocs changes the logging of this one.
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    pattern = r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?(?:https?:)?//[^"'>]*"""
    for page in pages:
        found = [
            tag
            for tag in re.findall(pattern, page.read_text(encoding="utf-8"))
            if not re.search(r"rel=.?(canonical|next|prev)", tag)
        ]
        assert not found, (page.name, found)


def test_every_public_name_has_its_docstring(site: Path) -> None:
    text = (site / "reference/docstrings.html").read_text(encoding="utf-8")
    for name in set(tnnlm.__all__) - {"__version__"}:
        assert re.search(rf'id="tnnlm\.[\w.]*\b{name}"', text), name
    assert ":class:" not in text
    assert "Convert the taps of any long convolution to a linear recurrence." in text


def test_code_outside_of_docs_and_notebooks_are_pages(site: Path) -> None:
    assert "Custom kernel" in (site / "source/examples/hyena_kernel.py.html").read_text(encoding="utf-8")
    assert "DampedWaves" in (site / "notebooks/custom-kernel.html").read_text(encoding="utf-8")
    assert (site / "notebooks/custom-kernel.ipynb").is_file()
