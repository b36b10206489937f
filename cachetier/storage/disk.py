"""The disk tier: what the store sees of it.

Locking design: `_write_lock` is held by whoever changes the log: `append` from start to end, `drop` only if nobody else
has it. A dropped chunk is condemned first: from then on nobody sees it, and whoever has the lock next removes its row.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from cachetier.core.config import ServerConfig
from cachetier.core.keys import ChainKey, ModelIdentity, NamespaceId
from cachetier.core.layout import KVLayout
from cachetier.storage.data_dir import disk_shape
from cachetier.storage.disk_counters import DiskCounters
from cachetier.storage.file_layer import FileLayer
from cachetier.storage.index import Location
from cachetier.storage.namespaces import NamespaceTable, StoredNamespace
from cachetier.storage.record_reads import HeldRecord, PlacedRead, Run, extend_runs
from cachetier.storage.records import DiskChunk
from cachetier.storage.segment_log import ChunkToWrite, SegmentLog

__all__ = ["ChunkToWrite", "DiskChunk", "DiskCounters", "DiskTier", "HeldRecord", "StoredNamespace"]

_log = logging.getLogger(__name__)


class DiskTier:
    """Chunks on disk. `append` belongs to one thread; everything else runs on any thread, also at the same time."""

    def __init__(self, log: SegmentLog, namespaces: NamespaceTable, limit_bytes: int) -> None:
        """Take over an open log; `open` is the way to make a tier."""
        self._segment_log = log
        self._namespaces = namespaces
        self._write_lock = threading.Lock()
        self._condemned: set[ChainKey] = set()
        self._dropped: deque[ChainKey] = deque()
        self.limit_bytes = limit_bytes

    @classmethod
    def open(
        cls,
        config: ServerConfig,
        files: FileLayer | None = None,
        *,
        is_hot: Callable[[ChainKey], bool] = lambda key: False,
        is_pinned: Callable[[ChainKey], bool] = lambda key: False,
    ) -> "DiskTier":
        """Open the tier in `config.data_dir`, which the caller has locked (`DataDir.open`), and recover it.

        `append` reclaims the oldest segment when it needs room, on its caller's thread. It then asks `is_pinned`
        (a lease needs the chunk: always carried over) and `is_hot` (it was hit: carried over up to half a segment).
        Both must be safe to call from that thread and must not call the tier.

        Raises:
            ConfigError: `disk_bytes` has no room for two segments of this directory.
            FormatError: another version wrote the directory.
            OSError: the disk fails or has no room for the index.
        """
        files = files or FileLayer()
        log = SegmentLog(config.data_dir, disk_shape(config), files, is_hot, is_pinned)
        return cls(log, NamespaceTable(config.data_dir, files), config.disk_bytes)

    def lookup(self, key: ChainKey) -> DiskChunk | None:
        """Return what is known of the chunk `key`, or None. Does not wait for writers or for payloads."""
        location = self._find(key)
        return location.chunk if location else None

    def chunks(self) -> Iterator[DiskChunk]:
        """Yield all chunks, reading the whole index; of what is written or dropped meanwhile, some.

        Raises:
            OSError: the disk fails.
        """
        return (chunk for chunk in self._segment_log.chunks() if chunk.key not in self._condemned)

    def take_lost(self) -> list[ChainKey]:
        """Return the chunks that went since the last call, by eviction or `drop`; some may have been stored again.

        For the thread that appends.
        """
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        return [*dropped, *self._segment_log.take_lost()]

    def append(self, chunks: Sequence[ChunkToWrite]) -> list[bool]:
        """Write `chunks` and return, when they are durable and visible, which of them are stored.

        A chunk that is already stored counts as stored and is not written again. Never raises for a full or failing
        disk: what it cannot store it refuses.
        """
        with self._write_lock:
            self._remove_condemned()
            stored = self._segment_log.write(chunks)
            self._remove_condemned()
        self.counters.refused += stored.count(False)
        return stored

    def read(self, key: ChainKey, frames: Sequence[memoryview]) -> bool:
        """Fill `frames` (one per shard, whole frames, page-aligned) with the chunk; False: gone or unreadable.

        The bytes are what the disk gave: whoever uses them verifies digests and checksum. A chunk that cannot be read
        is dropped.
        """
        return self.read_many([(key, frames)])[0]

    def read_many(self, wanted: Sequence[tuple[ChainKey, Sequence[memoryview]]]) -> list[bool]:
        """Do as `read` for each of `wanted`, neighbours on disk in one read; return which were filled."""
        outcomes: list[bool] = []
        runs: list[Run] = []
        for number, (key, frames) in enumerate(wanted):
            location = self._find(key)
            outcomes.append(False)
            if location is not None:
                extend_runs(runs, PlacedRead(number, location, frames))
        for run in runs:
            for read, is_good in zip(run, self._segment_log.read_run(run), strict=True):
                outcomes[read.number] = bool(is_good)
                if is_good is False:
                    self.drop([wanted[read.number][0]])
        return outcomes

    def hold(self, key: ChainKey) -> HeldRecord | None:
        """Say where the chunk's frames lie and let nothing be written there until `let_go`; None: it is gone."""
        location = self._find(key)
        return self._segment_log.hold(location) if location else None

    def let_go(self, record: HeldRecord) -> None:
        """End a `hold`."""
        self._segment_log.let_go(record)

    def drop(self, keys: Iterable[ChainKey]) -> int:
        """Forget chunks at once, and durably as soon as no group is being written; return how many were held."""
        held = {key for key in keys if self._find(key)}
        self._condemned |= held
        self._dropped.extend(held)
        self.counters.dropped += len(held)
        if held and self._write_lock.acquire(blocking=False):
            try:
                self._remove_condemned()
            finally:
                self._write_lock.release()
        return len(held)

    def remember_namespace(self, namespace: NamespaceId, identity: ModelIdentity, layouts: list[KVLayout]) -> None:
        """Keep what is known of `namespace` across restarts; a disk that fails makes it forget."""
        try:
            self._namespaces.remember(StoredNamespace(identity, layouts))
        except OSError as error:
            _log.warning("namespace %s is not remembered: %s", namespace.hex(), error)

    def namespaces(self) -> dict[NamespaceId, StoredNamespace]:
        """Return all remembered namespaces."""
        return dict(self._namespaces.known)

    @property
    def counters(self) -> DiskCounters:
        """What happened since `open`."""
        counters = self._segment_log.counters
        counters.bad_pages = self._segment_log.num_bad_pages
        return counters

    @property
    def num_held(self) -> int:
        """How many holds have not ended."""
        return self._segment_log.num_held

    @property
    def segments_dir(self) -> str:
        """Folder of the segment files."""
        return self._segment_log.folder

    @property
    def num_chunks(self) -> int:
        """Chunks that are durable and visible."""
        return self._segment_log.num_rows - len(self._condemned)

    @property
    def used_bytes(self) -> int:
        """Bytes taken on disk: the index and the segment files that exist, filled or not."""
        return self._segment_log.used_bytes

    def check_integrity(self) -> None:
        """Raise AssertionError if rows, segment table and files contradict each other."""
        with self._write_lock:
            self._remove_condemned()
            self._segment_log.check_integrity()
        assert self.used_bytes <= self.limit_bytes

    def close(self) -> None:
        """Write the books and close all files."""
        with self._write_lock:
            self._remove_condemned()
            self._segment_log.close()

    def _find(self, key: ChainKey) -> Location | None:
        return None if key in self._condemned else self._segment_log.find(key)

    def _remove_condemned(self) -> None:
        """Remove the rows of condemned chunks; the caller holds the write lock."""
        condemned = list(self._condemned)
        if not condemned and self._segment_log.is_settled:
            return
        try:
            self._segment_log.remove(condemned)
        except OSError as error:
            self.counters.write_errors += 1
            _log.warning("dropped chunks stay in the index for now: %s", error)
            return
        self._condemned.difference_update(condemned)
