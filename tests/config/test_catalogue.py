"""Help, JSON schema and reference page list every setting, and the schema accepts what the loader reads."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.commands import help_of
from tests.support.scripts import ROOT
from tests.support.started import modules_after
from tnnlm.config.catalogue import groups
from tnnlm.config.json_schema import json_schema, schema_text
from tnnlm.config.layers import Schema
from tnnlm.config.loader import load_config
from tnnlm.config.shipped import find_config, shipped_names
from tnnlm.config.text_sources import SourceConfig
from tnnlm.errors import UserError
from tnnlm.kernels import KERNEL_SCHEMAS

SHIPPED = {name: owner for name, owner in KERNEL_SCHEMAS.items() if owner.__module__.startswith("tnnlm.")}
ALL = {key for owner in SHIPPED.values() for key in Schema.of(owner).settings}
ITEMS = {f"data.sources[].{item.name}" for item in fields(SourceConfig)}


class _Core(yaml.SafeLoader):
    """Loader by the core schema of YAML 1.2, which editors use."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _kind, _pattern, _letters in (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Core.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), [*_letters])


def problems(text: str) -> list[str]:
    """Return what an editor would underline in a file of settings."""
    jsonschema = pytest.importorskip("jsonschema")
    found = jsonschema.Draft202012Validator(json_schema()).iter_errors(yaml.load(text, _Core))
    return [error.message for error in found]


def test_help_schema_and_page_list_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    listed = help_of("train.py")
    assert max(map(len, listed.partition("\ngeneral:\n")[2].splitlines())) <= 100
    page = (ROOT / "docs/reference/settings.md").read_text(encoding="utf-8")
    entries = [entry for group in groups() for entry in group.entries]
    assert {entry.key for entry in entries} == ALL | ITEMS
    assert all(entry.text.endswith((".", ".)")) for entry in entries)
    words = " ".join(listed.split())
    for entry in entries:
        assert f"| `{entry.key}` |" in page or entry.key == "model.kernel.name", entry.key
        # The formatter breaks lines at blanks and behind hyphens.
        sentence = entry.sentence.replace(" ", "").replace("-", "")
        typed = f"{entry.name}: " if entry.key in ITEMS else f"{entry.key}="
        assert f" {typed}" in words, entry.key
        assert sentence in words.replace(" ", "").replace("-", ""), entry.key
    schema = json_schema()
    for name, owner in SHIPPED.items():
        for key in Schema.of(owner).settings:
            *parents, leaf = key.split(".")
            inner = schema
            for parent in parents:
                inner = inner["properties"][parent]
            if key.startswith("model.kernel."):
                inner = schema["$defs"][f"kernel.{name}"]
            assert inner["properties"][leaf]["description"], key
    (items, *_) = schema["properties"]["data"]["properties"]["sources"]["anyOf"]
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    for item in fields(SourceConfig):
        assert items["items"]["properties"][item.name]["description"], item.name
        assert re.search(rf"`{item.name}\b", page), item.name


def test_help_loads_no_library_of_training() -> None:
    assert not {"lightning", "datasets", "torch._dynamo"} & modules_after("train", ["--print-schema"])


def test_schema_is_valid_and_the_shipped_file_is_current() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert (ROOT / "configs/schema.json").read_text(encoding="utf-8") == schema_text()


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_configurations_name_the_schema_and_follow_it(name: str) -> None:
    path = find_config(name)
    text = path.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("$schema=")[2]).resolve() == ROOT / "configs/schema.json"
    assert problems(text) == []


ACCEPTED = (
    "name: 007\nruns_dir: true",
    "optim: {lr: '${oc.env:LR,1e-3}', grad_clip: 0}",
    "trainer: {max_steps: 1_000, devices: auto, sample_prompt: ''}",
    "data: {source: files, files: book.txt}",
    "data: {source: files, files: [a.txt, 7], tokenizer: null}",
    "data: {sources: [{files: a.txt, weight: 2}, {hub_name: b, name: 7}]}",
    "model: {kernel: {rpe_dim: 0x10}}",
    "model: {kernel: {name: rtf, state_size: 8}}",
    "model: {glu_dim: null, kernel: {name: sgconv, reverse_lag: 0}}",
)
REFUSED = (
    "optim: {lr: 0}",
    "optim: {lr: fast}",
    "optim: {learning_rate: 1e-3}",
    "optim: 3",
    "trainer: {precision: bf16}",
    "trainer: {max_steps: 0}",
    "trainer: {max_steps: 1.5}",
    "trainer: {max_steps: null}",
    "trainer: {devices: all}",
    "trainer: {compile: yes}",
    "name: null",
    "name: ''",
    "data: {files: {a: b}}",
    "data: {sources: [{files: a.txt, wieght: 2}, {files: b.txt}]}",
    "data: {sources: [{files: a.txt, weight: 0}, {files: b.txt}]}",
    "data: {sources: [a.txt, b.txt]}",
    "init: {lora: {rank: 0}}",
    "modle: {}",
    "model: {kernel: {name: fd_tno, decay: 0.9}}",
    "model: {kernel: {state_size: 8}}",
    "model: {kernel: {name: unknown}}",
)


@pytest.mark.parametrize("text", ACCEPTED + REFUSED)
def test_schema_and_loader_agree(text: str) -> None:
    path = Path("settings.yaml")
    path.write_text(text, encoding="utf-8")
    if text in ACCEPTED:
        load_config(path)
    else:
        with pytest.raises(UserError):
            load_config(path)
    assert bool(problems(text)) == (text in REFUSED)


def test_a_kernel_of_the_user_may_have_any_setting() -> None:
    assert not problems("model: {kernel: {name: mine, module: kernel.py, own: 3}}")
    assert problems("model: {kernel: {name: mine, own: 3}}")
