"""The process of a server: files that change under it, and signals that stop it."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.serving.test_tools import serving
from tests.support.servers import tiny_converted

ENDLESS = {"prompt": "a", "max_tokens": 131_072, "stream": True, "logit_bias": {"0": -100}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_converted(tmp_path_factory.mktemp("serve") / "converted")


def events(lines: Iterator[str]) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_files_of_a_served_model_may_change(folder: Path, tmp_path: Path) -> None:
    """A truncated file that is mapped into memory ends the process with SIGBUS."""
    own = tmp_path / "converted"
    shutil.copytree(folder, own)
    with serving(own) as (process, url):
        mapped = Path(f"/proc/{process.pid}/maps")
        if mapped.exists():
            assert str(own) not in mapped.read_text(encoding="utf-8")
        body = {"prompt": "the quick", "max_tokens": 50, "temperature": 0}
        before = httpx2.post(f"{url}/v1/completions", json=body).json()["choices"]
        with httpx2.stream("POST", f"{url}/v1/completions", json=ENDLESS, timeout=60) as running:
            lines = running.iter_lines()
            next(lines)
            for path in own.iterdir():
                size = path.stat().st_size
                with path.open("r+b") as file:
                    file.write(b"\xff" * size)
                    file.truncate(0)
            after = httpx2.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
            assert next(lines) == ""
            assert next(lines).startswith("data: {")
        assert after == before
        assert process.poll() is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_running_streams_are_told_that_the_server_stops(folder: Path, name: str) -> None:
    with serving(folder, "--grace", "0") as (process, url):
        with httpx2.stream("POST", f"{url}/v1/completions", json=ENDLESS, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(getattr(signal, name))
            told = events(lines)
        assert told[-1]["error"]["message"] == "the server is shutting down"
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
