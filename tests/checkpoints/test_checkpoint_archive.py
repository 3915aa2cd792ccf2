"""Archives whose directory claims what the file doesn't hold are damaged, and raise no other error."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest

from tnnlm.checkpoints.archive import archive_fault
from tnnlm.checkpoints.training import read_checkpoint
from tnnlm.errors import CheckpointError

PATH = Path("last.ckpt")


def write_directory_with(offset: int) -> None:
    """Write an archive of one member that begins at ``offset`` of 64 bits, as its directory says."""
    with zipfile.ZipFile(PATH, "w") as archive:
        archive.writestr("archive/data.pkl", b"content")
    data = bytearray(PATH.read_bytes())
    entry = data.find(b"PK\x01\x02")
    (name,) = struct.unpack_from("<H", data, entry + 28)
    extra = struct.pack("<HHQ", 1, 8, offset)
    struct.pack_into("<H", data, entry + 30, len(extra))
    struct.pack_into("<L", data, entry + 42, 0xFFFFFFFF)  # the offset is in the extra field
    data[entry + 46 + name : entry + 46 + name] = extra
    end = data.rfind(b"PK\x05\x06")
    struct.pack_into("<L", data, end + 12, end - entry)
    PATH.write_bytes(data)


def test_intact_archive_has_no_fault() -> None:
    write_directory_with(0)
    assert archive_fault(PATH) is None


@pytest.mark.parametrize("offset", [10_000, 2**63 - 1, 2**63, 2**64 - 1])
def test_member_that_begins_outside_of_the_file_is_a_fault(offset: int) -> None:
    write_directory_with(offset)
    with pytest.raises(CheckpointError, match=r"damaged \(a member begins outside of the file\)"):
        read_checkpoint(PATH)


def test_directory_that_is_not_where_the_archive_says_is_a_fault() -> None:
    write_directory_with(0)
    data = bytearray(PATH.read_bytes())
    field = data.rfind(b"PK\x05\x06") + 16
    struct.pack_into("<L", data, field, struct.unpack_from("<L", data, field)[0] + 10)
    PATH.write_bytes(data)
    assert archive_fault(PATH) is not None
