"""A disk in memory that fails: what is not synced may be lost or torn, and any operation may raise.

A file has the bytes that reads see and the bytes that are on the platter. `fdatasync` copies one to the other; a crash
puts each unsynced 512-byte sector either on the platter or not. Names obey `fsync_dir` in the same way.
"""

import errno
import os
import random
from collections.abc import Sequence

from cachetier.storage.file_layer import Buffer, FileLayer

SECTOR_BYTES = 512


class SimulatedCrashError(Exception):
    """The machine loses power in the middle of a file operation."""


class _File:
    def __init__(self) -> None:
        self.seen = bytearray()
        self.platter = bytearray()
        self.unsynced: set[int] = set()  # sector numbers

    def sync(self, sectors: set[int]) -> None:
        self.platter.extend(bytes(len(self.seen) - len(self.platter)))
        for sector in sectors:
            span = slice(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES)
            self.platter[span] = self.seen[span]


class FaultFiles(FileLayer):
    """See the module. `fail_in` and `crash_in` count down file operations that change something.

    Attributes:
        fail_in: after so many more operations one raises `error`; a failing write is short, a failing sync loses data.
        crash_in: after so many more operations one raises SimulatedCrashError, half done.
        error: errno of the failure: ENOSPC or EIO.
        fail_reads: reads of segments and index raise EIO.
        capacity_bytes: what all files together may take; more is ENOSPC.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fail_in = self.crash_in = -1
        self.error = errno.EIO
        self.fail_reads = False
        self.capacity_bytes = 1 << 40
        self._names: dict[str, _File] = {}
        self._durable_names: dict[str, _File] = {}
        self._open: dict[int, _File] = {}

    def crash(self) -> None:
        """Lose power: forget what was not synced, sector by sector, and close everything."""
        for folder in {os.path.dirname(name) for name in (*self._names, *self._durable_names)}:
            if self.rng.random() < 0.5:
                self.fsync_dir(folder)
        self._names = dict(self._durable_names)
        for file in self._names.values():
            file.sync({sector for sector in file.unsynced if self.rng.random() < 0.5})
            file.seen = bytearray(file.platter)
            file.unsynced = set()
        self._open = {}
        self.fail_in = self.crash_in = -1
        self.fail_reads = False

    def contents(self) -> dict[str, bytearray]:
        """Return what reads see of each file; change it to flip bits."""
        return {name: file.seen for name, file in self._names.items()}

    def open(self, path: str, *, create: bool = False, direct: bool = False) -> int:
        if path not in self._names:
            if not create:
                raise FileNotFoundError(errno.ENOENT, path)
            self._names[path] = _File()
        descriptor = max(self._open, default=2) + 1
        self._open[descriptor] = self._names[path]
        return descriptor

    def close(self, descriptor: int) -> None:
        del self._open[descriptor]

    def pwritev(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
        file, data = self._open[descriptor], b"".join(buffers)
        is_short = self._is_hit()
        is_last = self._is_crash()
        if is_short or is_last:
            data = data[: self.rng.randrange(len(data) + 1)]
        end = offset + len(data)
        file.seen.extend(bytes(max(0, end - len(file.seen))))
        file.seen[offset:end] = data
        file.unsynced |= set(range(offset // SECTOR_BYTES, -(-end // SECTOR_BYTES)))
        if is_last:
            raise SimulatedCrashError
        if is_short:
            raise OSError(self.error, "injected")

    def pread(self, descriptor: int, size_bytes: int, offset: int) -> bytes:
        buffer = bytearray(size_bytes)
        self.preadv(descriptor, [buffer], offset)
        return bytes(buffer)

    def preadv(self, descriptor: int, buffers: Sequence[bytearray | memoryview], offset: int) -> None:
        if self.fail_reads:
            raise OSError(errno.EIO, "injected")
        seen = self._open[descriptor].seen
        for buffer in buffers:
            data = seen[offset : offset + len(buffer)]
            if len(data) != len(buffer):
                raise OSError(errno.EIO, "short read")
            buffer[:] = data
            offset += len(buffer)

    def fdatasync(self, descriptor: int) -> None:
        file = self._open[descriptor]
        if self._is_crash():
            raise SimulatedCrashError
        if self._is_hit():  # as Linux does: dirty pages count as clean now, whether they reached the disk or not
            file.sync({sector for sector in file.unsynced if self.rng.random() < 0.5})
            file.unsynced = set()
            raise OSError(errno.EIO, "injected")
        file.sync(file.unsynced)
        file.unsynced = set()

    def fallocate(self, descriptor: int, size_bytes: int) -> None:
        file = self._open[descriptor]
        more = max(0, size_bytes - len(file.seen))
        if self._is_hit() or sum(len(each.seen) for each in self._names.values()) + more > self.capacity_bytes:
            raise OSError(errno.ENOSPC, "injected")
        file.seen.extend(bytes(more))
        file.platter.extend(bytes(len(file.seen) - len(file.platter)))

    def fsync_dir(self, path: str) -> None:
        in_folder = {name: file for name, file in self._names.items() if os.path.dirname(name) == path}
        rest = {name: file for name, file in self._durable_names.items() if os.path.dirname(name) != path}
        self._durable_names = {**rest, **in_folder}

    def unlink(self, path: str) -> None:
        del self._names[path]

    def rename(self, source: str, target: str) -> None:
        self._names[target] = self._names.pop(source)

    def listdir(self, path: str) -> list[str]:
        return sorted(os.path.basename(name) for name in self._names if os.path.dirname(name) == path)

    def size(self, descriptor: int) -> int:
        return len(self._open[descriptor].seen)

    def _is_hit(self) -> bool:
        self.fail_in -= 1
        return self.fail_in == -1

    def _is_crash(self) -> bool:
        self.crash_in -= 1
        return self.crash_in == -1
