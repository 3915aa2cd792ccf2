"""Tables of the shipped configurations: sizes, and the speed that products and memory traffic allow."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from benchmarks.bytes_moved import ByteCounter
from experiments.report import table
from tnnlm.config.loader import load_config
from tnnlm.config.schema import Config
from tnnlm.config.shipped import find_config
from tnnlm.models.factory import build_model
from tnnlm.training.estimate import estimate_run, guessed_share
from tnnlm.training.flops import flops_per_token
from tnnlm.training.memory import autocast_of, estimate_memory, fake_batch, on_path_of
from tnnlm.training.optim import build_optimizer


class Card(NamedTuple):
    """GPU, with the rates of its data sheet."""

    name: str
    bf16: float
    """Dense matrix products in bfloat16, in FLOP/s."""
    float32: float
    """Matrix products in float32, without TF32, in FLOP/s."""
    bandwidth: float
    """Bandwidth of the memory, in bytes/s."""
    price: float
    """Assumed price in dollars per hour."""


CARDS = (
    Card("A100 80 GB", 312e12, 19.5e12, 2.039e12, 1.5),
    Card("H100 80 GB", 989e12, 67e12, 3.35e12, 2.5),
)


def bytes_per_token(config: Config) -> float:
    """Return the bytes per token that the operators of an optimizer step on a GPU read and write.

    The step runs over tensors without values, in models of one layer and of two. Bytes are affine in the
    number of layers; blocks are not compiled.
    """
    batch, optimizer = zip(*(step_bytes(config, layers) for layers in (1, 2)), strict=True)
    more, accumulate = config.model.n_layers - 1, config.trainer.accumulate
    whole = [one + more * (two - one) for one, two in (batch, optimizer)]
    return (whole[0] + whole[1] / accumulate) / (config.data.batch_size * config.model.max_length)


def step_bytes(config: Config, layers: int) -> tuple[int, int]:
    """Return the bytes moved by a micro-batch, forward and backward, and by the optimizer."""
    given = copy.deepcopy(config)
    given.model.n_layers = layers
    precision = "bf16-mixed" if given.trainer.precision == "auto" else given.trainer.precision
    with on_path_of("cuda"), FakeTensorMode():
        model = build_model(given)
        model.recompute = given.trainer.recompute
        optimizer = build_optimizer(model, given.optim, fused=True)
        batch = fake_batch(given)
        with ByteCounter(distinct=False) as counter:
            with autocast_of(precision):
                loss = model.loss(batch)
            loss.backward()
            read = counter.total
            parameters = [p for p in model.parameters() if p.grad is not None]
            norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
            clip_grads_with_norm_(parameters, given.optim.grad_clip or 1.0, norm)
            optimizer.step()
    return read, counter.total - read


def speed_table(*configs: str) -> str:
    """Return the largest speed and least cost of shipped configurations as a table, two rows each."""
    rows = []
    for name in configs:
        config = _on_gpu(name)
        flops = _flops(config)
        moved, plan = bytes_per_token(config), estimate_run(config)
        single = config.trainer.precision == "32-true"
        for card in CARDS:
            products, memory = (card.float32 if single else card.bf16) / flops, card.bandwidth / moved
            hours = plan.total_tokens / min(products, memory) / 3600
            rows.append(
                {
                    "config": f"`{name}`",
                    "GPU": card.name,
                    "MB per token": f"{moved / 1e6:.1f}",
                    "tokens/s, products": f"{products:,.0f}",
                    "tokens/s, memory": f"{memory:,.0f}",
                    "wall-clock hours": f"{hours / plan.devices:.1f}",
                    "GPU hours": f"{hours:.1f}",
                    "dollars": f"{hours * card.price:,.0f}",
                }
            )
    return table(rows)


def configurations_table(*configs: str) -> str:
    """Return the sizes of shipped configurations as a table, with the estimated memory per GPU."""
    rows = []
    for name in configs:
        config = _on_gpu(name)
        plan = estimate_run(config)
        rows.append(
            {
                "config": f"`{name}`",
                "parameters": f"{plan.params:,}",
                "tokens per update": f"{plan.tokens_per_update:,}",
                "updates": f"{config.trainer.max_steps:,}",
                "tokens": f"{plan.total_tokens:,}",
                "GPUs": str(plan.devices),
                "memory per GPU, GiB": f"{estimate_memory(config).peak / 2**30:.1f}",
                "GFLOP per token": f"{_flops(config) / 1e9:.3f}",
            }
        )
    return table(rows)


def _on_gpu(name: str) -> Config:
    return load_config(find_config(name), ["trainer.accelerator=cuda"])


def _flops(config: Config) -> float:
    """Return the FLOPs per token that the log of a run reports."""
    return flops_per_token(config.model, config.data.batch_size, guessed_share(config))
