"""YAML files: the rules of YAML 1.2, duplicate keys, and errors of the parser with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import ROOT, assert_refused
from tnnlm.config.loader import load_config
from tnnlm.errors import ConfigError

CASES = ROOT / "tests" / "cases"


def refusal(text: str) -> str:
    """Return the message with which a YAML file is refused."""
    Path("c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config("c.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_duplicate_keys_are_refused_with_file_line_and_key(script: Any) -> None:
    path = CASES / "duplicate_key.yaml"
    refused = script("train", "--config", str(path))
    assert_refused(refused, f"{path}: line 2: name is set twice, first on line 1; remove one")


def test_a_tab_is_refused_with_file_line_and_problem(script: Any) -> None:
    path = CASES / "tab.yaml"
    refused = script("train", "--config", str(path))
    assert_refused(refused, f"{path}: line 2: found character '\\t'", "indent with spaces, not with tabs")


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (
            "model:\n  d_model: 8\n  kernel: {name: tno}\n  d_model: 9\n",
            4,
            "model.d_model is set twice, first on line 2",
        ),
        ("model:\n  kernel: {name: rtf, name: tno}\n", 2, "model.kernel.name is set twice"),
        ("seed: 1\n'seed': 2\n", 2, "seed is set twice"),
        ("name: a\ndata:\n  files: *.txt\n", 3, "put text that begins with a special character in quotes"),
        ("name: @x\n", 1, "put text that begins with a special character in quotes"),
        ("name: a: b\n", 1, "mapping values are not allowed here"),
        ("seed: 1\n---\nseed: 2\n", 2, "a second document begins"),
        ("name: a\nseed: !!int 5\n", 2, "the tag !!int is not supported"),
        ("name: !!python/object/apply:os.getcwd []\n", 1, "the tag !!python/object/apply:os.getcwd"),
        ("data: &a {files: *a}\n", 1, "an alias stands inside of its own anchor"),
        ("? [a]\n: b\n", 1, "a key is not text"),
        ('name: "open\n', 2, "found unexpected end of stream"),
    ],
)
def test_errors_name_file_line_and_problem(text: str, line: int, problem: str) -> None:
    message = refusal(text)
    assert message.startswith(f"c.yaml: line {line}: ")
    assert problem in message


@pytest.mark.parametrize("text", ['name: "\\UFFFFFFFF"', "name: a\x01", "[" * 5000, "{a: " * 5000])
def test_text_that_no_parser_reads_is_refused_in_one_line(text: str) -> None:
    assert refusal(text).startswith("c.yaml: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  d_model: 0\n", "model.d_model=0: must be at least 1 (c.yaml, line 2)"),
        ("optim:\n  lr: fast\n", "optim.lr=fast: expected a number in decimal notation"),
        ("optim.lr: 1\n", "optim.lr: unknown key (c.yaml, line 1); nest it in the group optim"),
        ("optim: 3\n", "optim=3: expected a group of settings, optim.NAME=... (c.yaml, line 1)"),
        (
            "optim: {lr: {a: 1}}\n",
            "optim.lr={...}: is a single setting, not a group of settings (c.yaml, line 1)",
        ),
        ("name: [a]\n", "name=[a]: expected text (c.yaml, line 1)"),
        ("<<: {seed: 1}\n", "<<: unknown key (c.yaml, line 1)"),
    ],
)
def test_wrong_values_name_file_line_and_key(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


def test_anchors_and_multi_line_text_are_read() -> None:
    text = "name: &n 007\ntrainer:\n  wandb: *n\n  sample_prompt: |-\n    def f():\n      return\n"
    Path("c.yaml").write_text(text)
    config = load_config("c.yaml")
    assert (config.name, config.trainer.wandb) == ("007", "007")
    assert config.trainer.sample_prompt == "def f():\n  return"


def test_json_is_read() -> None:
    data = {"name": "é😀", "optim": {"lr": 1e-3}, "data": {"source": "files", "files": ["a\tb.txt"]}}
    Path("c.json").write_text(json.dumps(data))
    config = load_config("c.json")
    assert (config.name, config.optim.lr, config.data.files) == ("é😀", 1e-3, ["a\tb.txt"])


def test_a_byte_order_mark_and_line_ends_of_windows_are_read() -> None:
    Path("c.yaml").write_bytes(b"\xef\xbb\xbfname: on\r\nseed: 1_0\r\n")
    config = load_config("c.yaml")
    assert (config.name, config.seed) == ("on", 10)
