"""Lightning strategy for sharded models: fully sharded (FSDP2), or hybrid sharded on a grid of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tnnlm.checkpoints.shards import SHARDS
from tnnlm.checkpoints.training import read_checkpoint
from tnnlm.training.sharded_save import ShardedSaves, load_shards


class ShardedStrategy(ModelParallelStrategy):
    """ModelParallelStrategy whose parameters are sharded over all devices or over groups of them.

    Hybrid sharding (HSDP): consecutive ranks form a group that holds one copy of the model, so that weights
    are gathered within a group, and gradients are averaged between the groups as well.
    """

    def __init__(self, devices: int, shard_size: int, *, sharded_checkpoints: bool = False) -> None:
        """Set the mesh and the format of checkpoints.

        Args:
            devices: Number of devices on all nodes.
            shard_size: Number of devices that share one copy of the model.
            sharded_checkpoints: Whether every rank saves its shards, asynchronously. If not, rank 0 saves a
                single file of unsharded tensors.
        """
        super().__init__(devices, tensor_parallel_size=1, save_distributed_checkpoint=sharded_checkpoints)
        self._shard_size = shard_size
        self._saves = ShardedSaves(self._parameters, self._write_index) if sharded_checkpoints else None

    def parameter_mesh(self) -> DeviceMesh:
        """Return the mesh to shard parameters over: (shard), or (replicate, shard). Call it on all ranks."""
        ranks = self.world_size
        if self._shard_size == ranks:
            return self.device_mesh["data_parallel"]
        shape = (ranks // self._shard_size, self._shard_size)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Save a single file, or begin to save shards; see :class:`ShardedSaves`.

        Raises:
            OSError: If the file, or the shards that were begun before, can't be written.
        """
        if self._saves is None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        else:
            self._saves.begin(checkpoint, Path(self.broadcast(filepath)))

    @property
    def saves(self) -> ShardedSaves | None:
        """Saves of sharded checkpoints; None if checkpoints are single files."""
        return self._saves

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint of either format into the model and its optimizers, and return the rest of it.

        Raises:
            CheckpointError: If the checkpoint is missing or corrupt.
        """
        path = Path(self.broadcast(checkpoint_path))
        index = read_checkpoint(path)
        if SHARDS not in index:
            return super().load_checkpoint(path, weights_only)
        assert self.model is not None
        load_shards(path, index, self.model, self.optimizers)
        return index

    def teardown(self) -> None:
        """Finish the saves, and release the devices."""
        if self._saves is not None:
            self._saves.finish()
        super().teardown()

    def _parameters(self) -> list[str]:
        assert self.model is not None
        return [name for name, _ in self.model.named_parameters()]

    def _write_index(self, index: dict[str, Any], path: Path) -> None:
        self.checkpoint_io.save_checkpoint(index, path)


def background_saves(strategy: Strategy) -> ShardedSaves | None:
    """Return the saves of a strategy whose checkpoints are valid only some time after they were begun."""
    return strategy.saves if isinstance(strategy, ShardedStrategy) else None
