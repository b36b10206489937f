"""What the tests of faults do to a server: its memory, its files and its disk."""

import contextlib
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cachetier.client import ArenaView, Client, Session
from cachetier.core.arena_format import STATE_FILLING, STATE_READY
from cachetier.core.layout import PAGE_BYTES, digests_offset, num_pages
from cachetier.storage.records import peek_header_bytes, unpack_header
from tests.e2e.harness import Server

OBJECT_BYTES = 64 * 4 * 4 * 128  # tokens a chunk, heads, layers and bytes a row of the model that the tests run


class SharedArena:
    """The arena of a running server, mapped as an engine maps it."""

    def __init__(self, server: Server) -> None:
        client = Client(str(server.socket))
        session = Session(client, "test", "test", 5)
        path = session.server.arena_path
        session.close()
        client.close()
        view = ArenaView.attach(path)
        geometry = view.geometry
        view.close()
        file = np.memmap(path, np.uint8, "r+")
        self._states = file[geometry.state_offset :][: geometry.data_bytes // PAGE_BYTES]
        self._data = file[geometry.data_offset :]

    def ready_frames(self) -> list[int]:
        """Return the offsets of all frames that are filled."""
        return [int(page) * PAGE_BYTES for page in np.flatnonzero(self._states == STATE_READY)]

    def flip_bit(self, rng: random.Random, frame: int, where: str) -> None:
        """Flip a bit of the "object" in `frame`, or of its "digests"."""
        self._data[frame + random_byte(rng, where)] ^= 1 << rng.randrange(8)

    @contextlib.contextmanager
    def held(self, frames: list[int]) -> Iterator[None]:
        """Have `frames` look as if they were still on their way from disk, so that a load waits for them."""
        pages = [frame // PAGE_BYTES for frame in frames]
        self._states[pages] = STATE_FILLING
        try:
            yield
        finally:
            self._states[pages] = STATE_READY


def random_byte(rng: random.Random, where: str) -> int:
    """Return the number of a byte of a frame that something depends on."""
    if where == "object":
        return rng.randrange(OBJECT_BYTES)
    return digests_offset(OBJECT_BYTES) + rng.randrange(num_pages(OBJECT_BYTES) * 8)


def flip_bits_on_disk(rng: random.Random, data_dir: Path, places: list[str]) -> None:
    """Flip a bit in one record for each of `places`: its "header", the "object" in it, or the object's "digests"."""
    records = [
        (path, offset, len(header))
        for path in sorted((data_dir / "segments").iterdir())
        for offset, header in record_headers(path.read_bytes())
    ]
    for place, (path, offset, header_bytes) in zip(places, rng.sample(records, len(places)), strict=True):
        at = offset + (rng.randrange(200) if place == "header" else header_bytes + random_byte(rng, place))
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def record_headers(segment: bytes) -> Iterator[tuple[int, bytes]]:
    """Return offset and header of all records in a segment."""
    for offset in range(0, len(segment), PAGE_BYTES):
        header = segment[offset : offset + peek_header_bytes(segment[offset : offset + PAGE_BYTES])]
        if header and unpack_header(header):
            yield offset, header


@contextlib.contextmanager
def no_file_grows(server: Server) -> Iterator[None]:
    """Let every write of the server to a file fail, as on a full disk, without the rights to make a small disk.

    Memory that is mapped already, as the arena is, can be written.
    """
    _, most = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1, most))
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (most, most))
