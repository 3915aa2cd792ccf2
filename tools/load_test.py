#!/usr/bin/env python
"""Load-test a server with concurrent greedy streams, each compared with the same request alone.

Reports requests that failed or returned another completion, tokens per second, time to first token, time
between tokens, and memory of the server. Exit code 1 if a completion is missing or differs.

Examples:
  python tools/load_test.py                                # serve the newest converted model
  python tools/load_test.py --model runs/demo --streams 1,8,64
  python tools/load_test.py --url http://127.0.0.1:8000 --seconds 120 --json load.json

Needs: pip install 'tnnlm[serve]' aiohttp psutil
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tnnlm.errors import OneLineParser, UserError, run_script
from tnnlm.files import check_file, write_text

SERVE = Path(__file__).with_name("serve.py")
KINDS = 48
"""Number of different requests; each stream sends them in a different random order."""
WORDS = __doc__.split()


@dataclass
class Tally:
    """Counts and times measured with a given number of streams."""

    streams: int
    seconds: float = 0.0
    texts: int = 0
    """Requests sent."""
    lost: int = 0
    """Requests without a complete answer."""
    mixed: int = 0
    """Completions that differ from that of the same request alone."""
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    """Times to first token, in seconds."""
    between: list[float] = field(default_factory=list)
    """Times between chunks of a stream, in seconds."""
    memory: list[float] = field(default_factory=list)
    """Resident memory of the server in MiB, once per second."""

    def summary(self) -> dict[str, Any]:
        """Return the results as plain data: times as 50th and 99th percentiles in milliseconds, memory as
        the median of each quarter of the time in MiB."""
        quarter = max(1, len(self.memory) // 4)
        parts = [self.memory[at * quarter : (at + 1) * quarter] or [0.0] for at in range(4)]
        return {
            "streams": self.streams,
            "seconds": round(self.seconds, 1),
            "texts": self.texts,
            "lost": self.lost,
            "mixed": self.mixed,
            "tokens_per_s": round(self.tokens / max(self.seconds, 1e-9), 1),
            "first_token_ms": [round(1e3 * percentile(self.first, p), 1) for p in (50, 99)],
            "between_tokens_ms": [round(1e3 * percentile(self.between, p), 1) for p in (50, 99)],
            "memory_mib": [round(percentile(part, 50)) for part in parts],
        }


def percentile(values: list[float], p: float) -> float:
    """Return a percentile by nearest rank; 0 for an empty list."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] if ordered else 0.0


def requests(longest: int) -> list[dict[str, Any]]:
    """Return greedy requests with prompts and completions of many lengths, at most ``longest`` new tokens."""
    rng = random.Random(0)
    made = []
    for index in range(KINDS):
        words = rng.choices(WORDS, k=rng.choice((3, 10, 40, 200)))
        text = f"{index} {' '.join(words)}"
        made.append({"prompt": text, "max_tokens": rng.randint(16, longest), "temperature": 0})
    return made


class Client:
    """Client of a server's completions API."""

    def __init__(self, session: Any, url: str) -> None:
        self.session = session
        self.url = f"{url}/v1/completions"

    async def stream(self, request: dict[str, Any], tally: Tally) -> str | None:
        """Return the completion, or None if it is incomplete; add the measured times to ``tally``."""
        text, last, started = [], None, time.perf_counter()
        finish = None
        body = request | {"stream": True, "stream_options": {"include_usage": True}}
        async with self.session.post(self.url, json=body) as response:
            if response.status != 200:
                return None
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                chunk = json.loads(line[6:])
                if chunk.get("usage"):
                    tally.tokens += chunk["usage"]["completion_tokens"]
                for choice in chunk.get("choices", ()):
                    (tally.first if last is None else tally.between).append(now - (last or started))
                    last = now
                    text.append(choice["text"])
                    finish = choice["finish_reason"] or finish
        return "".join(text) if finish else None


async def load(
    client: Client,
    tally: Tally,
    seconds: float,
    work: list[dict[str, Any]],
    expected: list[str],
    server: Any,
) -> None:
    """Keep ``tally.streams`` streams busy, then wait for the requests that still run.

    Args:
        client: Client of the server.
        tally: Receives the results.
        seconds: Time during which new requests are sent.
        work: Requests to choose from.
        expected: Completion of each request when it runs alone.
        server: Process of the server (psutil) whose memory is recorded; None records no memory.
    """
    started = time.perf_counter()
    bar = tqdm(total=round(seconds), desc=f"{tally.streams} streams", unit="s", leave=False, disable=None)

    async def worker(number: int) -> None:
        rng = random.Random(number)
        while time.perf_counter() - started < seconds:
            index = rng.randrange(len(work))
            text = await client.stream(work[index], tally)
            tally.texts += 1
            tally.lost += text is None
            tally.mixed += text is not None and text != expected[index]

    async def watch() -> None:
        while True:
            await asyncio.sleep(1)
            bar.update(1)
            if server is not None:
                tally.memory.append(server.memory_info().rss / 2**20)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(worker(number) for number in range(tally.streams)))
    tally.seconds = time.perf_counter() - started
    watching.cancel()
    bar.close()


async def run(url: str, args: argparse.Namespace, pid: int | None) -> list[dict[str, Any]]:
    """Measure each number of streams in ``args.streams``, one after the other.

    Raises:
        UserError: If aiohttp or psutil is not installed, or if the server refuses requests.
    """
    try:
        import aiohttp
        import psutil
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; run: pip install aiohttp psutil") from None

    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        client = Client(session, url)
        server = None if pid is None else psutil.Process(pid)
        work = requests(args.max_tokens)
        expected = []
        try:
            for request in tqdm(work, desc="requests alone", leave=False, disable=None):
                text = await client.stream(request, Tally(1))
                if text is None:
                    raise UserError(f"{url}: refuses requests; give its key with --api-key if it needs one")
                expected.append(text)
            summaries = []
            for streams in args.streams:
                tally = Tally(streams)
                await load(client, tally, args.seconds, work, expected, server)
                summaries.append(tally.summary())
        except aiohttp.ClientError as error:
            raise UserError(f"{url}: {error}") from None
    return summaries


@contextmanager
def own_server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Start a server; yield its address and process id, and stop it at the end.

    Raises:
        UserError: If the server does not start.
    """
    words = [sys.executable, str(SERVE), "--port", "0", "--dtype", args.dtype, "--engine", args.engine]
    words += ["--model", args.model] if args.model else []
    variables = os.environ | {"PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(words, stderr=subprocess.PIPE, encoding="utf-8", env=variables) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line.strip())
            if line.startswith("http"):
                break
        else:
            raise UserError(seen[-1].removeprefix("error: ") if seen else "the server did not start")
        try:
            yield line.split()[0].rstrip("/"), process.pid
        finally:
            process.terminate()


def show(summaries: list[dict[str, Any]]) -> None:
    """Print a table; its last column is the throughput relative to the first row."""
    print(
        " streams   texts  lost  mixed  tokens/s   first token p50/p99    between p50/p99  "
        "  MiB, by quarters of the time   times"
    )
    for line in summaries:
        first, between, memory = line["first_token_ms"], line["between_tokens_ms"], line["memory_mib"]
        print(
            f"{line['streams']:8} {line['texts']:7} {line['lost']:5} {line['mixed']:6} "
            f"{line['tokens_per_s']:9,.0f} {first[0]:9,.0f} / {first[1]:,.0f} ms "
            f"{between[0]:9,.1f} / {between[1]:,.1f} ms   {' '.join(f'{part:5}' for part in memory)} "
            f"{line['tokens_per_s'] / max(summaries[0]['tokens_per_s'], 1e-9):6.2f}"
        )


def parse() -> argparse.Namespace:
    """Return the checked arguments of the command line.

    Raises:
        UserError: If a number is out of range.
    """
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("running server").add_argument
    add("--url", help="Address of a running server. (default: start one)")
    key = os.environ.get("TNNLM_API_KEY")
    add("--api-key", metavar="KEY", default=key, help="API key of the server. (default: $TNNLM_API_KEY)")
    add = parser.add_argument_group("server that is started without --url").add_argument
    add("--model", metavar="DIR|RUN|CKPT", help="Converted model, run or checkpoint. (default: newest)")
    add("--dtype", default="float32", metavar="NAME", help="Dtype of the weights. (default: float32)")
    add("--engine", default="packed", metavar="NAME", help="Engine. (default: packed)")
    add = parser.add_argument_group("load").add_argument
    add("--streams", default="1,32", metavar="N,N", help="Numbers of concurrent streams. (default: 1,32)")
    add("--seconds", type=float, default=20, metavar="S", help="Seconds per number of streams. (default: 20)")
    add("--max-tokens", type=int, default=200, metavar="N", help="Maximum new tokens. (default: 200)")
    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", help="Write the results as JSON.")
    args = parser.parse_args()
    try:
        args.streams = [int(word) for word in args.streams.split(",")]
    except ValueError:
        args.streams = []
    if not args.streams or not all(1 <= n <= 10_000 for n in args.streams):
        raise UserError("--streams: expected numbers from 1 to 10,000, such as 1,32")
    if args.max_tokens < 16 or not 0 < args.seconds < 1e6:
        raise UserError("--max-tokens must be at least 16, --seconds above 0")
    return args


def main() -> int:
    """Run the load test and print its results; return 1 if a completion is missing or differs."""
    args = parse()
    if args.json:
        check_file(args.json)
    if args.url:
        summaries = asyncio.run(run(args.url.rstrip("/"), args, None))
    else:
        with own_server(args) as (url, pid):
            summaries = asyncio.run(run(url, args, pid))
    show(summaries)
    if args.json:
        write_text(args.json, json.dumps(summaries, indent=2))
    return 1 if any(line["lost"] or line["mixed"] for line in summaries) else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
