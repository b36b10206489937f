"""Threads that fill frames which a match has leased, from a tier that is slower than host memory.

Locking design: the queue, the counters and the host table are guarded by the store's lock. A thread takes a few
chunks that were asked for together under the lock, reads them without it (the filler's own pin keeps the frames), and
takes the lock again to make them READY. Engines do not wait for that: they watch the state byte of each frame.

Order of need: matches come in the order in which requests arrive and offer a prompt's chunks from the first on, and the
queue is first in, first out.

Bounds: every queued chunk has its frames, so the arena bounds the queue. A chunk that no lease wants any more leaves
the queue at once, and its frames are free; but when nothing was read for a while it is read all the same: an engine
that computes what a slow tier holds would otherwise never learn that the tier has become fast.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from cachetier.store.books import Books
from cachetier.store.chunk import ChunkState, HostChunk
from cachetier.store.read_speed import ReadSpeed

BATCH_BYTES = 4 << 20  # a thread takes neighbours up to this size and reads them at once: tiers like large reads

logger = logging.getLogger(__name__)


class Filler(ABC):
    """The queue of chunks to read from one tier, and the threads that read them."""

    def __init__(self, name: str, books: Books, view: Callable[[int, int], memoryview], num_threads: int) -> None:
        self._wake = threading.Condition(books.lock)
        self._table = books.table
        self._counters = books.counters
        self._view = view
        self._queue: OrderedDict[HostChunk, None] = OrderedDict()
        self._speed = ReadSpeed(num_threads)
        self._offered_bytes = self._passed_bytes = 0
        self._is_stopping = False
        self._threads = [
            threading.Thread(target=self._run, name=f"cachetier-{name}-{number}", daemon=True)
            for number in range(num_threads)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def offer(self, chunk: HostChunk) -> None:
        """Queue a PROMOTING chunk that has all its frames (lock held)."""
        chunk.pins += 1
        self._offered_bytes += chunk.tiling.total_frame_bytes
        chunk.queued_until_bytes = self._offered_bytes
        self._queue[chunk] = None
        self._wake.notify()

    def cancel(self, chunk: HostChunk) -> None:
        """Take a chunk that nobody has leased any more out of the queue, if it is still there (lock held)."""
        if chunk in self._queue and not self._speed.is_stale(time.monotonic()):
            del self._queue[chunk]
            self._skip(chunk)

    def ready_in_s(self, chunks: Iterable[HostChunk]) -> list[float]:
        """Return in how many seconds each chunk should be READY (lock held); nothing while that is unknown."""
        speed = self.bytes_per_s
        if not speed:
            return []
        return [max(0.0, (chunk.queued_until_bytes - self._passed_bytes) / speed) for chunk in chunks]

    @property
    def bytes_per_s(self) -> float:
        """How fast the tier gives chunks (lock held), 0 while that is unknown."""
        return self._speed.bytes_per_s(time.monotonic()) or 0.0

    def stop(self, timeout_s: float | None = None) -> None:
        """Skip what is queued and end the threads, waiting for them for at most `timeout_s`."""
        with self._wake:
            self._is_stopping = True
            self._skip_queued()
            self._wake.notify_all()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    @abstractmethod
    def _read(self, batch: Sequence[HostChunk]) -> list[bool]:
        """Fill the frames of each chunk (lock not held); return which were filled."""

    @abstractmethod
    def _filled(self, chunk: HostChunk) -> None:
        """Make a chunk READY whose frames were filled (lock held)."""

    @abstractmethod
    def _failed(self, chunk: HostChunk) -> None:
        """Note that the frames of a chunk, which is in no table any more, were not filled (lock held)."""

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._is_stopping:
                    self._wake.wait()
                if self._is_stopping:
                    return
                batch = self._take_batch()
            try:
                outcomes = self._read(batch)
            except Exception:  # the thread's boundary
                logger.exception("%d chunks could not be read", len(batch))
                outcomes = [False] * len(batch)
            with self._wake:
                for chunk, is_read in zip(batch, outcomes, strict=True):
                    self._finish(chunk, is_read)

    def _take_batch(self) -> list[HostChunk]:
        batch: list[HostChunk] = []
        size, now = 0, time.monotonic()
        is_speed_stale = self._speed.is_stale(now)
        while self._queue and size < BATCH_BYTES:
            chunk, _ = self._queue.popitem(last=False)
            if chunk.state is not ChunkState.PROMOTING or (chunk.pins == 1 and not is_speed_stale):
                self._skip(chunk)
            else:
                batch.append(chunk)
                size += chunk.tiling.total_frame_bytes
                self._speed.begin(chunk.tiling.total_frame_bytes, now)
        return batch

    def _finish(self, chunk: HostChunk, is_read: bool) -> None:
        self._speed.end(chunk.tiling.total_frame_bytes, time.monotonic(), is_read=is_read)
        if chunk.state is not ChunkState.PROMOTING:  # invalidated or given up while it was read
            self._skip(chunk)
            return
        if is_read:
            self._filled(chunk)
        else:
            self._give_up(chunk)
            self._failed(chunk)
        self._let_go(chunk)

    def _skip_queued(self) -> None:
        while self._queue:
            self._skip(self._queue.popitem(last=False)[0])

    def _skip(self, chunk: HostChunk) -> None:
        self._counters.promotions_skipped += 1
        self._give_up(chunk)
        self._let_go(chunk)

    def _give_up(self, chunk: HostChunk) -> None:
        """Tell who watches the frames that they will not be filled, and whoever matches that there is no such chunk."""
        self._table.mark_bad(chunk)
        if chunk.state is ChunkState.PROMOTING:
            self._table.remove(chunk)

    def _let_go(self, chunk: HostChunk) -> None:
        self._passed_bytes += chunk.tiling.total_frame_bytes
        self._table.unpin(chunk)
