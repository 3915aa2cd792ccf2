"""Concurrent changes, full disks, damaged data and unusual paths: convert.py and generate.py keep existing
files, never add to the model of another process, and report problems in one line."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tnnlm.checkpoints import converted
from tnnlm.checkpoints.converted import load_converted
from tnnlm.checkpoints.manifest import write_checksums
from tnnlm.deployment import perplexity, pipeline
from tnnlm.errors import CheckpointError
from tnnlm.files import only_process


def while_measuring(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Call ``happens`` after the model is written and before it is measured."""
    measure = perplexity.measure_perplexities

    def measured(*arguments: Any) -> Any:
        happens()
        return measure(*arguments)

    monkeypatch.setattr(pipeline, "measure_perplexities", measured)


def test_nothing_is_added_to_a_folder_that_was_removed(
    run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_here / "converted"
    while_measuring(monkeypatch, lambda: shutil.rmtree(folder))
    done = script("convert", "runs/tiny")
    assert done.code == 1
    assert "was removed or replaced" in done.out
    assert not folder.exists()


def test_nothing_is_added_to_the_model_of_another_process(
    run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script("convert", "runs/tiny", "--method", "window", "--out", "other").code == 0
    folder, other = run_here / "converted", Path("other")
    texts = {path.name: path.read_bytes() for path in other.iterdir()}

    def replace() -> None:
        shutil.rmtree(folder)
        shutil.copytree(other, folder)

    while_measuring(monkeypatch, replace)
    done = script("convert", "runs/tiny", "--export")
    assert done.code == 1
    assert "was removed or replaced" in done.out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == texts


def test_second_convert_of_the_same_folder_waits_for_the_first(run_here: Path, script: Any) -> None:
    with only_process(run_here / "converted", CheckpointError("two writers")):
        refused = script("convert", "runs/tiny")
    assert refused.code == 2
    holder = f"process {os.getpid()} on {socket.gethostname()} since "
    assert f"runs/tiny/converted: another process is writing to it ({holder}" in refused.err
    assert refused.err.endswith("); wait until it finishes\n")
    assert not (run_here / "converted").exists()
    assert script("convert", "runs/tiny").code == 0
    with only_process(run_here / "converted", CheckpointError("two writers")):
        assert script("convert", "runs/tiny/converted", "--export").code == 2
    assert not list(run_here.glob(".converted*"))


def test_model_replaced_during_loading_is_loaded_again(
    run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script("convert", "runs/tiny").code == 0
    assert script("convert", "runs/tiny", "--method", "window", "--out", "other").code == 0
    expected, folder, read = load_converted(Path("other")).fingerprint, run_here / "converted", load_file

    def swapped(path: Path) -> dict[str, torch.Tensor]:
        if Path("other").exists():
            folder.rename("old")
            Path("other").rename(folder)
        return read(path)

    monkeypatch.setattr(converted, "load_file", swapped)
    found = load_converted(folder)
    assert found.fingerprint == expected
    assert converted.model_fingerprint(found.model) == expected


def test_a_loaded_model_does_not_change_when_it_is_replaced(run_here: Path, script: Any) -> None:
    assert script("convert", "runs/tiny").code == 0
    found = load_converted(run_here / "converted")
    assert script("convert", "runs/tiny", "--method", "window", "--force").code == 0
    assert converted.model_fingerprint(found.model) == found.fingerprint
    assert load_converted(run_here / "converted").fingerprint != found.fingerprint


def test_link_still_points_to_the_replaced_folder(run_here: Path, script: Any) -> None:
    assert script("convert", "runs/tiny", "--out", "first").code == 0
    Path("latest").symlink_to("first")
    assert script("convert", "runs/tiny", "--out", "latest", "--force").code == 0
    assert Path("latest").is_symlink()
    assert load_converted(Path("first"))


def below_a_file() -> str:
    Path("text.txt").write_text("text")
    return "text.txt/converted"


def dangling() -> str:
    Path("link").symlink_to("nowhere")
    return "link"


def long_name() -> str:
    return "n" * 300


@pytest.mark.parametrize("place", [below_a_file, dangling, long_name])
def test_unusable_out_is_one_line(place: Callable[[], str], run_here: Path, script: Any) -> None:
    path = place()
    refused = script("convert", "runs/tiny", "--out", path)
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert refused.err.startswith(f"error: {path}: ")


@pytest.mark.parametrize("place", [below_a_file, long_name])
def test_unusable_state_file_is_one_line(place: Callable[[], str], run_here: Path, script: Any) -> None:
    assert script("convert", "runs/tiny").code == 0
    path = place()
    refused = script("generate", "--prompt", "a", "--save-state", path)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith(f"error: {path}: ")


def test_state_is_not_saved_as_a_folder(run_here: Path, script: Any) -> None:
    assert script("convert", "runs/tiny").code == 0
    Path("folder").mkdir()
    refused = script("generate", "--prompt", "a", "--save-state", "folder")
    assert (refused.code, refused.out) == (2, "")
    assert "is a folder" in refused.err


def test_device_without_memory_is_refused(run_here: Path, script: Any) -> None:
    assert script("convert", "runs/tiny").code == 0
    refused = script("generate", "--prompt", "a", "--device", "meta")
    assert refused.code == 2
    assert refused.err.startswith("error: --device meta: ")


def test_full_disk_fails_the_export_alone(
    run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.suffix != ".pt2":
            return write(self, data)
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    done = script("convert", "runs/tiny", "--export")
    assert done.code == 1
    assert "FAILED: --export: the disk is full" in done.out
    assert load_converted(run_here / "converted")
    assert not (run_here / "converted/export").exists()


def test_damaged_validation_data_is_reported(run_here: Path, script: Any) -> None:
    assert script("convert", "runs/tiny", "--out", "first").code == 0  # prepares the data in this folder
    for text in Path(os.environ["TNNLM_CACHE"]).rglob("val-00000.bin"):
        text.write_bytes(text.read_bytes()[:40])
    done = script("convert", "runs/tiny")
    assert done.code == 0
    assert "no perplexities" in done.out
    assert "val-00000.bin: is damaged or was replaced (40 bytes instead of " in " ".join(done.out.split())


@pytest.mark.parametrize("options", [("--temperature", "0"), ("--temperature", "1"), ("--num-samples", "2")])
def test_logits_that_are_not_finite_end_in_one_line(
    options: tuple[str, ...], run_here: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script("convert", "runs/tiny").code == 0
    path = run_here / "converted/model.safetensors"
    tensors = load_file(path)
    tensors["embedding.weight"] = torch.full_like(tensors["embedding.weight"], torch.nan)
    save_file(tensors, path)
    write_checksums(path.parent)
    # Such weights are refused when they are loaded; they stand for finite ones whose logits overflow.
    monkeypatch.setattr("tnnlm.checkpoints.converted.check_finite", lambda *_: None)
    refused = script("generate", "--prompt", "a", *options)
    assert refused.code == 2
    assert "logits are not finite" in refused.err


def test_files_of_a_converted_model_are_readable_by_others(run_here: Path, script: Any) -> None:
    assert script("convert", "runs/tiny").code == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in (run_here / "converted").iterdir()}
    assert set(modes.values()) == {modes["config.json"]}
    assert json.loads((run_here / "converted/conversion.json").read_text())["ppl"]
