"""Permissions to run code, and keyed records of the code that this user made or ran on this machine.

Files of a model come from strangers. Code that they carry or name (a compiled step, a kernel module) runs
only if the user named it, allowed it, or has a record of it. A record is a file whose name is the HMAC-SHA256
of what it describes under a random key that only the user can read, so that no one else can make one.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tnnlm.errors import UserError
from tnnlm.files import cache_root

_KEY_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Code of a model that the user allows to run."""

    code: bool = False
    """Whether the kernel module that a file names may run, whatever its hash, and in a resumed training the
    loggers, callbacks and profiler that the run names (``--trust-code``)."""
    compiled: bool = False
    """Whether a compiled step made elsewhere may run (``--trust-compiled``)."""
    module: str | None = None
    """Kernel module that the user named (``--kernel-module``), which is run in place of the one that a file
    names if it has the hash in the file; None if the user named none."""


NO_CODE = Trust()
"""Nothing but what this user made or ran on this machine."""


def remember(kind: str, **facts: str) -> bool:
    """Record that this user made or ran something.

    Args:
        kind: Kind of the code, such as ``compiled step``.
        facts: Everything that identifies it, such as its hash.

    Returns:
        Whether there is a record now; False if the cache is not writable or not private, or there is none.
    """
    with contextlib.suppress(OSError, UserError):
        key = _writing_key()
        if key is not None:
            # The name alone is the record; the text tells a reader what it is about.
            text = json.dumps({"kind": kind, **facts})
            (_folder() / _name(key, kind, facts)).write_text(text, encoding="utf-8")
            return True
    return False


def can_remember() -> bool:
    """Return whether :func:`remember` can make records, for work that is useless without one."""
    with contextlib.suppress(OSError, UserError):
        return _writing_key() is not None and os.access(_folder(), os.W_OK)
    return False


def remembered(kind: str, **facts: str) -> bool:
    """Return whether :func:`remember` recorded exactly this for this user."""
    with contextlib.suppress(OSError, UserError):
        folder = _folder()
        key = _key(folder)
        return key is not None and (folder / _name(key, kind, facts)).is_file()
    return False


def _folder() -> Path:
    """Return the folder of the records, one per user, because a cache may be shared."""
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    return cache_root() / f"trust{user}"


def _writing_key() -> bytes | None:
    """Return the key for new records, which is made if there is none; None if the folder is not private."""
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _key(folder) or _new_key(folder)


def _name(key: bytes, kind: str, facts: dict[str, str]) -> str:
    said = json.dumps([kind, facts], sort_keys=True).encode()
    return f"{hmac.new(key, said, 'sha256').hexdigest()}.json"


def _key(folder: Path) -> bytes | None:
    """Return the key; None if there is none, or if others could have written or read it."""
    path = folder / "key"
    if not _is_private(folder.lstat(), stat.S_ISDIR):
        return None
    with contextlib.suppress(FileNotFoundError):
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(number, "rb") as file:
            key = file.read(_KEY_BYTES + 1) if _is_private(os.fstat(number), stat.S_ISREG) else b""
            return key if len(key) == _KEY_BYTES else None
    return None


def _new_key(folder: Path) -> bytes | None:
    """Write a random key, unless another process does so first, and return the stored key.

    Another process must see a whole key or none, so a whole one is given its name. A file system without hard
    links, such as FAT or that of some containers, gets it under its name at once.
    """
    own, key = folder / f".key.{secrets.token_hex(8)}.tmp", folder / "key"
    _write_key(own)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(own, key)
    except OSError:
        with contextlib.suppress(FileExistsError):
            _write_key(key)
    finally:
        own.unlink()
    return _key(folder)


def _write_key(path: Path) -> None:
    """Write a random key to a new file that only its owner can read."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with os.fdopen(number, "wb", buffering=0) as file:
        file.write(secrets.token_bytes(_KEY_BYTES))


def is_own(folder: Path) -> bool:
    """Return whether a folder belongs to this user and no one else can write to it.

    The group may write if it is the user's own, which has no other member: where every user has such a group,
    the umask usually allows it.
    """
    found = folder.stat()
    if not hasattr(os, "getuid"):  # Windows: the user's profile is closed to others
        return True
    if found.st_uid != os.getuid() or found.st_mode & 0o002:
        return False
    return not found.st_mode & 0o020 or _is_private_group(found.st_gid)


def _is_private_group(number: int) -> bool:
    """Return whether a group is the primary one of this user, has its name, and lists no one else."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(number)
    except KeyError:  # without a name, as in some containers
        return False
    return (user.pw_gid, user.pw_name) == (number, group.gr_name) and not {*group.gr_mem} - {user.pw_name}


def _is_private(found: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    """Return whether a file or folder is of a kind, belongs to this user, and is closed to all others."""
    if not is_kind(found.st_mode):
        return False
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o077)
