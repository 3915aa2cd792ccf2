"""Conversations as rows: what is read and refused, which tokens are scored, and how rows are cut."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.support.conversations import TINY, chats, config_of, pairs, turn, write_rows
from tnnlm.chat.templates import PLAIN, RAW
from tnnlm.config.loader import load_config
from tnnlm.data.conversations.prepare import prepare_conversations
from tnnlm.data.sources import cache_folder
from tnnlm.data.tasks import TaskData, load_task_data
from tnnlm.errors import ConfigError, UserError
from tnnlm.models.batches import inputs_of

WHOLE = "data.val_fraction=0.02"
"""The default, because nothing is held out of the training rows."""
pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TNNLM_CACHE", str(tmp_path / "cache"))


def shown(data: TaskData, row: Any) -> tuple[str, str]:
    """Return the text of a row of token ids, and of its scored tokens."""
    tokenizer = data.tokenizer.tokenizer
    return (
        tokenizer.decode(inputs_of(row).tolist(), skip_special_tokens=False),
        tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=False),
    )


def test_answers_of_messages_are_scored() -> None:
    data = load_task_data(config_of(write_rows(chats())))
    assert data.tokenizer.chat_template == PLAIN
    text, answers = min(shown(data, row) for row in data.train)
    assert text == (
        "system: Be brief.\nuser: What is 0 plus 0?\nassistant: 0<|endoftext|>\nuser: Why?\n"
        "assistant: Because. <|endoftext|>\n"
    )
    assert answers == " 0<|endoftext|> Because. <|endoftext|>"
    assert data.report.answers["train"] == sum(int((row >= 0).sum()) for row in data.train)
    assert data.report.documents == len(data.train) + data.report.splits["val"].documents == 40


def test_strings_are_joined_as_they_are_unless_a_template_is_set() -> None:
    path = write_rows(pairs())
    data = load_task_data(config_of(path, "prompt_completion"))
    assert data.tokenizer.chat_template == RAW
    text, answers = max(shown(data, row) for row in data.train)
    assert text.startswith("Count to ")
    assert text.endswith(answers)
    assert answers.endswith("<|endoftext|>")
    assert ":" not in answers
    data = load_task_data(config_of(path, "prompt_completion", "data.chat_template=plain"))
    text, answers = shown(data, data.train[0])
    assert text.startswith("user: Count to")
    assert answers.startswith(" 0")


def test_tables_of_all_types_give_the_rows_of_jsonl() -> None:
    rows = [
        {"prompt": [turn("user", row["prompt"])], "completion": [turn("assistant", row["completion"])]}
        for row in pairs()
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "pairs.parquet")
    Path("pairs.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with pyarrow.output_stream("pairs.jsonl.zst", compression="zstd") as file:
        file.write(write_rows(rows).read_bytes())
    paths = ("chat.jsonl", "pairs.parquet", "pairs.json", "pairs.jsonl.zst")
    found = [load_task_data(config_of(Path(path), "prompt_completion")).train for path in paths]
    for other in found[1:]:
        assert [row.tolist() for row in found[0]] == [row.tolist() for row in other]


def test_damaged_row_of_parquet_is_named_and_other_columns_are_not_read() -> None:
    rows = [
        [{**turn(role, "x"), "at": date(2026, 1, i + 1)} for role in ("user", "assistant")] for i in range(9)
    ]
    text = pyarrow.array([b"x"] * 6 + [b"\xff"] * 3).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows, "other": text}), "a.parquet")
    load_task_data(config_of(Path("a.parquet"), "chat"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text, "completion": text}), "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: row 7: is not UTF-8 text \(byte 0\)"):
        load_task_data(config_of(Path("a.parquet"), "prompt_completion"))


def test_validation_files_are_the_validation_split() -> None:
    path, held_out = write_rows(chats()[:30]), write_rows(chats()[28:36], "val.jsonl")
    words = ("chat", f"data.validation={held_out}", WHOLE, "data.max_val_tokens=null")
    data = load_task_data(config_of(path, *words))
    assert data.report.splits["train"].documents == len(data.train) == 30
    assert data.report.shared == 2
    texts = [shown(data, row)[0] for row in data.val]
    assert sorted(texts) == sorted(set(texts))
    assert {text.split("What is ")[1].split()[0] for text in texts} == {str(i) for i in range(28, 36)}
    write_rows(pairs(), "val.jsonl")
    with pytest.raises(UserError, match=r"val\.jsonl: line 1: has no column 'messages'"):
        load_task_data(config_of(path, *words))


def test_strings_and_messages_are_not_mixed_in_the_splits() -> None:
    messages = [{"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")]}]
    words = ("prompt_completion", f"data.validation={write_rows(messages, 'val.jsonl')}", WHOLE)
    with pytest.raises(UserError, match="mixes strings and messages in training and validation rows"):
        load_task_data(config_of(write_rows(pairs()), *words))


def test_data_set_of_the_hub_has_the_rows_of_a_file() -> None:
    Path("talks").mkdir()
    write_rows(chats(), "talks/train.jsonl")
    write_rows(chats(3), "talks/validation.jsonl")
    words = (
        "data.source=hub",
        "data.hub_name=talks",
        "data.hub_val_split=validation",
        "data.format=chat",
        WHOLE,
    )
    data = load_task_data(load_config(None, [*TINY, *words]))
    assert (len(data.train), len(data.val), data.report.shared) == (40, 3, 3)
    Path("talks").rename("talks[1]")
    words = (*words[:1], "data.hub_name='talks[1]'", *words[2:])
    with pytest.raises(UserError, match="takes it as a pattern; rename it"):
        load_task_data(load_config(None, [*TINY, *words]))
    alone = load_task_data(config_of(write_rows(chats()))).train
    assert shown(data, data.train[0])[0].count("user: ") == shown(data, alone[0])[0].count("user: ") == 2


def test_long_conversations_are_cut_or_skipped_and_counted() -> None:
    long = (
        [turn("user", "w o r d " * 90), turn("assistant", "no")],
        [turn("user", "a"), turn("assistant", "b " * 90)],
    )
    path = write_rows([*chats(), *({"messages": messages} for messages in long)])
    data = load_task_data(config_of(path, "chat", "data.val_fraction=0.2"))
    assert max(len(row) for row in data.train) <= 97
    assert (data.report.cut, data.report.skipped) == (1, 1)
    assert any("1 conversation cut, 1 conversation skipped" in line for line in data.report.lines())


def test_packed_rows_are_cut_from_the_stream_with_end_tokens_between() -> None:
    path = write_rows(chats())
    config = config_of(path, "chat", "data.packing=true")
    data, alone = load_task_data(config), load_task_data(config_of(path))
    assert {len(row) for row in data.train} == {97}
    text = "".join(shown(data, row[:-1])[0] for row in data.train)
    assert "<|endoftext|>\n<|endoftext|>system" in text
    assert [row.tolist() for row in data.val] == [row.tolist() for row in alone.val]
    assert alone.report.change(data.report) == "data.packing is true instead of false"


def test_rows_without_answer_are_dropped_and_counted() -> None:
    rows = [*chats(), {"messages": [turn("user", "x")]}, {"messages": None}]
    report = load_task_data(config_of(write_rows([*rows, {"messages": [turn("assistant", " ")]}]))).report
    assert report.dropped == {"without an answer": 1, "null": 1, "blank": 1}


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("chat", {"text": "x"}, "has no column 'messages', only text; data.format=chat reads messages"),
        ("prompt_completion", {"prompt": "x"}, "has no column 'completion', only prompt"),
        ("chat", {"messages": []}, "messages is an empty list"),
        ("chat", {"messages": "x"}, "messages is no list of messages but str"),
        (
            "chat",
            {"messages": [{"role": "bot", "content": "x"}]},
            "messages[0]: has the role 'bot'; use system",
        ),
        ("chat", {"messages": [{"role": "user"}]}, "messages[0]: its content is not text but NoneType"),
        (
            "prompt_completion",
            {"prompt": "x", "completion": [turn("assistant", "y")]},
            "mixes strings and messages",
        ),
        ("chat", [1], "is not a JSON object"),
    ],
)
def test_unusable_row_is_refused_with_its_line(kind: str, row: Any, reason: str) -> None:
    good: list[Any] = chats() if kind == "chat" else pairs()
    config = config_of(write_rows([*good, row]), kind)
    with pytest.raises(UserError) as error:
        load_task_data(config)
    assert str(error.value).startswith("chat.jsonl: ")
    assert f": line {len(good) + 1}" in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert not cache_folder(config.data).exists() or not list(cache_folder(config.data).glob("*/"))


def test_template_that_fails_names_the_row() -> None:
    Path("t.jinja").write_text("{{ messages[7].content.x }}", encoding="utf-8")
    config = config_of(write_rows(chats()), "chat", "data.chat_template=t.jinja")
    with pytest.raises(UserError, match=r"chat\.jsonl: line \d+: the chat template fails"):
        load_task_data(config)


def test_no_answer_within_the_length_is_refused() -> None:
    config = config_of(write_rows(chats()), "chat", "model.max_length=8", "data.max_val_tokens=null")
    with pytest.raises(UserError, match=r"to train on has an answer within model\.max_length=8 tokens"):
        load_task_data(config)


def test_single_conversation_is_refused() -> None:
    with pytest.raises(UserError, match=r"chat\.jsonl: has only one conversation, or copies of it"):
        load_task_data(config_of(write_rows(chats(1) * 3)))


def test_files_without_an_answer_are_named_with_the_reasons() -> None:
    rows = [{"messages": [turn("user", "x")]}] * 3 + [{"messages": None}]
    with pytest.raises(UserError) as error:
        load_task_data(config_of(write_rows(rows)))
    assert "chat.jsonl: has no row with an answer (3 without an answer, 1 null); add a message" in str(
        error.value
    )
    held_out = write_rows([], "val.jsonl")
    with pytest.raises(UserError, match=r"^val\.jsonl: has no row with an answer \(no rows\)"):
        load_task_data(config_of(write_rows(chats()), "chat", f"data.validation={held_out}", WHOLE))


@pytest.mark.parametrize("template", ["", "always the same", "{% for m in messages %}{% endfor %}"])
def test_a_template_that_writes_no_answer_is_refused(template: str) -> None:
    Path("t.jinja").write_text(template, encoding="utf-8")
    config = config_of(write_rows(chats()), "chat", "data.chat_template=t.jinja")
    with pytest.raises(UserError, match=r"data\.chat_template=t\.jinja: its text has no answer in any"):
        load_task_data(config)


def test_answers_without_end_token_are_reported() -> None:
    Path("t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    rows = write_rows(chats(), "c.jsonl")
    report = load_task_data(config_of(rows, "chat", "data.chat_template=t.jinja")).report
    assert report.unended == len(chats())
    assert any(line.startswith("warning: 40 conversations without an end token") for line in report.lines())
    assert load_task_data(config_of(rows)).report.unended == 0


def test_names_of_columns_in_errors_are_bounded() -> None:
    rows = [{"k" * 5_000: 1, **{f"column{index}": 1 for index in range(50)}}]
    for kind in ("chat", "text"):
        with pytest.raises(UserError) as error:
            load_task_data(config_of(write_rows(rows), kind))
        assert "... (51 in all)" in str(error.value)
        assert len(str(error.value)) < 500
    long = {"messages": [{"role": "x" * 5_000, "content": "x"}]}
    with pytest.raises(UserError) as error:
        load_task_data(config_of(write_rows([long])))
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["data.source=stdlib"], "data.source=stdlib has no conversations"),
        (["task=masked"], "is for task=causal only"),
        (["data.text_column=body"], "data.text_column=body: is for data.format=text only"),
        (["data.format=text", "data.packing=true"], "data.packing: is for conversations only"),
        (["data.document_separator=--"], "data.document_separator=--: is for data.format=text only"),
        (["data.tokenizer_sample=5000"], "data.tokenizer_sample=5000: is for data.format=text only"),
        (["data.files=[]", "data.sources=[{files: a.jsonl}, {files: b.jsonl}]"], "mixture has no conversat"),
        (["data.files=[]", "data.tokens=a.npy", "data.tokenizer=t.json"], "tokens has no conversations"),
        (["trainer.context_parallel=2"], "not supported with data.format=chat"),
    ],
)
def test_settings_that_do_not_fit_conversations_are_refused(words: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config_of(Path("chat.jsonl"), "chat", *words)


def test_text_file_is_refused() -> None:
    Path("a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"a\.txt: is no \.jsonl, \.json or \.parquet file, which data\.format=chat"
    ):
        load_task_data(config_of(Path("a.txt")))


def test_template_beside_a_given_tokenizer_is_used() -> None:
    first = prepare_conversations(config_of(write_rows(chats()))).tokenizer
    Path("own").mkdir()
    Path("own/tokenizer.json").write_text(first.to_json(), encoding="utf-8")
    Path("own/chat_template.jinja").write_text("own " + PLAIN, encoding="utf-8")
    config = config_of(Path("chat.jsonl"), "chat", "data.tokenizer=own/tokenizer.json")
    assert prepare_conversations(config).tokenizer.chat_template == "own " + PLAIN


def test_name_of_a_tokenizer_is_no_path_of_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_conversations(config_of(write_rows(chats()))).tokenizer
    first.chat_template = None
    monkeypatch.setattr("tnnlm.data.conversations.prepare.load_tokenizer", lambda name, eos: first)
    Path("chat_template.jinja").write_text("another " + PLAIN, encoding="utf-8")
    config = config_of(Path("chat.jsonl"), "chat", "data.tokenizer=someones")
    assert prepare_conversations(config).tokenizer.chat_template == PLAIN
