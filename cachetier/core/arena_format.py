"""The arena's format: one file in shared memory that the server and every worker map.

    offset 0          header, 4 KiB: magic, version, offsets and sizes, instance of the server
    state_offset      one byte for each 4 KiB page of the data area; a frame's state stands at its first page
    data_offset       the data area; frame offsets in messages count from here and are multiples of 4 KiB

The server makes a new file at every start; whoever still maps the old one holds bytes that no lease protects.
"""

import struct
from typing import NamedTuple

from cachetier.core.errors import FormatError
from cachetier.core.layout import PAGE_BYTES, round_up

MAGIC = b"CTARENA1"
_HEADER = struct.Struct("<8sQQQ16s")

STATE_FREE = 0
STATE_FILLING = 1  # somebody who holds a lease is writing it
STATE_READY = 2  # filled; its checksum has yet to be verified by whoever uses it
STATE_BAD = 3  # filling it failed: treat as a miss


class ArenaGeometry(NamedTuple):
    """Where things lie in an arena file, in bytes."""

    state_offset: int
    data_offset: int
    data_bytes: int
    instance: bytes

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.data_offset + self.data_bytes


def geometry_for(file_bytes: int, instance: bytes) -> ArenaGeometry:
    """Return the largest arena that fits into `file_bytes`; `instance` has 16 bytes."""
    pages = file_bytes // PAGE_BYTES - 1
    data_pages = pages * PAGE_BYTES // (PAGE_BYTES + 1)
    data_offset = PAGE_BYTES + round_up(data_pages, PAGE_BYTES)
    return ArenaGeometry(PAGE_BYTES, data_offset, data_pages * PAGE_BYTES, instance)


def pack_header(geometry: ArenaGeometry) -> bytes:
    """Return the first bytes of the file."""
    return _HEADER.pack(MAGIC, geometry.state_offset, geometry.data_offset, geometry.data_bytes, geometry.instance)


def unpack_header(data: bytes) -> ArenaGeometry:
    """Reverse `pack_header`.

    Raises:
        FormatError: `data` is no arena header.
    """
    if len(data) < _HEADER.size or not data.startswith(MAGIC):
        raise FormatError(f"not an arena: it starts with {bytes(data[: len(MAGIC)])!r}")
    return ArenaGeometry(*_HEADER.unpack(data[: _HEADER.size])[1:])
