"""Servers to measure: tools/serve.py as installed, and llama.cpp's server with as many slots as streams."""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.llama_cpp import DTYPES, write_gguf
from tnnlm.config.schema import ModelConfig
from tnnlm.errors import UserError
from tnnlm.machine.threads import user_environment

ROOT = Path(__file__).parents[2]
_WAIT = 120.0
"""Seconds within which a server must answer."""
_PADDING = 256
"""Tokens to a multiple of which llama.cpp rounds the context of a slot."""


def find_llama_server(path: str | None) -> str:
    """Return the program llama-server: ``path``, or the one on the PATH.

    Raises:
        UserError: If there is none.
    """
    found = shutil.which(path or "llama-server")
    if found is None:
        raise UserError(
            f"{path or 'llama-server'}: no such program",
            "build it as docs/performance.md says and give its path with --llama-server",
        )
    return found


@contextmanager
def own_server(model: Path, dtype: str, folder: Path) -> Iterator[str]:
    """Start tools/serve.py with its defaults, yield its address, and stop it at the end."""
    words = [sys.executable, str(ROOT / "tools/serve.py"), "--port", "0", "--model", str(model)]
    log = folder / "tnnlm.log"
    with _started([*words, "--dtype", dtype], log) as process:
        for _ in _until_started(process, log):
            lines = [
                line
                for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
                if line.startswith("http")
            ]
            if lines:
                break
        yield lines[0].split()[0].rstrip("/")


class LlamaServer:
    """Server of llama.cpp with a Llama of random weights, about as many per token as a tnnlm model.

    Args:
        program: Path of llama-server.
        shape: Configuration of the tnnlm model.
        dtype: One of ``llama_cpp.DTYPES``.
        context: Tokens of a sequence, prompt and completion together.
        folder: Folder for the weights and the log.

    Raises:
        UserError: If ``gguf`` is not installed.
    """

    def __init__(self, program: str, shape: ModelConfig, dtype: str, context: int, folder: Path) -> None:
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise UserError(f"gguf: is not installed ({error})", "run: pip install gguf") from None
        self._program, self._log = program, folder / "llama-server.log"
        self._weights = folder / "llama-server.gguf"
        self.context = _PADDING * -(-(context + 1) // _PADDING)
        write_gguf(self._weights, dtype, shape, self.context)
        self.name = f"llama-server-{DTYPES[dtype]}"

    @contextmanager
    def running(self, slots: int) -> Iterator[str]:
        """Start the server, yield its address, and stop it at the end.

        Each slot has a separate key-value cache, as many threads run as PyTorch uses, and states of prompts
        are not kept, because no two prompts are alike.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        threads = str(torch.get_num_threads())
        words = [self._program, "--model", str(self._weights), "--host", "127.0.0.1", "--port", str(port)]
        words += ["--parallel", str(slots), "--ctx-size", str(slots * self.context), "--no-kv-unified"]
        words += ["--threads", threads, "--threads-batch", threads, "--no-cache-prompt", "--cache-ram", "0"]
        with _started(words, self._log) as process:
            for _ in _until_started(process, self._log):
                if _healthy(port):
                    break
            yield f"http://127.0.0.1:{port}"


def _healthy(port: int) -> bool:
    """Return whether a server answers that it is ready."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


@contextmanager
def _started(words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server that writes its output to a file, and stop it at the end."""
    environment = user_environment()  # each server chooses itself how its threads wait
    with (
        log.open("wb") as file,
        subprocess.Popen(words, stdout=file, stderr=file, env=environment) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()


def _until_started(process: subprocess.Popen[bytes], log: Path) -> Iterator[None]:
    """Yield repeatedly while a server starts.

    Raises:
        UserError: If it exits, or takes too long.
    """
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < _WAIT:
        yield
        time.sleep(0.05)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
    raise UserError(f"{log.stem}: did not start: {lines[-1]}")
