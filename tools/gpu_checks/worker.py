"""Process of one part of tools/gpu_check.py, which appends rows to a file."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from gpu_checks.rows import append_row
from gpu_checks.runner import SKIPPED, Part, status_row

TOOLS = Path(__file__).parents[1]
PARTS = (
    Part("card", "gpu_checks.card:measure", 30),
    Part("agreement", "gpu_checks.correctness:agreement", 45),
    Part("demo", "gpu_checks.training:demo", 60),
    Part("train-125m", "gpu_checks.training:medium", 110),
    Part("decode-48m", "gpu_checks.decoding:small", 60),
    Part("gpt2", "gpu_checks.training:gpt2", 70),
    Part("memory", "gpu_checks.memory:measure", 60),
    Part("tests", "gpu_checks.correctness:repository_tests", 90),
    Part("decode-1b3", "gpu_checks.decoding:large", 90),
)
"""Parts in the order of their worth. Their limits add up to more than six minutes; most parts need less."""
_MEASURING = 0.6
"""Share of a part's time for its loops; the rest is for imports, building models and compilation."""


def command(part: Part, rows: Path, seconds: float, device: str, tiny: bool) -> list[str]:
    """Return the command of a part's process, to be run in a checkout."""
    folders = [str(TOOLS), str(TOOLS.parent)]
    code = f"import sys; sys.path[:0] = {folders!r}; from gpu_checks.worker import main; sys.exit(main())"
    words = [part.function, "--rows", str(rows), "--device", device, "--seconds", f"{_MEASURING * seconds:g}"]
    return [sys.executable, "-c", code, *words, *(["--tiny"] if tiny else [])]


def main(words: list[str] | None = None) -> int:
    """Run a part and return the exit code of its process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("function")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(words)
    return run(args.function, args.rows, args.device, args.seconds, args.tiny)


def run(function: str, rows: Path, device: str, seconds: float, tiny: bool) -> int:
    """Run a part in this process; a package that is missing is reported as the status of the part."""
    module, _, name = function.partition(":")
    try:
        import torch

        from gpu_checks.shapes import Setting

        setting = Setting(torch.device(device), tiny, seconds)
        getattr(import_module(module), name)(setting, partial(append_row, rows))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "tnnlm", "gpu_checks", "experiments", "tests"):
            raise
        append_row(rows, status_row(SKIPPED + missing))
    return 0
