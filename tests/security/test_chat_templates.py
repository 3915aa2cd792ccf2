"""A chat template of a stranger reaches nothing of Python, and can't use up time or memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.support.conversations import turn
from tnnlm.chat import renderer as limits
from tnnlm.chat.renderer import LONGEST_TEMPLATE, Renderer
from tnnlm.errors import UserError

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__()[0].__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch escaped') }}",
    "{{ self.__init__.__globals__.__builtins__.open('escaped', 'w') }}",
    "{{ raise_exception.__globals__['sys'].modules }}",
    "{{ lipsum.__globals__['os'].popen('touch escaped').read() }}",
    "{{ ''['__class__'] }}{{ messages | attr('__class__') }}{{ (messages | attr('append'))(1) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
)
FLOODS = (
    "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='a' * 999) %}{% for _ in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ range(10 ** 12) | list }}",
    "{{ '%999999999999d' | format(1) }}",
    "{{ 'a' | center(10 ** 12) }}",
    "{% for _ in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
)


def render(source: str, process: Renderer) -> str:
    variables = {"messages": [turn("user", "Hi")], "add_generation_prompt": True}
    return process.render(source, [variables], "there")[0].text


def test_template_reaches_nothing_outside_of_the_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Renderer() as process:
        for source in ESCAPES:
            text = ""
            with contextlib.suppress(UserError):
                text = render(source, process)
            # An attribute that the sandbox hides is undefined, which is no text.
            assert text.strip() in ("", "None"), source
    assert not list(tmp_path.iterdir())


def test_template_can_use_up_neither_time_nor_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MEGABYTES", 256)
    with Renderer(seconds=0.5, longest=1 << 20) as process:
        for source in FLOODS:
            with pytest.raises(UserError, match="there: the chat template ") as error:
                render(source, process)
            assert "\n" not in str(error.value)
            assert render("{{ messages[0].content }}", process) == "Hi"


def test_template_of_any_length_is_not_parsed() -> None:
    with Renderer() as process, pytest.raises(UserError, match="has 262,145 characters; use at most 262,144"):
        render("a" * (LONGEST_TEMPLATE + 1), process)
