"""Sharded data parallelism: torch's ``fully_shard`` (FSDP2, HSDP) under Lightning's ModelParallelStrategy.

Parameters are gathered where they are needed unsharded: those of the kernels for conversion, all of them to
generate a sample. Call every function except ``choose_strategy`` and ``gradient_sync`` on all ranks, because
it may communicate.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from tnnlm.config.schema import Config
from tnnlm.errors import ConfigError
from tnnlm.kernels import Kernel, TwoSidedKernel
from tnnlm.models.backbone import Backbone
from tnnlm.models.causal_lm import CausalLM
from tnnlm.modules import RecurrentConv
from tnnlm.training.estimate import SHARDING, resolve_devices, resolve_precision, resolve_shard_size
from tnnlm.training.rounded_gather import RoundedAllGather, only_linear
from tnnlm.training.sharded_strategy import ShardedStrategy


def choose_strategy(config: Config) -> str | Strategy:
    """Return the Lightning strategy for ``trainer.strategy``.

    ``fsdp`` and ``hsdp`` select FSDP2 through ModelParallelStrategy; other names are passed to Lightning
    unchanged.

    Raises:
        ConfigError: If FSDP does not support ``trainer.precision``, or ``trainer.shard_size`` doesn't divide
            the number of devices.
    """
    strategy = config.trainer.strategy
    if strategy not in SHARDING:
        return strategy
    precision = resolve_precision(config)
    if precision not in ("32-true", "bf16-mixed"):
        # bf16-true keeps kernels in float32 next to bfloat16 projections, but FSDP2 gathers a block as one
        # buffer of one dtype. Lightning rejects the other two precisions.
        raise ConfigError(
            f"trainer.precision={precision}: not supported by trainer.strategy={strategy}",
            "use trainer.precision=bf16-mixed or 32-true, or trainer.strategy=ddp",
        )
    devices = resolve_devices(config) * config.trainer.num_nodes
    sharded = config.checkpoint.format == "sharded"
    return ShardedStrategy(devices, resolve_shard_size(config), sharded_checkpoints=sharded)


def parameter_mesh(strategy: ModelParallelStrategy) -> DeviceMesh:
    """Return the mesh over which a strategy shards parameters; call it on all ranks."""
    if isinstance(strategy, ShardedStrategy):
        return strategy.parameter_mesh()
    return strategy.device_mesh["data_parallel"]


def shard(model: Backbone, mesh: DeviceMesh, *, rounded: bool = False) -> None:
    """Shard every block and the embedding over ``mesh``, in place; parameter names do not change.

    On a mesh of two dimensions, the shards of the second are replicated over the first (HSDP, arXiv
    2304.11277, section 3.2.2).

    A block is gathered for its forward and backward pass and resharded afterwards. Kernels are sharded too,
    because gradient clipping would otherwise need a norm over sharded and unsharded gradients. There is no
    mixed-precision policy: gathered weights are float32 and autocast rounds them as on one device, so kernels
    and both validation perplexities equal those of one device.

    Args:
        model: Model to shard.
        mesh: Mesh of one or two dimensions.
        rounded: Whether autocast rounds the weights of linear layers to bfloat16. They are then transferred
            in bfloat16 during training, and the kernel of a block, which must stay exact, is a separate unit.
    """
    placement = partial(shard_dimension, ranks=mesh.shape[-1])
    for block in model.layers:
        # PyTorch 2.8 can't replace the all-gather.
        replaced = rounded and only_linear(block) and hasattr(FSDPModule, "set_custom_all_gather")
        if replaced:
            fully_shard(block.mixer.conv, mesh=mesh, shard_placement_fn=placement)
        fully_shard(block, mesh=mesh, shard_placement_fn=placement)
        if replaced:
            assert isinstance(block, FSDPModule)
            block.set_custom_all_gather(RoundedAllGather(model))  # type: ignore[arg-type]  # private base
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    for module in (model, *model.layers) if isinstance(model, CausalLM) else ():
        # Recurrent validation calls prefill, which needs gathered weights just as forward does.
        register_fsdp_forward_method(module, "prefill")
    register_fsdp_forward_method(model, "loss")


def shard_dimension(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Return the dimension to shard; None is the first, which FSDP2 pads to a multiple of ``ranks``.

    A short first dimension, such as the scales of an SGConv kernel, would leave most ranks with padding.
    FSDP2 shards other dimensions only evenly.
    """
    if parameter.shape[0] % ranks == 0:
        return None
    even = [dim for dim, size in enumerate(parameter.shape) if size % ranks == 0]
    return Shard(max(even, key=lambda dim: parameter.shape[dim])) if even else None


def is_sharded(model: nn.Module) -> bool:
    """Return whether ``shard`` was applied to ``model``."""
    return isinstance(model, FSDPModule)


def gradient_sync(model: nn.Module, sync: bool) -> None:
    """Set whether the next backward pass of a sharded model reduces gradients across ranks.

    Between micro-batches Lightning skips the reduction for DDP, but not for ModelParallelStrategy. Gradients
    that are not reduced yet are unsharded: 4 bytes per parameter on every device.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


def gather_kernels(model: Backbone) -> list[Kernel | TwoSidedKernel]:
    """Return the kernel of every layer with unsharded parameters.

    Without sharding these are the model's kernels themselves, otherwise gathered copies on every rank. If the
    model is sharded this communicates: call it on all ranks, where no rank may fail or skip the call.
    """
    convs = [block.mixer.conv for block in model.layers]
    found = [conv.kernel for conv in convs if not isinstance(conv, RecurrentConv)]
    return [_gathered(kernel) for kernel in found] if is_sharded(model) else found


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Keep all weights gathered on every rank inside a ``with`` block.

    The model does not communicate inside the block, so a single rank may run it. Every device needs memory
    for the unsharded model.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            # FSDP2 keeps the root unit, which holds the embedding, gathered between forward and backward.
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def renumber_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, module: nn.Module
) -> None:
    """Renumber the parameters in an optimizer's state dict to the order of ``module.parameters()``, in place.

    torch numbers parameters group by group; ModelParallelStrategy numbers them in module order, both when it
    saves and when it loads. An unsharded optimizer loads by position within a group and ignores the numbers.
    With numbers in module order, every strategy can therefore load the checkpoints of every other.

    Args:
        state: State dict of ``optimizer``.
        optimizer: Optimizer over parameters of ``module``.
        module: The LightningModule.
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
    # deepcopy takes parameters from the memo, so the copy gets the unsharded ones.
    memo: dict[int, Any] = {}
    for parameter in kernel.parameters():
        tensor = parameter.detach()
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        memo[id(parameter)] = nn.Parameter(full, requires_grad=False)
    return copy.deepcopy(kernel, memo)
