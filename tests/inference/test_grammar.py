"""Constrained output: valid JSON and text of a regular expression, and limits on hostile grammars."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.servers import Running, run_server, tiny_converted
from tnnlm.cli.generate import main, parse
from tnnlm.errors import UserError
from tnnlm.inference import grammar
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.grammar import GrammarCompiler
from tnnlm.inference.sampling import SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "grün", None, True]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
HELLO = [{"role": "user", "content": "fox"}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


def test_missing_package_is_named(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"there: constrained output needs the package llguidance; install it"
    ):
        GrammarCompiler(generator.tokenizer).regex("a", "there")


def test_options_that_exclude_each_other_are_refused() -> None:
    for words, option in (
        ("--json-schema s --regex a", "--json-schema"),
        ("--regex a --speculate ngram", "--regex"),
        ("--repetition-penalty 2 --speculate ngram", "--repetition-penalty"),
    ):
        with pytest.raises(UserError, match=f"^{option}"):
            parse(["--prompt", "a", *words.split()])


class TestWithPackage:
    """Tests that need llguidance."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("llguidance")

    @pytest.fixture
    def compiler(self, generator: TextGenerator) -> GrammarCompiler:
        return GrammarCompiler(generator.tokenizer)

    def test_every_output_is_valid(self, server: Running) -> None:
        jsonschema = pytest.importorskip("jsonschema")
        texts = []
        for seed in range(4):
            body = {"messages": HELLO, "n": 50, "seed": seed, "max_tokens": 400, "response_format": FORMAT}
            answer = httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
            assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
            texts += [choice["message"]["content"] for choice in answer["choices"]]
        assert len(texts) == 200
        assert len({*texts}) > 100
        for text in texts:
            jsonschema.validate(json.loads(text), SCHEMA)
            assert "\n" not in text

    def test_expression_holds_in_completions_and_generation(
        self, server: Running, generator: TextGenerator, compiler: GrammarCompiler
    ) -> None:
        pattern = "[a-z]{3,9} (fox|dog)[0-9]{1,4}"
        body = {"prompt": "the", "n": 8, "max_tokens": 60, "guided_regex": pattern, "seed": 1}
        answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        found = compiler.regex(pattern, "there")
        state, sampling = generator.prefill(["the"]), SamplingParams(temperature=1)
        record, chunks = generator.stream(state, 60, sampling, grammar=found)
        batch = generator.generate(state.select([0] * 5), 60, sampling, grammar=found)
        texts = ["".join(chunks), *(row.text for row in batch)]
        texts += [choice["text"] for choice in answer["choices"]]
        assert [text for text in texts if not re.fullmatch(pattern, text)] == []
        assert record.tokens

    def test_answer_of_the_plain_template_is_continued(self, server: Running) -> None:
        """The space that the template writes before an answer is generated, and no part of the content."""
        body = {"messages": HELLO, "max_tokens": 60, "guided_regex": " [a-z]{3,9}", "seed": 2}
        url = f"{server.url}/v1/chat/completions"
        first = httpx2.post(url, json=body, timeout=60).json()
        message, usage = first["choices"][0]["message"], first["usage"]
        assert re.fullmatch("[a-z]{3,9}", message["content"])
        body["messages"] = [*HELLO, message | {"refusal": None}, *HELLO]
        later = httpx2.post(url, json=body, timeout=60).json()["usage"]
        assert later["prompt_tokens_details"]["cached_tokens"] == usage["total_tokens"]

    def test_rows_beside_a_grammar_are_as_without(self, generator: TextGenerator) -> None:
        body = {"prompt": "the quick", "max_tokens": 40, "temperature": 1, "seed": 3}
        with run_server(generator, reproducible=True) as running:
            url = f"{running.url}/v1/completions"
            alone = httpx2.post(url, json=body, timeout=60).json()["choices"]
            other = {"prompt": "fox", "max_tokens": 300, "temperature": 1, "stream": True}
            other |= {"response_format": {"type": "json_object"}}
            with httpx2.stream("POST", url, json=other, timeout=60) as response:
                lines = response.iter_lines()
                next(lines)
                assert httpx2.post(url, json=body, timeout=60).json()["choices"] == alone

    def test_hostile_grammars_fail_alone(self, generator: TextGenerator) -> None:
        deep: Any = {"type": "object"}
        for _ in range(150):
            deep = {"type": "object", "properties": {"a": deep}}
        wide = {f"p{i}": {"type": "string", "pattern": "(a|b)*a(a|b){9}"} for i in range(400)}
        schemas: list[Any] = [
            deep,
            {"type": "object", "properties": wide},
            {"anyOf": [{"const": "x" * 100}] * 1000},
            {"$ref": "http://example.com/schema"},
            {"$ref": "file:///etc/passwd"},
            {"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"},
            {"type": "integer", "multipleOf": 1_000_003},
            {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}, {"multipleOf": 983}], "type": "integer"},
            {"type": "string", "pattern": "(.{0,200}x){0,50}"},
            {"type": "string", "minLength": 10**7},
            {"type": "object", "patternProperties": {"(": {}}},
            {"type": 5},
            {"type": "string", "format": "no such format"},
        ]
        patterns = ["(" * 3000, "((a{1,999}){1,999}){1,999}", r"\p{L}{1,3000}", "(?=a)b", "([", "a" * 5000]
        with run_server(generator) as running, httpx2.Client(base_url=running.url, timeout=60) as client:
            fields: list[dict[str, Any]] = [{"guided_regex": pattern} for pattern in patterns]
            named = [{"name": "n", "schema": schema} for schema in schemas]
            fields += [{"response_format": {"type": "json_schema", "json_schema": one}} for one in named]
            for field in fields:
                body = {"prompt": "a", "max_tokens": 20, "seed": 1, **field}
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code in (200, 400, 500), field
                if answer.status_code != 200:
                    error = answer.json()["error"]
                    assert "\n" not in error["message"]
                    assert len(error["message"]) < 500
                if answer.status_code == 500:
                    assert "grammar" in error["message"]
            assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200

    def test_grammar_that_takes_too_long_ends(
        self, generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(grammar, "START_SECONDS", 0.0)
        slow = GrammarCompiler(generator.tokenizer, 1e-12).regex("[a-z]+", "there").start()
        found: list[str] = []
        for _ in range(1000):
            try:
                slow.forbidden(generator.tokenizer.size)
            except UserError as error:
                found.append(str(error))
        assert found[-1] == "the grammar takes too much time per token; use a simpler one"

    def test_schema_of_a_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder, schema = tiny_converted(tmp_path / "model"), tmp_path / "schema.json"
        schema.write_text(json.dumps(SCHEMA), encoding="utf-8")
        words = ["--model", str(folder), "--engine", "eager", "--prompt", "fox", "--json", "--seed", "1"]
        assert main([*words, "--json-schema", str(schema), "--num-samples", "2", "--temperature", "1"]) == 0
        for text in json.loads(capsys.readouterr().out)["samples"]:
            assert {*json.loads(text)} == {"name", "age", "tags"}
        schema.write_text('{"type": 5}', encoding="utf-8")
        with pytest.raises(UserError, match=r"--json-schema .*schema.json: the schema is refused"):
            main([*words, "--json-schema", str(schema)])
        with pytest.raises(UserError, match=r"--regex: the regular expression is refused"):
            main([*words, "--regex", "(["])
