"""Hooks of the documentation site (mkdocs.yml): what it shows in addition to the pages in docs/.

Pages link to files of the repository outside of docs/, which become pages under source/. Notebooks become
pages next to them, and the docstrings of all public names the page reference/docstrings.md.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import tnnlm

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
"""Link to a file: text before the target, target, anchor, and text behind it."""
CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):(<code>)~?")
"""Beginning of a reference in a docstring, as Sphinx writes it."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are generated."""
    for notebook in sorted(DOCS.glob("notebooks/*.ipynb")):
        uri = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, uri, content=notebook_page(notebook)))
    files.append(File.generated(config, "reference/docstrings.md", content=docstrings_page()))
    for path in linked_files():
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".md":
            language = {".py": "python", ".yaml": "yaml", ".yml": "yaml"}.get(path.suffix, "text")
            text = f"# `{path.relative_to(ROOT).as_posix()}`\n\n````{language}\n{text}\n````\n"
        files.append(File.generated(config, source_uri(path), content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the text of a page whose links lead to pages of the site."""
    here = origin(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        before, target, anchor, after = link.groups(default="")
        path = (here.parent / target).resolve()
        if not path.is_file():
            return link[0]  # a strict build reports it
        return f"{before}{os.path.relpath(uri_of(path), Path(page.file.src_uri).parent)}{anchor}{after}"

    parts = CODE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


def on_page_content(html: str, **_: Any) -> str:
    """Return a page in which references of docstrings are code alone."""
    return ROLE.sub(r"\1", html)


def linked_files() -> list[Path]:
    """Return the files outside of docs/ that pages link to, directly or through each other."""
    found: set[Path] = set()
    waiting = sorted(DOCS.rglob("*.md"))
    while waiting:
        page = waiting.pop()
        for _, target, _, _ in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
            path = (page.parent / target).resolve()
            if path.is_file() and DOCS not in path.parents and path not in found:
                found.add(path)
                waiting += [path] if path.suffix == ".md" else []
    return sorted(found)


def source_uri(path: Path) -> str:
    """Return the page of a file outside of docs/."""
    uri = f"source/{path.relative_to(ROOT).as_posix()}"
    return uri if path.suffix == ".md" else f"{uri}.md"


def uri_of(path: Path) -> str:
    """Return the page or file of the site that shows a file of the repository."""
    if DOCS not in path.parents:
        return source_uri(path)
    uri = path.relative_to(DOCS).as_posix()
    return f"{uri.removesuffix('.ipynb')}.md" if path.suffix == ".ipynb" else uri


def origin(uri: str) -> Path:
    """Return the file of the repository that a page shows."""
    outside = ROOT / uri.removeprefix("source/")
    return outside if uri.startswith("source/") and outside.suffix == ".md" else DOCS / uri


def notebook_page(notebook: Path) -> str:
    """Return a notebook as Markdown, with its code and without outputs."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    parts.append(f'<a href="{notebook.name}" download>Download this notebook</a>')
    return "\n\n".join(parts) + "\n"


def docstrings_page() -> str:
    """Return the page with the docstrings of all public names."""
    names = sorted(tnnlm.__all__, key=str.lower)
    blocks = [f"::: {tnnlm._MODULES[name]}.{name}" for name in names if name in tnnlm._MODULES]
    title = "# Docstrings\n\nDocstrings of every public name; [the Python API](api.md) has examples."
    return "\n\n".join([title, *blocks]) + "\n"
