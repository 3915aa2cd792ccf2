"""Shards that don't fit together are refused, also where their sizes do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tnnlm.checkpoints.shards import SHARDS, SUFFIX, Shards, load_model_weights
from tnnlm.checksums import list_files
from tnnlm.errors import CheckpointError

INDEX = Path("last.ckpt")
NAME = "state_dict.weight"


def written(*offsets: list[int]) -> dict[str, Any]:
    """Write one file per part (2, 3) of a tensor (4, 3), and return the content of their index."""
    folder = Path(f"last-1{SUFFIX}")
    folder.mkdir()
    for number, offset in enumerate(offsets):
        information = json.dumps({NAME: {"saved_offsets": offset}})
        path = folder / f"shard-{number}.safetensors"
        save_file({NAME: torch.full((2, 3), float(number))}, path, {"DCP_SHARDING_INFO": information})
    return described(folder)


def described(folder: Path) -> dict[str, Any]:
    """Return the content of an index of all files in a folder."""
    files = list_files(folder, sorted(path.name for path in folder.iterdir()))
    return {"state_dict": {}, SHARDS: Shards(folder, files, {NAME: [4, 3]}, []).entry()}


def test_parts_are_put_together() -> None:
    found = load_model_weights(INDEX, written([0, 0], [2, 0]))["weight"]
    assert found[:, 0].tolist() == [0, 0, 1, 1]


def test_a_shard_that_is_there_twice_is_refused() -> None:
    index = written([0, 0], [2, 0])
    folder = Path(index[SHARDS]["folder"])
    first, second = sorted(folder.iterdir())
    assert first.stat().st_size == second.stat().st_size
    shutil.copyfile(first, second)
    with pytest.raises(CheckpointError, match=r"its shard .*shard-1\.safetensors is corrupt"):
        load_model_weights(INDEX, index)


@pytest.mark.parametrize("offset", [[1, 0], [-2, 0], [0, -3], [3, 0]])
def test_parts_that_overlap_or_leave_their_tensor_are_refused(offset: list[int]) -> None:
    with pytest.raises(CheckpointError, match=r"shard-1\.safetensors is corrupt"):
        load_model_weights(INDEX, written([0, 0], offset))


def test_missing_parts_are_refused() -> None:
    with pytest.raises(CheckpointError, match="are incomplete"):
        load_model_weights(INDEX, written([0, 0]))
