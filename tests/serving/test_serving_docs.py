"""The examples of docs/how-to/serve.md run unchanged."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess

from tests.support.scripts import ROOT
from tests.support.servers import Running

PAGE = (ROOT / "docs" / "how-to" / "serve.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_curl(server: Running) -> None:
    (command,) = (block for block in blocks("bash") if "curl" in block)
    done = subprocess.run(command.replace(ADDRESS, server.url), shell=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["choices"][0]["finish_reason"] == "length"


def test_python(server: Running) -> None:
    (code,) = blocks("python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace(ADDRESS, server.url), {})
    assert len(printed.getvalue()) > 20


def test_limits_are_the_defaults() -> None:
    from tnnlm.serving.settings import Limits

    limits = Limits()
    rows = dict(re.findall(r"\| `--([a-z-]+)` \| ([\d,]+)", PAGE))
    assert int(rows["max-batch"]) == limits.max_batch
    assert int(rows["max-queue"].replace(",", "")) == limits.max_queue
    assert int(rows["max-prompt-tokens"].replace(",", "")) == limits.max_prompt_tokens
    assert int(rows["max-tokens"].replace(",", "")) == limits.max_tokens
    assert int(rows["timeout"]) == limits.timeout
    assert int(rows["max-request-rows"]) == limits.max_request_rows
    assert int(rows["max-answer-mb"]) << 20 == limits.max_answer_bytes
    assert int(rows["max-connections"].replace(",", "")) == limits.max_connections
    assert int(rows["send-timeout"]) == limits.send_timeout
