"""Frequency-domain TNN compared with the TNN: quality, training speed, decay of the kernels, conversion.

FD-TNN (arXiv 2305.09028, "SKI to go faster") computes the real part of a kernel's spectrum by the position
encoder and the imaginary part by a Hilbert transform, without a decay. All models have the same number of
parameters and differ in their kernels only. There are three kinds of cells: models that are trained, scored
and converted; interleaved timing of training steps; and the decay of untrained kernels.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.frame import Experiment, Files, Record, Section
from experiments.sizing import Family, size_of, text_words
from experiments.ski_claims import ACTIVATIONS, SAYS, SKI_TEXTS
from experiments.timing import Run, interleaved
from experiments.training import device_of, held_out_bits, next_token_loss, perplexities, train_family
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.conversion.certify import measure as certificate
from tnnlm.conversion.convert import convert_layers
from tnnlm.data.packing import prepare
from tnnlm.data.tasks import split_rows
from tnnlm.errors import UserError
from tnnlm.kernels import FDTNOConfig, FDTNOKernel, build_kernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach, kernels
from tnnlm.training.estimate import resolve_precision

VARIANTS: dict[str, list[str]] = SKI_TEXTS.named("variants")
"""Settings of the kernels, by name."""
_CHANNELS = 64
"""Channels of the kernels whose decay is measured."""


def config_of(size: str, data: Files = (), words: tuple[str, ...] = ()) -> Config:
    """Return the settings that all models of a size share, with the kernel of the TNN.

    Args:
        size: One of ``SIZES``.
        data: Text files that replace the data set of the experiment.
        words: Further settings, ``key=value``.
    """
    return SKI_TEXTS.config(size, [*text_words(data), *words])


def family_of(variant: str, config: Config) -> Family:
    """Return one of ``VARIANTS``, with the sizes and settings of ``config``, which is changed in place."""
    config.model.kernel = load_config(None, VARIANTS[variant]).model.kernel
    return Family(variant, config, size_of(partial(CausalLM, config.model)))


def _train_grid(size: str) -> list[Record]:
    return [
        {"kind": "train", "size": size, "variant": variant, "seed": seed}
        for seed, variants in enumerate(SKI_TEXTS.sizes(size)["seeds"])
        for variant in (VARIANTS if variants == ["all"] else variants)
    ]


def _train(cell: Record, data: Files) -> Record:
    sizes, config = SKI_TEXTS.sizes(cell["size"]), config_of(cell["size"], data)
    family = family_of(cell["variant"], config)
    corpus = prepare(config.data, config.model.vocab_size, config.seed)
    rows, _ = split_rows(corpus, config)
    model, trained = train_family(family, rows, cell["seed"])
    assert isinstance(model, CausalLM)
    forms, conversions = _forms(model.eval())
    multiples = tuple(sizes["multiples"])
    ends = (multiples[0], multiples[-1])
    _, scored = perplexities(model, forms, corpus, config, sizes["form_tokens"], ends)
    for name in forms:
        gaps = {length: ppl / scored["parallel"][length] - 1 for length, ppl in scored[name].items()}
        conversions[name]["gaps"] = gaps
    with torch.no_grad():
        decays = [tails(kernel(2 * config.model.max_length)) for kernel in kernels(model)]
    return {
        "params": family.params,
        "tokens_per_second": trained["tokens_per_second"],
        "curve": trained["curve"],
        "bits_per_byte": held_out_bits(model, corpus, config, sizes["val_tokens"]),
        "ppl": perplexities(model, {}, corpus, config, sizes["tokens"], multiples)[1]["parallel"],
        "tails": decays,
        "conversions": conversions,
    }


def _forms(model: CausalLM) -> tuple[dict[str, CausalLM], dict[str, Any]]:
    """Return the converted models by method, and order, errors and time of each conversion or its refusal."""
    forms: dict[str, CausalLM] = {}
    conversions: dict[str, Any] = {}
    for name, words in SKI_TEXTS.named("conversions").items():
        started = time.perf_counter()
        try:
            horizon, layers = convert_layers(model, load_config(None, words).conversion)
        except UserError as error:
            conversions[name] = {"refused": str(error)}
            continue
        seconds = time.perf_counter() - started
        report = certificate(model, layers, method=name, horizon=horizon, seconds=seconds)
        conversions[name] = {
            "horizon": horizon,
            "methods": [layer.method for layer in report.layers],
            "orders": [layer.order for layer in report.layers],
            "tap_error": max(layer.relative_tap_error for layer in report.layers),
            "l1_error": max(layer.l1_error for layer in report.layers),
            "state_bytes": report.state_bytes,
            "seconds": seconds,
        }
        forms[name] = attach(model, [layer.params for layer in layers])
    return forms, conversions


def _time_grid(size: str) -> list[Record]:
    return [{"kind": "time", "size": size, "length": n} for n in SKI_TEXTS.sizes(size)["lengths"]]


def _times(cell: Record, data: Files) -> Record:
    """Time forward and backward passes of whole models and of kernels alone, interleaved."""
    sizes, length = SKI_TEXTS.sizes(cell["size"]), cell["length"]
    steps: dict[str, Run] = {}
    taps: dict[str, Run] = {}
    for variant in ("tnn", "fd gelu", "fd relu"):
        config = config_of(cell["size"], words=tuple(sizes["timed"]))
        config.model.max_length, trained = length, config.model.max_length
        family = family_of(variant, config)
        device = device_of(config)
        rows = max(1, config.data.batch_size * trained // length)
        steps[variant] = _step(family.build(0).to(device), config, rows)
        kernel = build_kernel(config.model.kernel, config.model.expand * config.model.d_model, length)
        taps[variant] = _taps(kernel.to(device), length)
    return {
        "tokens": rows * length,
        "step_seconds": interleaved(steps, sizes["turns"]),
        "kernel_seconds": interleaved(taps, sizes["turns"]),
    }


def _step(model: nn.Module, config: Config, rows: int) -> Run:
    device = device_of(config)
    half = resolve_precision(config) == "bf16-mixed"
    tokens = torch.randint(config.model.vocab_size, (rows, config.model.max_length + 1), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = next_token_loss(model, tokens)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def _taps(kernel: nn.Module, length: int) -> Run:
    def run() -> None:
        k = kernel(length)
        k.backward(torch.ones_like(k))
        kernel.zero_grad(set_to_none=True)

    return run


def _decay_grid(size: str) -> list[Record]:
    return [
        {"kind": "decay", "input": given, "norm": norm, "activation": activation}
        | {"grid": SKI_TEXTS.sizes(size)["grid"]}
        for given in ("cosine", "angle")
        for norm in (False, True)
        for activation in ACTIVATIONS
    ]


def _decay(cell: Record, data: Files) -> Record:
    """Measure the decay of an untrained kernel, in float64."""
    torch.manual_seed(0)
    settings = FDTNOConfig(
        name="fd_tno", activation=cell["activation"], rpe_input=cell["input"], rpe_norm=cell["norm"]
    )
    kernel = FDTNOKernel(settings, _CHANNELS, cell["grid"]).double()
    with torch.no_grad():
        return {"tails": tails(kernel(cell["grid"]))}


def tails(k: Tensor) -> dict[str, float]:
    """Return the share of the norm of taps k (E, T) at or after a lag, by lag; lag 0 is excluded."""
    energy = k[:, 1:].double().square().sum(0)
    remaining = energy.flip(0).cumsum(0).flip(0)
    lags = [1 << power for power in range(k.shape[1].bit_length()) if 1 << power < k.shape[1]]
    return {str(lag): float((remaining[lag - 1] / remaining[0]).sqrt()) for lag in lags}


_MEASURED = (
    Section(grid=_train_grid, measure=_train),
    Section(grid=_time_grid, measure=_times),
    Section(grid=_decay_grid, measure=_decay),
)
SKI = Experiment(sections=(*_MEASURED, *SAYS), **SKI_TEXTS.named("experiment"))
