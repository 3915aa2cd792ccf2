"""One of several ranks that compare a model gathered in bfloat16 with the unsharded model."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.support.models import tiny_config
from tnnlm.models.causal_lm import CausalLM
from tnnlm.training.fsdp import shard


def compare(rank: int, ranks: int, port: str, recompute: bool) -> None:
    """Assert that losses and gradients are bitwise equal, and that blocks are transferred in bfloat16."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    torch.manual_seed(0)
    whole = CausalLM(tiny_config())
    sharded = copy.deepcopy(whole)
    sharded.recompute = whole.recompute = recompute
    shard(sharded, init_device_mesh("cpu", (ranks,)), rounded=True)
    tokens = torch.randint(whole.config.vocab_size, (2, whole.config.max_length + 1))
    gather, sent = dist.all_gather_into_tensor, []

    def recorded(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(output.dtype)
        return gather(output, *args, **kwargs)

    with patch("torch.distributed.all_gather_into_tensor", recorded):
        losses = []
        for model in (whole, sharded):
            model.train()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(tokens)
            loss.backward()
            losses.append(loss.detach())
        assert torch.equal(*losses)
        blocks = len(whole.layers)
        assert sent.count(torch.bfloat16) == 2 * blocks  # forward and backward pass
        for one, mine in zip(whole.parameters(), sharded.parameters(), strict=True):
            if one.grad is not None:
                assert isinstance(mine.grad, DTensor)
                assert torch.equal(mine.grad.full_tensor(), one.grad)
        sent.clear()
        with torch.no_grad():
            assert torch.equal(whole.eval().loss(tokens), sharded.eval().loss(tokens))
        assert torch.bfloat16 not in sent
    dist.destroy_process_group()
