"""File systems of a network, on which a lock may not hold between machines."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "gpfs", "lustre", "nfs", "nfs4",
    "ncpfs", "ocfs2", "orangefs", "pvfs2", "smb3", "smbfs",
}  # fmt: skip
_said: set[str] = set()


def network_file_system(path: Path) -> str | None:
    """Return the type of the network file system that a path is on, such as ``nfs4``; None on a local one.

    Only Linux tells.
    """
    try:
        table = mount_table()
    except OSError:
        return None
    real = Path(os.path.realpath(path))
    kind, longest = "", -1
    for line in table.splitlines():
        _, mounted, found, *_ = line.split(" ")
        # Spaces and the like in a path are written as octal numbers.
        point = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), mounted))
        # A later entry of the same path hides the former one.
        if real.is_relative_to(point) and len(point.parts) >= longest:
            kind, longest = found, len(point.parts)
    return kind if kind in _NETWORK else None


def mount_table() -> str:
    """Return the table of mounted file systems.

    Raises:
        OSError: On systems other than Linux.
    """
    return Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape")


def say_once(line: str) -> None:
    """Print a line to stderr, once in a process."""
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr)
