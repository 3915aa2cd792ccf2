"""Damaged files: truncated, with flipped bits, or replaced by what no program wrote there.

Every kind of file that is read back is tried with these. A damaged file has to be refused in one line::

    for damage in [*truncations(path, 5, rng), *flips(path, 5, rng), *replacements(path)]:
        with damage.of(path):
            check_refused(lambda: load(path), path, damage)
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tnnlm.errors import OS_ADVICE, UserError

LIMIT = 120
"""Seconds after which a call counts as hanging; far more than any takes, also on a busy machine."""
DEPTH = 200_000
"""Depth of nested lists in a file of JSON or YAML, above every parser's limit."""


@dataclass(frozen=True)
class Damage:
    """One way to damage a file."""

    name: str
    """Short description of the damage, for the message of a failed test."""
    make: Callable[[Path, Path], None]
    """Function of the intact file and the path at which the damaged one is created."""

    @contextmanager
    def of(self, path: Path) -> Iterator[Path]:
        """Replace a file by a damaged one with the same times; the same inode is back after the block."""
        with tempfile.TemporaryDirectory() as folder:
            intact = Path(shutil.move(path, Path(folder) / "intact"))
            try:
                self.make(intact, path)
                yield path
            finally:
                _remove(path)
                shutil.move(intact, path)

    def __str__(self) -> str:
        return self.name


def truncations(path: Path, n: int, rng: random.Random) -> list[Damage]:
    """Return ``n`` truncations of a file to fewer bytes, one byte less among them; fewer of a short file."""
    size = path.stat().st_size
    sizes = {size - 1, *rng.sample(range(1, size), min(n, size - 1))} if size > 1 else {0}
    return [_changed(f"truncated to {left} of {size} bytes", _cut(left)) for left in sorted(sizes)[-n:]]


def flips(path: Path, n: int, rng: random.Random) -> list[Damage]:
    """Return ``n`` changes of a file in one bit each; fewer of a short file."""
    bits = 8 * path.stat().st_size
    return [
        _changed(f"bit {bit} flipped", _flip(bit)) for bit in sorted(rng.sample(range(bits), min(n, bits)))
    ]


def replacements(path: Path, *others: Path) -> list[Damage]:
    """Return replacements of a file by what is no such file.

    Args:
        path: The file. Deeply nested lists replace files of JSON and YAML only.
        *others: Files of the same or another kind that replace it, such as that of another model.
    """
    found = [
        _changed("empty", _cut(0)),
        _changed("one byte longer", lambda data: data + b"\0"),
        Damage("missing", lambda intact, path: None),
        Damage("a folder", lambda intact, path: path.mkdir()),
        Damage("a broken link", lambda intact, path: path.symlink_to("nowhere")),
        Damage("a link to itself", lambda intact, path: path.symlink_to(path.name)),
        Damage("zeros", lambda intact, path: _write(path, bytes(intact.stat().st_size), intact)),
        *(_changed(f"replaced by {other.name}", _constant(other.read_bytes())) for other in others),
    ]
    if path.suffix in (".json", ".yaml", ".jsonl", ".progress"):
        found += [
            _changed("deeply nested", _constant(b"[" * DEPTH)),
            _changed("a deeply nested value", _constant(b'{"a":' * DEPTH)),
            _changed("a huge number", _constant(b'{"a": ' + b"9" * 5_000 + b"}")),
            *(_changed(f"{text.decode()} alone", _constant(text)) for text in (b"null", b"[]", b"{}", b"1")),
            _changed("not UTF-8", lambda data: b"\xff" + data),
        ]
    if hasattr(os, "mkfifo"):
        found.append(Damage("a pipe", lambda intact, path: os.mkfifo(path)))
        if os.geteuid() != 0:  # the superuser reads everything
            found.append(Damage("unreadable", _unreadable))
    if Path("/proc/self/mem").exists():  # a file whose first byte can't be read, as on a bad disk
        found.append(Damage("an input/output error", lambda intact, path: path.symlink_to("/proc/self/mem")))
    return found


def check_refused(call: Callable[[], Any], path: Path, damage: Damage) -> str:
    """Check that a call fails as a script does with exit code 2: in one line that names the file.

    Args:
        call: Function that reads the file.
        path: The damaged file, whose name the message contains.
        damage: Damage of the file, which the message of a failed check names.

    Returns:
        The message.
    """
    message = refusal(call)
    assert message is not None, f"{path.name}, {damage}: used without a word"
    assert path.name in message, f"{path.name}, {damage}: not named in {message!r}"
    assert len(message.splitlines()) == 1, f"{path.name}, {damage}: {message!r}"
    return message


def refusal(call: Callable[[], Any]) -> str | None:
    """Return the message with which a call refuses its input, or None if it succeeds.

    Any other exception than those which :func:`~tnnlm.errors.run_script` reports in one line is raised.
    """
    with _time_limit():
        try:
            call()
        except UserError as error:
            return str(error)
        except OSError as error:
            if error.errno not in OS_ADVICE or not error.filename:
                raise
            return f"{error.filename}: {OS_ADVICE[error.errno]}"
    return None


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise an error in a block that waits for ever, for example on a pipe without a writer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still waits after {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _changed(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return Damage(name, lambda intact, path: _write(path, change(intact.read_bytes()), intact))


def _write(path: Path, data: bytes, intact: Path) -> None:
    """Write a damaged file whose times and permissions don't tell it from the intact one."""
    path.write_bytes(data)
    shutil.copystat(intact, path)


def _cut(left: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:left]


def _constant(content: bytes) -> Callable[[bytes], bytes]:
    return lambda data: content


def _flip(bit: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    return change


def _unreadable(intact: Path, path: Path) -> None:
    shutil.copy2(intact, path)
    path.chmod(0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
