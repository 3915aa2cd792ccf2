#!/usr/bin/env python
"""Load-test a server with concurrent greedy streams, each compared with the same request alone.

Reports requests that failed or returned another completion, tokens per second, time to first token, time
between tokens, and memory of the server. Exit code 1 if a completion is missing or differs. With --hostile,
clients that are slow, read nothing, disconnect, or send oversized requests and extreme fields attack in every
second phase, and the table has a line for the phases without and one for those with them.

Examples:
  python tools/load_test.py                                # serve the newest converted model
  python tools/load_test.py --model runs/demo --streams 1,8,64
  python tools/load_test.py --url http://127.0.0.1:8000 --seconds 120 --json load.json
  python tools/load_test.py --streams 200 --hostile 10 --minutes 10

Needs: pip install -c constraints.txt -e '.[serve]' aiohttp psutil
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from load_testing.hostile import attack
from load_testing.streams import PATH, Client, Stage, Tally, load, requests
from tnnlm.errors import OneLineParser, UserError, run_script
from tnnlm.files import check_file, write_text

SERVE = Path(__file__).with_name("serve.py")
SETTLING = 2.0
"""Seconds at the beginning of a phase whose times belong to no phase."""


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
                text = await client.stream(request, Stage(Tally(1)))
                if text is None:
                    raise UserError(f"{url}: refuses requests; give its key with --api-key if it needs one")
                expected.append(text)
            summaries = []
            for streams in args.streams:
                if args.hostile:
                    summaries += await beside_hostile(client, streams, args, work, expected, server)
                else:
                    tally = Tally(streams)
                    started = time.perf_counter()
                    await load(client, Stage(tally), streams, args.seconds, work, expected, server)
                    tally.seconds = time.perf_counter() - started
                    summaries.append(tally.summary())
        except aiohttp.ClientError as error:
            raise UserError(f"{url}: {error}") from None
    return summaries


async def beside_hostile(
    client: Client,
    streams: int,
    args: argparse.Namespace,
    work: list[dict[str, Any]],
    expected: list[str],
    server: Any,
) -> list[dict[str, Any]]:
    """Keep streams busy in alternating phases without and with hostile clients; return both results."""
    tallies = {name: Tally(streams) for name in ("calm", "hostile", "between phases")}
    stage = Stage(tallies["calm"])
    url, statuses = client.url.removesuffix(PATH), Counter[str]()
    rounds = max(1, round(30 * args.minutes / args.phase))

    async def phases() -> None:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            await run_in(pool, 0, 0.0)  # starts the process
            for name in ("calm", "hostile") * rounds:
                ended = run_in(pool, args.hostile if name == "hostile" else 0, args.phase)
                await asyncio.sleep(min(SETTLING, args.phase / 4))
                stage.now, started = tallies[name], time.perf_counter()
                statuses.update(await ended)
                tallies[name].seconds += time.perf_counter() - started
                stage.now = tallies["between phases"]

    def run_in(pool: Executor, clients: int, seconds: float) -> Awaitable[Counter[str]]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(pool, attack, url, args.api_key, clients, seconds)

    watched = asyncio.create_task(phases())
    await load(client, stage, streams, 2 * rounds * args.phase, work, expected, server)
    await watched
    for name in ("texts", "lost", "mixed"):  # of completions, which last longer than the change of a phase
        rest = getattr(tallies["between phases"], name)
        setattr(tallies["hostile"], name, getattr(tallies["hostile"], name) + rest)
    answers = dict(sorted(statuses.items()))
    return [
        tallies["calm"].summary(),
        tallies["hostile"].summary() | {"hostile": args.hostile, "attempts": answers},
    ]


@contextmanager
def own_server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Start a server; yield its address and process id, and stop it at the end.

    Raises:
        UserError: If the server does not start.
    """
    words = [sys.executable, str(SERVE), "--port", "0", "--dtype", args.dtype, "--engine", args.engine]
    words += ["--model", args.model] if args.model else []
    words += ["--reproducible"] if args.engine == "packed" else []
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
    for calm, line in itertools.pairwise(summaries):
        if "hostile" in line:
            ratio = line["between_tokens_ms"][1] / max(calm["between_tokens_ms"][1], 1e-9)
            print(
                f"{line['streams']} streams, p99 between tokens beside {line['hostile']} hostile clients: ",
                end="",
            )
            print(f"{ratio:.2f} times that without them")
            print("  attempts:", ", ".join(f"{name} {count:,}" for name, count in line["attempts"].items()))


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
    add(
        "--engine",
        default="packed",
        metavar="NAME",
        help="Engine; packed runs with --reproducible, so that rounding does not change completions under "
        "load. Where the server refuses that, name auto. (default: packed)",
    )
    add = parser.add_argument_group("load").add_argument
    add("--streams", default="1,32", metavar="N,N", help="Numbers of concurrent streams. (default: 1,32)")
    add("--seconds", type=float, default=20, metavar="S", help="Seconds per number of streams. (default: 20)")
    add("--max-tokens", type=int, default=200, metavar="N", help="Maximum new tokens. (default: 200)")
    add = parser.add_argument_group("hostile clients beside the load").add_argument
    add("--hostile", type=int, default=0, metavar="N", help="Number of hostile clients. (default: 0)")
    add("--minutes", type=float, default=3, metavar="M", help="Minutes with and without them. (default: 3)")
    add("--phase", type=float, default=15, metavar="S", help="Seconds of a phase. (default: 15)")
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
    if not 0 <= args.hostile <= 1000 or not 0 < args.minutes < 1e5 or not 0 < args.phase < 1e5:
        raise UserError("--hostile must be from 0 to 1,000, --minutes and --phase above 0")
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
    failed = any(line["lost"] or line["mixed"] or failures(line.get("attempts", {})) for line in summaries)
    return 1 if failed else 0


def failures(attempts: dict[str, int]) -> int:
    """Return the number of attempts of hostile clients that ended with an error of the server."""
    return sum(count for name, count in attempts.items() if name.split()[-1].startswith("5"))


if __name__ == "__main__":
    sys.exit(run_script(main))
