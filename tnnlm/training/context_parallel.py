"""Context parallelism: the processes of a context group share the sequences of a batch.

Consecutive ranks form a group. All of them read the same rows of token ids, which are small, and each runs
the model on its shard of the tokens; only the convolutions communicate. The loss of a rank is the mean over
its shard, so that DDP's average of the gradients over all ranks is the gradient of the global mean.
"""

from __future__ import annotations

import lightning
import torch.distributed as dist
from torch import Tensor

from tnnlm.config.schema import Config
from tnnlm.errors import ConfigError
from tnnlm.models.backbone import Backbone
from tnnlm.modules import ContextConv, LongConv
from tnnlm.ops.context import ContextGroup
from tnnlm.training.batches import own_data


def join_group(trainer: lightning.Trainer, config: Config) -> ContextGroup:
    """Return the context group of this rank; all ranks must call it.

    Raises:
        ConfigError: If the ranks can't be divided into groups, or the batches are not those of
            ``TextDataModule``, which gives all ranks of a group the same rows.
    """
    size = config.trainer.context_parallel
    if size == 1:
        return ContextGroup()
    if own_data(trainer) is None:
        raise ConfigError(
            f"trainer.context_parallel={size}: the ranks of a group need the same rows",
            "train with tnnlm.TextDataModule, or set trainer.context_parallel=1",
        )
    ranks = trainer.world_size
    if ranks % size:
        raise ConfigError(f"trainer.context_parallel={size}: must divide the number of ranks, {ranks}")
    # Every rank takes part in the creation of every group.
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
    return ContextGroup(trainer.global_rank % size, size, groups[trainer.global_rank // size])


def split_convolutions(model: Backbone, group: ContextGroup) -> None:
    """Make ``model`` process shards of sequences, in place; parameter names do not change."""
    for block in model.layers:
        conv = block.mixer.conv
        if group.size > 1 and type(conv) is LongConv:
            block.mixer.conv = ContextConv(conv.kernel, group)


def own_tokens(rows: Tensor, group: ContextGroup) -> Tensor:
    """Return this rank's shard of rows of token ids (B, L + 1), as rows (B, L / C + 1).

    The target of a shard's last token is the first input of the next shard, so that shards overlap in one
    token.
    """
    length = (rows.shape[1] - 1) // group.size
    return rows[:, group.rank * length : (group.rank + 1) * length + 1]


def own_rows(rows: Tensor, counted: int | None, group: ContextGroup) -> tuple[Tensor, int]:
    """Return this rank's share of whole rows (B, L + 1), for what can't be split along the sequence.

    Args:
        rows: Rows that all ranks of the group hold.
        counted: Number of leading rows to count; None for all.
        group: Context group.

    Returns:
        Every C-th row from this rank's number on, and how many of them are counted.
    """
    total = len(rows) if counted is None else counted
    return rows[group.rank :: group.size], len(range(group.rank, total, group.size))
