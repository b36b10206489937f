"""How much of the disk's bandwidth does the disk tier reach, writing groups and reading chunks?

The yardstick is the same pattern without us: O_DIRECT on a preallocated file of the same disk, one sequential write and
one `fdatasync` a group, one read a chunk, from as many threads. Yardstick and tier take turns, and the medians over the
rounds count. The tier writes in addition a header for each chunk and the index, and verifies headers when it reads.
Its index is new: no page of it has to be read before it is written. After a restart, with pages that are not in the
page cache, groups of 128 KiB objects were written at half the rate (30 % of the yardstick instead of 60 %).

    python bench/segments.py [--dir DIR] [--group-mib 64] [--rounds 7]
"""

import argparse
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from record import record, row

from cachetier.core.config import GIB, MIB, ServerConfig
from cachetier.core.keys import ChainKey, NamespaceId
from cachetier.core.layout import Shard, frame_bytes
from cachetier.storage.data_dir import DataDir
from cachetier.storage.disk import ChunkToWrite, DiskChunk, DiskTier
from cachetier.storage.segments import aligned_buffer

CONTENT = bytes(256)


class Raw:
    """The yardstick: a preallocated file, written over and over as segments are, without header or index."""

    def __init__(self, folder: str, num_bytes: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_DIRECT
        self._descriptor = os.open(os.path.join(folder, "raw"), flags, 0o600)
        os.posix_fallocate(self._descriptor, 0, num_bytes)
        self._num_bytes, self._tail = num_bytes, 0

    def write(self, frames: list[memoryview]) -> None:
        size = sum(map(len, frames))
        if self._tail + size > self._num_bytes:
            self._tail = 0
        for start in range(0, len(frames), 1000):
            part = frames[start : start + 1000]
            assert os.pwritev(self._descriptor, part, self._tail) == sum(map(len, part))
            self._tail += sum(map(len, part))
        os.fdatasync(self._descriptor)

    def read(self, number: int, frame: memoryview) -> None:
        assert os.preadv(self._descriptor, [frame], number * len(frame)) == len(frame)


class Tier:
    """The disk tier, with chunks of one object."""

    def __init__(self, folder: str, num_bytes: int, object_bytes: int) -> None:
        path = os.path.join(folder, "tier")
        self._config = ServerConfig(data_dir=path, socket="/tmp/unused", disk_bytes=num_bytes, segment_bytes=GIB // 4)
        self._data_dir = DataDir.open(self._config)
        self._tier = DiskTier.open(self._config)
        self._object_bytes = object_bytes
        self.keys: list[ChainKey] = []

    def write(self, frames: list[memoryview]) -> None:
        writes = [ChunkToWrite(chunk=self._chunk(), frames=[frame]) for frame in frames]
        assert all(self._tier.append(writes))

    def read(self, number: int, frame: memoryview) -> None:
        assert self._tier.read(self.keys[number], [frame])

    def close(self) -> None:
        self._tier.close()
        self._data_dir.close()

    def _chunk(self) -> DiskChunk:
        key = ChainKey(os.urandom(16))
        self.keys.append(key)
        return DiskChunk(
            key=key,
            parent=ChainKey(bytes(16)),
            namespace=NamespaceId(bytes(16)),
            position=0,
            group=0,
            content=CONTENT,
            tiling=(Shard(0, 8, 0, 32),),
            object_bytes=(self._object_bytes,),
            checksums=(0,),
        )


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_all(read: Callable[[int, memoryview], None], numbers: Sequence[int], size: int, num_threads: int) -> None:
    def run(part: Sequence[int]) -> None:
        frame = aligned_buffer(size)
        for number in part:
            read(number, frame)

    threads = [threading.Thread(target=run, args=(numbers[first::num_threads],)) for first in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(folder: str, object_bytes: int, group_bytes: int, rounds: int) -> list[dict[str, object]]:
    size = frame_bytes(object_bytes)
    block = aligned_buffer(group_bytes)
    block[:MIB] = random.Random(1).randbytes(MIB)
    frames = [block[start : start + size] for start in range(0, group_bytes - size + 1, size)]
    num_bytes = 2 * GIB
    raw, tier = Raw(folder, num_bytes), Tier(folder, num_bytes, object_bytes)
    mib = len(frames) * size / MIB
    rates: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        pair = [("raw O_DIRECT", raw), ("cachetier", tier)]
        for name, contender in pair if number % 2 else reversed(pair):
            rate = mib / timed(partial(contender.write, frames))
            rates.setdefault(("write a group, new index", name), []).append(rate)
    rng = random.Random(object_bytes)
    for num_threads in (1, 4):
        for number in range(rounds):
            numbers = rng.sample(range(len(frames) * min(rounds, 3)), min(256, len(frames)))
            for name, contender in pair if number % 2 else reversed(pair):
                seconds = timed(partial(read_all, contender.read, numbers, size, num_threads))
                rate = len(numbers) * size / MIB / seconds
                rates.setdefault((f"read chunks, {num_threads} threads", name), []).append(rate)
    tier.close()
    shutil.rmtree(os.path.join(folder, "tier"))
    os.unlink(os.path.join(folder, "raw"))
    rows = []
    for question in dict.fromkeys(question for question, _ in rates):
        ours, yardstick = (statistics.median(rates[question, name]) for name in ("cachetier", "raw O_DIRECT"))
        parameters = {"object_kib": object_bytes // 1024, "group_mib": group_bytes // MIB}
        rows.append(row(question, "raw O_DIRECT", round(yardstick), "MiB/s", **parameters))
        rows.append(row(question, "cachetier", round(ours), "MiB/s", **parameters))
        rows.append(row(question, "cachetier / raw", round(100 * ours / yardstick, 1), "%", **parameters))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where to write: decides which disk is measured (default: the temporary folder)")
    parser.add_argument("--group-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--object-kib", type=int, nargs="+", default=[128, 1024, 8192])
    args = parser.parse_args()
    rows = []
    for object_kib in args.object_kib:
        folder = tempfile.mkdtemp(dir=args.dir)
        try:
            rows += measure(folder, object_kib * 1024, args.group_mib * MIB, args.rounds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    record("segments", rows)


if __name__ == "__main__":
    main()
