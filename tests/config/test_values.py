"""Values of settings, read by the type of the field: command line, YAML file and stored settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripts import ROOT, assert_refused
from tnnlm.config.checks import leaves
from tnnlm.config.layers import Schema
from tnnlm.config.loader import config_from_dict, load_config
from tnnlm.config.schema import Config
from tnnlm.config.text_sources import SourceConfig
from tnnlm.config.values import kinds_of, typed
from tnnlm.errors import ConfigError
from tnnlm.kernels.tno import TNOConfig

CASES = ROOT / "tests" / "cases"


def value_of(config: Config, key: str) -> Any:
    """Return the value of a setting by its full key."""
    return next(value for name, value, _ in leaves(config) if name == key)


def from_words(*words: str, key: str = "") -> Any:
    """Return the value of the setting that the last word sets."""
    return value_of(load_config(None, words), key or words[-1].partition("=")[0])


def from_file(text: str, key: str) -> Any:
    """Return the value of a setting that a YAML file sets."""
    Path("c.yaml").write_text(text, encoding="utf-8")
    return value_of(load_config("c.yaml"), key)


NAMES = [
    "2024_01_01",
    "007",
    "1.10",
    "1e3",
    "on",
    "no",
    "12:30",
    "try #2",
    "???",
    "null",
    "~",
    "0x1F",
    "2024-01-01",
]


@pytest.mark.parametrize(
    "name", [*NAMES, "true", "it's", "a: b", "&a", "*a", "!x", "%x", "@x", "- a", "{a}", "a=b"]
)
def test_text_of_the_command_line_is_literal(name: str) -> None:
    assert from_words(f"name={name}") == name
    assert from_words(f"name='{name}'") == (name if "'" not in name else f"'{name}'")
    assert from_words(f'name="{name}"') == name


@pytest.mark.parametrize(
    "prompt", ["alpha ", " alpha", "# Title", "Q: why?", "[INST] hi", "", "a\nb", "${x", "\\n"]
)
def test_prompts_are_literal(prompt: str) -> None:
    assert from_words(f"trainer.sample_prompt={prompt}") == prompt
    assert from_words(f'trainer.sample_prompt="{prompt}"') == prompt


def test_a_pair_of_quotes_is_removed_only_around_the_whole_value() -> None:
    assert from_words("""name='"a"'""") == '"a"'
    assert from_words("""name="a" and "b" """.rstrip()) == '"a" and "b"'
    assert from_words("""trainer.sample_prompt=\"""") == '"'


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("null", "~")])
def test_a_number_or_date_in_a_yaml_file_is_literal_in_a_text_field(name: str) -> None:
    plain = name if "#" not in name and not name.startswith("?") else f'"{name}"'
    assert from_file(f"name: {plain}\n", "name") == name


def test_null_in_a_yaml_file_is_refused_where_text_is_needed() -> None:
    for null in ("null", "~", ""):
        with pytest.raises(ConfigError, match=r"^name=null: expected text \(c\.yaml, line 2\)$"):
            from_file(f"# a comment\nname: {null}\n", "name")
    assert from_file("name: 'null'\n", "name") == "null"


def test_null_is_none_only_where_the_type_allows_it() -> None:
    assert from_words("data.tokenizer=null") is None
    assert from_words("data.tokenizer='null'") == "null"
    assert from_words("data.max_documents=null") is None
    assert from_file("data: {tokenizer: ~}\n", "data.tokenizer") is None
    assert from_file("data: {tokenizer: 'null'}\n", "data.tokenizer") == "null"
    for word in ("optim.lr=null", "data.batch_size=null", "data.streaming=null", "data.files=null"):
        with pytest.raises(ConfigError, match=r"=null: expected .* \(command line\)$"):
            load_config(None, [word])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000),
        ("1_000", 1000),
        ("1.5e3", 1500),
        ("+7", 7),
        (" 8 ", 8),
        ("'9'", 9),
        ("20.0", 20),
        ("1E2", 100),
    ],
)
def test_integers_are_decimal(text: str, value: int) -> None:
    steps = from_words(f"trainer.max_steps={text}")
    assert (steps, type(steps)) == (value, int)
    assert from_file(f"trainer: {{max_steps: {text}}}\n", "trainer.max_steps") == value


@pytest.mark.parametrize(
    "text",
    [
        "0100",
        "1:30",
        "on",
        "yes",
        "0x10",
        "0o10",
        "0b1",
        "1__0",
        "_1",
        "1_",
        "1,000",
        "2.5",
        "٣",
        "1e-3",
        "1 0",
    ],
)
def test_what_is_not_a_decimal_integer_is_refused_with_key_and_place(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"trainer.max_steps={text}"])
    assert str(caught.value).startswith(f"trainer.max_steps={text}: ")
    assert str(caught.value).endswith("(command line)")
    if text not in ("0x10", "0o10"):
        with pytest.raises(ConfigError, match=r"^trainer\.max_steps=.*\(c\.yaml, line 1\)$"):
            from_file(f"trainer: {{max_steps: '{text}'}}\n", "trainer.max_steps")


def test_a_yaml_file_may_contain_the_radix_prefixes_of_yaml_1_2() -> None:
    assert from_file("seed: 0o10\n", "seed") == 8
    assert from_file("seed: 0xCAFE\n", "seed") == 0xCAFE


@pytest.mark.parametrize("text", ["1e30", "1" + 30 * "0", "1e50"])
def test_an_integer_of_any_size_is_refused_with_its_bound(text: str) -> None:
    keys = [key for key, setting in Schema.of(TNOConfig).settings.items() if int in kinds_of(setting.hint)]
    assert {"seed", "trainer.devices", "model.kernel.rpe_dim", "data.max_documents"} <= set(keys)
    for key in keys:
        with pytest.raises(
            ConfigError, match=rf"^{re.escape(key)}=1000.*: must be at most [0-9,]+ \(command line\)$"
        ):
            load_config(None, [f"{key}={text}"])
        with pytest.raises(ConfigError, match=r": must be at most [0-9,]+ \(c\.yaml, line 1\)$"):
            from_file(
                "".join(f"{{{part}: " for part in key.split(".")) + text + "}" * len(key.split(".")), key
            )


@pytest.mark.parametrize(
    "text", ["1e999999999", "1e99999999999999999999", "-1e-99999999999999999999", "9" * 5000]
)
def test_numbers_that_would_fill_the_memory_are_refused(text: str) -> None:
    for key in ("seed", "optim.grad_clip"):
        with pytest.raises(ConfigError, match=rf"^{key}=.*: (is too large|has .*) \(command line\)$"):
            load_config(None, [f"{key}={text}"])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), (".5", 0.5), ("5.", 5.0), ("1_0.5", 10.5), ("2", 2.0), ("-.0", 0.0)]
)
def test_numbers_are_decimal(text: str, value: float) -> None:
    given = from_words(f"optim.grad_clip={text}")
    assert (given, type(given)) == (value, float)
    assert from_file(f"optim: {{grad_clip: {text}}}\n", "optim.grad_clip") == value


@pytest.mark.parametrize("text", ["1:30", "00.5", "0x1p3", "one", "", "1e", "e3", ".", "1e3.5", "true"])
def test_what_is_not_a_decimal_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^optim\.lr=.*\(command line\)$"):
        load_config(None, [f"optim.lr={text}"])


def test_booleans_are_true_and_false_only() -> None:
    assert from_words("data.source=hub", "data.hub_name=x", "data.streaming=true") is True
    assert from_words("trainer.skip_nonfinite=False") is False
    for text in ("yes", "no", "on", "off", "1", "0", "t"):
        with pytest.raises(ConfigError, match=r"expected true or false \(command line\)"):
            load_config(None, [f"trainer.skip_nonfinite={text}"])
        with pytest.raises(ConfigError, match=r"expected true or false \(c\.yaml, line 2\)"):
            from_file(f"trainer:\n  skip_nonfinite: {text}\n", "trainer.skip_nonfinite")


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (["*.txt"], ["*.txt"]),
        (["**/x.txt"], ["**/x.txt"]),
        (["number #2.txt"], ["number #2.txt"]),
        (["[ab]*.txt"], ["[ab]*.txt"]),
        (["a, b.txt"], ["a, b.txt"]),
        (["[*.txt, **/x.jsonl,number #2.txt]"], ["*.txt", "**/x.jsonl", "number #2.txt"]),
        (["['a,b.txt', \"it's.txt\", don't.txt,]"], ["a,b.txt", "it's.txt", "don't.txt"]),
        (["[007, null, no]"], ["007", "null", "no"]),
        (["'[a]'"], ["[a]"]),
        (["[]"], []),
        (["a.txt", "b.txt"], ["a.txt", "b.txt"]),
        (["[a.txt,b.txt]", "c.txt"], ["a.txt", "b.txt", "c.txt"]),
        (["a.txt", "[b.txt]"], ["b.txt"]),
    ],
)
def test_lists_are_in_brackets_or_repeated(words: list[str], files: list[str]) -> None:
    assert from_words("data.source=files", *(f"data.files={word}" for word in words)) == files


def test_a_list_of_the_command_line_replaces_that_of_the_file() -> None:
    Path("c.yaml").write_text("data: {source: files, files: [a.txt, b.txt]}\n")
    assert load_config("c.yaml", ["data.files=c.txt", "data.files=d.txt"]).data.files == ["c.txt", "d.txt"]


@pytest.mark.parametrize("text", ["[a,,b]", "[,a]", "", "[a, '']"])
def test_empty_items_of_a_list_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.files.*empty.*\(command line\)"):
        load_config(None, ["data.source=files", f"data.files={text}"])


@pytest.mark.parametrize(
    "key", ["runs_dir", "data.cache_dir", "data.tokenizer", "data.eos_token", "trainer.wandb"]
)
def test_empty_text_is_not_taken_for_the_default(key: str) -> None:
    # Usually the value of a shell variable that is not set.
    with pytest.raises(ConfigError, match=rf"^{key}: is empty \(command line\)"):
        load_config(None, [f"{key}="])
    assert load_config(None, ["trainer.sample_prompt="]).trainer.sample_prompt == ""


def test_stored_settings_have_the_types_of_their_fields() -> None:
    config = config_from_dict(
        {"name": "007", "optim": {"lr": 1}, "data": {"tokenizer": "null", "files": ["null"]}}
    )
    assert (config.name, config.optim.lr, type(config.optim.lr)) == ("007", 1.0, float)
    assert (config.data.tokenizer, config.data.files) == ("null", ["null"])
    refused: list[dict[str, object]] = [
        {"name": 7},
        {"seed": True},
        {"seed": 1.5},
        {"name": None},
        {"model": []},
        {"name": b"a"},
        {"model": {1: 2}},
    ]
    for data in refused:
        with pytest.raises(ConfigError, match=r"\(old\.ckpt\)$"):
            config_from_dict(data, "old.ckpt")


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (f"name={'a' * 300}", "has 300 bytes"),
        (f"name={'é' * 150}", "has 300 bytes"),
        ("name=a/b", "must be a single folder name"),
        ("name=a\\b", "must be a single folder name"),
        ("name=a\nb", "control character"),
        ("name=a\x1b[31m", "control character"),
        ("name=a ", "begins or ends with a blank"),
        ("name=a\udcff", "is not UTF-8 text"),
        ("name=", "must be a single folder name"),
        ("trainer.sample_prompt=a\udcff", "is not UTF-8 text"),
        ("data.tokenizer=a\udcff.json", "is not UTF-8 text"),
    ],
)
def test_names_that_no_folder_can_have_are_refused_in_one_line(script: Any, word: str, reason: str) -> None:
    assert_refused(script("train", word), word.partition("=")[0], reason, "(command line)")
    assert not list(Path().iterdir())


def test_a_nul_character_is_refused_in_every_text() -> None:
    for key in ("name", "runs_dir"):
        with pytest.raises(ConfigError, match=rf"^{key}=.*: contains a NUL character \(c\.yaml, line 1\)$"):
            from_file(f'{key}: "a\\0b"\n', key)


def test_files_with_special_names_are_read(script: Any) -> None:
    text = (CASES / "number #2.txt").read_text()
    for name in ("number #2.txt", "${h}.txt", "007"):
        path = Path(name) if "." in name else Path(name, "deep", "x.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    files = ["data.files=*.txt", "data.files=**/x.txt", "data.files=number #2.txt", "data.files=${h}.txt"]
    for index, words in enumerate(([file] for file in files), 1):
        done = script(
            "train", "--config", str(CASES / "tiny.yaml"), *words, "trainer.max_steps=1", f"name={index}"
        )
        assert done.code == 0, done.err
        assert Path(f"runs/{index}/summary.json").is_file()


def test_a_run_with_an_equals_sign_in_its_name_is_resumed_by_name(script: Any) -> None:
    Path("runs/seed=1/checkpoints").mkdir(parents=True)
    assert_refused(script("train", "--resume", "seed=1"), "runs/seed=1", "has no config.yaml")
    assert_refused(script("train", "--resume", "seed=2"), "runs: contains no run")  # a setting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (["a.txt", "b.txt"], "[a.txt,b.txt]"),
        (0.1, "0.1"),
        (0.1234567891, "0.1234567891"),
        (1e7, "1e+07"),
        (" def ", "' def '"),
        ([SourceConfig(files=["a.txt"], weight=2.0)], "[{weight: 2, files: [a.txt]}]"),
    ],
)
def test_typed_values_are_those_of_the_command_line(value: Any, text: str) -> None:
    assert typed(value) == text
