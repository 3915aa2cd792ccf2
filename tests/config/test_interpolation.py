"""Interpolation: of what the user typed only, and never of what comes with a run, a checkpoint or a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tnnlm.config.loader import (
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    load_config,
    model_config_from_dict,
)
from tnnlm.config.schema import Config
from tnnlm.errors import ConfigError

SECRET = "${oc.env:SECRET}"


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cret")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (SECRET, "s3cret"),
        ("a-${oc.env:SECRET}-b", "a-s3cret-b"),
        ("${oc.env:MISSING}", "${oc.env:MISSING}"),
        ("${oc.env:MISSING,other}", "other"),
        ("${oc.env:MISSING,007}", "007"),
        ("${oc.env:MISSING, 1e3 }", "1e3"),
        ("${oc.env:MISSING,True}-${oc.env:MISSING,null}", "True-null"),
        ("${oc.env:MISSING,[a]}", "[a]"),
        ("${oc.env:MISSING,a:b,c}", "a:b,c"),
        (r"${oc.env:MISSING,a\,b}", "a,b"),
        ('${oc.env:MISSING," a "}', " a "),
        ("${oc.env: SECRET ,other}", "s3cret"),
        ("${oc.env:,other}", "other"),
        ("${oc.env:A=B}", "${oc.env:A=B}"),
        ("${seed}", "7"),
        ("s${seed}-l${optim.lr}-${model.causal}", "s7-l0.5-${model.causal}"),
        ("${trainer.compile}", "false"),
        ("${model.kernel.decay}", "0.25"),
        ("${h}.txt", "${h}.txt"),
        ("${model}", "${model}"),
        ("${data.files}", "${data.files}"),
        ("${}", "${}"),
        ("${seed", "${seed"),
        ("$seed {seed} $${x}", "$seed {seed} $${x}"),
        ("${oc.decode:1}", "${oc.decode:1}"),
        ("${oc.create:{a}}", "${oc.create:{a}}"),
        (r"\${seed}", "${seed}"),
        (r"\${oc.env:SECRET}", SECRET),
        (r"\\${seed}", r"\${seed}"),
        (r"a\b", r"a\b"),
    ],
)
def test_what_resolves_is_replaced_and_the_rest_is_text(text: str, value: str) -> None:
    words = ["seed=7", "optim.lr=0.5", "model.kernel.decay=0.25"]
    assert load_config(None, [*words, f"trainer.sample_prompt={text}"]).trainer.sample_prompt == value
    Path("c.yaml").write_text(f"trainer:\n  sample_prompt: '{text}'\n")
    assert load_config("c.yaml", words).trainer.sample_prompt == value
    files = [f"data.files=['{text}', b]", "data.source=files"]
    assert load_config(None, [*words, *files]).data.files == [value, "b"]


def test_numbers_are_interpolated_and_read_by_their_type() -> None:
    config = load_config(None, ["optim.eps=${optim.lr}", "model.glu_dim=${model.d_model}"])
    assert (config.optim.eps, config.model.glu_dim) == (config.optim.lr, config.model.d_model)
    with pytest.raises(ConfigError, match=r"^seed=\$\{optim\.lr\}: expected an integer \(command line\)$"):
        load_config(None, ["seed=${optim.lr}"])
    with pytest.raises(
        ConfigError, match=r"^seed=\$\{x\}: expected an integer in decimal.*\(command line\)$"
    ):
        load_config(None, ["seed=${x}"])


def test_a_value_of_the_command_line_is_seen_by_the_file() -> None:
    Path("c.yaml").write_text("name: run-${seed}\nseed: 1\n")
    assert load_config("c.yaml", ["seed=2"]).name == "run-2"


@pytest.mark.parametrize("words", [["name=${name}"], ["name=${runs_dir}", "runs_dir=${name}"]])
def test_a_circle_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^name=.*: refers to itself \(command line\)$"):
        load_config(None, words)


def typed(text: str) -> Config:
    """Return a configuration in which settings of every kind hold the given text."""
    config = Config()
    config.trainer.sample_prompt = config.trainer.wandb = config.data.text_column = text
    config.data.files, config.data.source = [text], "files"
    return config


@pytest.mark.parametrize("text", [SECRET, "${seed}", "${x}", r"\${seed}", r"a\${b}", "${name}"])
def test_settings_of_a_checkpoint_are_data(text: str) -> None:
    config = typed(text)
    assert config_from_dict(config_to_dict(config)) == config
    config.model.kernel.module = text
    assert model_config_from_dict(config_to_dict(config.model)).kernel.module == text


@pytest.mark.parametrize("text", [SECRET, "${seed}", "${x}", r"\${seed}", r"a\${b}", "${name}"])
def test_the_configuration_of_a_run_gives_the_same_values_when_resumed_and_with_config(text: str) -> None:
    config = typed(text)
    Path("config.yaml").write_text(config_to_yaml(config))
    assert load_config("config.yaml", saved=True) == config
    assert load_config("config.yaml") == config


@pytest.mark.parametrize("text", [SECRET, "${seed}", "a-${x}", "${oc.decode:1}", "${oc.create:{a}}", "${"])
def test_an_interpolation_in_a_file_that_came_with_a_model_is_refused(text: str) -> None:
    Path("config.yaml").write_text(f"seed: 1\ntrainer:\n  wandb: '{text}'\n")
    place = r"is an interpolation .*\(config\.yaml, line 3\); use a file with the values"
    with pytest.raises(ConfigError, match=place) as caught:
        load_config("config.yaml", saved=True)
    assert str(caught.value).startswith(f"trainer.wandb={text}: ")
    for key, data in {
        "data.files": {"data": {"source": "files", "files": ["a", text]}},
        "model.kernel.name": {"model": {"kernel": {"name": text}}},
        "model.kernel.module": {"model": {"kernel": {"name": "tno", "module": text}}},
    }.items():
        with pytest.raises(ConfigError, match=rf"^{key}=.* is an interpolation .*\(last\.ckpt\)"):
            config_from_dict(data, "last.ckpt")
    model = config_to_dict(Config().model)
    for key in ("name", "module", "decay"):
        kernel = {"name": "tno", key: text}
        with pytest.raises(ConfigError, match=rf"^model\.kernel\.{key}=.*\(converted\)"):
            model_config_from_dict(model | {"kernel": kernel}, "converted")


def test_what_the_user_types_is_interpolated_beside_a_run_of_a_stranger() -> None:
    Path("config.yaml").write_text("name: theirs\n")
    assert load_config("config.yaml", [f"data.eos_token={SECRET}"], saved=True).data.eos_token == "s3cret"
    Path("config.yaml").write_text(f"name: '{SECRET}'\n")
    assert load_config("config.yaml").name == "s3cret"


def test_the_name_of_a_kernel_may_be_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNEL", "rtf")
    config: Any = load_config(None, ["model.kernel.name=${oc.env:KERNEL}", "model.kernel.state_size=3"])
    assert dataclasses.asdict(config.model.kernel)["state_size"] == 3
