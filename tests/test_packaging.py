"""The distributions: their contents, and a wheel that decodes outside the repository."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml

import tnnlm
from tests.support.converted import write_converted
from tests.support.scripts import ROOT
from tests.support.training_runs import SETTINGS, write_text
from tnnlm.tokenizer import train_bpe

IGNORED = (".*", "__pycache__", "build", "dist", "*.egg-info")
"""Patterns of files that are not copied to the build folder; at the top of the repository also runs."""


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def ignored_names(folder: str, names: list[str]) -> set[str]:
    """Return the names in a folder that are not copied."""
    top = {"runs"} if Path(folder) == ROOT else set()
    return top | set(shutil.ignore_patterns(*IGNORED)(folder, names))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a source distribution, and a wheel from it, without a network."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "source", ignore=ignored_names)
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
    wanted |= {f"tnnlm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    wanted.add("tnnlm/configs/schema.json")
    assert {name for name in names if name.startswith("tnnlm/")} == wanted
    assert {name.split("/")[0] for name in names} == {"tnnlm", f"tnnlm-{tnnlm.__version__}.dist-info"}
    assert metadata["Version"] == tnnlm.__version__
    assert metadata["Author"] == "tnnlm developers"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = str(metadata.get_payload())
    assert description.lstrip().startswith("# tnnlm")
    assert not re.search(r"\]\((?!https://)", description)  # relative links lead nowhere on an index
    needed = {
        re.split(r"[^\w-]", line)[0]
        for line in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line
    }
    assert needed == {"torch", "tokenizers", "safetensors", "omegaconf", "numpy", "filelock", "xxhash"}


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


@pytest.fixture(scope="module")
def installed(distributions: Path) -> Path:
    """Install the wheel into a folder, with the dependencies of this environment."""
    (wheel,) = distributions.glob("*.whl")
    target = distributions / "installed"
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile",
        "--disable-pip-version-check", "--target", str(target), str(wheel),
    )  # fmt: skip
    return target


def test_installed_command_trains_converts_and_generates(installed: Path) -> None:
    write_text()

    def tnnlm_command(*words: str) -> str:
        return run(sys.executable, str(installed / "bin/tnnlm"), *words, PYTHONPATH=str(installed))

    shown = json.loads(tnnlm_command("train", "--config", "lra/listops", "--dry-run", "--json"))
    assert shown["params"] > 0
    assert "next: tnnlm convert runs/demo" in tnnlm_command(
        "train", "--config", "demo", *SETTINGS, "trainer.max_steps=4"
    )
    assert "next: tnnlm generate --model runs/demo/converted" in tnnlm_command("convert", "--no-compile")
    written = json.loads(tnnlm_command("generate", "--prompt", "The ", "--max-new-tokens", "3", "--json"))
    assert written["new_tokens"] == 3
    assert "usage: tnnlm serve" in tnnlm_command("serve", "--help")
    assert "tnnlm COMMAND" in tnnlm_command("--help")
    assert tnnlm_command("--version").strip() == tnnlm.__version__


def test_installed_server_completes(installed: Path) -> None:
    write_converted(
        Path("served"), train_bpe(["The first and the second"], 300, "<eos>", 1, False), "balanced"
    )
    command = [sys.executable, "-m", "tnnlm", "serve", "--model", "served", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            address = next(re.findall(r"http://[^ ]+/", line)[0] for line in lines if "http://" in line)
            body = json.dumps({"prompt": "The ", "max_tokens": 2, "temperature": 0}).encode()
            request = urllib.request.Request(
                f"{address}v1/completions", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                assert json.load(response)["usage"]["completion_tokens"] <= 2
        finally:
            process.terminate()


def test_installed_wheel_decodes_as_documented(installed: Path) -> None:
    tokenizer = train_bpe(["The first and the second and the third"], 300, "<eos>", 1, False)
    write_converted(Path("runs/demo/converted"), tokenizer, "balanced")
    page = (ROOT / "docs" / "how-to" / "export.md").read_text(encoding="utf-8")
    (snippet,) = (
        code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "from tnnlm" in code
    )
    code = f"{snippet}\nimport tnnlm\nprint(tnnlm.__file__)\nprint(len(record.tokens))"
    *text, file, written = run(sys.executable, "-c", code, PYTHONPATH=str(installed)).splitlines()
    assert Path(file) == installed / "tnnlm" / "__init__.py"
    assert text
    assert 0 < int(written) <= 40
