"""One process prepares a folder of the cache; all others wait for it, without a timeout."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities import rank_zero_only

from tests.support.training_runs import tiny_run
from tnnlm.checkpoints.locate import LAST
from tnnlm.data import packing, waiting
from tnnlm.data.waiting import prepare_once
from tnnlm.errors import DataError
from tnnlm.files import only_process
from tnnlm.training import run

FOLDER = Path("cache/data")


def write_meta(folder: Path = FOLDER) -> None:
    """Complete a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").write_text("{}")


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function: another process holds the lock, and ends as given after this one looked thrice."""
    held = []

    def start(folder: Path, end: Callable[[], None]) -> list[int]:
        lock = only_process(waiting.unfinished(folder), waiting.busy(folder))
        lock.__enter__()
        held.append(lock)
        looks: list[int] = []

        def look(seconds: float) -> None:
            looks.append(1)
            if len(looks) == 3:
                end()
                held.pop().__exit__(None, None, None)

        monkeypatch.setattr(waiting.time, "sleep", look)
        return looks

    yield start
    for lock in held:
        lock.__exit__(None, None, None)


def test_data_of_another_process_is_waited_for(other: Any, capsys: pytest.CaptureFixture[str]) -> None:
    looks = other(FOLDER, write_meta)
    prepare_once(FOLDER, lambda: pytest.fail("prepared twice"))
    assert len(looks) == 3
    told = capsys.readouterr().err
    assert re.fullmatch(
        rf"\S+{FOLDER.name}\.part: another process prepares the same data.*; waiting for it\n", told
    )
    prepare_once(FOLDER, lambda: pytest.fail("prepared twice"))


def test_failure_of_the_other_process_ends_the_wait(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    other(FOLDER, lambda: None)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with pytest.raises(DataError, match=r"data: the process that prepared this data has failed; correct"):
        prepare_once(FOLDER, lambda: built.append(1))
    assert built == []
    other(FOLDER, lambda: None)
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    prepare_once(FOLDER, lambda: built.append(1))  # rank 0 finds the reason by itself
    assert built == [1]


def test_threads_that_start_together_prepare_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    waits = threading.Event()
    monkeypatch.setattr(waiting, "print", lambda *_, **__: waits.set(), raising=False)

    def build() -> None:
        built.append(1)
        assert waits.wait(60)
        write_meta()

    ranks = [threading.Thread(target=prepare_once, args=(FOLDER, build)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert built == [1]


def test_a_rank_has_the_data_before_it_meets_the_others(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    config = tiny_run()
    request = packing.Request(config.data, config.model.vocab_size, config.seed, None)
    folder = request.folder()
    looks = other(folder, lambda: packing.build_whole(request))
    start = run._resolve(config, None, LAST, None, None)
    assert len(looks) == 3
    assert start.tokenizer is None  # rank 0 writes it
    assert (folder / "meta.json").is_file()
