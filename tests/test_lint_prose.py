"""The prose linter reports rejected words and fragments, and accepts the terms of the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from lint_prose import Passage, check, passages_of, word_list


def problems(text: str, kind: str = "comment") -> list[str]:
    """Problems that the linter finds in a passage."""
    return [finding.problem for finding in check(Passage(Path("page.md"), 1, kind, text))]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Text is written at constant time, beside the state.", "beside"),
        ("The learning rate's course after the warm-up.", "course"),
        ("Hidden tokens are predicted.", "Hidden tokens"),
        ("A kernel that dies\nout is converted.", "dies out"),
        ("Reading the prompt takes a second.", "Reading the prompt"),
        ("It writes text.", "writes text"),
        ("Logits in another form.", "form"),
    ],
)
def test_rejected_words_are_reported(text: str, word: str) -> None:
    assert any(problem.startswith(f'"{word}"') for problem in problems(text)), problems(text)


@pytest.mark.parametrize(
    "text",
    [
        "The parallel form and the recurrent form have equal perplexities, in closed form.",
        "Code such as `beside` and ``course`` is not prose, nor is [a link](course.md).",
        "```sh\npython beside.py --course\n```\nA block of code is not prose.",
        "Of course the state of both forms has a fixed size.",
        "<!-- begin table forms course -->\nComments of a page are not prose.",
    ],
)
def test_terms_of_the_field_and_code_are_accepted(text: str) -> None:
    assert problems(text) == []


@pytest.mark.parametrize(
    ("text", "kind", "problem"),
    [
        ("of the last.", "attribute", "capital letter"),
        ("Of the last channel.", "entry", "stands alone"),
        ("Decay of the last channel", "attribute", "full stop"),
        ("Return the taps", "docstring", "full stop"),
        ("default: 256", "help", "capital letter"),
        ("file.txt: is empty.", "error", "full stop"),
    ],
)
def test_fragments_are_reported(text: str, kind: str, problem: str) -> None:
    assert any(problem in found for found in problems(text, kind))


def test_passages_of_a_module_are_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""Module."""\n\n# A comment.\nWIDTH = 3\n"""Width in channels."""\n\n\n'
        'def function(x):\n    """Return x.\n\n    Args:\n        x: A number,\n            or two.\n\n'
        '    Returns:\n        The same.\n    """\n    raise UserError(f"{x}: is wrong", "omit it")\n\n\n'
        'parser.add_argument("--x", help="Set x.")\n'
    )
    found = {(passage.kind, " ".join(passage.text.split())) for passage in passages_of(path)}
    assert {
        ("docstring", "Module."),
        ("comment", "A comment."),
        ("attribute", "Width in channels."),
        ("entry", "A number, or two."),
        ("entry", "The same."),
        ("error", "`x`: is wrong"),
        ("error", "omit it"),
        ("help", "Set x."),
    } <= found


def test_every_rejected_pattern_has_a_replacement() -> None:
    accepted, rejected = word_list()
    assert accepted.pattern
    assert all(instead for _, instead in rejected)
