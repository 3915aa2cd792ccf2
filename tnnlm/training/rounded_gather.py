"""Gathers of sharded weights in bfloat16, for blocks whose weights autocast rounds to bfloat16 anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tnnlm.modules import Block


class RoundedAllGather:
    """All-gather for FSDP2 that transfers float32 weights as bfloat16 while the model trains.

    The gathered weights are float32 tensors of rounded values, so that gradients are reduced in float32. In
    evaluation, which runs without autocast, the weights are transferred unrounded.
    """

    def __init__(self, model: nn.Module) -> None:
        """Round while ``model`` is in training mode."""
        self._model = model

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return memory for the shards of all ranks."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gather the shards ``input_tensor`` of all ranks of ``group`` into ``output_tensor``."""
        if not self._model.training or output_tensor.dtype != torch.float32:
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
        gathered = torch.empty_like(output_tensor, dtype=torch.bfloat16)
        dist.all_gather_into_tensor(gathered, input_tensor.to(torch.bfloat16), group=group)
        output_tensor.copy_(gathered)
        return None


def only_linear(block: Block) -> bool:
    """Return whether all parameters of a block outside its long convolution belong to linear layers.

    Autocast rounds these to bfloat16 in every product, so that rounding them before changes no result. It
    does not round those of a LayerNorm or a short convolution.
    """
    inside = set(block.mixer.conv.modules())
    return all(
        isinstance(module, nn.Linear) or module in inside
        for module in block.modules()
        if list(module.parameters(recurse=False))
    )
