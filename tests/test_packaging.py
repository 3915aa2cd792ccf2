"""The distributions: what is in them, and a wheel that decodes outside the repository."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from test_checkpoint import write_converted

import tnnlm
from conftest import ROOT
from tnnlm.tokenizer import train_bpe

LEFT_OUT = (".*", "__pycache__", "build", "dist", "runs", "*.egg-info")
"""of the repository, when it is copied to be built"""


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution and the wheel that was built of it, without a network."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
    out = folder / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(folder / "source"))
    return out


def test_wheel_has_the_package_with_its_data_and_nothing_else(distributions: Path) -> None:
    (path,) = distributions.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (found,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(found))
    sources = ROOT / "tnnlm"
    wanted = {
        p.relative_to(ROOT).as_posix()
        for p in sources.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert "tnnlm/py.typed" in wanted
    assert {name for name in names if name.startswith("tnnlm/")} == wanted
    assert {name.split("/")[0] for name in names} == {"tnnlm", f"tnnlm-{tnnlm.__version__}.dist-info"}
    assert metadata["Version"] == tnnlm.__version__
    assert metadata["Author"] == "tnnlm developers"
    assert metadata["Requires-Python"] == ">=3.11"
    needed = {
        re.split(r"[^\w-]", line)[0]
        for line in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line
    }
    assert needed == {"torch", "tokenizers", "safetensors", "omegaconf", "numpy"}


def test_citation_and_changelog_name_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == tnnlm.__version__
    for paper in citation["references"]:
        assert {"type", "title", "authors", "year"} <= paper.keys()
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{tnnlm.__version__}] - {citation['date-released']}" in changes


def test_source_distribution_has_scripts_tests_and_documents(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("configs", "docs", "examples", "tests", "tools", "tnnlm"):
        files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert {p.relative_to(ROOT).as_posix() for p in files} <= names
    for name in ("train.py", "convert.py", "generate.py", "constraints.txt", "Makefile", "CHANGELOG.md"):
        assert name in names


def test_installed_wheel_decodes_as_documented(distributions: Path, tmp_path: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    target = tmp_path / "installed"
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile",
        "--disable-pip-version-check", "--target", str(target), str(wheel),
    )  # fmt: skip
    tokenizer = train_bpe(["The first and the second and the third"], 300, "<eos>", 1, False)
    write_converted(Path("runs/demo/converted"), tokenizer, "balanced")
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (snippet,) = (
        code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "from tnnlm" in code
    )
    code = f"{snippet}\nimport tnnlm\nprint(tnnlm.__file__)\nprint(len(record.tokens))"
    *text, file, written = run(sys.executable, "-c", code, PYTHONPATH=str(target)).splitlines()
    assert Path(file) == target / "tnnlm" / "__init__.py"
    assert text
    assert 0 < int(written) <= 40
