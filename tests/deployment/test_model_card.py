"""The model card of a converted folder states the measurements of the run and of its conversion."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.support.converted import measure_model
from tests.support.models import tiny_config
from tests.support.scripts import assert_refused
from tests.support.training_runs import SETTINGS, write_text
from tnnlm.checkpoints.training import load_checkpoint
from tnnlm.config.schema import Config, ConversionConfig, DataConfig
from tnnlm.conversion import convert_model
from tnnlm.conversion.certify import horizon_warning
from tnnlm.deployment.card_metadata import Stated
from tnnlm.deployment.model_card import model_card
from tnnlm.deployment.pipeline import convert_checkpoint
from tnnlm.models.causal_lm import CausalLM


def front_matter(card: str) -> dict[str, Any]:
    start, head, _ = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    assert start == ""
    return yaml.safe_load(head)


def make_card(name: str = "mine", license: str | None = None, step: int = 7, **data: Any) -> str:
    model = CausalLM(tiny_config()).eval()
    report = measure_model(model, convert_model(model, method="etsc", horizon=40), method="etsc", horizon=40)
    config = Config(name=name, model=model.config, data=DataConfig(**data))
    return str(model_card(config, step, model, report, stated=Stated(license)))


def test_card_of_a_run_holds_the_measured_numbers(script: Any) -> None:
    write_text()
    assert script("train", *SETTINGS, "name=tiny").code == 0
    assert script("convert", "tiny").code == 0
    card = Path("runs/tiny/converted/README.md").read_text()
    report = json.loads(Path("runs/tiny/converted/conversion.json").read_text())
    head = front_matter(card)
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "text-generation")
    assert "license" not in head
    assert "datasets" not in head
    assert "`text.txt`" in card
    for form in ("parallel", "recurrent", "int8 weights"):
        for value in report["ppl"][form].values():
            assert f"{value:.4f}" in card
    for layer in report["layers"]:
        assert f"{layer['relative_tap_error']:.1e}" in card
        assert f"{layer['largest_pole']:.5f}" in card
    assert f"{report['state_bytes']:,} bytes" in card
    assert f"{report['horizon']:,} lags" in card
    assert "Not measured" not in card
    val_tokens = json.loads(Path("runs/tiny/data.json").read_text())["splits"]["val"]["tokens"]
    assert {*report["ppl_tokens"]} == {*report["ppl"]["parallel"]}
    for length, n_tokens in report["ppl_tokens"].items():
        assert n_tokens == (val_tokens - 1) // int(length) * int(length)
        assert f"{n_tokens:,} tokens at a context of {int(length):,}" in card
    # Without its training text, perplexity can't be measured, and the card reports that.
    Path("text.txt").write_text("another text " * 2000)
    assert script("convert", "tiny", "--out", "later").code == 0
    later = Path("later/README.md").read_text()
    assert "Not measured (the data of this run has changed)." in later
    assert "| recurrent" not in later


def test_card_of_a_run_that_validates_on_a_part_says_so() -> None:
    assert (
        "% of the data was held out for validation. At most the first 5,000 tokens of it are used.\n"
        in make_card(max_val_tokens=5000)
    )
    assert "At most the first" not in make_card()


def test_card_of_imported_weights_claims_no_data(run_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = make_card(step=0, source="hub", hub_name="someone/texts")
    assert "The weights were imported. The data that they were trained on is not known." in card
    assert "datasets" not in front_matter(card)
    for claim in ("held out", "someone", "trained on the same data", "optimizer steps | 0"):
        assert claim not in card
    source = replace(load_checkpoint(run_here / "checkpoints/last.ckpt"), step=0)
    monkeypatch.setattr("tnnlm.deployment.pipeline.load_checkpoint", lambda *_: source)
    recipe = ConversionConfig(method="window")
    done = convert_checkpoint(str(run_here), recipe, out=Path("out"), force=False, verify=False)
    assert done.note == "the training data of imported weights is not known"
    assert f"Not measured ({done.note})." in Path("out/README.md").read_text(encoding="utf-8")
    assert done.report.ppl == {"parallel": {}, "recurrent": {}}


def test_card_states_the_source_of_the_data() -> None:
    hub = make_card(source="hub", hub_name="someone/texts", hub_config="raw", hub_val_split="validation")
    assert front_matter(hub)["datasets"] == ["someone/texts"]
    assert "`someone/texts`, `raw`, `split train`" in hub
    assert "Validated on split `validation`" in hub
    assert "standard library" in make_card()
    private = make_card(source="files", files=["/home/someone/secret/book.txt"], tokenizer="/home/x/t.json")
    assert "`book.txt`" in private
    assert "/home" not in private
    local = make_card(source="hub", hub_name=str(Path.cwd()))
    assert "datasets" not in front_matter(local)
    assert str(Path.cwd()) not in local


@pytest.mark.parametrize("tail", [0.0, 0.1])
def test_card_warns_of_taps_past_the_horizon(tail: float) -> None:
    model = CausalLM(tiny_config()).eval()
    report = measure_model(model, convert_model(model, method="etsc", horizon=40), method="etsc", horizon=40)
    report.layers = [replace(layer, tail_energy=tail, l1_error=0.0) for layer in report.layers]
    report.warning = horizon_warning(report.layers, report.horizon)
    card = str(model_card(Config(model=model.config), 7, model, report))
    assert ("**Limit:**" in card) == (tail > 0)


HOSTILE = "a\"b: 'c'\n---\n# {{ 7 * 7 }} {% raw %} `d` | e"
"""String with quotes, line breaks, a metadata border, and syntax of Jinja, Markdown and YAML."""


def test_user_strings_break_neither_the_metadata_nor_the_lines() -> None:
    card = make_card(name=HOSTILE, license=HOSTILE, source="hub", hub_name=HOSTILE, hub_config=HOSTILE)
    plain = front_matter(make_card(source="hub", hub_name="x/y"))
    on_a_line = " ".join(HOSTILE.split())
    assert front_matter(card) == plain | {"datasets": [on_a_line], "license": on_a_line}
    assert f"\n# {on_a_line}\n" in card
    shown = on_a_line.replace("`", "'")
    assert f"\nThe data set `{shown}`, `{shown}`, `split train`. " in card
    headings = [line for line in card.splitlines() if line.startswith("## ")]
    assert headings == ["## Data", "## Perplexity", "## Conversion", "## Use", "## Licence"]


def test_licence_is_that_of_the_configuration() -> None:
    assert "license" not in front_matter(make_card())
    assert "Not stated. Add a licence here" in make_card()
    licensed = make_card(license="apache-2.0")
    assert front_matter(licensed)["license"] == "apache-2.0"
    assert licensed.endswith("## Licence\n\napache-2.0\n")


def test_metadata_is_that_of_the_hub_and_has_both_forms_as_evaluation_results() -> None:
    model = CausalLM(tiny_config()).eval()
    report = measure_model(model, convert_model(model, method="etsc", horizon=40), method="etsc", horizon=40)
    report.ppl = {
        "parallel": {"32": 20.5, "256": 19.25},
        "recurrent": {"32": 20.5001, "256": float("inf")},
        "window 32": {"32": 21.0},
    }
    data = DataConfig(source="hub", hub_name="someone/texts", hub_config="raw", hub_val_split="validation")
    config = Config(name="mine", model=model.config, data=data)
    stated = Stated("mit", ["de", "en"], ["other/texts", "someone/texts"])
    card = model_card(config, 7, model, report, stated=stated, prompt="Es war einmal")
    assert ModelCard(str(card), ignore_metadata_errors=False).data.to_dict() == card.data.to_dict()
    found: Any = card.data
    assert found.license == "mit"
    assert found.language == ["de", "en"]
    assert found.datasets == ["other/texts", "someone/texts"]
    assert (found.library_name, found.pipeline_tag) == ("transformers", "text-generation")
    results = found.eval_results
    assert [(result.metric_name, result.metric_value) for result in results] == [
        ("perplexity per token, parallel form, context of 32 tokens", 20.5),
        ("perplexity per token, parallel form, context of 256 tokens", 19.25),
        ("perplexity per token, recurrent form, context of 32 tokens", 20.5001),
    ]
    for result in results:
        assert (result.task_type, result.metric_type) == ("text-generation", "perplexity")
        assert (result.dataset_type, result.dataset_config) == ("someone/texts", "raw")
        assert result.dataset_split == "validation"
    assert 'tokenizer("Es war einmal", ' in str(card)
    assert "--prompt 'Es war einmal'" in str(card)
    # Nothing is stated that is not known: neither language nor results, nor a prompt.
    plain = ModelCard(make_card()).data.to_dict()
    assert not {"language", "license", "datasets", "model-index"} & plain.keys()
    assert '"TEXT"' in make_card()


def test_what_the_user_states_is_checked_first(run_here: Path, script: Any) -> None:
    refused = script("convert", "runs/tiny", "--language", "English")
    assert_refused(refused, "--language English: is no code of a language; give one such as en or zh")
    assert_refused(script("convert", "tiny", "--dataset", "a/b/c"), "--dataset a/b/c: is no name of a data")
    assert not (run_here / "converted").exists()


def test_licence_is_given_on_the_command_line(run_here: Path, script: Any) -> None:
    assert script("convert", "runs/tiny", "--license", "apache-2.0").code == 0
    card = (run_here / "converted/README.md").read_text(encoding="utf-8")
    assert front_matter(card)["license"] == "apache-2.0"
    assert script("convert", str(run_here / "converted"), "--license", "mit", "--export").code == 2
