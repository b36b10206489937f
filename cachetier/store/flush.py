"""The flush thread: writes ready chunks to disk in groups, and does what else writes to the index.

Locking design: the queues, the counters and the host table are guarded by the store's lock. The thread takes a group
under the lock (its chunks are pinned since they were offered), writes it without the lock, and takes the lock again to
note the outcome. It is the only caller of `DiskTier.append`, `drop` and `remember_namespace`.

Bounds: the backlog holds at most `backlog_bytes` of frames; a chunk offered beyond that stays in host memory alone and
is counted, and is offered again when it is hit. The errands are at most one for each chunk on disk, one for each known
namespace, and one for the documents.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from cachetier.core.keys import ChainKey
from cachetier.core.messages import TIER_DISK
from cachetier.storage.disk import ChunkToWrite, DiskChunk, DiskTier
from cachetier.store.books import Books
from cachetier.store.chunk import ChunkState, HostChunk
from cachetier.store.namespaces import Namespace

GROUP_CHUNKS = 256
GROUP_BYTES = 64 << 20
GROUP_WAIT_S = 0.05

logger = logging.getLogger(__name__)


class Flusher:
    """The queue in front of the disk tier, and the thread that empties it."""

    def __init__(
        self, books: Books, disk: DiskTier, view: Callable[[int, int], memoryview], backlog_bytes: int
    ) -> None:
        self._wake = threading.Condition(books.lock)
        self._done = threading.Condition(books.lock)
        self._table = books.table
        self._pins = books.disk_pins
        self._counters = books.counters
        self._changes = books.changes
        self._disk = disk
        self._view = view
        self._limit_bytes = backlog_bytes
        self._queue: deque[HostChunk] = deque()
        self._forgetting: dict[ChainKey, None] = {}
        self._errands: list[Callable[[], object]] = []
        self.backlog_bytes = 0
        self._num_offered = self._num_finished = 0
        self._errands_offered = self._errands_finished = 0
        self._num_hurried = 0
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="cachetier-flush", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def offer(self, chunk: HostChunk) -> bool:
        """Queue a READY chunk (lock held); False: the backlog is full and the chunk stays in host memory alone."""
        if chunk.is_offered:
            return True
        size = sum(chunk.tiling.frame_bytes)
        if self._is_stopping or self.backlog_bytes + size > self._limit_bytes:
            self._counters.flushes_dropped += 1
            return False
        chunk.pins += 1
        chunk.is_offered = True
        self.backlog_bytes += size
        self._num_offered += 1
        self._queue.append(chunk)
        if len(self._queue) == 1 or self._is_group_full():
            self._wake.notify()
        return True

    def forget(self, key: ChainKey) -> None:
        """Drop a chunk from disk soon; until then `is_forgotten` says so (lock held)."""
        if key not in self._forgetting:
            self._forgetting[key] = None
            self._errands_offered += 1
            self._wake.notify()

    def is_forgotten(self, key: ChainKey) -> bool:
        """Tell whether a chunk on disk is about to be dropped (any thread)."""
        return key in self._forgetting

    def remember(self, namespace: Namespace) -> None:
        """Keep a namespace across restarts (lock held)."""
        self.run_soon(partial(self._disk.remember_namespace, namespace.id, namespace.identity, namespace.layouts))

    def run_soon(self, errand: Callable[[], object]) -> None:
        """Have the thread call `errand`, which writes to disk; the lock is held now, but not then."""
        self._errands.append(errand)
        self._errands_offered += 1
        self._wake.notify()

    def flush(self, timeout_s: float | None) -> bool:
        """Block until everything offered before the call was written or refused; False: `timeout_s` passed first."""
        with self._done:
            chunks, errands = self._num_offered, self._errands_offered
            self._num_hurried += 1
            self._wake.notify()
            try:
                return self._done.wait_for(
                    lambda: self._num_finished >= chunks and self._errands_finished >= errands, timeout_s
                )
            finally:
                self._num_hurried -= 1

    def stop(self) -> None:
        """Give up what is still queued and end the thread."""
        with self._wake:
            self._is_stopping = True
            while self._queue:
                self._counters.flushes_dropped += 1
                self._finish(self._queue.popleft())
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._wait_for_work():
                    return
                keys, errands = list(self._forgetting), self._errands
                self._errands = []
                group = self._take_group()
            self._run_errands(keys, errands)
            self._write(group)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do, and a little longer for more of it; False: stop."""
        while not (self._queue or self._forgetting or self._errands):
            if self._is_stopping:
                return False
            self._wake.wait()
        deadline = time.monotonic() + GROUP_WAIT_S
        while not (self._is_stopping or self._num_hurried or self._is_group_full()):
            left = deadline - time.monotonic()
            if left <= 0 or not self._wake.wait(left):
                break
        return True

    def _is_group_full(self) -> bool:
        return len(self._queue) >= GROUP_CHUNKS or self.backlog_bytes >= GROUP_BYTES

    def _take_group(self) -> list[HostChunk]:
        group: list[HostChunk] = []
        size = 0
        while self._queue and len(group) < GROUP_CHUNKS and size < GROUP_BYTES:
            chunk = self._queue.popleft()
            if chunk.state is ChunkState.READY:
                group.append(chunk)
                size += sum(chunk.tiling.frame_bytes)
            else:  # invalidated while it waited
                self._finish(chunk)
        return group

    def _run_errands(self, keys: list[ChainKey], errands: list[Callable[[], object]]) -> None:
        for errand in errands:
            self._run_errand(errand)
        if keys:
            self._run_errand(lambda: self._disk.drop(keys))
        self._note_gone()
        with self._done:
            for key in keys:
                del self._forgetting[key]
            self._errands_finished += len(keys) + len(errands)
            self._done.notify_all()

    def _run_errand(self, errand: Callable[[], object]) -> None:
        try:
            errand()
        except Exception:  # the thread's boundary
            logger.exception("the data directory could not be written")

    def _write(self, group: list[HostChunk]) -> None:
        stored = [False] * len(group)
        if group:
            try:
                stored = self._disk.append([self._to_write(chunk) for chunk in group])
            except Exception:  # the thread's boundary
                logger.exception("%d chunks could not be written", len(group))
        self._note_gone()
        leaving = self._pins.take_leaving()
        gone = [key for key in leaving if key in self._table.chunks and self._disk.lookup(key) is None]
        with self._done:
            for chunk, is_stored in zip(group, stored, strict=True):
                self._note(chunk, is_stored)
            for key in gone:
                kept = self._table.chunks.get(key)
                if kept is not None and kept.state is ChunkState.READY and kept.is_durable:
                    self._table.set_durable(kept, False)
            self._done.notify_all()

    def _note(self, chunk: HostChunk, is_stored: bool) -> None:
        if is_stored:
            self._counters.flushed += 1
            self._changes.note_stored(chunk, TIER_DISK)
        else:
            self._counters.flushes_failed += 1
        if chunk.state is ChunkState.READY:  # otherwise it was invalidated meanwhile, and `forget` follows
            self._table.set_durable(chunk, is_stored)
        self._finish(chunk)

    def _note_gone(self) -> None:
        lost = self._disk.take_lost()
        if self._changes.is_followed:
            gone = [key for key in lost if self._disk.lookup(key) is None]
            with self._wake:
                for key in gone:
                    self._changes.note_gone(key, TIER_DISK)

    def _finish(self, chunk: HostChunk) -> None:
        self.backlog_bytes -= sum(chunk.tiling.frame_bytes)
        self._num_finished += 1
        chunk.is_offered = False
        self._table.unpin(chunk)

    def _to_write(self, chunk: HostChunk) -> ChunkToWrite:
        return ChunkToWrite(chunk=describe(chunk), frames=views(chunk, self._view))


def views(chunk: HostChunk, view: Callable[[int, int], memoryview]) -> list[memoryview]:
    """Return the bytes of all frames of a chunk that has them all."""
    frames = []
    for offset, size in zip(chunk.frames, chunk.tiling.frame_bytes, strict=True):
        assert offset is not None, "an object has no frame"
        frames.append(view(offset, size))
    return frames


def describe(chunk: HostChunk) -> DiskChunk:
    """Return what the index keeps of a READY chunk."""
    assert None not in chunk.checksums, "an object has no checksum"
    return DiskChunk(
        key=chunk.key,
        parent=chunk.parent,
        namespace=chunk.namespace,
        position=chunk.position,
        group=chunk.tiling.group,
        content=chunk.content,
        tiling=chunk.tiling.shards,
        object_bytes=chunk.tiling.object_bytes,
        checksums=tuple(value for value in chunk.checksums if value is not None),
    )
