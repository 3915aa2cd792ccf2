"""Fuzz harness for files that are read back: every kind is damaged in every way, in a separate process.

A damaged file has to be refused with exit code 2 and one line that names it, or has to make no difference to
what is loaded. Counted are tracebacks, crashes, hangs, messages that don't name the file, memory above
twice the file, and silent uses: a damaged file that is used without a line that names it.

    python -m tests.support.fuzz              # all cases, as `make nightly` runs them
    python -m tests.support.fuzz --few state  # a few cases of the subjects whose name contains "state"
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tests.support.damage import Damage, flips, replacements, truncations
from tnnlm.errors import run_script

SECONDS = 10
"""Limit of a case in seconds of processor time."""
WALL = 30
"""Limit of a case in seconds, for one that waits; more than any takes on a busy machine."""
SLACK = 96 << 20
"""Memory in bytes that a case may take besides twice its file: code that is loaded late, and caches."""
GOOD = ("refused", "same", "noted")
"""Outcomes that are right: refused, loaded as if intact, or used with a line that names the file."""


class Subject(NamedTuple):
    """Kind of file, and what reads it."""

    name: str
    path: Path
    """The intact file."""
    use: Callable[[], str]
    """Function that reads the file as a command does, and returns a digest of what it loaded."""
    others: tuple[Path, ...] = ()
    """Valid files of the same kind, which replace it."""
    own: bool = False
    """Whether the file is written by the user, so that no checksum can exist."""
    extra: tuple[Damage, ...] = ()
    """Further damages of this kind of file."""


class Outcome(NamedTuple):
    """Result of one case."""

    kind: str
    message: str


def damages(subject: Subject, cuts: int, bits: int, seed: int = 0) -> list[Damage]:
    """Return the damages to try on a subject: truncations, flipped bits and replacements."""
    rng = random.Random(f"{seed} {subject.name}")
    flipped = min(bits, 8 * subject.path.stat().st_size)
    found = [*truncations(subject.path, cuts, rng), *flips(subject.path, flipped, rng)]
    return [*found, *replacements(subject.path, *subject.others), *subject.extra]


def judge(subject: Subject, damage: Damage, found: Result | str, intact: str) -> Outcome:
    """Return what happened when a damaged file was used.

    Args:
        subject: Kind of file.
        damage: Damage that was done.
        found: Result of the call, or how its process ended.
        intact: Digest of the intact file.
    """
    if isinstance(found, str):
        return Outcome(found, "")
    lines = found.said.strip().splitlines()
    places = (subject.path, *subject.path.parents[:-1])
    named = any(place.name in line for line in lines for place in places[:3])
    if found.grown > 2 * found.size + SLACK:
        return Outcome("memory", f"{found.grown >> 20} MiB for a file of {found.size} bytes")
    if found.code == 2:
        fits = len(lines) == 1 and lines[0].startswith("error: ") and named
        return Outcome("refused" if fits else "message", found.said)
    if found.code != 0:
        return Outcome("traceback", found.said)
    if found.digest == intact or damage.name == "missing":  # a file that may be absent
        return Outcome("same", found.said)
    return Outcome("noted" if named or subject.own else "silent", found.said)


class Result(NamedTuple):
    """Result of a call."""

    code: int
    digest: str
    said: str
    """Output, and the traceback if there was one."""
    grown: int
    """Growth of the peak of memory in bytes."""
    size: int
    """Size of the file in bytes, damaged or not, whichever is larger."""


def results(subject: Subject, tried: Sequence[Damage]) -> Iterator[Result | str]:
    """Use a subject with each of the damages, in forked processes, and yield the results in this order.

    A process serves until a call ends it or takes too long, whose result is ``crash`` or ``hang``.
    """
    done, intact = 0, subject.path.read_bytes()
    while done < len(tried):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _serve(subject, tried[done:], writing)
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while done < len(tried):
                found = _received(pipe, child)
                yield found
                done += 1
                if isinstance(found, str):
                    break
        os.waitpid(child, 0)
        if done < len(tried) or isinstance(found, str):  # the damaged file is still there
            if subject.path.is_dir() and not subject.path.is_symlink():
                shutil.rmtree(subject.path)
            subject.path.unlink(missing_ok=True)
            subject.path.write_bytes(intact)


def _received(pipe: Any, child: int) -> Result | str:
    """Return the next result that a process sends, or how it ended."""
    if not select.select([pipe], [], [], WALL)[0]:
        os.kill(child, signal.SIGKILL)
        return "hang"
    header = pipe.read(4)
    if len(header) < 4:
        return "hang" if os.path.exists(f"/proc/{child}") and _used_up(child) else "crash"
    left, data = int.from_bytes(header, "big"), b""
    while len(data) < left:
        data += pipe.read(left - len(data))
    return Result(*pickle.loads(data))


def _used_up(child: int) -> bool:
    """Return whether an ended process was stopped for the processor time that it took."""
    status = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    return status is not None and status.si_status in (signal.SIGXCPU, signal.SIGKILL)


def _serve(subject: Subject, tried: Sequence[Damage], writing: int) -> NoReturn:
    """Use a subject with each of the damages, send the results, and end this process."""
    for damage in tried:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        size = subject.path.stat().st_size
        with damage.of(subject.path) as path:
            with contextlib.suppress(OSError):
                size = max(size, path.stat().st_size)
            try:
                data = pickle.dumps((*_called(subject.use), size))
            except BaseException:
                data = pickle.dumps((1, "", traceback.format_exc(), 0, size))
        os.write(writing, len(data).to_bytes(4, "big") + data)
    os._exit(0)


def _called(use: Callable[[], str]) -> tuple[int, str, str, int]:
    digest: list[str] = []

    def main() -> int:
        digest.append(use())
        return 0

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _peak()
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = run_script(main)
        except Exception:
            traceback.print_exc(file=said)
            code = 1
    return code, "".join(digest), said.getvalue()[-4000:], _peak() - before


def _peak() -> int:
    """Return the peak of this process's memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10


class Report(NamedTuple):
    """Outcomes of all cases of a subject."""

    subject: Subject
    outcomes: Counter[str]
    faults: list[str]
    """Description of each case with a wrong outcome."""


def fuzz(subject: Subject, cuts: int, bits: int) -> Report:
    """Try a subject with damages, and return what happened."""
    unchanged = Damage("nothing", lambda intact, path: path.write_bytes(intact.read_bytes()))
    (found,) = results(subject, [unchanged])
    assert isinstance(found, Result), f"{subject.name}: {found} of the intact file"
    assert found.code == 0, found.said
    outcomes: Counter[str] = Counter()
    faults = []
    tried = damages(subject, cuts, bits)
    for damage, result in zip(tried, results(subject, tried), strict=True):
        kind, message = judge(subject, damage, result, found.digest)
        outcomes[kind] += 1
        if kind not in GOOD:
            lines = message.strip().splitlines() or [""]
            faults.append(f"{subject.name}, {damage}: {kind}: {lines[0][:120]} ... {lines[-1][:300]}")
    return Report(subject, outcomes, faults)


def main(words: Sequence[str] | None = None) -> int:
    """Run the harness, print the figures, and return 1 if any case went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="Parts of names of subjects. (default: all)")
    parser.add_argument("--few", action="store_true", help="Try a few damages of each subject.")
    parser.add_argument("--faults", type=int, default=5, help="Faults to print of each subject.")
    args = parser.parse_args(words)
    from tests.support.artefacts import subjects

    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ |= {"TNNLM_CACHE": str(Path(folder) / "cache"), "HF_HUB_OFFLINE": "1"}
        for subject in subjects():
            if args.names and not any(name in subject.name for name in args.names):
                continue
            begun = time.monotonic()
            report = fuzz(subject, *((5, 10) if args.few else (50, 200)))
            total += report.outcomes
            seconds = time.monotonic() - begun
            counted = ", ".join(f"{kind} {n}" for kind, n in sorted(report.outcomes.items()))
            print(f"{subject.name}: {report.outcomes.total()} cases, {counted} ({seconds:.0f} s)", flush=True)
            for fault in report.faults[: args.faults]:
                print("   ", fault, flush=True)
        os.chdir("/")
    wrong = sum(number for kind, number in total.items() if kind not in GOOD)
    kinds = ("traceback", "crash", "hang", "memory", "silent", "message")
    print(f"{total.total()} cases:", ", ".join(f"{kind} {total[kind]}" for kind in kinds))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
