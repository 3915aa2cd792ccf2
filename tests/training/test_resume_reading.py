"""Reading of a checkpoint by many ranks: checksums on one of them, and mapped tensors next to a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training_runs import tiny_run
from tnnlm.checkpoints.training import load_any
from tnnlm.errors import ConfigError
from tnnlm.training import resume
from tnnlm.training.callbacks.checkpoint import AtomicCheckpointIO


def test_only_the_main_process_verifies_checksums(run_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[Path] = []

    def verify(path: Path) -> dict[str, Any]:
        verified.append(path)
        return resume.read_checkpoint(path)

    monkeypatch.setattr(resume, "read_intact", verify)
    config = tiny_run("name=tiny", "trainer.max_steps=8")
    assert resume.check_resumable(config, run_here, verify=False) == 4
    assert verified == []
    assert resume.check_resumable(config, run_here) == 4
    assert verified == [run_here / "checkpoints/last.ckpt"]


def test_a_run_whose_checkpoint_holds_an_unescaped_text_can_be_resumed(run_here: Path) -> None:
    """Earlier versions escaped ${ in config.yaml alone."""
    path = run_here / "checkpoints/last.ckpt"
    data = torch.load(path, weights_only=True)
    data["tnnlm"]["config"]["trainer"]["sample_prompt"] = "a ${x}"
    torch.save(data, path)
    with pytest.raises(
        ConfigError, match=r"^trainer\.sample_prompt=a \${x}: .*last\.ckpt\); .*\\\${ for the text"
    ):
        load_any(path)
    config = resume.resumed_config(run_here, ["trainer.max_steps=8"])
    assert resume.check_resumable(config, run_here) == 4


@pytest.mark.parametrize("gpu", [False, True])
def test_ranks_with_a_gpu_map_the_file(run_here: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    path, load = run_here / "checkpoints/last.ckpt", torch.load
    expected, mapped = load(path, weights_only=True)["state_dict"], []

    def note(*args: Any, mmap: bool, **kwargs: Any) -> Any:
        mapped.append(mmap)
        return load(*args, mmap=mmap, **kwargs)

    monkeypatch.setattr(torch, "load", note)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)["state_dict"]
    assert mapped == [gpu]
    assert all(torch.equal(found[key], value) for key, value in expected.items())
