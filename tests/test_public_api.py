"""The public API: every name exists and is imported on first use, and models load and save."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tnnlm
from tests.support.models import tiny_config
from tests.support.scripts import ROOT
from tnnlm.tokenizer import train_bpe

PUBLIC = [name for name in tnnlm.__all__ if not name.startswith("_")]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import tnnlm; dir(tnnlm); tnnlm.__version__; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "ours = sorted(name for name in sys.modules if name.split('.')[0] == 'tnnlm'); "
        "print(sorted(new - set(sys.stdlib_module_names)), ours)"
    )
    assert python(code) == "['tnnlm'] ['tnnlm']"


@pytest.mark.parametrize("name", ["Config", "UserError", "load_config", "KernelConfig"])
def test_a_name_brings_its_own_module_alone(name: str) -> None:
    code = (
        f"import sys, tnnlm; tnnlm.{name}; print('lightning' in sys.modules, 'transformers' in sys.modules)"
    )
    assert python(code) == "False False"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_found_and_documented(name: str) -> None:
    value = getattr(tnnlm, name)
    assert value.__doc__
    assert value.__name__ == name
    assert name in dir(tnnlm)


@pytest.mark.parametrize("name", tnnlm.__all__)
def test_public_name_has_a_short_example_on_the_page(name: str) -> None:
    page = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8").replace("\\_", "_")
    sections = {part.partition("\n")[0]: part for part in re.split(r"^#{2,3} ", page, flags=re.MULTILINE)}
    (example,) = re.findall(r"```python\n(.*?)```", sections[name], flags=re.DOTALL)
    assert f"tnnlm.{name}" in example or name in ("TextGenerator", "RecurrentConv")  # returned, not created
    assert len([line for line in example.splitlines() if line]) <= 10


def test_star_import_gives_the_public_names() -> None:
    assert sorted(tnnlm.__all__, key=str) == tnnlm.__all__
    found: dict[str, object] = {}
    exec("from tnnlm import *", found)
    assert set(PUBLIC) <= set(found)


def test_unknown_names_are_refused_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Transformer'"):
        tnnlm.Transformer  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Transformer'"):
        from tnnlm import Transformer  # noqa: F401


def test_type_checkers_see_the_names_that_are_imported() -> None:
    tree = ast.parse((ROOT / "tnnlm/__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == tnnlm._MODULES
    assert set(seen) == set(PUBLIC)


def test_a_missing_extra_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; sys.modules['lightning'] = None\n"
        "import tnnlm\n"
        "try: tnnlm.LitModel\n"
        "except ImportError as error: print(error)"
    )
    assert python(code) == (
        "tnnlm.LitModel: needs the package lightning; run: pip install -c constraints.txt -e '.[train]'"
    )


@pytest.fixture
def trained() -> tuple[tnnlm.CausalLM, tnnlm.TextTokenizer]:
    tokenizer = train_bpe(
        ["the text of a test, and nothing else " * 20], 280, "<|endoftext|>", 1, progress=False
    )
    return tnnlm.CausalLM(tiny_config()), tokenizer


@pytest.mark.parametrize("converted", [False, True])
def test_what_was_saved_generates_when_loaded(
    trained: tuple[tnnlm.CausalLM, tnnlm.TextTokenizer], converted: bool
) -> None:
    model, tokenizer = trained
    if converted:
        folder = tnnlm.save(tnnlm.convert_model(model), tokenizer, "out")
        assert "not measured" in Path("out/conversion.json").read_text()
    else:
        folder = tnnlm.save(model, tokenizer, "out", method="etsc")
        assert '"relative_tap_error"' in Path("out/conversion.json").read_text()
        assert model.training
    assert folder == Path("out")
    generator = tnnlm.load("out", device="cpu")
    greedy = tnnlm.SamplingParams(temperature=0)
    text = generator("the text", 8, greedy)
    tokens = tokenizer.encode("the text")
    with torch.no_grad():
        for _ in range(8):
            logits = model.eval()(torch.tensor([tokens]))[0, -1, : tokenizer.size]
            tokens.append(int(logits.argmax()))
    assert text == tokenizer.decode(tokens[len(tokenizer.encode("the text")) :])
    assert generator("the text", 8, seed=3) == generator("the text", 8, seed=3)
    assert generator("the text", 0) == ""


def test_run_folder_name_and_checkpoint_load(run_here: Path) -> None:
    best = run_here / "checkpoints/best.ckpt"
    texts = {tnnlm.load(path, device="cpu")("The ", 5, seed=0) for path in ("tiny", run_here, str(best))}
    assert len(texts) == 1
    checkpoint = tnnlm.load_trained(run_here)
    assert isinstance(checkpoint.model, tnnlm.CausalLM)
    tnnlm.save(checkpoint.model, checkpoint.tokenizer, run_here / "converted", method="balanced")
    assert tnnlm.load(device="cpu")("The ", 5, seed=0)


def test_a_users_mistake_is_one_line(trained: tuple[tnnlm.CausalLM, tnnlm.TextTokenizer]) -> None:
    model, tokenizer = trained
    Path("there").mkdir()
    small = tnnlm.CausalLM(tiny_config(vocab_size=200))
    packed = tnnlm.convert_model(model)
    packed.head = nn.Linear(2, 2)
    for call, message in (
        (lambda: tnnlm.load("nowhere"), "nowhere: no such run"),
        (lambda: tnnlm.load("there"), "neither a converted model nor a run"),
        (lambda: tnnlm.load("there", device="gpu9"), "gpu9"),
        (lambda: tnnlm.load_trained("nowhere.ckpt"), "no such checkpoint"),
        (lambda: tnnlm.save(model, tokenizer, "there"), "force=True"),
        (lambda: tnnlm.save(model, tokenizer, "there", force=True), "is not a converted model"),
        (lambda: tnnlm.save(small, tokenizer, "new"), "the tokenizer has"),
        (lambda: tnnlm.save(packed, tokenizer, "new"), "packed for decoding"),
        (lambda: tnnlm.save(nn.Linear(2, 2), tokenizer, "new"), "a Linear can't be saved"),  # type: ignore[arg-type]
        (lambda: tnnlm.save(tnnlm.convert_model(model), tokenizer, "new", order=2), "converted already"),
    ):
        with pytest.raises(tnnlm.UserError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    assert not Path("new").exists()
