"""What the tiers hold, listed a little at a time, because the index of a large disk takes a minute to read.

Owned by whoever answers the session that asked; one thread at a time.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from cachetier.core.keys import TOKEN_BYTES, ChainKey, NamespaceId
from cachetier.storage.disk import DiskChunk
from cachetier.store.books import Books
from cachetier.store.chunk import HostChunk

CHUNKS_A_LOOK = 64

log = logging.getLogger(__name__)


class HeldChunks:
    """The chunks that the tiers have of a namespace's texts without a salt, images or sounds.

    Chunks are kept by their parents until all are listed. Then they are taken from the root on: parents first, one
    chain after the other, and none whose chain does not begin at the root. What is stored meanwhile has to be added.

    Attributes:
        is_done: whether all have been taken.
    """

    def __init__(self, books: Books, namespace: NamespaceId, in_memory: Sequence[HostChunk]) -> None:
        """Begin with the chunks `in_memory`; those on disk follow."""
        self._namespace, self._text_bytes = namespace, books.chunk_tokens * TOKEN_BYTES
        on_disk: Iterator[DiskChunk] = books.disk.chunks() if books.disk is not None else iter(())
        self._listing: Iterator[HostChunk | DiskChunk] | None = chain(in_memory, on_disk)
        self._root = books.hasher.root(namespace, "")
        self._children: dict[bytes, list[bytes]] = {}
        self._next: list[bytes] = []
        self.is_done = False

    def add(self, key: bytes, parent: bytes) -> None:
        """Add a chunk, to be taken if its parent has not been taken yet; no parent: it begins a chain."""
        self._children.setdefault(parent or self._root, []).append(key)

    def take(self, most: int, limit_s: float) -> list[ChainKey]:
        """Return up to `most` more chunks, none while they are still being listed; lists for about `limit_s`."""
        deadline_s, taken = time.monotonic() + limit_s, list[ChainKey]()
        while self._listing is not None:
            self._list_some(self._listing)
            if time.monotonic() >= deadline_s:
                break
        while self._next and len(taken) < most:
            key = self._next.pop()
            self._next += self._children_of(key)
            taken.append(ChainKey(key))
        self.is_done = self._listing is None and not self._next
        return taken

    def _children_of(self, key: bytes) -> Iterator[bytes]:
        return reversed(dict.fromkeys(self._children.pop(key, ())))  # once, also those in memory and on disk

    def _list_some(self, listing: Iterator[HostChunk | DiskChunk]) -> None:
        try:
            some = list(islice(listing, CHUNKS_A_LOOK))
        except OSError as error:
            log.warning("routers do not learn of all that is on disk: the index cannot be read: %s", error)
            some = []
        for chunk in some:
            if chunk.namespace == self._namespace and len(chunk.content) == self._text_bytes:
                self.add(chunk.key, chunk.parent)
        if not some:
            self._listing = None
            self._next += self._children_of(self._root)
