"""Benchmark of training steps, relative to the FLOP rate of large matrix products on the same machine.

The models are tnnlm, tnnlm without its convolution, GPT-2, and a TNN with the operations of tnn-pytorch, with
about equal parameters and the same tokens; their steps are interleaved. A step consists of the forward pass
(under bfloat16 autocast if the CPU has bfloat16 arithmetic), backward pass, gradient clipping and AdamW.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.ratios import ratio_table
from benchmarks.report import memory_table, table
from benchmarks.subjects import peer_shape
from experiments.peers import GPT2 as GPT2Model
from experiments.timing import clock, interleaved, random_tokens, read_bandwidth, row
from experiments.training import next_token_loss
from tnnlm.config.optim import OptimConfig
from tnnlm.config.schema import ModelConfig
from tnnlm.kernels import Kernel, build_kernel
from tnnlm.machine.allocator import keep_large_blocks
from tnnlm.machine.capabilities import capability, describe_cpu
from tnnlm.machine.resident import resident_peak
from tnnlm.machine.threads import limit_threads
from tnnlm.models.causal_lm import CausalLM
from tnnlm.modules import SimpleRMSNorm
from tnnlm.training.optim import build_optimizer

OURS, WITHOUT, PYPI, GPT2 = "tnnlm-tno", "tnnlm-without-convolution", "tnn-pytorch", "transformers-gpt2"
NAMES = (OURS, WITHOUT, PYPI, GPT2)
TOKENS = 4096
"""Tokens per step; a longer row is a step by itself."""
RECOMPUTED = 32_768
"""Row length in tokens from which activation checkpointing is used."""
LONGEST_PEER = 8192
"""Longest rows, in tokens, on which the baselines are trained; on longer ones only tnnlm is."""
_GEMM = 2048


@dataclass
class Trainee:
    """Model with its optimizer."""

    name: str
    params: int
    """Trainable parameters, without GPT-2's position embeddings, which grow with the length."""
    matrix_weights: int
    """Weights in matrix products, including the tied head: six FLOP each per token, forward and backward."""
    step: Callable[[Tensor], float]
    """Updates the weights on tokens (B, L + 1) and returns the loss."""


def trainee(name: str, shape: ModelConfig, length: int, compiled: bool) -> Trainee:
    """Return a model to train; tnnlm uses activation checkpointing from ``RECOMPUTED`` tokens per row.

    Args:
        name: One of ``NAMES``.
        shape: Configuration of the tnnlm model; the others get as many parameters.
        length: Tokens per row.
        compiled: Whether to use torch.compile; tnn-pytorch always runs eagerly, because of complex numbers.

    Raises:
        UserError: If ``transformers`` is not installed.
    """
    torch.manual_seed(0)
    shape = replace(shape, max_length=length)
    if name == GPT2:
        other = GPT2Model(peer_shape("gpt2", shape, length)).train()
        if compiled:
            other.net.compile()
        optimizer = torch.optim.AdamW(other.parameters(), lr=1e-4, fused=True)
        params = sum(p.numel() for p in other.parameters()) - other.net.transformer.wpe.weight.numel()
        return Trainee(name, params, _matrices(other), _stepper(other, optimizer, next_token_loss))
    model = CausalLM(shape).train()
    model.recompute = length >= RECOMPUTED
    if name == WITHOUT:
        for block in model.layers:
            block.mixer.conv = nn.Identity()  # type: ignore[assignment]
    if name == PYPI:
        model.blocks = nn.ModuleList(_PyPIBlock(shape) for _ in range(shape.n_layers))
    elif compiled:
        model.compile_blocks()
    step = _stepper(model, build_optimizer(model, OptimConfig()), CausalLM.loss)
    return Trainee(name, model.n_params, _matrices(model), step)


def _matrices(model: nn.Module) -> int:
    """Return the number of weights in matrix products per token: parameters with two dimensions, without
    position embeddings and without the networks of kernels, which run once per lag instead of per token."""
    in_kernels = {id(p) for m in model.modules() if isinstance(m, Kernel) for p in m.parameters()}
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() == 2 and id(p) not in in_kernels and "wpe" not in name
    )


def _stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[Any, Tensor], Tensor]
) -> Callable[[Tensor], float]:
    half = capability("bfloat16_arithmetic").available

    def step(rows: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = loss_of(model, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


class _PyPIBlock(nn.Module):
    """Layer with the operations of tnn-pytorch, whose packages on PyPI contain no code.

    Separate projections for u and v, FFTs over the middle axis with the backward pass of autograd, and two
    norms before the mixer.
    """

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        width, inner, hidden = shape.d_model, shape.expand * shape.d_model, shape.glu_dim or shape.d_model
        self.kernel = build_kernel(shape.kernel, inner, shape.max_length)
        self.norm = SimpleRMSNorm()
        self.u, self.v, self.out = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        self.gate, self.value = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.mix = nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        """Return outputs (B, L, D) for inputs (B, L, D) without padding."""
        silu, length = nn.functional.silu, x.shape[1]
        h = self.norm(self.norm(x))
        u, v = silu(self.u(h)), silu(self.v(h))
        taps = torch.fft.rfft(self.kernel(length).T, 2 * length, dim=0)
        y = torch.fft.irfft(torch.fft.rfft(v.float(), 2 * length, dim=1) * taps, 2 * length, dim=1)
        x = x + self.out(u * y[:, :length])
        h = self.norm(x)
        return x + self.mix(silu(self.gate(h)) * self.value(h))


def time_training(
    shape: ModelConfig, lengths: Sequence[int], rounds: int, compiled: bool, longest_peer: int
) -> tuple[float, list[dict[str, Any]]]:
    """Measure training steps of every model on rows of every length.

    Args:
        shape: Configuration of the tnnlm model.
        lengths: Tokens per row; a batch has ``TOKENS`` tokens, or one row if that is longer.
        rounds: Timed steps per model, after warm-up steps; two for rows of ``RECOMPUTED`` tokens or more.
        compiled: Whether to use torch.compile.
        longest_peer: Longest rows in tokens on which the baselines are trained, too.

    Returns:
        The FLOP/s of large matrix products (median), and rows with ``name``, ``dtype``, ``batch``,
        ``context``, ``seconds_per_token``, ``tokens_per_second``, ``spread``, ``params``, ``flop_share``
        (FLOP/s of the model's matrix products over that rate), ``peak_bytes`` of two steps in a separate
        process, and for tnnlm ``convolution_share``, the part of the time that a step without it saves.

    Raises:
        UserError: If ``transformers`` is not installed.
    """
    rates: list[float] = []
    rows: list[dict[str, Any]] = []
    for length in lengths:
        names = NAMES if length <= longest_peer else (OURS,)
        data = random_tokens(max(1, TOKENS // length), length + 1, shape.vocab_size)
        models = {}
        for name in tqdm(names, desc=f"building, {length} tokens", leave=False, disable=None):
            models[name] = trainee(name, shape, length, compiled)
            for _ in range(2 if length < RECOMPUTED else 1):
                models[name].step(data)
        cases = {name: partial(model.step, data) for name, model in models.items()}
        rates.append(_gemm_rate())
        times = interleaved(cases, rounds if length < RECOMPUTED else 2, warm_up=0)
        rates.append(_gemm_rate())
        rows += [_row(model, data, times[name]) for name, model in models.items()]
        if WITHOUT in times:
            ours = next(one for one in rows if (one["name"], one["context"]) == (OURS, length))
            ours["convolution_share"] = 1 - statistics.median(times[WITHOUT]) / statistics.median(times[OURS])
        del models
    rate = statistics.median(rates)
    for result in tqdm(rows, desc="peak memory", leave=False, disable=None):
        result["flop_share"] = result.pop("flops_per_token") * result["tokens_per_second"] / rate
        result["peak_bytes"] = peak_bytes(result["name"], shape, result["context"], compiled)
    return rate, rows


def measure_training(args: argparse.Namespace, shape: ModelConfig) -> dict[str, Any]:
    """Measure training steps on rows of every length."""
    lengths = args.contexts or ((512, 2048) if args.quick else (512, 2048, 8192, 65_536))
    rounds, longest = (3, 2048) if args.quick else (5, LONGEST_PEER)
    rate, rows = time_training(shape, lengths, rounds, not args.quick, longest)
    return {
        "mode": "train",
        "cpu": describe_cpu(),
        "bandwidth_gbs": read_bandwidth(),
        "gemm_flops": rate,
        "results": rows,
    }


def training_table(result: dict[str, Any]) -> str:
    """Return the FLOP rate, the tables of throughput and memory, and ratios."""
    rate = f"{result['gemm_flops'] / 1e9:,.0f} GFLOP/s"
    first = f"tokens per second (share of the FLOP rate); FLOP rate of matrix products: {rate}"
    return "\n\n".join(filter(None, [first, table(result), memory_table(result), ratio_table(result)]))


def peak_bytes(name: str, shape: ModelConfig, length: int, compiled: bool) -> int:
    """Return the peak memory of two training steps in a separate process, without the loaded libraries."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (name, shape, length, compiled))


def _peak(name: str, shape: ModelConfig, length: int, compiled: bool) -> int:
    before = resident_peak()
    keep_large_blocks()
    limit_threads()
    model, data = (
        trainee(name, shape, length, compiled),
        random_tokens(max(1, TOKENS // length), length + 1, shape.vocab_size),
    )
    for _ in range(2):
        model.step(data)
    return resident_peak() - before


def _row(model: Trainee, data: Tensor, seconds: list[float]) -> dict[str, Any]:
    tokens = data[:, 1:].numel()
    dtype = "bfloat16" if capability("bfloat16_arithmetic") else "float32"
    per_token = [one / tokens for one in seconds]
    own = row(model.name, dtype, data.shape[0], data.shape[1] - 1, per_token)
    extra = {"params": model.params, "flops_per_token": 6.0 * model.matrix_weights}
    return own | {"tokens_per_second": 1 / own["seconds_per_token"]} | extra


def _gemm_rate() -> float:
    """Return the FLOP/s of a large matrix product in the training dtype, the best of three."""
    dtype = torch.bfloat16 if capability("bfloat16_arithmetic") else torch.float32
    a, b = (torch.ones(_GEMM, _GEMM, dtype=dtype) for _ in range(2))
    return 2.0 * _GEMM**3 / min(clock(partial(torch.matmul, a, b)) for _ in range(3))
