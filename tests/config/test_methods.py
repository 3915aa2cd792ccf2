"""Settings that the method of a conversion ignores are refused before a training, as convert.py does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.training_runs import tiny_run, write_text
from tnnlm.config.loader import config_to_yaml, load_config
from tnnlm.errors import ConfigError
from tnnlm.training.resume import resumed_config

IGNORED = {
    ("etsc", "order=16"): "balanced and gradient",
    ("auto", "order=16"): "balanced and gradient",
    ("auto", "poles=channel"): "balanced",
    ("window", "window_taps=4"): "balanced and auto",
    ("balanced", "gradient_steps=50"): "gradient",
    ("etsc", "gradient_lr=0.1"): "gradient",
}


@pytest.mark.parametrize(("method", "word"), IGNORED)
def test_settings_without_effect_are_refused_wherever_they_are_given(method: str, word: str) -> None:
    words = [f"conversion.method={method}", f"conversion.{word}"]
    reason = f"conversion.{word}: only applies to conversion.method={IGNORED[method, word]}, not {method}"
    with pytest.raises(ConfigError) as refused:
        load_config(None, words)
    assert refused.value.reason == f"{reason} (command line)"
    path = Path("own.yaml")
    path.write_text("conversion:\n  " + word.replace("=", ": "))
    with pytest.raises(ConfigError, match=r"own\.yaml"):
        load_config(path, words[:1])


def test_the_method_is_settled_before() -> None:
    large = ("model.n_layers=24", "model.d_model=2048", "model.max_length=8192")
    assert load_config(None, large).conversion.method == "auto"
    with pytest.raises(ConfigError, match="not auto"):
        load_config(None, [*large, "conversion.order=16"])
    assert load_config(None, [*large, "conversion.window_taps=4"]).conversion.window_taps == 4


def test_defaults_and_settings_with_an_effect_are_accepted() -> None:
    words = ["conversion.method=balanced", "conversion.order=16", "conversion.poles=channel"]
    path = Path("complete.yaml")
    path.write_text(config_to_yaml(load_config(None, words)))
    assert load_config(path).conversion.order == 16
    assert load_config(path, ["conversion.method=gradient", "conversion.poles=shared"]).conversion.order == 16
    # The metrics of a training use the tolerance, whatever the method.
    assert load_config(None, ["conversion.method=etsc", "conversion.tolerance=0.1"])


def test_a_saved_run_resumes_but_takes_no_new_setting_without_effect() -> None:
    run = Path("runs/old")
    run.mkdir(parents=True)
    saved = config_to_yaml(tiny_run("name=old")).replace("order: null", "order: 16")
    (run / "config.yaml").write_text(saved)
    assert resumed_config(run, []).conversion.order == 16
    with pytest.raises(ConfigError, match=r"poles=channel: only applies .* \(command line\)"):
        resumed_config(run, ["conversion.poles=channel"])


def test_train_refuses_without_writing(script: Any) -> None:
    write_text()
    done = script("train", "data.source=files", "data.files=text.txt", "conversion.order=16")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: conversion.order=16: only applies to conversion.method=balanced")
