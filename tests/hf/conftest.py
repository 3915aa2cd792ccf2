"""Converted folders of every family, each opened once."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from tests.support.hf_folders import FORMS, Opened, open_folder, write_folder

# Transformers is an optional extra.
collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["test_*.py"]


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: a second one does not speed up tiny models, and is delayed on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=FORMS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Return a converted folder of every family and type of recurrence."""
    return open_folder(write_folder(tmp_path_factory.mktemp("hf") / request.param, *FORMS[request.param]))


@pytest.fixture(scope="session")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Return a folder with the default conversion: a TNN, converted by the balanced method."""
    return open_folder(write_folder(tmp_path_factory.mktemp("hf") / "balanced", "tno", "balanced"))
