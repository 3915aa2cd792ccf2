"""The comparison of kernel families: equal sizes, both forms, determinism, and invalid input."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.families import families
from experiments.frame import Claim
from experiments.results import reproduce
from experiments.sizing import PEERS, Family, match_width, text_models
from experiments.training import recurrent_forms, train_family, train_plain
from tests.support.scripts import Result
from tests.support.training_runs import write_text
from tnnlm.data.packing import PackedRows
from tnnlm.errors import UserError
from tnnlm.models.causal_lm import CausalLM

NAMES = ("tnn", "sgconv", "rtf")
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs Transformers"
)


@pytest.fixture(autouse=True)
def _text() -> None:
    text_models.cache_clear()  # clears the data of the test before, which had another cache
    write_text()


def tiny(*names: str, files: tuple[tuple[str, Path], ...] = ()) -> dict[str, Family]:
    return text_models(names, "tiny", 11, ("text.txt",), files).families


def test_width_is_the_closest() -> None:
    assert match_width(lambda width: 10 * width + 3, 10_000) == 1000
    assert match_width(lambda width: 10 * width + 3, 10_006) == 1000
    assert match_width(lambda width: 10 * width, 4) == 1


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_parameters_are_equal_within_three_percent(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.sizing.split_rows", lambda corpus, config: (None, None))
    names = (*NAMES, *(PEERS if importlib.util.find_spec("transformers") else []))
    found = text_models(names, size, 5, ("text.txt",)).families
    base = found["tnn"]
    assert base.config.model.glu_dim == base.config.model.d_model
    for family in found.values():
        assert abs(family.params / base.params - 1) <= 0.03
        assert family.config.data == base.config.data
        assert (family.config.optim.lr == base.config.optim.lr) == (family.name in NAMES)
    assert found["rtf"].config.conversion.method == "companion"


def test_a_family_that_is_too_large_is_refused_by_name() -> None:
    Path("large.yaml").write_text("model: {kernel: {name: tno, rpe_dim: 512}}\n")
    with pytest.raises(UserError, match=r"large: model\.glu_dim: no width"):
        tiny("tnn", "large", files=(("large", Path("large.yaml")),))


@needs_transformers
@pytest.mark.parametrize("name", ["tnn", *PEERS])
def test_both_forms_of_a_family_agree(name: str) -> None:
    family = tiny(name)[name]
    model = family.build(3).eval()
    again = family.build(3).parameters()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again, strict=True))
    forms: dict[str, Any] = {"KV cache": model}
    if isinstance(model, CausalLM):
        forms = recurrent_forms(model, family.config.conversion)
        assert list(forms) == ["etsc", "auto"]
    tokens = torch.randint(0, 400, (1, 33))
    with torch.no_grad():
        logits = model(tokens)
        for form in forms.values():
            _, state = form.prefill(tokens[:, :20], form.init_state(1), keep=1)
            _, state = form.prefill(tokens[:, 20:32], state, keep=1)
            step, state = form.step(tokens[:, 32], state)
            # The method auto has this tolerance, and the kernels are untrained.
            torch.testing.assert_close(step, logits[:, -1], rtol=0, atol=2e-2)
            if name in PEERS:
                form.undo(state)
                torch.testing.assert_close(form.step(tokens[:, 32], state)[0], step)


def rows_of_noise() -> PackedRows:
    return PackedRows(torch.randint(0, 400, (2000,)).int().numpy(), 32)


def test_training_follows_from_the_seed() -> None:
    family = tiny("tnn")["tnn"]
    family.config.trainer.accumulate = 2
    family.config.data.batch_size = 4
    rows = rows_of_noise()
    model, cell = train_family(family, rows, 1)
    again, repeated = train_family(family, rows, 1)
    _, other = train_family(family, rows, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert cell["curve"] == repeated["curve"] != other["curve"]
    assert cell["tokens"] == 11 * 2 * 4 * 32 == cell["curve"][-1][0]
    assert cell["curve"][-1][1] < cell["curve"][0][1]


def test_a_loss_that_is_not_finite_names_the_remedy() -> None:
    family = tiny("tnn")["tnn"]
    model = family.build(0)
    nn.init.constant_(next(model.parameters()), torch.nan)
    with pytest.raises(UserError, match=r"tnn.* not finite by step 10; lower the learning rate"):
        train_plain("tnn", model, family.config, rows_of_noise(), 0, lambda m, rows: m(rows[:, :-1]).mean())


def test_other_precisions_are_refused() -> None:
    family = tiny("tnn")["tnn"]
    family.config.trainer.precision = "bf16-true"
    with pytest.raises(UserError, match="not supported here; use 32-true or bf16-mixed"):
        train_family(family, rows_of_noise(), 0)


@needs_transformers
def test_a_kernel_of_a_file_is_compared_and_measured_again_when_it_changes() -> None:
    def run(bar: Any) -> list[Claim]:
        text_models.cache_clear()
        experiment = families({"mine": Path("mine.yaml")})
        return reproduce(experiment, "tiny", Path("out"), bar, data=("text.txt",))

    Path("mine.yaml").write_text("model: {kernel: {name: tno, rpe_dim: 8}}\n")
    measured: list[str] = []

    def counted(cells: list[dict[str, Any]]) -> Any:
        measured[:] = [cell["family"] for cell in cells]
        return cells

    assert any("mine is at least as good" in claim.claim for claim in run(counted))
    assert measured == [*NAMES, "transformer", "mine"]
    assert "| mine | " in Path("out/families.md").read_text()
    Path("mine.yaml").write_text("model: {kernel: {name: tno, rpe_dim: 16}}\n")
    run(counted)
    assert measured == ["mine"]
    assert len(json.loads(Path("out/families.json").read_text())["cells"]) == 6


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that calls tools/reproduce.py."""
    import sys

    import reproduce as module
    from tnnlm.errors import run_script

    def call(*words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *words])
        capsys.readouterr()
        return Result(run_script(module.main), *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("families", "--kernel", "../x=file.yaml", "--out", "out"), "expected NAME=FILE"),
        (("families", "--kernel", "transformer=x.yaml", "--out", "out"), "with a name other than tnn"),
        (("families", "--kernel", "x=missing.yaml", "--out", "out"), "no such file"),
        (("families", "--kernel", "x=x.yaml"), "requires the experiment families"),
        (("stability", "--kernel", "x=x.yaml", "--out", "out"), "and --out DIR"),
        (("families", "--out", "text.txt"), "not a folder"),
    ],
)
def test_bad_input_is_one_line(tool: Any, words: tuple[str, ...], said: str) -> None:
    done = tool(*words)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
