"""Groups of settings pass the checks of single settings, and only near misses of a key are suggested."""

from __future__ import annotations

from pathlib import Path

import pytest

from tnnlm.config.loader import load_config
from tnnlm.config.shipped import find_config
from tnnlm.errors import ConfigError


@pytest.mark.parametrize(
    ("group", "single"),
    [
        ("model={d_model: 0}", "model.d_model=0"),
        ("model={dmodel: 8}", "model.dmodel=8"),
        ("model={d_model: 0100}", "model.d_model=0100"),
        ("model={kernel: {name: rtf, decay: 1}}", "model.kernel.name=rtf model.kernel.decay=1"),
        ("model.kernel={name: foo}", "model.kernel.name=foo"),
        ("data={hub_split: a}", "data.hub_split=a"),
        ("data={lra: {folder: x}}", "data.lra.folder=x"),
        ("trainer={devices: many}", "trainer.devices=many"),
        ("trainer={skip_nonfinite: yes}", "trainer.skip_nonfinite=yes"),
    ],
)
def test_groups_pass_the_same_checks_as_single_settings(group: str, single: str) -> None:
    with pytest.raises(ConfigError) as of_single:
        load_config(None, single.split())
    with pytest.raises(ConfigError) as of_group:
        load_config(None, [group])
    assert str(of_group.value) == str(of_single.value)


def test_groups_of_the_command_line_are_yaml() -> None:
    words = [
        "model={d_model: 8, kernel: {name: rtf, state_size: 4}}",
        "trainer={ema_decay: 0.9}",
        "data={eos_token: no}",
    ]
    config = load_config(None, words)
    assert (config.model.d_model, config.model.kernel.name, config.trainer.ema_decay) == (8, "rtf", 0.9)
    assert config.data.eos_token == "no"
    with pytest.raises(ConfigError, match=r"model\.d_model is set twice \(command line\)"):
        load_config(None, ["model={d_model: 8, d_model: 9}"])
    with pytest.raises(ConfigError, match=r"^model=\{d_model: 8: expected ',' or '}'.*\(command line\)$"):
        load_config(None, ["model={d_model: 8"])


@pytest.mark.parametrize("key", ["foo", "qwertz.x", "model.colour", "model.kernel.stretch", "data.q"])
def test_nothing_is_suggested_for_a_key_that_is_like_no_other(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"{key}=1"])
    assert str(caught.value) == f"{key.replace('qwertz.x', 'qwertz')}: unknown key (command line)"


def test_a_setting_of_another_kernel_is_reported_with_its_kernel() -> None:
    with pytest.raises(
        ConfigError, match=r"decay: unknown key .*; it is a setting of model\.kernel\.name=tno$"
    ):
        load_config(None, ["model.kernel.name=rtf", "model.kernel.decay=1"])


def test_interpolation_in_the_place_of_a_key_is_named_whole() -> None:
    with pytest.raises(ConfigError, match=r"^\$\{oc\.env:HOME\}: is no key \(command line\); use "):
        load_config(None, ["${oc.env:HOME}=3"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("demo.yaml", "no such file, and not a shipped configuration; did you mean demo?"),
        ("rtf_demmo", "no such file, and not a shipped configuration; did you mean rtf_demo?"),
        ("runs", "is a folder, and not a shipped configuration; choose one of "),
    ],
)
def test_configuration_that_is_no_file_is_refused(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    with pytest.raises(ConfigError) as caught:
        find_config(name)
    assert str(caught.value).startswith(f"--config {name}: {expected}")
