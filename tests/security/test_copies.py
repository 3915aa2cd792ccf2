"""Copies of runs and models that only look different are used: other line ends, other places."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.converted import write_converted
from tnnlm.checkpoints.converted import load_converted
from tnnlm.checkpoints.manifest import write_checksums
from tnnlm.checkpoints.membership import check_member
from tnnlm.checkpoints.settings_file import verify_settings
from tnnlm.checkpoints.training import load_any
from tnnlm.checksums import check_files, list_files, read_signed, write_signed
from tnnlm.errors import CheckpointError
from tnnlm.tokenizer import train_bpe
from tnnlm.training.resume import resumed_config


def with_lines(end: bytes, *files: Path) -> None:
    for file in files:
        file.write_bytes(file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", end))


def test_checkout_of_a_run_with_the_line_ends_of_windows_resumes(run_here: Path) -> None:
    expected = resumed_config(run_here, [])
    with_lines(b"\r\n", *(path for path in run_here.iterdir() if path.suffix in (".yaml", ".json", ".csv")))
    assert verify_settings(run_here)
    assert resumed_config(run_here, []) == expected
    settings = run_here / "config.yaml"
    settings.write_bytes(settings.read_bytes().replace(b"seed: ", b"seed: 1"))
    with pytest.raises(CheckpointError, match="was changed"):
        resumed_config(run_here, [])


@pytest.mark.parametrize(("written", "read"), [(b"\n", b"\r\n"), (b"\r\n", b"\r\n"), (b"\r\n", b"\n")])
def test_line_ends_of_a_model_do_not_count(
    written: bytes, read: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write_converted(Path("out"), train_bpe(["some words and more words"], 300, "<|endoftext|>", 1, False))
    with_lines(written, *Path("out").glob("*.json"))
    write_checksums(Path("out"))
    with_lines(read, *Path("out").glob("*.json"))
    load_converted(Path("out"))
    assert not caplog.messages
    config = Path("out/config.json")
    config.write_bytes(config.read_bytes().replace(b'"n_ctx"', b'"n_CTX"'))
    with pytest.raises(CheckpointError, match=r"config\.json: is damaged"):
        load_converted(Path("out"))


def test_line_ends_of_data_that_is_no_text_count() -> None:
    Path("tokens.bin").write_bytes(b"1\n2\n")
    listed = list_files(Path(), ["tokens.bin"])
    with_lines(b"\r\n", Path("tokens.bin"))
    with pytest.raises(CheckpointError, match=r"tokens\.bin: is damaged"):
        check_files(Path(), listed, "")


def test_line_ends_of_a_record_do_not_count() -> None:
    path = Path("job.json")
    write_signed(path, {"job": "1", "text": "a\r\nb"})
    with_lines(b"\r\n", path)
    assert read_signed(path, "") == {"job": "1", "text": "a\r\nb"}
    path.write_bytes(path.read_bytes().replace(b'"1"', b'"2"'))
    with pytest.raises(CheckpointError, match="its checksum differs"):
        read_signed(path, "")


def test_list_with_an_entry_that_is_no_size_and_checksum_is_refused_in_one_line() -> None:
    write_converted(Path("out"), train_bpe(["some words and more words"], 300, "<|endoftext|>", 1, False))
    entries: list[object] = [5, {}, [], None, [1, "a", 2], ["1", "a"]]
    for entry in entries:
        Path("out/checksums.json").write_text(json.dumps({"files": {"config.json": entry}}))
        with pytest.raises(CheckpointError, match=r"is damaged or was replaced"):
            load_converted(Path("out"))


def test_checkpoint_in_the_root_folder_belongs_to_no_run(run_here: Path) -> None:
    loaded = load_any(run_here / "checkpoints/best.ckpt")
    check_member(Path("/best.ckpt"), loaded.config, loaded.tokenizer)


def test_checkpoint_whose_kernel_module_was_moved_belongs_to_its_run(run_here: Path) -> None:
    path = run_here / "checkpoints/best.ckpt"
    loaded = load_any(path)
    loaded.config.model.kernel.module, loaded.config.model.kernel.module_sha256 = "moved.py", "0" * 64
    check_member(path, loaded.config, loaded.tokenizer)
    loaded.config.seed += 1
    with pytest.raises(CheckpointError, match="is of another run"):
        check_member(path, loaded.config, loaded.tokenizer)


def test_renamed_run_in_another_folder_is_itself(run_here: Path) -> None:
    shutil.copytree(run_here, "elsewhere/other name")
    moved = Path("elsewhere/other name")
    assert resumed_config(moved, []).name == "other name"
    load_any(moved / "checkpoints/best.ckpt")
