"""Files of runs, converted models and caches have the permissions that the umask allows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.training_runs import SETTINGS, write_text


@pytest.mark.skipif(os.name == "nt", reason="needs permissions")
def test_all_written_files_follow_the_umask(script: Any) -> None:
    write_text()
    before = os.umask(0o027)
    try:
        assert script("train", *SETTINGS, "trainer.max_steps=2").code == 0
        assert script("convert").code == 0
        assert script("convert", "--force", "--method", "window").code == 0
        assert script("generate", "--prompt", "a", "--max-new-tokens", "1", "--save-state", "state").code == 0
    finally:
        os.umask(before)
    written = [Path("state"), *Path("runs").rglob("*"), *Path("cache").rglob("*")]
    assert len(written) > 20
    for path in written:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path
