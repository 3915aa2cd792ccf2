"""Settings: precedence of defaults, files and overrides, and the error message for each mistake of a user."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tnnlm.config import schema as config_module
from tnnlm.config.checks import leaves
from tnnlm.config.flags import field_docs
from tnnlm.config.loader import (
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    load_config,
    model_config_from_dict,
)
from tnnlm.config.schema import Config
from tnnlm.errors import ConfigError
from tnnlm.kernels import KERNEL_SCHEMAS, KernelConfig, RTFConfig, TNOConfig


@dataclasses.dataclass(kw_only=True)
class OtherKernelConfig(KernelConfig):
    """Settings of a kernel that shares no setting with the TNO."""

    order: int = config_module.number(7, low=1)


@pytest.fixture
def _other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNEL_SCHEMAS, "other", OtherKernelConfig)


def write(text: str | bytes) -> Path:
    """Write a YAML file into the folder of the test."""
    path = Path("config.yaml")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_load_config_without_input_gives_the_defaults() -> None:
    assert load_config() == Config()


def test_load_config_defaults_yield_to_yaml_and_yaml_to_overrides() -> None:
    path = write("optim: {lr: 0.5, eps: 0.25}\n")
    config = load_config(path, ["optim.lr=1e-3"])
    assert config.optim.lr == 1e-3
    assert config.optim.eps == 0.25
    assert config.optim.beta1 == Config().optim.beta1


def test_load_config_takes_the_last_of_two_equal_overrides() -> None:
    assert load_config(overrides=["seed=1", "seed=2"]).seed == 2


def test_load_config_gives_plain_objects() -> None:
    config = load_config(write("data: {source: files, files: [a.txt]}\n"))
    assert type(config) is Config
    assert type(config.model.kernel) is TNOConfig
    assert type(config.data.files) is list


@pytest.mark.parametrize("text", ["", "# only a comment\n", "null\n"])
def test_load_config_reads_an_empty_file_as_the_defaults(text: str) -> None:
    assert load_config(write(text)) == Config()


@pytest.mark.parametrize(
    ("word", "key", "nearest"),
    [
        ("optim.lrr=1", "optim.lrr", "optim.lr"),
        ("modle.d_model=1", "modle", "model"),
        ("lr=1", "lr", "optim.lr"),
        ("trainer.batch_size=1", "trainer.batch_size", "data.batch_size"),
        ("model.kernel.decai=1", "model.kernel.decai", "model.kernel.decay"),
    ],
)
def test_unknown_key_is_reported_in_full_with_the_nearest_one(word: str, key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[word])
    assert str(caught.value).startswith(f"{key}: unknown key")
    assert str(caught.value).endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize(
    "key", ["kernel_len", "dataset", "steps", "length", "kernel_lr", "model.kernel_size"]
)
def test_unknown_key_suggests_near_misses_only(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[f"{key}=1"])
    assert str(caught.value) == f"{key}: unknown key (command line)"


def test_unknown_key_in_yaml_names_the_file() -> None:
    path = write("model:\n  1: 2\n")
    with pytest.raises(ConfigError, match=r"model\.1: unknown key \(config\.yaml, line 2\)"):
        load_config(path)


@pytest.mark.parametrize(
    "word",
    [
        "optim.lr=fast",
        "optim.lr=null",
        "optim.lr=[1]",
        "model.d_model=2.5",
        "model.d_model=true",
        "data.streaming=perhaps",
        "data.files=null",
        "data.files=[a,,b]",
        "trainer.devices=1.5",
        "trainer.devices=many",
        "conversion.horizon=far",
        "data=3",
        "data=null",
    ],
)
def test_wrong_type_is_an_error_that_names_the_key(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[word])
    assert str(caught.value).startswith(word.partition("=")[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "word",
    [
        "model.d_model=0",
        "model.vocab_size=256",
        "model.kernel.decay=0",
        "model.kernel.decay=1.01",
        "optim.lr=0",
        "optim.lr=inf",
        "data.val_fraction=0.6",
        "data.max_documents=1",
        "conversion.horizon=0",
        "trainer.devices=0",
        "seed=-1",
        "seed=4294967296",
    ],
)
def test_value_out_of_bounds_is_an_error_that_names_key_and_bound(word: str) -> None:
    with pytest.raises(ConfigError, match=r"must be (at least|at most|above) ") as caught:
        load_config(overrides=[word])
    assert str(caught.value).startswith(word.partition("=")[0] + "=")


@pytest.mark.parametrize("word", ["optim.lr=nan", "optim.grad_clip=.nan", "model.kernel.decay=nan"])
def test_nan_is_an_error_that_names_the_key(word: str) -> None:
    # Comparisons with NaN are false, so a naive check accepts NaN within any bounds.
    with pytest.raises(ConfigError, match="not a number") as caught:
        load_config(overrides=[word])
    assert str(caught.value).startswith(word.partition("=")[0])


@pytest.mark.parametrize("value", ["model.kernel.decay=1", "optim.grad_clip=0", "model.vocab_size=257"])
def test_bounds_themselves_are_allowed(value: str) -> None:
    load_config(overrides=[value])


@pytest.mark.parametrize("word", ["data.source=web", "optim.schedule=linear", "trainer.precision=8"])
def test_choice_lists_the_options(word: str) -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        load_config(overrides=[word])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_run_name_is_a_single_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="single folder name"):
        load_config(overrides=[f"name='{name}'"])


@pytest.mark.parametrize("word", ["optim.lr", "=3", "--lr"])
def test_override_without_key_or_value_is_an_error_that_shows_one(word: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value, for example"):
        load_config(overrides=[word])


def test_override_that_is_not_yaml_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr=\[1"):
        load_config(overrides=["optim.lr=[1"])


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_missing_file_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such configuration file|is a folder") as caught:
        load_config(name)
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    "text",
    [
        "model: [",
        "\tmodel: 1",
        "seed: 1\nseed: 2",
        "- seed",
        "a: !!python/name:os.system ''",
        b"\xff\xfe\x00",
        "5",
    ],
)
def test_invalid_yaml_is_an_error_that_names_the_file(text: str | bytes) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith("config.yaml: ")
    assert "\n" not in str(caught.value)


def test_files_may_be_a_single_string() -> None:
    assert load_config(write("data: {source: files, files: a.txt}\n")).data.files == ["a.txt"]
    assert load_config(overrides=["data.source=files", "data.files=a.txt"]).data.files == ["a.txt"]
    assert load_config(overrides=["data.source=files", "data.files=[a.txt,b.txt]"]).data.files == [
        "a.txt",
        "b.txt",
    ]


@pytest.mark.usefixtures("_other_kernel")
def test_kernel_name_selects_its_settings() -> None:
    config = load_config(write("model: {kernel: {name: other}}\n"), ["model.kernel.order=3"])
    assert config.model.kernel == OtherKernelConfig(name="other", order=3)
    with pytest.raises(ConfigError, match=r"model\.kernel\.decay: unknown key"):
        load_config(overrides=["model.kernel.name=other", "model.kernel.decay=1"])


@pytest.mark.usefixtures("_other_kernel")
def test_kernel_name_on_the_command_line_beats_yaml() -> None:
    config = load_config(write("model: {kernel: {name: tno}}\n"), ["model.kernel.name=other"])
    assert type(config.model.kernel) is OtherKernelConfig


def test_another_kernel_on_the_command_line_drops_the_settings_of_the_first() -> None:
    path = write("model: {d_model: 8, kernel: {name: tno, decay: 0.5}}")
    config = load_config(path, ["model.kernel.name=rtf", "model.kernel.state_size=4"])
    assert config.model.d_model == 8
    assert config.model.kernel == RTFConfig(name="rtf", state_size=4)
    with pytest.raises(ConfigError, match=r"model\.kernel\.decay: unknown key \(command line\)"):
        load_config(path, ["model.kernel.name=rtf", "model.kernel.decay=0.5"])


def test_kernel_that_is_unknown_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^model\.kernel\.name=foo: unknown kernel \(command line\); choose one of fd_tno, hyena, ",
    ):
        load_config(overrides=["model.kernel.name=foo"])


def test_kernel_that_is_no_group_is_reported_in_full() -> None:
    with pytest.raises(ConfigError, match=r"^model\.kernel="):
        load_config(overrides=["model.kernel=tno"])


@pytest.mark.usefixtures("_other_kernel")
@pytest.mark.parametrize("name", ["tno", "other"])
def test_config_survives_dict_and_yaml(name: str) -> None:
    words = [
        f"model.kernel.name={name}",
        "data.source=files",
        "data.files=[ü.txt]",
        "conversion.horizon=64",
        "trainer.devices=2",
        "model.glu_dim=12",
    ]
    config = load_config(overrides=words)
    assert config_from_dict(config_to_dict(config)) == config
    assert load_config(write(config_to_yaml(config))) == config
    assert load_config(write(config_to_yaml(config)), saved=True) == config
    # The kernel of a converted model needs no setting but its name.
    model = model_config_from_dict(config_to_dict(config.model))
    assert model.kernel == KernelConfig(name=name)
    assert replace(model, kernel=config.model.kernel) == config.model


def test_config_to_dict_holds_plain_values_only() -> None:
    data = config_to_dict(load_config())
    assert yaml.safe_load(yaml.safe_dump(data)) == data


def test_config_from_dict_names_the_origin_of_an_error() -> None:
    with pytest.raises(ConfigError, match=r"colour: unknown key \(old\.ckpt\)"):
        config_from_dict({"colour": 1}, "old.ckpt")


@pytest.mark.parametrize("data", ["seed", [1], None])
def test_config_from_dict_rejects_other_types(data: object) -> None:
    with pytest.raises(ConfigError):
        config_from_dict(data)  # type: ignore[arg-type]


def test_files_of_a_wrong_type_name_the_key() -> None:
    with pytest.raises(ConfigError, match=r"data\.files"):
        load_config(write("data: {source: files, files: {a: 1}}"))
    with pytest.raises(ConfigError, match=r"data\.files=\[\{\.\.\.\}\]"):
        load_config(write("data: {source: files, files: [{a: 1}]}"))


GROUPS = {field.name: type(getattr(Config(), field.name)) for field in dataclasses.fields(Config)}
SCHEMAS = [group for group in GROUPS.values() if dataclasses.is_dataclass(group)]
KERNELS = [schema for schema in KERNEL_SCHEMAS.values() if schema.__module__.startswith("tnnlm.")]


@pytest.mark.parametrize("schema", [Config, *SCHEMAS, *KERNELS], ids=lambda schema: schema.__name__)
def test_every_field_has_a_docstring(schema: type) -> None:
    groups = {name for name, group in GROUPS.items() if schema is Config and group in SCHEMAS}
    assert {field.name for field in dataclasses.fields(schema)} == groups | set(field_docs(schema))


@pytest.mark.parametrize(
    ("words", "key", "owner"),
    [
        ("data.hub_config=x", "hub_config", "hub"),
        ("data.listops.max_length=50", "listops", "listops"),
        ("data.lra.folder=x", "lra", "lra"),
        ("data.source=stdlib data.files=a.txt", "files", "files"),
        ("data.files=a.txt data.hub_val_split=validation", "hub_val_split", "hub"),
        ("data.source=stdlib data.text_column=body", "text_column", "files or hub"),
        ("data.source=listops task=classify data.tokenizer=x", "tokenizer", "stdlib or files or hub"),
    ],
)
def test_settings_of_a_source_that_is_not_selected_are_an_error(words: str, key: str, owner: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key}: is not used .*set data\.source={owner}.* too"):
        load_config(None, words.split())


def test_a_setting_that_names_data_selects_its_source(tmp_path: Path) -> None:
    assert load_config(None, ["data.files=a.txt"]).data.source == "files"
    assert load_config(None, ["data.hub_name=x"]).data.source == "hub"
    path = tmp_path / "c.yaml"
    path.write_text("data: {source: hub, hub_name: x, hub_val_split: validation}")
    assert load_config(path, ["data.files=a.txt"]).data.source == "files"
    path.write_text("data: {files: [a.txt]}")
    assert load_config(path).data.source == "files"
    assert load_config(path, ["optim.lr=1e-3"]).data.source == "files"
    with pytest.raises(ConfigError, match=r"data\.hub_name: can't be used together with data\.files"):
        load_config(None, ["data.files=a.txt", "data.hub_name=x"])


def test_another_source_may_be_chosen_over_a_file_that_describes_one(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: {source: files, files: [a.txt]}")
    assert load_config(path, ["data.source=stdlib"]).data.source == "stdlib"
    path.write_text("data: {files: [a.txt]}")
    assert load_config(path, ["data.source=files"]).data.files == ["a.txt"]
    path.write_text("data: {source: stdlib, files: [a.txt]}")
    with pytest.raises(ConfigError, match=r"\(.*c\.yaml.*\)"):
        load_config(path)


def test_a_complete_configuration_selects_its_source(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(config_to_yaml(load_config(None, ["data.source=files", "data.files=a.txt"])))
    assert load_config(path).data.files == ["a.txt"]


def test_settings_that_a_saved_run_lacks_have_the_values_of_its_time(tmp_path: Path) -> None:
    new = load_config(None, ["model.kernel.name=sgconv"])
    data = config_to_dict(new)
    assert data["model"]["kernel"].pop("reverse_lag") == 1
    assert config_from_dict(data).model.kernel.reverse_lag == 0
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(new).replace("    reverse_lag: 1\n", ""), encoding="utf-8")
    assert "reverse_lag" not in path.read_text(encoding="utf-8")
    assert load_config(path, saved=True).model.kernel.reverse_lag == 0
    assert load_config(path).model.kernel.reverse_lag == 1
    assert config_from_dict(config_to_dict(new)) == new


def integers() -> list[str]:
    """Return the names of all settings that are integers."""
    return [
        name
        for name, value, metadata in leaves(Config())
        if "low" in metadata and not any(isinstance(part, float) for part in (value, metadata["high"]))
    ]


@pytest.mark.parametrize("value", ["1e30", str(2**63)])
def test_every_integer_has_an_upper_bound(value: str) -> None:
    assert {"trainer.max_steps", "optim.warmup_steps", "data.max_val_tokens"} <= set(integers())
    for name in integers():
        with pytest.raises(ConfigError, match=rf"^{re.escape(name)}=[0-9]+: must be at most [0-9,]+ \("):
            load_config(None, [f"{name}={value}"])


def test_large_models_attach_recurrences_of_a_smaller_method(tmp_path: Path) -> None:
    large = ["model.d_model=2048", "model.n_layers=24", "model.max_length=2048", "model.expand=3"]
    assert load_config(None).conversion.method == "etsc"
    config = load_config(None, large)
    assert config.conversion.method == "auto"
    assert load_config(None, [*large, "conversion.method=etsc"]).conversion.method == "etsc"
    # Earlier runs and checkpoints keep what they were trained with.
    path = tmp_path / "config.yaml"
    path.write_text("model: {d_model: 2048, n_layers: 24, max_length: 2048, expand: 3}\n", encoding="utf-8")
    assert load_config(path, saved=True).conversion.method == "etsc"
    assert load_config(path).conversion.method == "auto"
