"""Portability: no Unix-only names at module level, no forked loaders, and explicit encodings."""

from __future__ import annotations

import ast
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.scripts import ROOT
from tests.support.training_runs import SETTINGS, write_text
from tnnlm.config.loader import load_config
from tnnlm.data.masking import MaskedRows, Masking
from tnnlm.data.packing import PackedRows, prepare
from tnnlm.data.sequences.rows import Example, LabelledRows, SeenRows, write_rows
from tnnlm.machine import resident
from tnnlm.training import estimate, throughput

SCRIPTS = ("train.py", "convert.py", "generate.py")
PACKAGE = sorted((ROOT / "tnnlm").rglob("*.py"))
SHIPPED = [*PACKAGE, *sorted((ROOT / "tools").rglob("*.py")), *(ROOT / name for name in SCRIPTS)]
"""Files that are part of a release."""
ALL = [path for path in sorted(ROOT.rglob("*.py")) if ".venv" not in path.parts]
OLDEST = (3, 11)

UNIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
WITHOUT_UNIX = f"""
import os, signal, sys
for name in {UNIX_MODULES}:
    sys.modules[name] = None
for module, names in (
    (signal, ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP")),
    (os, ("sched_getaffinity", "fork", "getuid", "geteuid", "killpg", "setsid", "uname")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
"""
"""Code that removes what Windows lacks; packages imported earlier may still have used it."""


def python(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter with the repository on its path."""
    return subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=500,
    )


def other_packages(paths: list[Path]) -> set[str]:
    """Return the modules outside the repository that files import at module level."""
    found: set[str] = set()
    for path in paths:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
    own = ("tnnlm", "__future__", *UNIX_MODULES)
    return {name for name in found if name.partition(".")[0] not in own}


def test_every_module_imports_without_unix_names() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SHIPPED]
    code = f"""
import contextlib, importlib, traceback
for name in {sorted(other_packages(SHIPPED))}:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
{WITHOUT_UNIX}
failed = []
for name in {[name.removesuffix(".__init__") for name in names]}:
    try:
        importlib.import_module(name)
    except Exception as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name not in {UNIX_MODULES}):
            failed.append(name + ": " + traceback.format_exc().splitlines()[-1])
print("\\n".join(failed))
"""
    done = python("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr[-2000:]


def test_run_is_prepared_trained_and_converted_without_unix_names() -> None:
    write_text()
    settings = [*SETTINGS, "trainer.max_steps=8", "conversion.horizon=64"]
    code = f"""
import lightning.pytorch, datasets, os, signal, transformers
numbers = signal.SIGKILL, signal.SIGUSR1
{WITHOUT_UNIX}
from tnnlm.cli import convert, generate, prepare_data, train
from tnnlm.errors import run_script
# Lightning asks for them wherever it isn't on Windows.
signal.SIGKILL, signal.SIGUSR1 = numbers
for script, words in (
    (prepare_data, {settings}),
    (train, {settings}),
    (convert, ["--no-compile"]),
    (generate, ["--prompt", "The ", "--max-new-tokens", "4", "--engine", "eager"]),
):
    if script is convert:
        os.remove("text.txt")  # converts without measuring the quantized forms
    sys.argv = [script.__name__, *words]
    assert run_script(script.main) == 0, script
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_second_preparation_is_refused_without_fcntl() -> None:
    code = """
import sys
sys.modules["fcntl"] = None
from pathlib import Path
from tnnlm.errors import DataError
from tnnlm.data.packing import _resumable_folder
with _resumable_folder(Path("cache/key")) as part:
    (part / "file").touch()
    try:
        with _resumable_folder(Path("cache/key")):
            print("both")
    except DataError as error:
        print(error)
print(sorted(path.name for path in Path("cache").iterdir()), sys.modules["fcntl"])
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    refused, left = done.stdout.splitlines()
    assert "another process prepares the same data" in refused
    assert left == "['key'] None"


def test_peak_memory_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")  # psutil itself imports resource
    held = torch.ones(1 << 24)
    assert resident.resident_peak() > held.nbytes
    monkeypatch.setattr(resident.Path, "is_file", lambda path: False)  # without /proc, as on macOS
    if sys.platform != "win32":
        assert resident.resident_peak() > held.nbytes
    monkeypatch.setitem(sys.modules, "resource", None)  # without getrusage, as on Windows
    if sys.platform != "win32":
        assert resident.resident_peak() == 0  # psutil reports the peak on Windows only
        monkeypatch.setattr(psutil.Process, "memory_info", lambda process: Windows())
        assert resident.resident_peak() == Windows.peak_wset
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert resident.resident_peak() == 0
    assert throughput.peak_memory(torch.device("cpu")) == 0


class Windows:
    """Memory information of psutil on Windows."""

    peak_wset = 123


def test_rows_are_pickled_by_file_name(tmp_path: Path) -> None:
    write_text()
    corpus = prepare(load_config(None, SETTINGS).data, 400, 0)
    write_rows(tmp_path, "train", [Example((bytes(range(200)),), 1)] * 100, 2, SeenRows())
    for rows in (
        corpus.rows("train", 32),
        corpus.rows("train", 32, 1000),
        LabelledRows(tmp_path, "train", 9),
    ):
        sent = pickle.dumps(rows)
        assert len(sent) < 1000
        received = pickle.loads(sent)
        assert len(received) == len(rows)
        torch.testing.assert_close(received[3], rows[3], rtol=0, atol=0)
    masked = MaskedRows(corpus.rows("train", 32), Masking(0.3, 2, 300, seed=0))
    assert torch.equal(pickle.loads(pickle.dumps(masked))[3].tokens, masked[3].tokens)
    in_memory = PackedRows(np.arange(99, dtype=np.int32), 4)
    assert torch.equal(pickle.loads(pickle.dumps(in_memory))[1], in_memory[1])


def test_training_with_spawned_loader_processes() -> None:
    write_text()
    code = f"""
import multiprocessing, sys
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from tnnlm.cli import train
    assert train.main({[*SETTINGS, "trainer.max_steps=4", "data.num_workers=1"]}) == 0
"""
    Path("run.py").write_text(code, encoding="utf-8")
    done = python("run.py", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


def test_character_outside_the_encoding_of_the_output_is_no_error() -> None:
    code = "from tnnlm.errors import run_script; run_script(lambda: print('a \\u6f22') or 0)"
    done = python("-c", code, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout.strip()) == (0, "a ?"), done.stderr


@pytest.mark.parametrize(
    ("accelerator", "cuda", "expected"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("mps", False, "mps")],
)
def test_auto_accelerator_is_cuda_or_the_cpu(
    accelerator: str, cuda: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config = load_config(None, [f"trainer.accelerator={accelerator}"])
    assert estimate.resolve_accelerator(config) == expected


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_syntax_is_that_of_the_oldest_python(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=OLDEST)


def test_text_files_name_their_encoding() -> None:
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{node.lineno}: {ast.unparse(node)[:80]}"
        for path in [*SHIPPED, *sorted((ROOT / "examples").glob("*.py"))]
        for node in text_accesses(ast.parse(path.read_text(encoding="utf-8")))
        if not any(keyword.arg == "encoding" for keyword in node.keywords)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("code", "is_text"),
    [
        ("path.open()", True),
        ("path.open('a', newline='')", True),
        ("path.open('rb')", False),
        ("open(path)", True),
        ("open(path, 'wb')", False),
        ("(folder / 'x').read_text()", True),
        ("path.write_text(text)", True),
        ("write_text(path, text)", False),
        ("gzip.open(path)", False),
        ("gzip.open(path, 'rt')", True),
        ("subprocess.run(words, text=True)", True),
        ("subprocess.run(words, capture_output=True)", False),
    ],
)
def test_scan_knows_text_files(code: str, is_text: bool) -> None:
    assert bool([*text_accesses(ast.parse(code))]) == is_text


def text_accesses(tree: ast.AST) -> Iterator[ast.Call]:
    """Yield calls that open text files, which use the encoding of the system unless one is given."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else ""
        if name == "open" and owner not in ("Image", "tarfile", "os", "webbrowser"):
            at = 0 if method and owner != "gzip" else 1
            modes = [*node.args[at : at + 1], *(k.value for k in node.keywords if k.arg == "mode")]
            mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else ""
            if "b" not in str(mode) and (owner != "gzip" or "t" in str(mode)):
                yield node
            continue
        process = owner == "subprocess" and any(k.arg == "text" for k in node.keywords)
        if process or (method and name in ("read_text", "write_text")):
            yield node


def test_file_names_fit_every_file_system() -> None:
    """File systems of macOS and Windows ignore case, and Windows forbids some characters."""
    top = ("configs", "docs", "examples", "tests", "tools", "tnnlm")
    names = [path.relative_to(ROOT).as_posix() for folder in top for path in (ROOT / folder).rglob("*")]
    assert len({name.casefold() for name in names}) == len(names)
    assert not [name for name in names if set(name) & set('<>:"\\|?*')]
