"""Documentation tests: commands run unchanged on a tiny model and text, and links resolve.

A fenced block of ``sh`` or ``python`` runs, in the order of its page and in one folder per page, unless the
words after its language state a requirement: ``gpu``, ``cluster``, ``network``, ``long`` (minutes) or
``interactive``. The arguments of its commands are parsed and checked even then. A block of Python with a
file name after the language is written to that file.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from tests.support.commands import (
    check_arguments,
    commands_of,
    examples_of,
    help_of,
    script_call,
    script_module,
)
from tests.support.imported import write_fairseq, write_tokenizer
from tests.support.scripts import ROOT
from tests.support.training_runs import SETTINGS, write_text
from tnnlm.cli import serve
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.config.shipped import find_config
from tnnlm.errors import run_script
from tnnlm.kernels import KERNEL_SCHEMAS

OWN_TESTS = {"docs/how-to/export.md", "docs/how-to/serve.md", "docs/how-to/use-with-transformers.md"}
"""Pages whose commands run in other test modules."""
RESULTS = ROOT / "docs/results"
"""Pages that render from committed measurements, tested in tests/experiments/test_pages.py."""
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent != RESULTS),
    ROOT / "tools/slurm/README.md",
]
MARKS = {"gpu", "cluster", "network", "long", "interactive"}
LANGUAGES = {"sh", "python", "yaml", "text", ""}
SHELL = ("cat", "cp", "head", "ls", "mkdir", "tail")
"""Shell commands allowed in a block, in addition to the scripts of this repository."""
STEPS = ("trainer.max_steps=4", "trainer.val_every_n_steps=4", "checkpoint.every_n_steps=4")
SMALL = [
    *(w for w in SETTINGS if w.startswith(("model.d", "model.n", "model.max", "data.batch", "trainer."))),
    *STEPS,
    "conversion.horizon=64",
]
"""Small sizes, which override those of a page; its other settings are kept."""
TNO = [word for word in SETTINGS if word.startswith("model.kernel.")]


class Block(NamedTuple):
    """Fenced block of a page."""

    page: str
    language: str
    words: tuple[str, ...]
    """Words of the info string after the language."""
    text: str

    @property
    def marked(self) -> bool:
        return bool(MARKS & set(self.words))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(
        r"^```([^\n`]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    blocks = []
    for info, text in found:
        language, *words = info.split() or [""]
        blocks.append(Block(name_of(page), language, tuple(words), text))
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page) if block.page not in OWN_TESTS]
RUN = {
    page: list(blocks)
    for page, blocks in itertools.groupby(
        (b for b in BLOCKS if b.language in ("sh", "python") and not b.marked), key=lambda b: b.page
    )
}


def run_python(name: str, words: list[str], stdin: bytes = b"") -> int:
    """Run a script in this process."""
    return run_main(script_module(name), [name, *words], stdin)


def run_main(module: ModuleType, words: list[str], stdin: bytes = b"") -> int:
    """Run ``main`` of a module; ``words`` starts with its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            return run_script(module.main)
        except SystemExit as stop:  # argparse
            return int(stop.code or 0)


def tiny(name: str, words: list[str]) -> list[str]:
    """Return the arguments of a command, with sizes that take a second."""
    if name == "generate.py":
        return [*words, "--max-new-tokens", "4"]
    if name == "tools/instructions.py":
        return [*words, "--count", "200" if "write" in words else "4"]
    if name not in ("train.py", "tools/prepare_data.py") or {"--dry-run", "--print-schema"} & {*words}:
        return words
    if "--resume" in words:
        # A run that an earlier command has extended to 6 steps is extended again if steps are given.
        return [*words, f"trainer.max_steps={8 if any('max_steps' in word for word in words) else 6}"]
    config = find_config(words[words.index("--config") + 1] if "--config" in words else "demo")
    given = [word for word in words if "=" in word]
    if load_config(config, given).task == "classify":  # a dry run reads no data
        return [*words, *SMALL, *TNO]
    own = load_config(config, given).model.kernel.name == "tno" and not any(
        "model.kernel" in w for w in given
    )
    before = [word for word in SETTINGS if word not in TNO] + (TNO if own else [])
    if any(word.startswith(("data.source", "data.hub_name", "data.tokens", "data.files")) for word in given):
        before = [word for word in before if not word.startswith(("data.source", "data.files"))]
    if any(word.startswith("data.validation=") for word in given):
        before = [word for word in before if not word.startswith("data.val_fraction=")]
    if any(word.startswith("data.format=") for word in words):  # files of several words are joined
        before = [word for word in before if not word.startswith("data.files=")]
        return [*before, *words, *SMALL, "model.max_length=128", "trainer.sample_tokens=0"]
    return [*before, *words, *SMALL]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare a folder as a reader has it after the demo: a run, its conversion, and data files."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TNNLM_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        write_texts()
        assert run_python("train.py", [*SETTINGS, *SMALL]) == 0
        assert run_python("convert.py", ["runs/demo", "--no-compile"]) == 0
    return folder


def write_texts() -> None:
    """Write files of every kind that the pages train on or import."""
    import datasets

    text = write_text().read_text(encoding="utf-8")
    write_text(Path("book.txt"))
    write_fairseq(Path("checkpoint_best.pt"))
    write_tokenizer(31, Path("letters.json"))
    Path("lines.txt").write_text("The first\nA second line\n")
    Path("texts/more").mkdir(parents=True)
    pieces = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    for index, piece in enumerate(pieces):
        Path("texts/more" if index % 2 else "texts", f"{index}.txt").write_text(piece, encoding="utf-8")
    rows = datasets.Dataset.from_dict({"text": pieces, "body": pieces})
    Path("corpus").mkdir()
    rows.to_json("corpus/train.jsonl")
    rows.to_json("records.jsonl")
    rows.to_parquet("pages.parquet")


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """Return a copy of the folder for one page, with the files of the repository that commands use."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for name in ("configs", "examples", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


# The examples are too small for loader processes.
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("page", RUN)
def test_commands_of_a_page_run(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in RUN[page]:
        if block.language == "sh":
            for line in commands_of(block.text):
                capsys.readouterr()
                code = run_line(line)
                assert code == 0, f"{page}: {line}: {capsys.readouterr().err}"
        elif block.words:
            Path(block.words[0]).write_text(block.text, encoding="utf-8")
        else:
            exec(compile(block.text, page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", ["train.py", "convert.py", "generate.py"])
def test_examples_of_help_run(name: str, folder: Path) -> None:
    write_text(Path("story.txt"))
    for line in examples_of(help_of(name)):
        if "--compile" in line:  # takes half a minute; tests/inference/test_engine.py compiles
            continue
        if "--out" not in line and name == "convert.py" and "converted" not in line:
            shutil.rmtree("runs/demo/converted", ignore_errors=True)  # no example needs --force here
        assert run_line(line) == 0, line


def run_line(line: str) -> int:
    """Run a shell line: a script of this repository, possibly after a pipe, or an allowed command."""
    before, _, after = line.partition(" | ")
    if after:
        piped = subprocess.run(["bash", "-c", before], capture_output=True, check=True).stdout
        assert before.split()[0] in SHELL, line
    else:
        piped, after = b"", before
    words = shlex.split(after, comments=True)
    if words[-2:-1] == [">"]:
        with Path(words[-1]).open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            return run_line(after.partition(" > ")[0])
    if words[0] in SHELL:
        return subprocess.run(
            words if not after.count("*") else ["bash", "-c", after], check=False
        ).returncode
    assert words[0] == "python", f"{line}: neither run nor marked by one of {', '.join(sorted(MARKS))}"
    if words[1] == "-m":
        name = "tnnlm.cli" if words[2] == "tnnlm" else words[2]
        return run_main(importlib.import_module(name), words[2:])
    return run_python(words[1], tiny(words[1], words[2:]), piped)


def test_languages_and_marks_are_known() -> None:
    for block in BLOCKS:
        assert block.language in LANGUAGES, block
        allowed = all(word in MARKS or word.endswith(".py") for word in block.words)
        assert allowed, f"{block.page}: {block.words}: expected some of {MARKS}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.marked], ids=lambda b: f"{b.page}:{b.text[:30]!r}")
def test_arguments_of_commands_that_are_not_run_are_valid(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for line in commands_of(block.text):
        found = script_call(shlex.split(line, comments=True))
        if found is not None:
            assert (ROOT / found[0]).is_file(), line
            check_arguments(*found)


def settings() -> set[str]:
    """Return the full name of every setting and group of settings."""
    found: set[str] = set()

    def collect(schema: Any, prefix: str) -> None:
        for entry in fields(schema):
            found.add(prefix + entry.name)
            inner = getattr(schema(), entry.name)
            if is_dataclass(inner):
                collect(type(inner), f"{prefix}{entry.name}.")

    collect(Config, "")
    for schema in KERNEL_SCHEMAS.values():
        collect(schema, "model.kernel.")
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if name_of(p) not in OWN_TESTS], ids=name_of)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    own = set(re.findall(r"^    (\w+): \w+ = number", page.read_text(encoding="utf-8"), re.MULTILINE))
    known = settings() | {f"model.kernel.{name}" for name in own | {"bands", "width"}}
    pattern = r"(?<![\w./-])((?:model|data|init|optim|trainer|checkpoint|conversion)\.[a-z][\w.]*\w)(?![\w/])"
    # In Python, a setting is a string, whereas `trainer.fit` is an attribute.
    text = re.sub(
        r"^```python.*?^```$",
        lambda block: " ".join(re.findall(r'"[^"]*"', block[0])),
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL | re.MULTILINE,
    )
    for name in re.findall(pattern, text):
        if not name.endswith((".py", ".json", ".safetensors", ".onnx", ".md")):
            assert name in known, name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_metrics_that_a_page_names_are_logged(page: Path) -> None:
    logged = "\n".join(messages())
    for name in re.findall(r"`((?:train|val|kernel)/[a-z_]+)", page.read_text(encoding="utf-8")):
        group, _, column = name.partition("/")
        assert name in logged or (f"{group}/" in logged and column in logged), name


def test_options_that_pages_name_exist() -> None:
    scripts = [*(ROOT / "tnnlm/cli").glob("*.py"), *(ROOT / "tools").glob("*.py")]
    named = [*script_module("convert.py").FLAGS.values(), *(name for name, *_ in serve.LIMITS)]
    known = {"--help", *(f"--{name}" for name in named)} | set(
        re.findall(r'"(--[a-z-]+)"', "".join(path.read_text(encoding="utf-8") for path in scripts))
    )
    for page in PAGES:
        if name_of(page) in OWN_TESTS or "slurm" in str(page):  # they name options of other programs
            continue
        for word in re.findall(r"`(--[a-z-]+)", page.read_text(encoding="utf-8")):
            assert word in known, (name_of(page), word)


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors of the headings of a page, as GitHub generates them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)) for title in titles]
    return frozenset(title.strip().lower().replace(" ", "-") for title in plain)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert ROOT in found.parents, target
        if anchor:
            assert anchor in anchors(found), target


def test_the_index_lists_every_page() -> None:
    text = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    for page in PAGES:
        if page.name != "README.md" or page.parent.name == "slurm":
            assert f"]({os.path.relpath(page, ROOT / 'docs')})" in text, page.name


@cache
def messages() -> list[str]:
    """Return every string of the package and its scripts, with a zero byte for each formatted value."""
    found = []
    for path in (*(ROOT / "tnnlm").rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(text_of(node))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"):
                # Reason and remedy of an error are printed together.
                found.append("; ".join(map(text_of, node.args)))
    return found


def text_of(node: ast.expr) -> str:
    """Return a string of the source code, with a zero byte for each formatted value."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in parts)


def test_messages_that_troubleshooting_quotes_are_ours() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE)
    quoted = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 30
    missing: list[str] = []
    for message in quoted:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("...")), re.DOTALL)
        missing += [message] if not any(pattern.search(text) for text in messages()) else []
    assert not missing


TERMS = {
    "taps": r"\btaps\b",
    "horizon": r"\bhorizon\b",
    "etsc": r"\bETSC\b",
    "balanced-reduction": r"\b[Bb]alanced reduction\b",
    "certificate": r"\bcertificates?\b",
    "hankel-ratio": r"\bHankel ratio\b",
    "parallel-and-recurrent-form": r"\b(parallel|recurrent) form\b",
}
"""Terms that are linked to the glossary at their first use, by anchor."""
WITHOUT_LINKS = {"README.md", "docs/README.md", "docs/glossary.md", "docs/troubleshooting.md"}


@pytest.mark.parametrize("page", [p for p in PAGES if name_of(p) not in WITHOUT_LINKS], ids=name_of)
def test_terms_are_linked_to_the_glossary(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$|^<!-- begin.*?^<!-- end -->$", "", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"`[^`\n]*`|^#.*$", "", prose, flags=re.MULTILINE)
    for anchor, pattern in TERMS.items():
        assert f"glossary.md#{anchor})" in text or not re.search(pattern, prose), anchor


def test_readme_is_a_first_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
