"""A kill while convert.py replaces a model leaves one whole model, and no other file after the next start."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tnnlm.checkpoints.converted import load_converted, model_fingerprint

CONVERT = ("convert", "runs/tiny", "--force", "--method")


def convert_until_killed(folder: Path, point: str) -> None:
    """Replace the converted model by one of method window, and end as by a power failure at ``point``."""
    from tnnlm.cli import run
    from tnnlm.deployment import description
    from tnnlm.files import atomic

    def kill(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    exchange, replace = atomic.exchange, os.replace

    def exchange_and_kill(new: Path, path: Path) -> bool:
        assert exchange(new, path)
        kill()
        return True

    def move_aside_and_kill(source: Path, target: Path) -> None:
        replace(source, target)
        if str(target).endswith(".old"):
            kill()

    faults: dict[str, list[tuple[Any, str, Any]]] = {
        "written": [(atomic, "exchange", kill)],
        "exchanged": [(atomic, "exchange", exchange_and_kill)],
        "moved aside": [(atomic, "exchange", lambda *_: False), (os, "replace", move_aside_and_kill)],
        "measured": [(description, "save_report", kill)],
    }
    for module, name, fault in faults[point]:
        setattr(module, name, fault)
    os.chdir(folder)
    os.environ["TNNLM_CACHE"] = str(folder / "cache")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
    run(CONVERT[0], [*CONVERT[1:], "window"])


def fingerprint(folder: Path) -> str:
    """Return the fingerprint of a converted model, whose files belong together."""
    found = load_converted(folder)
    assert model_fingerprint(found.model) == found.fingerprint
    return found.fingerprint


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_kill_leaves_one_whole_model(run_here: Path, script: Any) -> None:
    folder = run_here / "converted"
    models = {}
    for method in ("window", "balanced"):
        assert script(*CONVERT, method).code == 0
        models[method] = fingerprint(folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tnnlm.deployment.pipeline"])
    points = {"written": "balanced", "exchanged": "window", "moved aside": "balanced", "measured": "window"}
    for point, kept in points.items():
        process = context.Process(target=convert_until_killed, args=(Path.cwd(), point))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, point
        if point == "moved aside":
            assert not folder.exists()
            assert (
                script("generate", "--model", str(folder), "--prompt", "a", "--max-new-tokens", "1").code == 0
            )
        assert fingerprint(folder) == models[kept], point
        assert script(*CONVERT, "balanced").code == 0
        assert fingerprint(folder) == models["balanced"]
        assert not list(run_here.glob(".*")), point
