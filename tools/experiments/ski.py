"""The frequency-domain TNN beside the TNN: quality, speed, decay of the kernels, and what converts best.

FD-TNN (arXiv 2305.09028, "SKI to go faster") takes the real part of a kernel's spectrum from the position
encoder and the imaginary part from a Hilbert transform, and no decay. All models here have the same number
of parameters: only the kernels differ. Three kinds of cell: the decay of untrained kernels, the time of a
training step with models taking turns, and models trained, scored and converted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments import ski_plot, ski_report, ski_tables
from experiments.experiment import Experiment, Row, Verdict
from experiments.family_measure import Form, Sizes, held_out_bits, perplexities
from experiments.ski_scale import ACTIVATIONS, SCALES, config_of, family_of
from experiments.training import device_of, train_family
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.conversion.certify import measure as certificate
from tnnlm.conversion.convert import convert_layers
from tnnlm.data.packing import prepare
from tnnlm.data.tasks import open_rows
from tnnlm.errors import UserError
from tnnlm.kernels import FDTNOConfig, FDTNOKernel, build_kernel
from tnnlm.models.causal_lm import CausalLM
from tnnlm.models.surgery import attach, kernels
from tnnlm.training.estimate import resolve_precision

CONVERSIONS: dict[str, Row] = {
    "balanced 1e-2": {"method": "balanced", "tolerance": 1e-2},
    "balanced 1e-3": {"method": "balanced", "tolerance": 1e-3},
    "etsc": {"method": "etsc"},
    "window": {"method": "window"},
    "auto 1e-3": {"method": "auto", "tolerance": 1e-3},
}
_CHANNELS = 64
"""of the kernels whose decay is looked at"""


class Ski(Experiment):
    """TNN and FD-TNN of equal parameters."""

    name = "ski"
    title = "The frequency-domain TNN beside the TNN"
    seeds = (0, 1)

    def cells(self, size: str) -> list[Row]:
        """Decay of every kernel, a timed step at every length, a training of every model on every seed."""
        scale = SCALES[size]
        decays = [
            {"kind": "decay", "input": given, "norm": norm, "activation": activation, "grid": scale.grid}
            for given in ("cosine", "angle")
            for norm in (False, True)
            for activation in ACTIVATIONS
        ]
        times = [{"kind": "time", "size": size, "length": length} for length in scale.lengths]
        trains = [
            {"kind": "train", "size": size, "variant": variant, "seed": seed}
            for seed, variants in scale.seeds.items()
            for variant in variants
        ]
        return decays + times + trains

    def measure(self, cell: Row) -> Row:
        """One kernel's decay, one length's times, or one model."""
        if cell["kind"] == "train":
            return _train(cell, self.data)
        return _decay(cell) if cell["kind"] == "decay" else _times(cell)

    def verdicts(self, rows: list[Row]) -> list[Verdict]:
        """See :mod:`experiments.ski_report`."""
        return ski_report.verdicts(rows)

    def tables(self, rows: list[Row]) -> str:
        """See :mod:`experiments.ski_tables`."""
        return ski_tables.tables(rows)

    def plot(self, rows: list[Row], path: Path) -> None:
        """See :mod:`experiments.ski_plot`."""
        ski_plot.plot(rows, path)


def _decay(cell: Row) -> Row:
    """Of an untrained kernel, in float64: share of its norm left past every power of two, lag 0 left out."""
    torch.manual_seed(0)
    settings = FDTNOConfig(
        name="fd_tno", activation=cell["activation"], rpe_input=cell["input"], rpe_norm=cell["norm"]
    )
    kernel = FDTNOKernel(settings, _CHANNELS, cell["grid"]).double()
    with torch.no_grad():
        return {"tails": tails(kernel(cell["grid"]))}


def tails(k: Tensor) -> dict[str, float]:
    """Lag -> share of the norm of taps k (E, T) at lags from it on; lag 0, which is no memory, left out."""
    energy = k[:, 1:].double().square().sum(0)
    remaining = energy.flip(0).cumsum(0).flip(0)
    lags = [1 << power for power in range(k.shape[1].bit_length()) if 1 << power < k.shape[1]]
    return {str(lag): float((remaining[lag - 1] / remaining[0]).sqrt()) for lag in lags}


def _times(cell: Row) -> Row:
    """Median seconds of forward and backward of whole models, and of a kernel alone, taking turns."""
    turns, length = SCALES[cell["size"]].turns, cell["length"]
    steps: dict[str, Callable[[], None]] = {}
    taps: dict[str, Callable[[], None]] = {}
    for variant in ("tnn", "fd gelu", "fd relu"):
        scale = SCALES[cell["size"]]
        config = config_of(cell["size"], words=scale.timed)
        config.model.max_length, trained = length, config.model.max_length
        family = family_of(variant, config)
        device = device_of(config)
        rows = max(1, config.data.batch_size * trained // length)
        steps[variant] = _step(family.build(0).to(device), config, rows)
        kernel = build_kernel(config.model.kernel, config.model.expand * config.model.d_model, length)
        taps[variant] = _taps(kernel.to(device), length)
    return {
        "tokens": rows * length,
        "step_seconds": interleaved(steps, turns, device),
        "kernel_seconds": interleaved(taps, turns, device),
    }


def interleaved(
    cases: dict[str, Callable[[], None]], turns: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every case in every turn, after one turn to warm up: all cases in each turn, so that what
    else the machine does hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(turns + 1):
        for name, case in cases.items():
            _wait(device)
            started = time.perf_counter()
            case()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _step(model: nn.Module, config: Config, rows: int) -> Callable[[], None]:
    device = device_of(config)
    half = resolve_precision(config) == "bf16-mixed"
    tokens = torch.randint(config.model.vocab_size, (rows, config.model.max_length + 1), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    return step


def _taps(kernel: nn.Module, length: int) -> Callable[[], None]:
    def run() -> None:
        k = kernel(length)
        k.backward(torch.ones_like(k))
        kernel.zero_grad(set_to_none=True)

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _train(cell: Row, data: tuple[str, ...]) -> Row:
    scale, config = SCALES[cell["size"]], config_of(cell["size"], data)
    family = family_of(cell["variant"], config)
    corpus = prepare(config.data, config.model.vocab_size, config.seed)
    rows, _ = open_rows(corpus, config)
    model, trained = train_family(family, rows, cell["seed"])
    assert isinstance(model, CausalLM)
    forms, conversions = _forms(model.eval())
    shared = Sizes(tokens=scale.form_tokens, multiples=(1, max(scale.sizes.multiples)))
    scored = perplexities(model, forms, corpus, config, shared)
    for form in scored["forms"]:
        gaps = {length: ppl / scored["parallel"][length] - 1 for length, ppl in form["ppl"].items()}
        conversions[form["form"]]["gaps"] = gaps
    lags = 2 * config.model.max_length
    with torch.no_grad():
        decays = [tails(kernel(lags)) for kernel in kernels(model)]
    return {
        "params": family.params,
        "tokens_per_second": trained["tokens_per_second"],
        "curve": trained["curve"],
        "bits_per_byte": held_out_bits(model, corpus, config, scale.sizes),
        "ppl": perplexities(model, [], corpus, config, scale.sizes)["parallel"],
        "tails": decays,
        "conversions": conversions,
    }


def _forms(model: CausalLM) -> tuple[list[Form], dict[str, Any]]:
    """The model converted in every way, and what each way cost; refusals stand in their place."""
    forms: list[Form] = []
    conversions: dict[str, Any] = {}
    for name, settings in CONVERSIONS.items():
        started = time.perf_counter()
        try:
            horizon, layers = convert_layers(model, load_config(None, _words(settings)).conversion)
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
        forms.append(Form(attach(model, [layer.params for layer in layers]), {"form": name}))
    return forms, conversions


def _words(settings: Row) -> list[str]:
    return [f"conversion.{key}={value}" for key, value in settings.items()]
