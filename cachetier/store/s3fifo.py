"""S3-FIFO: which chunk of a set goes when room is needed. Pure bookkeeping; the caller holds the store's lock.

Yang, Zhang, Qiu, Yue, Vinayak: "FIFO queues are all you need for cache eviction", SOSP 2023. Why this one: most
prompts are never sent again, so a chunk that is stored once and never hit must leave fast and must not push out the
prefixes that everybody shares. New chunks enter a small queue (a tenth of all); those not hit before they reach its
end leave, and only their keys are remembered (the ghost queue); those that were hit, and those that come back while
their key is remembered, enter the main queue, whose end gives every chunk one more round per hit. So a scan, however
long, passes through the small queue alone. A hit only counts up to three on the chunk, without touching a queue.

Three deviations. One hit moves a chunk to the main queue, where the paper's code asks for two: a page cache sees bursts
on one object, but each hit here is another request with the same prefix. The queues count chunks: all chunks of one set
have frames of the same classes, so bytes would say the same. And hits are forgotten: a chunk of the main queue that was
not hit for LIFETIMES times as long as new chunks now live unhit, and for MEMORY_S at least, goes before them. Else
documents that were popular in the morning would confine those of the afternoon to a tenth of the memory.
"""

from collections import OrderedDict
from collections.abc import Callable

from cachetier.core.keys import ChainKey
from cachetier.store.chunk import HostChunk

SMALL_SHARE = 10  # one in so many chunks belongs in the small queue
LIFETIMES = 3
MEMORY_S = 10.0  # popular prompts are asked for more often, and no scan makes hits forgotten faster than that
ROUNDS_MAX = 8  # a search moves so many chunks that were hit lately out of the way of stale ones
SECOND_CHANCES_MAX = 2048  # a search spares so many chunks that were hit; then the next free one goes, hit or not
KEPT_MAX = 512  # a search passes over so many chunks that are in use, and then gives up


class S3Fifo:
    """The three queues of one set of chunks. The ghost queue never holds more keys than there are chunks."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Make empty queues; `clock` is in seconds, as `HostChunk.used_at_s` is."""
        self._clock = clock
        self._small: OrderedDict[ChainKey, HostChunk] = OrderedDict()
        self._main: OrderedDict[ChainKey, HostChunk] = OrderedDict()
        self._ghosts: OrderedDict[ChainKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    @property
    def num_ghosts(self) -> int:
        """Keys that are remembered though their chunks left."""
        return len(self._ghosts)

    def add(self, chunk: HostChunk) -> None:
        """Enter a chunk that is in no queue."""
        if chunk.key in self._ghosts:
            del self._ghosts[chunk.key]
            self._main[chunk.key] = chunk
        else:
            self._small[chunk.key] = chunk

    def remove(self, chunk: HostChunk, *, remember: bool) -> None:
        """Take a chunk out; `remember` its key if it never left the small queue (it was evicted, not damaged)."""
        if self._main.pop(chunk.key, None) is None:
            del self._small[chunk.key]
            if remember:
                self._ghosts[chunk.key] = None
        while len(self._ghosts) > len(self):
            self._ghosts.popitem(last=False)

    def victim(self, choose: Callable[[HostChunk], HostChunk | None]) -> HostChunk | None:
        """Return the chunk that should go next, or None if none may.

        `choose` is asked about candidates: it returns the chunk that goes in the candidate's place (itself, or a
        descendant), or None if the candidate must stay (somebody uses it); such a candidate starts another round.
        """
        first = self._next_queue()
        other = self._main if first is self._small else self._small
        return self._scan(first, choose) or self._scan(other, choose)

    def is_main(self, chunk: HostChunk) -> bool:
        """Tell whether a chunk is in the main queue: it was hit at least once."""
        return chunk.key in self._main

    def oldest(self) -> HostChunk | None:
        """Return the chunk that would be looked at next."""
        queue = self._next_queue()
        return next(iter(queue.values()), None)

    def check_integrity(self) -> None:
        """Raise AssertionError if a chunk is in two queues or the ghost queue is too long."""
        assert not self._small.keys() & self._main.keys(), "a chunk is in both queues"
        assert not self._ghosts.keys() & (self._small.keys() | self._main.keys()), "a chunk is its own ghost"
        assert len(self._ghosts) <= max(len(self), 0), "the ghost queue is longer than both others"

    def _next_queue(self) -> OrderedDict[ChainKey, HostChunk]:
        small, main = self._small, self._main
        if not small or not main or self._has_stale():
            return main or small
        return small if len(small) * SMALL_SHARE >= len(self) else main

    def _has_stale(self) -> bool:
        """Tell whether the main queue ends with a chunk whose hits are forgotten; those hit lately go another round."""
        now_s, limit_s = self._clock(), self._memory_s()
        for _ in range(ROUNDS_MAX):
            key, chunk = next(iter(self._main.items()))
            idle_s = now_s - chunk.used_at_s
            if idle_s > limit_s / 2:
                return idle_s > limit_s
            self._main.move_to_end(key)
        return False

    def _memory_s(self) -> float:
        """Return how long a hit counts now."""
        oldest = next(iter(self._small.values()), None)
        lifetime_s = self._clock() - oldest.used_at_s if oldest is not None else 0.0
        return max(MEMORY_S, LIFETIMES * lifetime_s)

    def _scan(
        self, queue: OrderedDict[ChainKey, HostChunk], choose: Callable[[HostChunk], HostChunk | None]
    ) -> HostChunk | None:
        spared = kept = 0
        stale_before_s = self._clock() - self._memory_s()
        while kept < min(len(queue), KEPT_MAX):
            key, chunk = next(iter(queue.items()))
            is_stale = queue is self._main and chunk.used_at_s < stale_before_s
            if chunk.hits and spared < SECOND_CHANCES_MAX and not is_stale:
                self._spare(queue, chunk)
                spared += 1
            elif (chosen := choose(chunk)) is not None:
                return chosen
            else:
                queue.move_to_end(key)
                kept += 1
        return None

    def _spare(self, queue: OrderedDict[ChainKey, HostChunk], chunk: HostChunk) -> None:
        if queue is self._small:
            del queue[chunk.key]
            self._main[chunk.key] = chunk
            chunk.hits = 0
        else:
            queue.move_to_end(chunk.key)
            chunk.hits -= 1
