"""Process that renders chat templates in Jinja's sandbox, with limits on time, memory and the text's size.

It is a script, which imports nothing of the package: :mod:`tnnlm.chat.renderer` runs it and sends one request
per line of stdin. The sandbox keeps a template from attributes and functions of Python, but neither from
endless loops nor from huge strings; the process can be ended, whatever it does.
"""

from __future__ import annotations

import json
import secrets
import signal
import sys
from functools import cache, lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_NONCE = secrets.token_hex(16)
"""Part of the marks around answers, which no template can know."""
_OPEN, _CLOSE = f"\ue000{_NONCE}\ue001", f"\ue000{_NONCE}\ue002"


class GenerationTag(Extension):
    """Tag ``{% generation %} ... {% endgeneration %}`` around what the assistant writes.

    It has the meaning that it has in Transformers: the text inside is what a model learns to generate.
    """

    tags = {"generation"}  # noqa: RUF012  # the attribute of Extension

    def parse(self, parser: Parser) -> nodes.Node:
        """Return a block that puts marks around its output."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class RefusedError(TemplateError):
    """Error that a template raises itself."""


@cache
def environment() -> ImmutableSandboxedEnvironment:
    """Return an environment with the white space, functions and filters that Transformers has."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    found.filters["tojson"] = _to_json
    found.globals["raise_exception"] = _refuse
    return found


@lru_cache(maxsize=4)
def compiled(source: str) -> Any:
    """Return a compiled template."""
    return environment().from_string(source)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: Any) -> None:
    raise RefusedError(str(message))


def rendered(template: Any, request: dict[str, Any], longest: int) -> dict[str, Any]:
    """Return the text of messages, and the ranges of it that the template marks as answers.

    Raises:
        RefusedError: If the text is longer than ``longest`` characters.
    """
    parts, size = [], 0
    for part in template.generate(**request):
        parts.append(part)
        size += len(part)
        if size > longest:
            raise RefusedError(f"makes a text of more than {longest:,} characters")
    return unmarked("".join(parts))


def unmarked(text: str) -> dict[str, Any]:
    """Return a text without the marks around answers, and the ranges [start, end) that they enclose."""
    pieces, size, spans = [], 0, []
    for index, piece in enumerate(text.split(_OPEN)):
        inside, *after = piece.split(_CLOSE) if index else (piece,)
        start = size
        if index:
            spans.append([start, start + len(inside)])
        for part in (inside, *after):
            pieces.append(part)
            size += len(part)
    return {"text": "".join(pieces), "spans": spans}


def limit(seconds: float, megabytes: int) -> None:
    """Limit the processor time of this request and the memory of this process, where the system can."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process
    try:
        import resource
    except ImportError:  # Windows
        return
    size = megabytes << 20
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ValueError, OSError):  # a lower limit holds already, or the system has none
        return


def answer(request: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the strings of a request, or the reason why its template fails."""
    try:
        template = compiled(request["template"])
        texts = [rendered(template, one, settings["longest"]) for one in request["texts"]]
    except MemoryError:
        return {"error": f"needs more than {settings['megabytes']:,} MiB of memory"}
    except RecursionError:
        return {"error": "is nested too deeply"}
    except Exception as error:  # templates can raise whatever their expressions raise
        lines = str(error).splitlines() or [type(error).__name__]
        line = getattr(error, "lineno", None)
        return {"error": f"{f'line {line}: ' if line else ''}{lines[0][:200]}"}
    return {"texts": texts}


def main() -> None:
    """Answer the requests on stdin until it ends."""
    settings = json.loads(sys.argv[1])
    for line in sys.stdin:
        limit(settings["seconds"], settings["megabytes"])
        try:
            reply = json.dumps(answer(json.loads(line), settings))
        except MemoryError:
            reply = json.dumps({"error": f"needs more than {settings['megabytes']:,} MiB of memory"})
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
