"""The threads that fetch chunks from the remote store into frames which a match has leased: see `store.filler`.

A call to the remote store can hang for seconds. After GET_LIMIT_S its chunks are given up, so that no engine and no
other match waits for them; their frames stay pinned until the call returns, for it may still write to them.
"""

import time
from collections.abc import Callable, Sequence

from cachetier.remote.base import Extent, Outcome, Place, RemoteStore, key_of
from cachetier.storage.records import header_bytes_of, pack_body
from cachetier.store.books import Books
from cachetier.store.breaker import Breaker
from cachetier.store.chunk import ChunkState, HostChunk
from cachetier.store.filler import Filler
from cachetier.store.flush import Flusher, describe

GET_LIMIT_S = 2.0


class Fetcher(Filler):
    """The queue of chunks to get from the remote store. What was got is an ordinary chunk in host memory afterwards."""

    def __init__(
        self,
        books: Books,
        store: RemoteStore,
        breaker: Breaker,
        flusher: Flusher | None,
        view: Callable[[int, int], memoryview],
        num_threads: int,
    ) -> None:
        super().__init__("fetch", books, view, num_threads)
        self._store = store
        self._breaker = breaker
        self._flusher = flusher
        self._moved = books.remote_bytes
        self._flying: dict[int, tuple[float, Sequence[HostChunk]]] = {}

    def expire(self, now: float) -> None:
        """Give up what is being fetched for too long, and what waits while the breaker is open (lock held)."""
        late = [batch for started, batch in self._flying.values() if now - started >= GET_LIMIT_S]
        for chunk in (chunk for batch in late for chunk in batch if chunk.state is ChunkState.PROMOTING):
            self._give_up(chunk)
        if late and not self._breaker.is_open:
            self._counters.remote_failures += 1
            self._breaker.fail()
        if self._breaker.is_open:
            self._skip_queued()

    def _read(self, batch: Sequence[HostChunk]) -> list[bool]:
        started = time.monotonic()
        with self._wake:
            self._flying[id(batch)] = started, batch
        try:
            outcomes = self._store.get([_place_of(chunk) for chunk in batch])
        finally:
            with self._wake:
                del self._flying[id(batch)]
        if Outcome.FAILED in outcomes:
            with self._wake:
                self._counters.remote_failures += 1
            self._breaker.fail()
        return [outcome is Outcome.DONE for outcome in outcomes]

    def _filled(self, chunk: HostChunk) -> None:
        self._table.seal(chunk, is_durable=False)
        self._moved.got += chunk.tiling.total_frame_bytes
        if self._flusher is not None:
            self._flusher.offer(chunk)

    def _failed(self, chunk: HostChunk) -> None:
        self._counters.promotions_failed += 1


def _place_of(chunk: HostChunk) -> Place:
    """Say where a chunk's frames are to go."""
    key = key_of(chunk.namespace, chunk.key)
    return Place(key, header_bytes_of(len(pack_body(describe(chunk)))), extents(chunk))


def extents(chunk: HostChunk) -> list[Extent]:
    """Return where the frames of a chunk that has them all lie."""
    found = []
    for offset, size in zip(chunk.frames, chunk.tiling.frame_bytes, strict=True):
        assert offset is not None, "an object has no frame"
        found.append(Extent(offset, size))
    return found
