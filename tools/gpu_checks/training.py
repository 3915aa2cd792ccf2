"""Training steps on synthetic tokens: tnnlm, with both convolutions, and GPT-2 of about the same size.

A step is the forward pass under bfloat16 autocast, the backward pass, clipping and fused AdamW.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.timing import clock, random_tokens
from gpu_checks.gpt2 import GPT2
from gpu_checks.rows import Emit, Row
from gpu_checks.shapes import DEMO, MEDIUM, Setting, Shape
from tnnlm.config.optim import OptimConfig
from tnnlm.errors import one_line
from tnnlm.models.causal_lm import CausalLM
from tnnlm.modules import LongConv
from tnnlm.ops import conv_backends
from tnnlm.ops.toeplitz import fft_convolution, fft_length
from tnnlm.training.flops import flops_per_token
from tnnlm.training.memory import RunMemory, estimate_memory
from tnnlm.training.optim import build_optimizer

OURS, COMPILED, STANDARD = "tnnlm", "tnnlm, compiled", "tnnlm, standard FFT operators"
"""Names of the variants."""
STEPS, TINY_STEPS = 100, 4
"""Timed steps, if there is time for them."""
_GROUP, _WARM_UP = 10, 3
"""Steps per timed group, since waiting for the GPU after each would slow them down, and untimed steps."""
_OPTIMIZER_BYTES = 28
"""Bytes per parameter that AdamW reads and writes: 4 numbers in and 3 out, in float32."""
Step = Callable[[], Any]


def demo(setting: Setting, emit: Emit) -> None:
    """Train the model of the demo."""
    _variants(setting.sized(DEMO), (OURS, COMPILED), setting, emit)


def medium(setting: Setting, emit: Emit) -> None:
    """Train the model of 125M parameters with both convolutions."""
    names = (OURS, *convolution_backends(setting.device), STANDARD, COMPILED)
    _variants(setting.sized(MEDIUM), names, setting, emit)


def gpt2(setting: Setting, emit: Emit) -> None:
    """Train GPT-2 of the same width, depth and vocabulary as the model of 125M parameters, compiled."""
    shape = setting.sized(MEDIUM)
    size = shape.model
    with _reported(emit, shape.name, "GPT-2"):
        model = GPT2(size.d_model, size.n_layers, size.vocab_size, size.max_length).to(setting.device)
        flops = model.flops_per_token(size.max_length)
        compiled = setting.device.type == "cuda"
        if compiled:
            for block in model.blocks:
                block.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        step = _step(model, model.loss, optimizer, shape, setting.device)
        name = "GPT-2, compiled, flash attention" if compiled else "GPT-2"
        emit(_measured(step, shape, name, model, flops, setting))


def convolution_backends(device: torch.device) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Return contexts that select a convolution with gradients, by variant, as far as a GPU can run it.

    The result is empty on a CPU.
    """
    if device.type != "cuda":
        return {}
    missing = {"windows": conv_backends.why_no_windows, "cudnn": conv_backends.why_no_cudnn}
    names = ["tiles", *(name for name, why in missing.items() if not why(device))]
    return {f"tnnlm, backend {name}": partial(conv_backends.use_backend, name) for name in names}


def training_step(shape: Shape, device: torch.device, precision: str = "bf16-mixed") -> tuple[CausalLM, Step]:
    """Return an untrained model on a device, and the function that updates it on random tokens.

    Args:
        shape: Model and batch.
        device: Device to train on.
        precision: ``bf16-mixed`` or ``32-true``.
    """
    torch.manual_seed(0)
    model = CausalLM(shape.model).to(device).train()
    optimizer = build_optimizer(model, OptimConfig())
    return model, _step(model, model.loss, optimizer, shape, device, precision == "bf16-mixed")


def release(device: torch.device) -> None:
    """Free the memory of models that are no longer referenced, and start a new measurement of the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _variants(shape: Shape, names: tuple[str, ...], setting: Setting, emit: Emit) -> None:
    usable = [name for name in names if setting.device.type == "cuda" or name != COMPILED]
    own = replace(setting, seconds=setting.seconds / len(usable))
    for name in usable:
        release(setting.device)
        with _reported(emit, shape.name, name):
            emit(_variant(shape, name, own))


def _variant(shape: Shape, name: str, setting: Setting) -> Row:
    memory = estimate_memory(shape.config(setting.device.type, "bf16-mixed"))
    model, step = training_step(shape, setting.device)
    if name == STANDARD:
        for block in model.layers:
            assert isinstance(block.mixer.conv, LongConv)
            block.mixer.conv = _StandardConv(block.mixer.conv.kernel)
    if name == COMPILED:
        model.compile_blocks()
    flops = flops_per_token(shape.model, shape.batch_size)
    with convolution_backends(setting.device).get(name, nullcontext)():
        row = _measured(step, shape, name, model, flops, setting)
    return row | {"bytes_per_second": least_traffic(memory, model.n_params) / row["seconds_per_step"]}


def least_traffic(memory: RunMemory, params: int) -> int:
    """Return bytes that a training step moves at least: saved activations out and in, and the optimizer's."""
    return 2 * (memory.step - memory.state) + _OPTIMIZER_BYTES * params


class _StandardConv(LongConv):
    """Causal convolution by PyTorch's transforms with their autograd, instead of this package's operator."""

    def forward(self, x: Tensor, *features: Tensor) -> Tensor:
        """Return the outputs (B, L, E) for x (B, L, E); see :class:`LongConv`."""
        length = x.shape[1]
        y = fft_convolution(x.permute(2, 0, 1), self.kernel(length, *features), fft_length(2 * length - 1))[0]
        return y.permute(1, 2, 0)


@contextmanager
def _reported(emit: Emit, shape: str, variant: str) -> Iterator[None]:
    """Report the failure of a variant, such as too little memory, as a row: the others are still measured."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        emit({"kind": "training", "shape": shape, "variant": variant, "failed": one_line(error)})


def _step(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    shape: Shape,
    device: torch.device,
    half: bool = True,
) -> Step:
    rows = random_tokens(shape.batch_size, shape.model.max_length + 1, shape.model.vocab_size).to(device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            loss = loss_of(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _measured(step: Step, shape: Shape, name: str, model: nn.Module, flops: float, setting: Setting) -> Row:
    """Time steps until enough are done or the time has passed, but at least one group."""
    ends = time.monotonic() + setting.seconds
    steps, group = (TINY_STEPS, 2) if setting.tiny else (STEPS, _GROUP)
    for _ in range(_WARM_UP):
        step()
    groups: list[float] = []
    while not groups or (len(groups) * group < steps and time.monotonic() < ends):
        groups.append(clock(partial(_repeat, step, group)) / group)
    per_step = statistics.median(groups)
    tokens = shape.batch_size * shape.model.max_length
    return {
        "kind": "training",
        "shape": shape.name,
        "variant": name,
        "params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": len(groups) * group,
        "seconds_per_step": per_step,
        "tokens_per_second": tokens / per_step,
        "flops": flops * tokens / per_step,
    }


def _repeat(step: Step, count: int) -> None:
    for _ in range(count):
        step()
