"""Lightning strategy for models that are sharded over all devices (FSDP2) or over groups of them (HSDP)."""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class ShardedStrategy(ModelParallelStrategy):
    """ModelParallelStrategy whose parameters are sharded over all devices or over groups of them.

    Hybrid sharding (HSDP): consecutive ranks form a group that holds one copy of the model, so that weights
    are gathered within a group, and gradients are averaged between the groups as well.
    """

    def __init__(self, devices: int, shard_size: int) -> None:
        """Set the mesh.

        Args:
            devices: Number of devices on all nodes.
            shard_size: Number of devices that share one copy of the model.
        """
        # A single file of unsharded tensors can be loaded by convert.py and by any number of ranks.
        super().__init__(
            data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        self._shard_size = shard_size

    def parameter_mesh(self) -> DeviceMesh:
        """Return the mesh to shard parameters over: (shard), or (replicate, shard). Call it on all ranks."""
        ranks = self.world_size
        if self._shard_size == ranks:
            return self.device_mesh["data_parallel"]
        shape = (ranks // self._shard_size, self._shard_size)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))
