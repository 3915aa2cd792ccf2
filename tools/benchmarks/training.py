"""Training steps to be timed: ours, ours without its convolution, GPT-2, and a TNN as tnn-pytorch has it.

All have as many parameters and read the same tokens. A step is all of it: forward under bf16 autocast
where the machine computes in it, backward, clipping, AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import gpt2
from tnnlm.config.schema import ModelConfig, OptimConfig
from tnnlm.kernels import Kernel, build_kernel
from tnnlm.machine.capabilities import capability
from tnnlm.models.causal_lm import CausalLM
from tnnlm.modules import SimpleRMSNorm
from tnnlm.training.optim import build_optimizer

OURS, WITHOUT, PYPI, GPT2 = "tnnlm-tno", "tnnlm-without-convolution", "tnn-pytorch", "transformers-gpt2"
NAMES = (OURS, WITHOUT, PYPI, GPT2)


@dataclass
class Trainee:
    """A model with its optimizer."""

    name: str
    params: int
    """trainable; GPT-2's table of positions, which grows with the length, left out"""
    matrix_weights: int
    """of matrix products, the tied head among them: six FLOP each per token, forward and backward"""
    step: Callable[[Tensor], float]
    """reads tokens (B, L + 1), updates the weights, returns the loss"""


def trainee(name: str, shape: ModelConfig, length: int, compiled: bool, recompute: bool = False) -> Trainee:
    """One of ``NAMES``, ready to train on rows of ``length`` tokens.

    Args:
        name: what to build.
        shape: of our model; the others get as many parameters.
        length: tokens per row.
        compiled: by torch.compile: all but tnn-pytorch, whose complex numbers it can't take.
        recompute: activations of ours in the backward pass.

    Raises:
        UserError: if ``transformers`` is missing.
    """
    torch.manual_seed(0)
    shape = replace(shape, max_length=length)
    if name == GPT2:
        other = gpt2(shape, length).train()
        if compiled:
            other.compile()
        optimizer = torch.optim.AdamW(other.parameters(), lr=1e-4, fused=True)
        params = sum(p.numel() for p in other.parameters()) - other.transformer.wpe.weight.numel()
        return Trainee(name, params, _matrices(other), _stepper(other, optimizer, _loss_of_peer))
    model = CausalLM(shape).train()
    model.recompute = recompute
    if name == WITHOUT:
        for block in model.layers:
            block.mixer.conv = _Identity()  # type: ignore[assignment]
    if name == PYPI:
        model.blocks = nn.ModuleList(_PyPIBlock(shape) for _ in range(shape.n_layers))
    elif compiled:
        model.compile_blocks()
    step = _stepper(model, build_optimizer(model, OptimConfig()), CausalLM.loss)
    return Trainee(name, model.n_params, _matrices(model), step)


def _matrices(model: nn.Module) -> int:
    """Weights of matrix products per token: what has two dimensions, but for tables of positions and
    the kernels' own networks, which run once per lag."""
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


def _loss_of_peer(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


class _Identity(nn.Module):
    """In the place of the convolution: what is left is all else."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _PyPIBlock(nn.Module):
    """The operations of a layer of tnn-pytorch, whose packages on PyPI hold no code: a projection for each
    of u and v, transforms of the axis in the middle with autograd's own backward, two norms before
    the mixer."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        width, inner, hidden = shape.d_model, shape.expand * shape.d_model, shape.glu_dim or shape.d_model
        self.kernel = build_kernel(shape.kernel, inner, shape.max_length)
        self.norm = SimpleRMSNorm()
        self.u, self.v, self.out = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        self.gate, self.value = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.mix = nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); no row is padded."""
        silu, length = nn.functional.silu, x.shape[1]
        h = self.norm(self.norm(x))
        u, v = silu(self.u(h)), silu(self.v(h))
        taps = torch.fft.rfft(self.kernel(length).T, 2 * length, dim=0)
        y = torch.fft.irfft(torch.fft.rfft(v.float(), 2 * length, dim=1) * taps, 2 * length, dim=1)
        x = x + self.out(u * y[:, :length])
        h = self.norm(x)
        return x + self.mix(silu(self.gate(h)) * self.value(h))
