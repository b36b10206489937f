"""The I/O threads that read chunks from disk into frames which a match has leased: see `store.filler`."""

from collections.abc import Callable, Sequence

from cachetier.storage.disk import DiskTier
from cachetier.store.books import Books
from cachetier.store.chunk import HostChunk
from cachetier.store.filler import Filler
from cachetier.store.flush import Flusher, views


class Promoter(Filler):
    """The queue of chunks to read from disk. Whoever offers one has pinned it on disk; the promoter takes that over."""

    def __init__(
        self,
        books: Books,
        disk: DiskTier,
        flusher: Flusher,
        view: Callable[[int, int], memoryview],
        num_threads: int,
    ) -> None:
        super().__init__("promote", books, view, num_threads)
        self._pins = books.disk_pins
        self._disk = disk
        self._flusher = flusher

    def _read(self, batch: Sequence[HostChunk]) -> list[bool]:
        return self._disk.read_many([(chunk.key, views(chunk, self._view)) for chunk in batch])

    def _filled(self, chunk: HostChunk) -> None:
        self._table.seal(chunk, is_durable=True)
        self._pins.touch(chunk.key)
        self._counters.promoted += 1

    def _failed(self, chunk: HostChunk) -> None:
        self._flusher.forget(chunk.key)
        self._counters.promotions_failed += 1

    def _let_go(self, chunk: HostChunk) -> None:
        self._pins.unpin(chunk.key)
        super()._let_go(chunk)
