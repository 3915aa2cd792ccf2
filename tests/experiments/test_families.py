"""The comparison of families: equal sizes, every field of its three files, going on, bad input."""

from __future__ import annotations

import builtins
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import ROOT, Result
from experiments.family_measure import Sizes, forms_of, state_bytes
from experiments.family_report import plot
from experiments.family_training import train_family
from experiments.sizing import PEERS, TRANSFORMER, Family, load_families, match_width
from tnnlm.data.packing import PackedRows
from tnnlm.errors import UserError, run_script
from training_runs import write_text

CONFIGS = ROOT / "configs"
FILES = {"tnn": "demo", "sgconv": "sgconv_demo", "rtf": "rtf_demo"}
TINY = (
    "model.d_model=32",
    "model.n_layers=2",
    "model.vocab_size=400",
    "model.max_length=32",
    "data.batch_size=4",
    "data.val_fraction=0.05",
    "optim.warmup_steps=2",
    "trainer.max_steps=11",
    "trainer.accelerator=cpu",
)
SIZES = Sizes(val_tokens=256, tokens=256, contexts=(16, 48), turns=1, steps=2)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs the extra peers"
)


def load_tool() -> Any:
    spec = importlib.util.spec_from_file_location("compare_models", ROOT / "tools" / "compare_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call tools/compare_models.py on a text of the test's own, in tiny sizes."""
    module = load_tool()
    monkeypatch.setattr(module, "QUICK", ())
    monkeypatch.setattr(module, "QUICK_SIZES", SIZES)
    write_text()

    def call(*words: str) -> Result:
        monkeypatch.setattr(
            sys, "argv", ["compare_models.py", *TINY, "--quick", "--text", "text.txt", *words]
        )
        capsys.readouterr()
        try:
            code = run_script(module.main)
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return call


def tiny(*names: str, words: tuple[str, ...] = ()) -> dict[str, Family]:
    files = {name: CONFIGS / f"{FILES[name]}.yaml" if name in FILES else None for name in names}
    return load_families(files, CONFIGS / "demo.yaml", [*TINY, *words], {})[1]


def test_width_is_the_closest() -> None:
    assert match_width(lambda width: 10 * width + 3, 10_000) == 1000
    assert match_width(lambda width: 10 * width + 3, 10_006) == 1000
    assert match_width(lambda width: 10 * width, 4) == 1


@pytest.mark.parametrize("size", [(), TINY])
def test_parameters_are_equal_within_three_percent(size: tuple[str, ...]) -> None:
    names = [*FILES, *(PEERS if importlib.util.find_spec("transformers") else [])]
    files = {name: CONFIGS / f"{FILES[name]}.yaml" if name in FILES else None for name in names}
    base, families, left_out = load_families(files, CONFIGS / "demo.yaml", size, {"rtf": 1e-3})
    assert not left_out
    assert families["tnn"].config.model.glu_dim == base.model.d_model
    for family in families.values():
        assert abs(family.params / families["tnn"].params - 1) <= 0.03
        assert family.config.data == base.data
    assert families["rtf"].config.optim.lr == 1e-3
    assert families["sgconv"].config.optim.lr == base.optim.lr
    assert families["rtf"].config.conversion.method == "companion"


def test_a_family_that_is_too_large_is_left_out_by_name() -> None:
    Path("large.yaml").write_text("model: {kernel: {name: tno, rpe_dim: 512}}\n")
    files = {"tnn": CONFIGS / "demo.yaml", "large": Path("large.yaml")}
    _, families, left_out = load_families(files, CONFIGS / "demo.yaml", TINY, {})
    assert list(families) == ["tnn"]
    assert "no width" in left_out["large"]
    with pytest.raises(UserError, match="large: no width"):
        load_families({"large": Path("large.yaml")}, CONFIGS / "demo.yaml", TINY, {})


@needs_transformers
@pytest.mark.parametrize("name", ["tnn", *PEERS])
def test_both_forms_of_a_family_agree(name: str) -> None:
    family = tiny(name)[name]
    model = family.build(3).eval()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), family.build(3).parameters(), strict=True)
    )
    forms, missing = forms_of(model, family.config.conversion)
    assert not missing
    tokens = torch.randint(0, 400, (1, 33))
    with torch.no_grad():
        logits = model(tokens)
        for form in forms:
            _, state = form.model.prefill(tokens[:, :20], form.model.init_state(1), keep=1)
            _, state = form.model.prefill(tokens[:, 20:32], state, keep=1)
            before = state_bytes(state)
            step, state = form.model.step(tokens[:, 32], state)
            # The tolerance of auto, on kernels that are not trained yet.
            torch.testing.assert_close(step, logits[:, -1], rtol=0, atol=2e-2)
            assert before == (2 * 2 * 32 * 32 * 4 if name in PEERS else state_bytes(state))


def test_training_follows_from_the_seed() -> None:
    family = tiny("tnn", words=("trainer.accumulate=2",))["tnn"]
    rows = PackedRows(torch.randint(0, 400, (2000,)).int().numpy(), 32)
    model, cell = train_family(family, rows, 1)
    again, repeated = train_family(family, rows, 1)
    _, other = train_family(family, rows, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert cell["curve"] == repeated["curve"] != other["curve"]
    assert cell["tokens"] == 11 * 2 * 4 * 32 == cell["curve"][-1][0]
    assert cell["curve"][-1][1] < cell["curve"][0][1]


@needs_transformers
def test_the_three_files_have_every_field_and_finished_cells_are_kept(
    tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--families", "tnn", TRANSFORMER, "--out", "out", "--seeds")
    done = tool(*words, "0")
    assert done.code == 0, done.err
    before = json.loads(Path("out/families.json").read_text())
    trained = []

    def counted(family: Family, rows: PackedRows, seed: int) -> Any:
        trained.append((family.name, seed))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train_family(family, rows, seed)

    monkeypatch.setattr("experiments.family_run.train_family", counted)
    assert tool(*words, "0", "1").code == 130
    assert tool(*words, "0", "1").code == 0
    assert trained == [("tnn", 1), (TRANSFORMER, 1), (TRANSFORMER, 1)]
    result = json.loads(Path("out/families.json").read_text())
    assert {"settings", "sizes", "machine", "seeds", "contexts", "left_out", "rows"} == result.keys()
    for old, row in zip(before["rows"], result["rows"], strict=True):
        assert row["seeds"]["0"] == old["seeds"]["0"]
        assert row["perplexity"] == old["perplexity"]
        assert row["decoding"] == old["decoding"]
        assert row["seeds"].keys() == {"0", "1"}
        assert all(cell["bits_per_byte"] > 0 for cell in row["seeds"].values())
        lengths = row["perplexity"]["parallel"].keys()
        assert lengths == {"32", "64", "128", "256"}
        for form in row["perplexity"]["forms"]:
            assert form["ppl"]["32"] == pytest.approx(row["perplexity"]["parallel"]["32"], rel=1e-3)
            assert form["ppl"].keys() == lengths
        assert all(row["decoding"][context]["seconds_per_token"] > 0 for context in ("16", "48"))
    ours, peer = result["rows"]
    assert ours["decoding"]["16"]["state_bytes"] == ours["decoding"]["48"]["state_bytes"]
    assert 3 * peer["decoding"]["16"]["state_bytes"] == peer["decoding"]["48"]["state_bytes"]
    assert len(ours["perplexity"]["forms"][-1]["methods"]) == 2
    text = Path("out/families.md").read_text()
    for shown in ("bits per byte", "±", "state bytes at 48", "KV cache", "etsc", "auto", "0.001"):
        assert shown in text
    assert Path("out/families.png").read_bytes().startswith(b"\x89PNG")


def test_all_kernels_are_compared(tool: Any) -> None:
    done = tool("--families", "sgconv", "rtf", "--out", "out", "--lr", "rtf=2e-3")
    assert done.code == 0, done.err
    rows = json.loads(Path("out/families.json").read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["sgconv", "rtf"]
    assert [row["lr"] for row in rows] == [4e-3, 2e-3]
    for row in rows:
        assert not row["perplexity"]["missing"]
        assert [form["form"] for form in row["perplexity"]["forms"]][-1] == "auto"
        for form in row["perplexity"]["forms"]:
            assert form["ppl"]["256"] == pytest.approx(row["perplexity"]["parallel"]["256"], rel=1e-3)


def test_other_settings_are_refused(tool: Any) -> None:
    Path("mine.yaml").write_text("model: {kernel: {name: tno, rpe_dim: 8}}\n")
    words = ("--families", "mine=mine.yaml", "--out", "out")
    assert tool(*words).code == 0
    changed = tool("model.n_layers=1", *words)
    assert changed.code == 2
    assert "other settings (settings); give another --out" in changed.err
    changed = tool(*words, "--lr", "mine=1e-3")
    assert changed.code == 2
    assert "other settings of mine; give another --out" in changed.err
    Path("out/results.json").write_text("{")
    assert "damaged" in tool(*words).err


def test_a_loss_that_is_not_finite_names_the_remedy() -> None:
    class Broken(Family):
        def build(self, seed: int) -> nn.Module:
            model = super().build(seed)
            nn.init.constant_(next(model.parameters()), torch.nan)
            return model

    whole = tiny("tnn")["tnn"]
    rows = PackedRows(torch.randint(0, 400, (2000,)).int().numpy(), 32)
    with pytest.raises(UserError, match=r"not finite by step 10 .* --lr tnn=X"):
        train_family(Broken(whole.name, whole.config, whole.params), rows, 0)


def test_a_family_that_fails_is_left_out_with_the_reason(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return whole(name, *rest)

    def fails_on_hot(family: Family, rows: PackedRows, seed: int) -> Any:
        if family.name == "hot":
            raise UserError("the loss is not finite")
        return train_family(family, rows, seed)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("experiments.family_run.train_family", fails_on_hot)
    Path("hot.yaml").write_text("model: {kernel: {name: tno, rpe_dim: 8}}\n")
    done = tool("--families", "hot=hot.yaml", "tnn", TRANSFORMER, "--out", "out")
    assert done.code == 0, done.err
    assert "left out: transformer: needs the package transformers" in done.err
    text = Path("out/families.md").read_text()
    assert "Left out: transformer: needs the package" in text
    assert "Left out: hot: the loss is not finite" in text
    alone = tool("--families", TRANSFORMER, "--out", "other")
    assert alone.code == 2
    assert "peers" in alone.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--families", "tnm"), "there is tnn"),
        (("--families", "model.d_model=8"), "expected at least one"),
        (("--families", "../x=file.yaml"), "expected NAME"),
        (("--families", "transformer=x.yaml"), "no file for transformer"),
        (("--families", "x=missing.yaml"), "no such configuration file"),
        (("--lr", "tnn=fast"), "expected NAME=X"),
        (("--lr", "other=1"), "expected NAME=X"),
        (("--lr", "tnn=nan"), "expected NAME=X"),
        (("--seeds", "-1"), "--seeds"),
        (("--families", "tnn", "--out", "text.txt"), "is not a folder"),
        (("model.kernel.decay=0.5",), "--families NAME=FILE"),
        (("model.with=3",), "unknown key"),
        (("trainer.precision=bf16-true", "--families", "tnn"), "compared in 32-true or bf16-mixed"),
    ],
)
def test_bad_input_is_one_line(tool: Any, words: tuple[str, ...], said: str) -> None:
    done = tool(*words)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_many_families_are_drawn() -> None:
    def row(name: str) -> dict[str, Any]:
        cell = {"bits_per_byte": 1.0, "curve": [[10, 3.0], [20, 2.0]]}
        timed = {str(n): {"seconds_per_token": 1e-3, "state_bytes": 5 * 10**6} for n in (8, 64)}
        return {
            "family": name,
            "seeds": {"0": cell},
            "perplexity": {"parallel": {"8": 2.0, "64": 90.0}, "forms": []},
            "decoding": None if name == "b" else timed,
        }

    plot({"rows": [row(name) for name in "abcdef"], "contexts": [8, 64]}, Path("families.png"))
    assert Path("families.png").stat().st_size > 10_000
