"""Conversion, generation by every engine, and the server on a pretended GPU, with counts per token."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import httpx2
import torch

from tests.support.pretend.cuda import in_this_thread
from tests.support.pretend.tensors import LEDGER, PretendTensor
from tests.support.servers import run_server
from tnnlm.cli import convert
from tnnlm.errors import UserError
from tnnlm.inference.engine import Engine
from tnnlm.inference.generator import TextGenerator
from tnnlm.inference.load import load_engine
from tnnlm.inference.sampling import SamplingParams

PROMPT, TOKENS = "The ", 6
GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=0.9, top_k=20, top_p=0.9)
Engines = tuple[tuple[str, str], ...]
ENGINES: Engines = (("eager", "float32"), ("packed", "float32"), ("packed", "bfloat16"), ("graph", "float32"))


def decode_run(run: Path, engines: Engines = ENGINES, serve: bool = True) -> dict[str, Any]:
    """Convert a run, generate by engines that a GPU has, and serve the model.

    Args:
        run: Folder of the run.
        engines: Names and dtypes of the engines.
        serve: Whether to serve the model.
    """
    assert convert.main([str(run), "--verify", "--no-compile"]) == 0
    found: dict[str, Any] = {"engines": {}}
    for name, dtype in engines:
        engine = _open(run, name, dtype)
        found["engines"][f"{name} {dtype}"] = {
            **_counts(engine.generator),
            "info": str(engine.info),
            "text": engine.generator(PROMPT, TOKENS, GREEDY),
            "sampled": engine.generator(PROMPT, TOKENS, SAMPLED, seed=0),
        }
    on_cpu = load_engine(str(run), Path(), device="cpu", dtype="float32", engine="eager")
    found["cpu"] = _without_end(on_cpu)(PROMPT, TOKENS, GREEDY)
    found["automatic"] = _open(run, "auto", "float32").info.name
    try:
        _open(run, "compiled", "float32")
    except UserError as error:
        found["compiled"] = str(error)
    return found | {"served": _serve(run)} if serve else found


def _open(run: Path, engine: str, dtype: str) -> Engine:
    # Triton is not needed: the fused operators run their reference on the inner tensors.
    with mock.patch("tnnlm.inference.engine.why_not_fused", return_value=""):
        opened = load_engine(str(run), Path(), device="cuda", dtype=dtype, engine=engine)
    _without_end(opened)
    return opened


def _without_end(engine: Engine) -> TextGenerator:
    """Exclude the end token, so that every completion has the full length."""
    generator = engine.generator
    generator._gaps = torch.tensor([generator.tokenizer.eos_id], device=generator.device)
    return generator


def _counts(generator: TextGenerator) -> dict[str, Any]:
    """Return launches of a step, and synchronisations per token of a stream and of a batch of three rows."""
    steps: list[int] = []
    run = generator.model.step

    def step(*args: Any) -> Any:
        before = LEDGER.launches.total()
        result = run(*args)
        steps.append(LEDGER.launches.total() - before)
        return result

    one, three = generator.prefill([PROMPT]), generator.prefill([PROMPT, "A", "In the"])
    assert isinstance(one.logits, PretendTensor)
    with mock.patch.object(generator.model, "step", step):
        streamed = _per_token(lambda n: "".join(generator.stream(one, n, GREEDY)[1]))
        steps.clear()
        generator.generate(one, 1, GREEDY)
        batched = _per_token(lambda n: generator.generate(three, n, SAMPLED, torch.Generator("cuda")))
    return {"launches": steps[0], "stream": streamed, "batch": batched}


def _per_token(generate: Callable[[int], Any]) -> dict[str, int]:
    """Return the host synchronisations by place that each further token adds."""
    counted = []
    for tokens in (TOKENS, 2 * TOKENS):
        with _fresh_syncs() as syncs:
            generate(tokens)
        counted.append(syncs)
    added = counted[1] - counted[0]
    assert all(count % TOKENS == 0 for count in added.values()), added
    return {place: count // TOKENS for place, count in added.items()}


@contextlib.contextmanager
def _fresh_syncs() -> Iterator[Counter[str]]:
    """Fill a counter with the synchronisations of the ``with`` block by kind and place."""
    counted: Counter[str] = Counter()
    before = LEDGER.syncs.copy()
    yield counted
    for (_, kind, place), count in (LEDGER.syncs - before).items():
        counted[f"{kind} at {place}"] += count


def _serve(run: Path) -> dict[str, Any]:
    """Return one greedy and three sampled completions of the server, and its synchronisations per token."""
    with ThreadPoolExecutor(1, initializer=in_this_thread().__enter__) as thread:
        generator = thread.submit(lambda: _open(run, "packed", "float32").generator).result()
        with run_server(generator, executor=thread) as server:

            def ask(tokens: int = TOKENS, **more: Any) -> list[str]:
                body = {"prompt": PROMPT, "max_tokens": tokens, **more}
                answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=300)
                assert answer.status_code == 200, answer.text
                return [choice["text"] for choice in answer.json()["choices"]]

            greedy = ask(temperature=0)
            sampled = ask(n=3, temperature=0.9, top_p=0.9, logprobs=2)
            return {
                "greedy": greedy,
                "sampled": sampled,
                "syncs": _per_token(lambda n: ask(n, temperature=0)),
            }
