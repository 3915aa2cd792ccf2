"""Sharded checkpoints of a training, written and read by all ranks with torch.distributed.checkpoint.

A checkpoint is copied to CPU memory and written by threads while the training continues. It becomes valid
when its index file, which names the shards and their checksums, replaces the former one; see
:mod:`tnnlm.checkpoints.shards`. All functions communicate: call them on all ranks.
"""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult

from tnnlm.checkpoints.shards import SHARDS, SUFFIX, Shards, moment_name, shards_of, weight_name
from tnnlm.checkpoints.training import delete_unreferenced
from tnnlm.checksums import list_files

WriteIndex = Callable[[dict[str, Any], Path], None]
"""Function that writes a checkpoint to a file atomically."""


class ShardedSaves:
    """Asynchronous saves of a training, one at a time.

    Checkpoints of the same step, such as best.ckpt and last.ckpt, share their shards.
    """

    def __init__(self, parameters: Callable[[], list[str]], write_index: WriteIndex) -> None:
        """Prepare without communicating.

        Args:
            parameters: Function that returns the names of the parameters in module order.
            write_index: Function that writes an index file.
        """
        self._parameters = parameters
        self._write_index = write_index
        self._group: dist.ProcessGroup | None = None
        self._step: int | None = None
        self._writer: _ShardWriter | None = None
        self._saved: Future[Any] | None = None
        self._begun: list[Path] = []
        """Index files of checkpoints that are being written."""
        self._steps: dict[Path, int] = {}

    def saved_step(self, path: Path) -> int | None:
        """Return the step of the last valid checkpoint at ``path`` when ``finish`` was last called."""
        return self._steps.get(_place(path))

    def begin(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Begin to save a checkpoint, after the save of an earlier step has ended.

        Args:
            checkpoint: Sharded checkpoint; its tensors may change when this returns.
            path: Index file.

        Raises:
            OSError: If the earlier save failed, or nothing can be created in the folder of ``path``.
        """
        path = _place(path)
        tensors, index = _split(checkpoint)
        step = int(checkpoint["global_step"])
        if self._writer is None or self._step != step or self._writer.folder.parent != path.parent:
            self.finish()
            # The collectives of the background thread must not interleave with those of the training.
            self._group = self._group or dist.new_group(backend="gloo")
            writer = _ShardWriter(_new_folder(path, step), self._parameters(), self._write_index)
            writer.add(path, index)
            saved = async_save(tensors, storage_writer=writer, process_group=self._group)
            assert isinstance(saved, Future)
            self._writer, self._saved, self._step = writer, saved, step
        else:
            self._writer.add(path, index)
        self._begun.append(path)

    def finish(self) -> None:
        """Wait until the checkpoints that were begun are valid.

        Raises:
            OSError: If a rank couldn't write, for example because the disk is full. The former checkpoints
                are still valid.
        """
        saved, self._saved = self._saved, None
        begun, self._begun = self._begun, []
        writer, self._writer = self._writer, None
        if writer is None or self._step is None:
            return
        try:
            if saved is not None:
                saved.result()
            self._writer = writer
            self._steps |= dict.fromkeys(begun, self._step)
        except CheckpointException as error:
            if dist.get_rank() == 0:
                shutil.rmtree(writer.folder, ignore_errors=True)
            causes = [cause for cause, _ in error.failures.values()]
            for cause in causes:
                if isinstance(cause, OSError) and cause.errno is not None:
                    raise OSError(cause.errno, cause.strerror, str(writer.folder)) from None
            raise RuntimeError(f"{writer.folder}: could not be saved: {causes[0]}") from error


class _ShardWriter(HuggingFaceStorageWriter):
    """Writer of one checkpoint's shards that describes them in index files when all ranks have written.

    One instance exists on every rank; only that of rank 0 writes index files.
    """

    def __init__(self, folder: Path, parameters: list[str], write_index: WriteIndex) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self._parameters = parameters
        self._write_index = write_index
        self._lock = threading.Lock()
        self._waiting: list[tuple[Path, dict[str, Any]]] = []
        self._shards: Shards | None = None

    def add(self, path: Path, index: dict[str, Any]) -> None:
        """Write an index of these shards to ``path``, when all of them are on the disk."""
        if dist.get_rank() != 0:
            return
        with self._lock:
            if self._shards is None:
                # The training goes on to change the optimizer's scalars and the states of callbacks.
                self._waiting.append((path, copy.deepcopy(index)))
            else:
                self._publish(path, index, self._shards)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write the shards of this rank, and return their sizes and checksums with the results."""
        written = super().write_data(plan, planner)
        written.wait()
        results = written.value()
        names = {result.storage_data.relative_path for result in results}
        digests = {name: (name, *entry) for name, entry in list_files(self.folder, names).items()}
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(
            [replace(result, storage_data=digests[result.storage_data.relative_path]) for result in results]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index files that wait, on rank 0, after all ranks have written their shards."""
        written = [result.storage_data for of_rank in results for result in of_rank]
        files = {name: [size, digest] for name, size, digest in sorted(written)}
        shapes = {name: list(found.size) for name, found in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]
        with self._lock:
            self._shards = Shards(self.folder, files, shapes, self._parameters)
            for path, index in self._waiting:
                self._publish(path, index, self._shards)
            self._waiting = []

    def _publish(self, path: Path, index: dict[str, Any], shards: Shards) -> None:
        """Write an index file, and delete the shards that no index file refers to any more."""
        self._write_index({**index, SHARDS: shards.entry()}, path)
        delete_unreferenced(path.parent, self.folder.name)


def load_shards(
    path: Path, index: dict[str, Any], module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Load the weights and optimizer states of a sharded checkpoint into a sharded model.

    Every rank only reads what it holds, and any number of ranks may have written the checkpoint.

    Args:
        path: Index file of the checkpoint.
        index: Content of the index file.
        module: LightningModule whose model is sharded.
        optimizers: Optimizers of the model.

    Raises:
        CheckpointError: If a shard is missing or truncated.
    """
    shards = shards_of(path, index)
    assert shards is not None
    reader = HuggingFaceStorageReader(str(shards.folder))
    weights = dict(get_model_state_dict(module))
    _fill({key: weight_name(key) for key in weights}, weights, shards, reader)
    module.load_state_dict({**weights, **index["state_dict"]})
    for number, (optimizer, saved) in enumerate(zip(optimizers, index["optimizer_states"], strict=True)):
        states = cast(dict[str, dict[str, Any]], get_optimizer_state_dict(module, optimizer)["state"])
        for parameter, moments in states.items():
            names = {moment: moment_name(number, parameter, moment) for moment in moments}
            _fill(names, moments, shards, reader)
            # The optimizer changes scalars in place, and those of the index are memory-mapped.
            moments |= copy.deepcopy(saved["state"].get(parameter, {}))
        loaded: Any = {"state": states, "param_groups": saved["param_groups"]}
        set_optimizer_state_dict(module, optimizer, loaded)


def _fill(
    names: dict[str, str], values: dict[str, Any], shards: Shards, reader: HuggingFaceStorageReader
) -> None:
    """Read the tensors of ``values`` that are in the shards, by their names there, in place."""
    large = {names[key]: value for key, value in values.items() if names[key] in shards.shapes}
    load(large, storage_reader=reader)
    values |= {key: large[name] for key, name in names.items() if name in large}


def _split(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a checkpoint into its large tensors by their names in the shards, and the rest of it.

    Scalars, such as the step counts of AdamW, stay in the rest.
    """
    tensors = {weight_name(key): value for key, value in checkpoint["state_dict"].items() if value.ndim}
    states = []
    for number, saved in enumerate(checkpoint["optimizer_states"]):
        small: dict[str, dict[str, Any]] = {}
        for parameter, moments in saved["state"].items():
            large = {name: value for name, value in moments.items() if _is_large(value)}
            tensors |= {moment_name(number, parameter, name): value for name, value in large.items()}
            small[parameter] = {name: value for name, value in moments.items() if name not in large}
        states.append({**saved, "state": small})
    scalars = {key: value for key, value in checkpoint["state_dict"].items() if not value.ndim}
    return tensors, {**checkpoint, "state_dict": scalars, "optimizer_states": states}


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _new_folder(path: Path, step: int) -> Path:
    """Create a folder for the shards of ``path`` on rank 0, and return it on all ranks.

    Raises:
        OSError: If it can't be created.
    """
    found: list[Path | OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found[0] = _create_folder(path, step)
        except OSError as error:
            found[0] = error
    dist.broadcast_object_list(found)
    result = found[0]
    if isinstance(result, OSError):
        raise result
    assert result is not None
    return result


def _place(path: Path) -> Path:
    """Return the path of an index file in its real folder.

    The file itself may be a link, which is replaced: in the run of a stranger it may lead anywhere.
    """
    return path.parent.resolve() / path.name


def _create_folder(path: Path, step: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        end = "" if number == 1 else f"-{number}"
        folder = path.with_name(f"{path.stem}-{step}{end}{SUFFIX}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
