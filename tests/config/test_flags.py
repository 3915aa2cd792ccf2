"""Command-line flags of scripts, with the help and the bounds of the fields of a schema."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Union

import pytest

from tnnlm.config.checks import check_settings
from tnnlm.config.flags import add_flags, field_docs, settings_from_flags
from tnnlm.config.schema import ConversionConfig
from tnnlm.errors import ConfigError
from tnnlm.fields import choice, number

NAMES = {"method": "method", "horizon": "horizon", "tolerance": "tolerance", "order": "order"} | {
    "gradient_steps": "steps",
    "window_taps": "window-taps",
}


def parser_of(**defaults: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert.py")
    add_flags(parser, ConversionConfig, NAMES, defaults)
    return parser


def read(*words: str) -> ConversionConfig:
    return settings_from_flags(ConversionConfig, NAMES, parser_of().parse_args(words))


def test_without_flags_the_settings_are_the_defaults() -> None:
    assert read() == ConversionConfig()


def test_a_script_can_override_the_defaults() -> None:
    args = parser_of(method="balanced").parse_args([])
    assert settings_from_flags(ConversionConfig, NAMES, args) == ConversionConfig(method="balanced")


def test_flags_set_their_fields() -> None:
    words = "--method balanced --horizon 64 --tolerance 1e-2 --order 5 --steps 7 --window-taps 2"
    assert read(*words.split()) == ConversionConfig(
        method="balanced", horizon=64, tolerance=1e-2, order=5, gradient_steps=7, window_taps=2
    )
    assert read("--horizon", "auto").horizon == "auto"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tolerance 2", "--tolerance 2.0: must be at most 0.999"),
        ("--tolerance nan", "--tolerance nan: not a number"),
        ("--order 0", "--order 0: must be at least 1"),
        ("--horizon=-3", "--horizon -3: must be at least 1"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--window-taps=-1", "--window-taps -1: must be at least 0"),
    ],
)
def test_value_out_of_bounds_names_the_flag(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(*words.split())
    assert str(error.value) == message


def test_numbers_are_read_like_those_of_settings() -> None:
    read_back = read("--order", "1e3", "--horizon", "1_000", "--tolerance", "1e-3")
    assert (read_back.order, read_back.horizon, read_back.tolerance) == (1000, 1000, 1e-3)


@pytest.mark.parametrize(
    "words",
    [
        *("--method best", "--horizon many", "--horizon 1.5", "--horizon 0100", "--order x", "--order 0100"),
        *("--order 1:30", "--order 1e99", "--tolerance 00.1", "--tolerance 1e999"),
    ],
)
def test_an_invalid_value_ends_the_script(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(*words.split())
    assert ended.value.code == 2
    assert f"convert.py: error: argument {words.split()[0]}: " in capsys.readouterr().err.splitlines()[-1]


def test_help_shows_the_docstrings_of_the_fields() -> None:
    text = " ".join(parser_of(method="balanced").format_help().split())
    for name in NAMES:
        assert field_docs(ConversionConfig)[name].replace("null:", "default:") in text
    for shown in ("--horizon N|auto", "--tolerance X", "{balanced,auto,", "(default: balanced)"):
        assert shown in text


@dataclass
class Base:
    """Schema to derive from."""

    share: float = number(0.5, low=0, high=1)
    """Share of the data;
    100 % is all."""


@dataclass
class Derived(Base):
    """Schema that adds fields to those that it inherits."""

    size: Union[int, str] = number("full", low=1, word="full")  # noqa: UP007
    kind: str = choice("a", "a", "b")
    """Kind of the object."""
    nested: tuple[int, ...] = ()


def test_docs_are_inherited_and_a_percent_sign_is_one() -> None:
    assert dict(field_docs(Derived)) == {
        "share": "Share of the data; 100 % is all.",
        "kind": "Kind of the object.",
    }
    parser = argparse.ArgumentParser()
    add_flags(parser, Derived, {"share": "share", "size": "size"})
    assert "100 % is all. (default: 0.5)" in parser.format_help()
    assert parser.parse_args(["--size", "full"]).size == "full"


def test_field_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Derived\.nested"):
        add_flags(argparse.ArgumentParser(), Derived, {"nested": "nested"})


def test_check_names_field_and_value() -> None:
    with pytest.raises(ConfigError, match=r"^kind=c: expected one of a, b$"):
        check_settings(Derived(kind="c"))
    with pytest.raises(ConfigError, match=r"^size=0: must be at least 1$"):
        check_settings(Derived(size=0))
