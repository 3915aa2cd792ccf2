"""Mode serve: concurrent streams on tools/serve.py and on llama.cpp's server, from the same client.

Every stream sends a different prompt of random tokens and reads a greedy completion. The limit is the time of
the matrix products of as many rows as there are streams, and of the prompts, alone; for a lone stream, the
time to read the weights. Prompts count for the time, only generated tokens as throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.decoding import show_skipped
from benchmarks.installed import install
from benchmarks.limits import product_seconds
from benchmarks.ratios import ratio_table
from benchmarks.servers import LlamaServer, find_llama_server, own_server
from benchmarks.subjects import CHUNK, WIDTHS, linear_weights
from experiments.report import table
from experiments.timing import read_bandwidth, row
from load_testing.streams import Client, Stage, Tally, percentile
from tnnlm.checkpoints.locate import load_for_decoding
from tnnlm.cli.usage import trust_of
from tnnlm.config.schema import ModelConfig
from tnnlm.errors import UserError
from tnnlm.inference.engine import open_engine
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.sampling import SamplingParams
from tnnlm.machine.capabilities import describe_cpu

STREAMS = (1, 8, 64, 200)
PROMPT = GENERATED = 128
"""Tokens of a prompt and of a completion."""
SERVER, GENERATE = "tnnlm-serve", "tnnlm-generate"
_LONE = 4
"""Requests of a lone stream, one after the other."""
Burst = Callable[[list[list[int]]], tuple[float, list[Tally]]]
"""Sends prompts and returns the seconds of all and a tally for each."""


def measure_serving(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """Measure every number of streams on all servers, interleaved.

    Raises:
        UserError: If aiohttp is not installed, or a server does not start.
    """
    streams, rounds = args.streams or ((1, 8) if args.quick else STREAMS), 1 if args.quick else 3
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model = Path(args.model) if args.model else install(shape, folder)
        found, converted = load_for_decoding(str(model), Path("runs"), trust_of(args))
        shape, vocabulary = converted.model.config, converted.tokenizer.size
        weights = linear_weights(converted.model) + converted.model.embedding.weight.numel()
        generator, engine = open_engine(converted, found, dtype=args.dtype, trust=trust_of(args))
        peer = _peer(args, shape, folder)
        bursts: dict[str, Burst] = {
            SERVER: _client(stack.enter_context(own_server(model, args.dtype, folder))),
            GENERATE: lambda prompts: _generate(generator, prompts),
        }
        bandwidth = read_bandwidth()
        products = product_seconds(shape, args.dtype, sorted({*streams, CHUNK}))
        floor = weights * WIDTHS[args.dtype] / (1e9 * bandwidth)
        rows = []
        for n in tqdm(streams, desc="streams", leave=False, disable=None):
            limit = (floor if n == 1 else products[n] / n) + PROMPT / GENERATED * products[CHUNK] / CHUNK
            with _all_of(bursts, peer, n) as here:
                measured = _interleaved(here, n, rounds, vocabulary)
            rows += [_row(name, args.dtype, n, found, limit) for name, found in measured.items()]
    return {
        "mode": "serve",
        "cpu": describe_cpu(),
        "bandwidth_gbs": bandwidth,
        "engine": str(engine),
        "slot_context": peer.context if peer else None,
        "results": rows,
    }


def _peer(args: argparse.Namespace, shape: ModelConfig, folder: Path) -> LlamaServer | None:
    """Return llama.cpp's server, or None after a line that says why it is not measured."""
    try:
        program = find_llama_server(args.llama_server)
        return LlamaServer(program, shape, args.dtype, PROMPT + GENERATED, folder)
    except UserError as error:
        if args.llama_server:
            raise
        show_skipped("llama-server", str(error))
        return None


@contextmanager
def _all_of(bursts: dict[str, Burst], peer: LlamaServer | None, streams: int) -> Iterator[dict[str, Burst]]:
    """Yield everything to measure at a number of streams, with llama.cpp's server running."""
    here = {name: burst for name, burst in bursts.items() if streams == 1 or name != GENERATE}
    if peer is None:
        yield here
        return
    with peer.running(streams) as url:
        yield here | {peer.name: _client(url)}


def _interleaved(
    bursts: dict[str, Burst], streams: int, rounds: int, vocabulary: int
) -> dict[str, list[tuple[float, list[Tally]]]]:
    """Return the results of every burst by name, after one that is not counted."""
    found: dict[str, list[tuple[float, list[Tally]]]] = {name: [] for name in bursts}
    size = max(streams, _LONE)
    # Another seed for each number of streams: a prompt that comes twice would be in the prefix cache.
    seed, count = torch.Generator().manual_seed(streams), size * (rounds + 1) * len(bursts)
    prompts = torch.randint(vocabulary, (count, PROMPT), generator=seed).tolist()
    for turn in range(rounds + 1):
        for name, burst in bursts.items():
            own, prompts = prompts[:size], prompts[size:]
            if streams == 1:
                each = [burst([prompt]) for prompt in own]
                result = sum(seconds for seconds, _ in each), [tally for _, one in each for tally in one]
            else:
                result = burst(own[:streams])
            if turn:
                found[name].append(result)
    return found


def _client(url: str) -> Burst:
    """Return a burst of concurrent streams on a server."""
    try:
        import aiohttp
    except ModuleNotFoundError:
        raise UserError("aiohttp: is not installed", "run: pip install aiohttp") from None

    async def send(prompts: list[list[int]]) -> tuple[float, list[Tally]]:
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            client = Client(session, url)
            tallies = [Tally(len(prompts)) for _ in prompts]
            body = {"max_tokens": GENERATED, "temperature": 0}
            started = time.perf_counter()
            texts = await asyncio.gather(
                *(
                    client.stream(body | {"prompt": prompt}, Stage(tally))
                    for prompt, tally in zip(prompts, tallies, strict=True)
                )
            )
            if None in texts:
                raise UserError(f"{url}: {texts.count(None)} of {len(texts)} requests were not completed")
            return time.perf_counter() - started, tallies

    return lambda prompts: asyncio.run(send(prompts))


def _generate(generator: TextGenerator, prompts: list[list[int]]) -> tuple[float, list[Tally]]:
    """Generate greedy completions in this process, as generate.py does."""
    started, tallies = time.perf_counter(), []
    for prompt in prompts:
        state = generator.prefill_tokens([prompt])
        record, chunks = generator.stream(state, GENERATED, SamplingParams(temperature=0))
        for _ in chunks:
            pass
        # The first token's logits come from the prompt.
        steps = [record.seconds / max(1, len(record.tokens) - 1)] * (len(record.tokens) - 1)
        tallies.append(Tally(1, tokens=len(record.tokens), first=[state.seconds], between=steps))
    return time.perf_counter() - started, tallies


def _row(
    name: str, dtype: str, streams: int, measured: list[tuple[float, list[Tally]]], limit: float
) -> dict[str, Any]:
    """Return the row of a server: medians over the bursts, and percentiles over all streams."""
    per_token = [seconds / max(1, sum(tally.tokens for tally in tallies)) for seconds, tallies in measured]
    every = [tally for _, tallies in measured for tally in tallies]
    first = [seconds for tally in every for seconds in tally.first]
    own = row(name, dtype, streams, PROMPT, per_token if len(per_token) > 1 else 2 * per_token)
    return own | {
        "tokens_per_second": 1 / own["seconds_per_token"],
        "limit_share": limit / own["seconds_per_token"],
        "first_token_ms": [1e3 * percentile(first, p) for p in (50, 99)],
        # Events may carry several tokens, so the time between tokens is that between the first and the last.
        "between_tokens_ms": 1e3 * median(sum(tally.between) / max(1, tally.tokens - 1) for tally in every),
    }


def serving_table(result: dict[str, Any]) -> str:
    """Return a table with a row per server and number of streams."""
    lines = [
        {
            "server": one["name"],
            "dtype": one["dtype"],
            "streams": f"{one['batch']}",
            "tokens/s": f"{one['tokens_per_second']:,.0f}",
            "of the limit": f"{one['limit_share']:.0%}",
            "first token, p50 / p99 ms": " / ".join(f"{ms:,.0f}" for ms in one["first_token_ms"]),
            "ms between tokens": f"{one['between_tokens_ms']:.2f}",
        }
        for one in result["results"]
    ]
    return table(lines)


def show_serving(result: dict[str, Any]) -> str:
    """Return what was measured, the table of :func:`serving_table`, and ratios."""
    lone = {one["name"]: one["between_tokens_ms"] for one in result["results"] if one["batch"] == 1}
    parts = [
        f"{PROMPT} prompt and {GENERATED} generated tokens; {GENERATE}: {result['engine']}",
        serving_table(result),
    ]
    if result["slot_context"]:
        parts.append(f"llama-server: a slot of {result['slot_context']} tokens per stream")
    if GENERATE in lone:
        ratio = lone[SERVER] / lone[GENERATE]
        parts.append(f"a lone stream's time between tokens over that of generate.py: {ratio:.2f}")
    return "\n\n".join(filter(None, [*parts, ratio_table(result)]))
