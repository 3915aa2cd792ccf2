"""Instructions to install: none takes a package of our name from an index, where it need not be ours."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from tests.support.scripts import ROOT
from tnnlm import errors
from tnnlm.errors import install_command

TEXTS = {
    ".md", ".py", ".toml", ".yml", ".yaml", ".j2", ".html", ".js", ".txt", ".sh", ".sbatch", ".ipynb", ".cfg"
}  # fmt: skip
SKIPPED = {".git", ".venv", "venv", "build", "dist", "runs", "site", "__pycache__", "node_modules"}
INSTALL = re.compile(
    r"\b(?:pip3?|pipx|uv pip|uv|conda|mamba|poetry|pdm)\s+(?:install|add|inject)\b((?:\\\n|[^\n])*)"
)
OURS = re.compile(r"tnnlm(\[[^]]*\])?([=<>~!@].*)?")
NAME = "tnnlm"


def instructions(text: str) -> list[str]:
    """Return the words in commands of a text that install a package of our name from an index."""
    commands = [re.split(r"[`#;|]|&&", rest)[0] for rest in INSTALL.findall(text)]
    words = [word.strip("'\",:().") for rest in commands for word in rest.split()]
    extras = re.findall(rf"(?<![\w.]){NAME}\[[a-z][\w,-]*\]", text)
    return [word for word in words if OURS.fullmatch(word)] + extras


def texts() -> list[Path]:
    """Return the files of the repository that may hold instructions."""
    return [
        path
        for path in ROOT.rglob("*")
        if (path.suffix in TEXTS or path.name.startswith(("Docker", "Make")))
        and path.is_file()
        and not SKIPPED & {*path.relative_to(ROOT).parts}
        and not path.parent.name.endswith(".egg-info")
        and path not in (ROOT / "pyproject.toml", Path(__file__))
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"pip install {NAME}", 1),
        (f"run `pip install -U {NAME}==0.1`", 1),
        (f"uv pip install --quiet \\\n  '{NAME}[serve]'", 2),
        (f"needs {NAME}[onnx]", 1),
        ("pip install -c constraints.txt -e '.[serve]'", 0),
        (f"pip install dist/{NAME}-*.whl", 0),
        (f"pip install ./{NAME}-0.1.0-py3-none-any.whl[serve] fastapi; {NAME} serve", 0),
        (f'card.{NAME}["state_bytes"]', 0),
    ],
)
def test_an_instruction_by_name_is_found(text: str, found: int) -> None:
    assert len(instructions(text)) == found


def test_no_instruction_installs_our_name_from_an_index() -> None:
    files = texts()
    assert {ROOT / "README.md", ROOT / "docs/how-to/serve.md", ROOT / "tnnlm/cli/serve.py"} <= {*files}
    found = {path.relative_to(ROOT): instructions(path.read_text(encoding="utf-8")) for path in files}
    assert not {path: words for path, words in found.items() if words}


def test_install_command_names_the_packages_of_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout it is the checkout, and elsewhere what the extra needs."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in ("train", "serve", "onnx", "wandb", "lora"):
        assert install_command(extra) == f"pip install -c constraints.txt -e '.[{extra}]'"
        assert extra in extras["optional-dependencies"]
    monkeypatch.setattr(errors, "__file__", str(Path("lib/tnnlm/errors.py").absolute()))
    needed = [
        "torch>=2.8",
        "wandb>=0.19; extra == 'wandb'",
        'a>=1; sys_platform == "linux" and extra == "gpu"',
    ]
    monkeypatch.setattr(errors.metadata, "requires", lambda _: needed)
    assert install_command("wandb") == "pip install 'wandb>=0.19'"
    assert install_command("gpu") == "pip install 'a>=1'"


def test_readme_has_no_relative_link_on_an_index_of_packages() -> None:
    spec = importlib.util.spec_from_file_location("setup_of_tnnlm", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    plain = module.description(readme, "")
    assert "# tnnlm" in plain
    assert "<!--" not in plain
    assert {target.partition(":")[0] for target in re.findall(r"\]\(([^)]+)\)", plain)} == {"https"}
    linked = module.description(readme, "https://host.org/us/tnnlm")
    targets = re.findall(r"\]\(([^)]+)\)", linked)
    assert "https://host.org/us/tnnlm/blob/main/docs/tutorial.md" in targets
    assert "https://host.org/us/tnnlm/raw/main/docs/two_forms.svg" in targets
    assert all(target.startswith("https://") for target in targets)
