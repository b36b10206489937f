"""What do flipped bits in the structure of an index do to the process that reads it: LMDB, and our own index?

Both hold the same 2,000 rows, put in groups of 100. Bits are flipped, one at a time, in what says where things lie: in
LMDB the settings pages, the page headers, the first and last entries of the offset tables and the node headers; in ours
the settings, the slot headers, the row counts and the tables of row ends. For each flip a child process opens the
file, looks up every row, removes 50, puts 200 and looks up the rest once more. Counted are flips after which the child

    crashed     ended by a signal (or did not end within ten seconds)
    gave wrong  returned for some key bytes that were never put under it
    missed      did not find some row
    refused     raised an exception on opening or in any operation

    python bench/index_faults.py [--flips 1000]
"""

import argparse
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from record import record, row

from cachetier.core.layout import PAGE_BYTES
from cachetier.storage.file_layer import FileLayer
from cachetier.storage.index import Index, IndexSettings, SegmentEntry
from cachetier.storage.pages import PAYLOAD_OFFSET

try:
    import lmdb
except ImportError:
    sys.exit("LMDB is needed for the comparison: pip install 'cachetier[dev]' or pip install lmdb")

RNG = random.Random(1)
ROWS = {RNG.randbytes(16): RNG.randbytes(340) for _ in range(2000)}
MORE = {RNG.randbytes(16): RNG.randbytes(340) for _ in range(200)}
KEYS = list(ROWS)
SHAPE = IndexSettings(limit_bytes=4 << 20, segment_bytes=1 << 20, num_segments=4, chunk_tokens=64)
CRASHED, WRONG, MISSED, REFUSED = 1, 2, 4, 8  # the child's exit status


class Lmdb:
    """LMDB with one named table."""

    file = "data.mdb"
    error = lmdb.Error

    def __init__(self, folder: str) -> None:
        self._environment = lmdb.open(folder, map_size=64 << 20, max_dbs=4)
        self._table = self._environment.open_db(b"chunks")

    def get(self, key: bytes) -> bytes | None:
        with self._environment.begin(db=self._table) as transaction:
            return transaction.get(key)

    def change(self, put: dict[bytes, bytes], remove: list[bytes]) -> None:
        with self._environment.begin(write=True, db=self._table) as transaction:
            for key in remove:
                transaction.delete(key)
            for key, body in put.items():
                transaction.put(key, body)

    def close(self) -> None:
        self._environment.close()

    @staticmethod
    def targets(image: bytes) -> list[int]:
        """Return the bytes of settings, page headers, offset tables and node headers."""
        found = [*range(16, 160), *range(PAGE_BYTES + 16, PAGE_BYTES + 160)]
        for start in range(2 * PAGE_BYTES, len(image), PAGE_BYTES):
            _, lower = struct.unpack_from("<HH", image, start + 10)
            if not 18 <= lower <= PAGE_BYTES:
                continue
            for entry in {16, lower - 2}:
                (node,) = struct.unpack_from("<H", image, start + entry)
                found += [start + entry, start + entry + 1]
                found += range(start + node, start + min(node + 8, PAGE_BYTES))
            found += range(start + 10, start + 16)
        return found


class Ours:
    """cachetier's index; its lookups hand out the body undecoded, so any bytes will do."""

    file = "chunks.idx"
    error = OSError

    def __init__(self, folder: str) -> None:
        self._index = Index(os.path.join(folder, self.file), SHAPE, FileLayer())

    def get(self, key: bytes) -> bytes | None:
        location = self._index.find(key)
        return location.body if location else None

    def change(self, put: dict[bytes, bytes], remove: list[bytes]) -> None:
        for key in remove:
            self._index.remove(key)
        for key, body in put.items():
            self._index.put(key, 1, 0, body, {1})
        self._index.stage_table([SegmentEntry(1, 0, len(ROWS))] * 4, {0})
        self._index.commit()

    def close(self) -> None:
        self._index.close()

    @staticmethod
    def targets(image: bytes) -> list[int]:
        """Return the bytes of settings, slot headers, row counts and tables of row ends."""
        found: list[int] = []
        for start in range(0, len(image), PAGE_BYTES):
            (count,) = struct.unpack_from("<I", image, start + PAYLOAD_OFFSET)
            if start < 4 * PAGE_BYTES:  # settings and segment table
                found += range(start, start + PAYLOAD_OFFSET + 28)
            elif count:
                ends = start + PAYLOAD_OFFSET + 4 + 16 * count
                found += [*range(start, start + PAYLOAD_OFFSET + 4), *range(ends, ends + 4 * count)]
        return found


def build(contender: type[Lmdb] | type[Ours], folder: str) -> bytes:
    opened = contender(folder)
    for start in range(0, len(KEYS), 100):
        opened.change({key: ROWS[key] for key in KEYS[start : start + 100]}, [])
    opened.close()
    return Path(folder, contender.file).read_bytes()


def use(contender: type[Lmdb] | type[Ours], folder: str) -> int:
    """Do what a server does with an index; return what was seen, as exit status."""
    seen = 0

    def attempt(work: Callable[[], int]) -> None:
        nonlocal seen
        try:
            seen |= work()
        except contender.error:
            seen |= REFUSED

    def look_up(key: bytes, body: bytes) -> int:
        found = opened.get(key)
        return MISSED if found is None else WRONG * (found != body)

    try:
        opened = contender(folder)
    except contender.error:
        return REFUSED
    for key in KEYS:
        attempt(partial(look_up, key, ROWS[key]))
    attempt(lambda: opened.change(MORE, KEYS[:50]) or 0)
    if not seen & REFUSED:
        for key in KEYS[50:]:
            attempt(partial(look_up, key, ROWS[key]))
    return seen


def in_child(contender: type[Lmdb] | type[Ours], folder: str) -> int:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(10)
        status = REFUSED  # any other exception
        try:
            status = use(contender, folder)
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return CRASHED if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def measure(contender: type[Lmdb] | type[Ours], num_flips: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        image = build(contender, folder)
        assert in_child(contender, folder) == 0, "the untouched index does not work"
        rng = random.Random(5)
        targets = contender.targets(image)
        for _ in range(num_flips):
            damaged = bytearray(image)
            damaged[rng.choice(targets)] ^= 1 << rng.randrange(8)
            Path(folder, contender.file).write_bytes(damaged)
            seen = in_child(contender, folder)
            for name, bit in (("crashed", CRASHED), ("gave wrong", WRONG), ("missed", MISSED), ("refused", REFUSED)):
                counts[name] += bool(seen & bit)
    finally:
        shutil.rmtree(folder)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    num_flips = parser.parse_args().flips
    rows = []
    for contender, name in ((Lmdb, "LMDB"), (Ours, "cachetier's index")):
        counts = measure(contender, num_flips)
        for outcome in ("crashed", "gave wrong", "missed", "refused"):
            rows.append(row(f"flips after which a reader {outcome}", name, counts[outcome], "flips", of=num_flips))
    record("index_faults", rows)


if __name__ == "__main__":
    main()
