"""Tests of tools/serve.py and tools/load_test.py, run as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.scripts import ROOT
from tests.support.servers import tiny_converted
from tnnlm.cli.serve import load, parse
from tnnlm.errors import UserError

TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_converted(tmp_path_factory.mktemp("serve") / "converted")


@contextmanager
def serving(folder: Path, *words: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, str(TOOLS / "serve.py"), "--model", str(folder), "--port", "0", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | variables) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        url = next(line for line in lines if line.startswith("http")).split()[0].rstrip("/")
        try:
            yield process, url
        finally:
            process.kill()


def test_a_stop_lets_sequences_finish(folder: Path) -> None:
    with serving(folder, "--grace", "20", TNNLM_API_KEY="secret") as (process, url):
        headers = {"Authorization": "Bearer secret"}
        body = {"prompt": "a", "max_tokens": 2000, "stream": True, "stream_options": {"include_usage": True}}
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        assert httpx2.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"] == folder.parent.name
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert told[-1]["usage"]["completion_tokens"] == 2000 or "stop" in str(told[-2])
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_reproducible_is_refused_where_bits_depend_on_the_batch(folder: Path) -> None:
    args = parse(["--model", str(folder), "--device", "cpu", "--reproducible", "--engine", "eager"])
    with pytest.raises(UserError, match="--reproducible: rounding depends on the batch in the eager engine"):
        load(args)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "nowhere"), "nowhere: no such run"),
        (("--port", "70000"), "--port 70000"),
        (("--max-batch", "0"), "--max-batch 0: must be from 1 to"),
        (("--cache-mb", "-1"), "--cache-mb -1: must be from 0 to"),
        (("--dtype", "int3"), "int3"),
        (("--api-key", ""), "--api-key: is empty"),
        (("--name", ""), "--name: is empty"),
        (("--allowed-hosts", ""), "--allowed-hosts: is empty"),
        (("--max-answer-mb", "0"), "--max-answer-mb 0: must be from 1 to"),
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid"),
    ],
    ids=str,
)
def test_bad_flags(folder: Path, words: tuple[str, ...], message: str) -> None:
    defaults: tuple[str, ...] = () if "--model" in words else ("--model", str(folder))
    done = run("serve.py", *defaults, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_older_than_its_run_is_named(tmp_path: Path) -> None:
    folder = tiny_converted(tmp_path / "demo" / "converted")
    best = tmp_path / "demo" / "checkpoints" / "best.ckpt"
    best.parent.mkdir()
    best.write_bytes(b"")
    os.utime(folder / "model.safetensors", (1_000_000_000,) * 2)
    done = run("serve.py", "--model", str(folder), "--dtype", "int3")
    assert done.stderr.startswith(f"warning: {folder}: is older than {best}; convert again with: ")


def test_a_port_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = run("serve.py", "--model", str(folder), "--port", str(other.getsockname()[1]))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "in use" in done.stderr


def test_load_test(folder: Path, tmp_path: Path) -> None:
    words = ("--model", str(folder), "--streams", "1,6", "--seconds", "1", "--max-tokens", "16")
    done = run("load_test.py", *words, "--json", "load.json")
    assert done.returncode == 0, done.stderr
    one, six = json.loads((tmp_path / "load.json").read_text())
    for line in (one, six):
        assert line["lost"] == line["mixed"] == 0
        assert line["tokens_per_s"] > 0
        assert line["texts"] >= line["streams"]
    assert "between p50/p99" in done.stdout
    assert run("load_test.py", "--hostile", "-1").returncode == 2
    assert run("load_test.py", "--streams", "none").returncode == 2
    assert run("load_test.py", "--url", "http://127.0.0.1:9").returncode == 2


def test_load_test_beside_hostile_clients(folder: Path, tmp_path: Path) -> None:
    words = ("--model", str(folder), "--streams", "6", "--max-tokens", "16", "--hostile", "10")
    done = run("load_test.py", *words, "--minutes", "0.1", "--phase", "1.5", "--json", "load.json")
    assert done.returncode == 0, done.stdout + done.stderr
    calm, hostile = json.loads((tmp_path / "load.json").read_text())
    for line in (calm, hostile):
        assert line["lost"] == line["mixed"] == 0
    assert {name.split()[0] for name in hostile["attempts"]} >= {
        "unread",
        "cancelled",
        "oversized",
        "extreme",
    }
    assert "hostile clients: " in done.stdout


def run(tool: str, *words: str) -> Any:
    return subprocess.run([sys.executable, str(TOOLS / tool), *words], capture_output=True, text=True)
