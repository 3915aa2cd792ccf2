"""What is measured on a trained family: bits per byte, perplexity against length, cost of a token."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.family_peers import Peer
from tnnlm.config.schema import Config, ConversionConfig
from tnnlm.conversion.convert import convert_layers
from tnnlm.data.packing import PackedCorpus, PackedRows
from tnnlm.errors import DataError, UserError
from tnnlm.evaluation import NLL, add, bits_per_byte, parallel_nll, recurrent_nll
from tnnlm.models.causal_lm import CausalLM, ModelState
from tnnlm.models.causal_lm import state_bytes as model_state_bytes
from tnnlm.models.surgery import attach

_PASS_TOKENS = 1 << 13
"""tokens in one pass of a model"""
_PREFILL = 512
_WARM_UP = 2
_SETTLE = 16
"""steps until a form's weights and state are all back in the caches after another's turn"""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    val_tokens: int = 1 << 18
    """held-out tokens that bits per byte are taken over"""
    tokens: int = 1 << 16
    """held-out tokens of the perplexities, the same at every length"""
    multiples: tuple[int, ...] = (1, 2, 4, 8)
    """lengths, in training lengths"""
    contexts: tuple[int, ...] = (512, 8192)
    """tokens that are read before a token is timed"""
    turns: int = 10
    """of every family at every context"""
    steps: int = 4
    """timed tokens per turn"""


class Form(NamedTuple):
    """A model that decodes, and what is known of it."""

    model: Any
    """``CausalLM`` or ``Peer``: ``init_state``, ``prefill``, ``step``"""
    about: dict[str, Any]


def held_out_bits(model: nn.Module, corpus: PackedCorpus, config: Config, sizes: Sizes) -> float:
    """Bits per byte of the parallel form at the training length."""
    rows = corpus.rows("val", config.model.max_length, config.data.max_val_tokens)
    nll = score(model.eval(), spread(rows, sizes.val_tokens), None)
    return bits_per_byte(nll.mean, corpus.val.bytes_per_token)


def spread(rows: PackedRows, tokens: int) -> Tensor:
    """Evenly spaced rows of about ``tokens`` together, one at the least: (B, L + 1)."""
    n = min(len(rows), max(1, tokens // rows.length))
    return torch.stack([rows[int(i)] for i in torch.linspace(0, len(rows) - 1, n).round().long()])


def forms_of(model: nn.Module, recipe: ConversionConfig) -> tuple[list[Form], list[str]]:
    """A trained model's recurrent forms, the one to decode with last, and why others are missing.

    A ``CausalLM`` is converted by its family's own settings, then by ``auto``.
    """
    if isinstance(model, Peer):
        return [Form(model.eval(), {"form": "KV cache", "methods": [], "orders": []})], []
    assert isinstance(model, CausalLM)
    forms, failed = [], []
    auto = dataclasses.replace(recipe, method="auto")
    for settings in (auto,) if recipe == auto else (recipe, auto):
        started = time.perf_counter()
        try:
            horizon, layers = convert_layers(model.eval(), settings)
        except UserError as error:
            failed.append(f"{settings.method}: {error}")
            continue
        about = {
            "form": settings.method,
            "methods": [layer.method for layer in layers],
            "orders": [layer.params.order() for layer in layers],
            "reasons": [layer.reason for layer in layers],
            "horizon": horizon,
            "seconds": time.perf_counter() - started,
        }
        forms.append(Form(attach(model, [layer.params for layer in layers]), about))
    return forms, failed


def perplexities(
    model: nn.Module, forms: list[Form], corpus: PackedCorpus, config: Config, sizes: Sizes
) -> dict[str, Any]:
    """Perplexity of all forms on the same held-out tokens, read in rows of every length.

    Returns:
        ``tokens`` scored; ``parallel``: length -> perplexity; ``forms``: what is known of each, and ``ppl``.

    Raises:
        DataError: if the held-out text doesn't fill a row of the training length.
    """
    trained = config.model.max_length
    multiples = [m for m in sizes.multiples if len(corpus.rows("val", m * trained))]
    if not multiples:
        raise DataError(f"the held-out text doesn't fill one row of {trained} tokens: give more of it")
    spans = spread(corpus.rows("val", max(multiples) * trained), sizes.tokens)
    rows = {m * trained: spans.unfold(1, m * trained + 1, m * trained).flatten(0, 1) for m in multiples}
    chunk = config.conversion.chunk
    return {
        "tokens": spans[:, 1:].numel(),
        "parallel": {str(length): score(model.eval(), part, None).ppl for length, part in rows.items()},
        "forms": [
            form.about
            | {"ppl": {str(length): score(form.model, part, chunk).ppl for length, part in rows.items()}}
            for form in forms
        ],
    }


def score(model: Any, rows: Tensor, chunk: int | None) -> NLL:
    """Score rows (B, L + 1), some at a time: in parallel, or recurrently in chunks of so many tokens."""
    device = next(model.parameters()).device
    parts = []
    for part in rows.to(device).split(max(1, _PASS_TOKENS // (rows.shape[1] - 1))):
        parts.append(parallel_nll(model, part) if chunk is None else recurrent_nll(model, part, chunk))
    return add(parts)


@torch.inference_mode()
def decoding(forms: Mapping[str, Form], tokens: Tensor, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Seconds per token and bytes of state of every form after every context.

    Families and contexts take turns, so that what else the machine does hits all alike.

    Args:
        forms: by family.
        tokens: (N,) to read, as many as the longest context and a token more.
        sizes: contexts, turns and steps.

    Returns:
        family -> context -> ``seconds_per_token`` (median), ``quartiles``, ``state_bytes``.
    """
    cases: dict[tuple[str, int], Callable[[], float]] = {}
    result: dict[str, dict[str, Any]] = {name: {} for name in forms}
    for name, form in tqdm(forms.items(), desc="reading contexts", disable=None):
        for context in sizes.contexts:
            state = _read(form.model, tokens[:context])
            result[name][str(context)] = {"state_bytes": state_bytes(state)}
            cases[name, context] = _stepper(form.model, state, tokens[context : context + 1])
    times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for turn in tqdm(range(_WARM_UP + sizes.turns), desc="decoding, turns", disable=None):
        for case, step in cases.items():
            for _ in range(_SETTLE):
                step()
            seconds = [step() for _ in range(sizes.steps)]
            times[case] += seconds if turn >= _WARM_UP else []
    for (name, context), values in times.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        result[name][str(context)] |= {"seconds_per_token": median, "quartiles": [low, high]}
    return result


def state_bytes(state: Any) -> int:
    """Bytes of all tensors of a state, which may be a Transformer's cache."""
    if isinstance(state, ModelState):
        return model_state_bytes(state)
    tensors = [part for layer in state.layers for part in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _read(model: Any, tokens: Tensor) -> Any:
    device = next(model.parameters()).device
    state = model.init_state(1)
    for chunk in tokens[None].to(device).split(_PREFILL, dim=1):
        _, state = model.prefill(chunk, state, keep=1)
    return state


def _stepper(model: Any, state: Any, token: Tensor) -> Callable[[], float]:
    """A function that reads one token after the same context each time, and returns its seconds."""
    device = next(model.parameters()).device
    token = token.to(device)

    def step() -> float:
        _wait(device)
        started = time.perf_counter()
        model.step(token, state)[0].argmax(-1)
        _wait(device)
        seconds = time.perf_counter() - started
        if isinstance(model, Peer):
            state.crop(-1)  # its cache grew in place
        return seconds

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
