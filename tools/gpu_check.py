#!/usr/bin/env python
"""Check and measure tnnlm on one GPU, an H100 or H200: results, training, decoding, memory.

The parts run in the order of their worth, each in a separate process with a time limit, until the time has
passed. A part that crashes or hangs loses nothing but itself, and an interrupted run keeps what it has.
Nothing is installed or downloaded: tokens are synthetic, and a part whose package is missing is reported as
skipped. Needs PyTorch 2.8 or newer; reports are rewritten after every measurement.

  OUT/gpu_check.json  all results, as a record for docs/records
  OUT/gpu_check.md    the same as tables, for docs/gpu.md

Exit code 1 if a part failed or a result is wrong.

Examples:
  python tools/gpu_check.py
  python tools/gpu_check.py --minutes 15 --out h200
  python tools/gpu_check.py --parts card decode-48m --out decoding
  python tools/gpu_check.py --device cpu --tiny --out rehearsal    # all parts at tiny sizes, without a GPU
  python tools/gpu_check.py --arithmetic                           # computed bounds, nothing is measured
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # tnnlm need not be installed

from experiments.commits import current_commit
from gpu_checks.report import failed, markdown, record, replace_text
from gpu_checks.runner import LEAST, Outcome, Part, StopSignals, run_parts
from gpu_checks.worker import PARTS, command
from tnnlm.errors import OS_PROBLEMS, OneLineParser, UserError, run_script

OLDEST = (2, 8)
"""Oldest version of PyTorch."""
MINUTES = 6.0
"""Time for which the limits of the parts are chosen; a longer run scales them."""


def parse() -> argparse.Namespace:
    """Return the checked arguments of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [part.name for part in PARTS]
    add("--minutes", type=float, default=MINUTES, metavar="M", help="Time for all parts. (default: 6)")
    add("--parts", nargs="+", choices=names, default=names, help="Parts to run. (default: all)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="Device. (default: cuda)")
    add("--tiny", action="store_true", help="Measure tiny models, to rehearse the command.")
    add("--out", type=Path, default=Path("gpu_check"), metavar="DIR", help="Folder. (default: gpu_check)")
    add("--arithmetic", action="store_true", help="Compute bounds from data sheets, and measure nothing.")
    args = parser.parse_args()
    if not LEAST / 60 <= args.minutes <= 24 * 60:
        raise UserError(f"--minutes {args.minutes:g}: must be at least {LEAST / 60:.2f} and at most 1440")
    return args


def main() -> int:
    """Run the parts, write both reports and print the tables; return the exit code."""
    args = parse()
    target = args.out / "gpu_check.json"
    for path in (target, target.with_suffix(".md")):
        if path.exists():
            raise UserError(f"{path}: already exists", "choose another --out")
    check_torch(args.device if not args.arithmetic else "cpu")
    line = shlex.join(["python", "tools/gpu_check.py", *sys.argv[1:]])
    about = (line, time.strftime("%Y-%m-%d"), current_commit())
    make_folder(args.out)
    if args.arithmetic:
        from gpu_checks.arithmetic import arithmetic_record

        computed = arithmetic_record(*about)
        replace_text(target, json.dumps(computed, indent=1) + "\n")
        print(markdown(computed["tables"]))
        return 0
    stop = StopSignals()
    stop.listen()
    scale = max(1.0, args.minutes / MINUTES)
    parts = [part._replace(seconds=scale * part.seconds) for part in PARTS if part.name in args.parts]
    changed = partial(write_reports, args.out, about)
    launch = partial(launched, device=args.device, tiny=args.tiny)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_parts(parts, launch, Path(folder), 60 * args.minutes, changed, stop)
    print(markdown(record(outcomes, *about)["tables"]))
    print(f"wrote {target} and {target.with_suffix('.md')}")
    return 128 + stop.number if stop.name else int(failed(outcomes))


def make_folder(path: Path) -> None:
    """Create the folder of the reports, with the standard library only.

    Raises:
        UserError: If the file system doesn't have folders that users create, such as ``/proc``.
        OSError: If it can't be created for a reason that a user understands.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in OS_PROBLEMS:
            raise
        raise UserError(f"{path}: can't be created", "choose another --out") from None


def launched(part: Part, rows: Path, seconds: float, device: str, tiny: bool) -> list[str]:
    """Announce a part and return its command."""
    print(f"{part.name}: up to {seconds:.0f} s", file=sys.stderr, flush=True)
    return command(part, rows, seconds, device, tiny)


def write_reports(out: Path, about: tuple[str, str, str], outcomes: list[Outcome]) -> None:
    """Write both reports with the outcomes so far."""
    found = record(outcomes, *about)
    replace_text(out / "gpu_check.json", json.dumps(found, indent=1) + "\n")
    replace_text(out / "gpu_check.md", markdown(found["tables"]))


def check_torch(device: str) -> None:
    """Check the version of PyTorch and its GPU.

    Raises:
        UserError: If PyTorch is missing or too old, or finds no GPU.
    """
    try:
        import torch
    except ImportError:
        raise UserError("torch: is not installed", "install PyTorch 2.8 or newer") from None
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST:
        raise UserError(f"torch {torch.__version__}: is too old", "install PyTorch 2.8 or newer")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU", "add --device cpu --tiny to rehearse")


if __name__ == "__main__":
    sys.exit(run_script(main))
