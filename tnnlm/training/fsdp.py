"""Parameters sharded over ranks: torch's ``fully_shard`` under Lightning's ModelParallelStrategy.

What is sharded, and what is gathered where the whole is needed: kernels to convert them, all weights to
write a sample. Everything here but ``choose_strategy`` and ``gradient_sync`` may communicate: call it on
all ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from tnnlm.config.schema import Config
from tnnlm.errors import ConfigError
from tnnlm.kernels import Kernel, TwoSidedKernel
from tnnlm.models.backbone import Backbone
from tnnlm.models.causal_lm import CausalLM
from tnnlm.modules import RecurrentConv
from tnnlm.training.estimate import FSDP, resolve_devices, resolve_precision


def choose_strategy(config: Config) -> str | Strategy:
    """What ``trainer.strategy`` means to Lightning: ``fsdp`` is FSDP2, all else its own names.

    Raises:
        ConfigError: for a precision that can't be sharded.
    """
    if config.trainer.strategy != FSDP:
        return config.trainer.strategy
    precision = resolve_precision(config)
    if precision not in ("32-true", "bf16-mixed"):
        # bf16-true keeps kernels in float32 beside bfloat16 projections: a block is gathered in one piece,
        # of one dtype. The other two Lightning refuses.
        raise ConfigError(
            f"trainer.precision={precision}: trainer.strategy=fsdp runs in bf16-mixed or 32-true",
            "choose one of them, or trainer.strategy=ddp",
        )
    return ModelParallelStrategy(
        data_parallel_size=resolve_devices(config) * config.trainer.num_nodes,
        tensor_parallel_size=1,
        # One file of whole tensors, so that convert.py and any number of ranks can read it.
        save_distributed_checkpoint=False,
    )


def shard(model: Backbone, mesh: DeviceMesh) -> None:
    """Shard every block, and the embedding, over ``mesh``; in place, names stay the same.

    A block is gathered for its own forward and backward and freed again. Kernels are sharded with
    their block, like all else: left whole, their gradients would need a reduction of their own, and
    clipping a norm over sharded and whole gradients together. No precision policy: weights are gathered
    in float32 and autocast rounds where it does on one device, so that kernels, and both perplexities
    of a validation, are those of one device.
    """
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in (model, *model.layers) if isinstance(model, CausalLM) else ():
        # Recurrent validation enters here, and must find the weights gathered as forward does.
        register_fsdp_forward_method(module, "prefill")
    register_fsdp_forward_method(model, "loss")


def is_sharded(model: nn.Module) -> bool:
    """Whether ``shard`` was called on it."""
    return isinstance(model, FSDPModule)


def gradient_sync(model: nn.Module, sync: bool) -> None:
    """Whether the next backward reduces gradients over ranks, where the model is sharded.

    Lightning leaves it out for DDP between micro-batches, but not under ModelParallelStrategy.
    Gradients that wait are whole: 4 bytes per parameter on every device.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


def gather_kernels(model: Backbone) -> list[Kernel | TwoSidedKernel]:
    """The kernel of every layer with whole parameters: the model's own, or gathered copies on every rank.

    Communicates if the model is sharded: call it on all ranks, outside of anything that may fail
    or be skipped on one of them.
    """
    convs = [block.mixer.conv for block in model.layers]
    found = [conv.kernel for conv in convs if not isinstance(conv, RecurrentConv)]
    return [_gathered(kernel) for kernel in found] if is_sharded(model) else found


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Keep all weights gathered on every rank for the length of a block, in which nothing communicates:
    one rank may run the model alone. Takes the memory of a whole model on every device."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            # The outermost unit, the embedding, is kept between forward and backward.
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def renumber_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, module: nn.Module
) -> None:
    """Number an optimizer's saved parameters in the order of ``module.parameters()``, in place.

    torch counts them group by group, ModelParallelStrategy as the module has them, when it writes and
    when it reads. An optimizer that is not sharded goes by the position in the group, whatever
    the number: so each strategy reads the checkpoints of every other.

    Args:
        state: of ``optimizer``, from its ``state_dict()``.
        optimizer: over parameters of ``module``.
        module: the LightningModule.
    """
    place = {id(parameter): index for index, parameter in enumerate(module.parameters())}
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    number = {
        old: place[id(parameter)]
        for saved, group in groups
        for old, parameter in zip(saved["params"], group["params"], strict=True)
    }
    state["state"] = {number[old]: moments for old, moments in state["state"].items()}
    for saved in state["param_groups"]:
        saved["params"] = [number[old] for old in saved["params"]]


def _gathered(kernel: Kernel | TwoSidedKernel) -> Kernel | TwoSidedKernel:
    # Copying a module copies its parameters, unless the memo has them: whole, instead of sharded.
    memo: dict[int, Any] = {}
    for parameter in kernel.parameters():
        tensor = parameter.detach()
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        memo[id(parameter)] = nn.Parameter(full, requires_grad=False)
    return copy.deepcopy(kernel, memo)
