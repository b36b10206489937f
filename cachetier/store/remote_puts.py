"""The threads that put chunks into the remote store as they become ready, and delete those that turned out damaged.

Locking design: the queues and the counters are guarded by the store's lock. A thread takes a group under the lock (its
chunks are pinned since they were offered) and puts it without the lock.

Bounds: the queue, with what is being put, holds at most `limit_bytes` of frames. What is offered beyond that stays on
this node and is counted: engines never wait for the remote store, and a cache may forget. While the breaker is open the
queue waits, but not for longer than OPEN_LIMIT_S, for its frames cannot be evicted.
"""

import logging
import threading
import time
from collections import OrderedDict, deque

from cachetier.core.keys import ChainKey, NamespaceId
from cachetier.remote.base import Outcome, RemoteStore, Value, key_of
from cachetier.storage.records import pack_body, pack_header
from cachetier.store.books import Books
from cachetier.store.breaker import Breaker
from cachetier.store.chunk import ChunkState, HostChunk
from cachetier.store.flush import describe
from cachetier.store.remote_gets import extents

THREADS = 2
GROUP_CHUNKS = 64
GROUP_BYTES = 16 << 20
OPEN_LIMIT_S = 5.0
FULL_WAIT_S = 0.1  # a full store makes room in the background, and says so only by having it the next time
FORGOTTEN_MAX = 4096

log = logging.getLogger(__name__)


class Putter:
    """The queue in front of the remote store, and the threads that empty it."""

    def __init__(self, books: Books, store: RemoteStore, breaker: Breaker, limit_bytes: int) -> None:
        self._wake = threading.Condition(books.lock)
        self._table = books.table
        self._counters = books.counters
        self._moved = books.remote_bytes
        self._store = store
        self._breaker = breaker
        self._limit_bytes = limit_bytes
        self._queue: deque[HostChunk] = deque()
        self._queued_bytes = 0
        self._forgotten: OrderedDict[ChainKey, None] = OrderedDict()
        self._to_delete: list[tuple[ChainKey, str]] = []
        self._is_stopping = False
        self._threads = [
            threading.Thread(target=self._run, name=f"cachetier-put-{number}", daemon=True) for number in range(THREADS)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def offer(self, chunk: HostChunk) -> None:
        """Queue a chunk that has just become READY (lock held), or drop the offer."""
        size = chunk.tiling.total_frame_bytes
        if self._is_stopping or self._is_hopeless() or self._queued_bytes + size > self._limit_bytes:
            self._counters.remote_puts_dropped += 1
            return
        chunk.pins += 1
        self._queued_bytes += size
        self._queue.append(chunk)
        self._wake.notify()

    def forget(self, namespace: NamespaceId, key: ChainKey) -> None:
        """Delete a chunk from the remote store soon (lock held); until then `is_forgotten` says so."""
        self._forgotten[key] = None
        if len(self._forgotten) > FORGOTTEN_MAX:
            self._forgotten.popitem(last=False)
        self._to_delete.append((key, key_of(namespace, key)))
        self._wake.notify()

    def is_forgotten(self, key: ChainKey) -> bool:
        """Tell whether a chunk is damaged there and not deleted yet (any thread)."""
        return key in self._forgotten

    def expire(self) -> None:
        """Give up what is queued when the breaker has been open for long (lock held); call it about once a second."""
        if self._is_hopeless():
            self._drop_queued()

    def resume(self) -> None:
        """Go on, because the breaker has closed."""
        with self._wake:
            self._wake.notify_all()

    def stop(self, timeout_s: float) -> None:
        """Give up what is queued and end the threads, waiting for them for at most `timeout_s` each."""
        with self._wake:
            self._is_stopping = True
            self._drop_queued()
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._is_stopping or ((self._queue or self._to_delete) and not self._breaker.is_open)):
                    self._wake.wait()
                if self._is_stopping:
                    return
                damaged, self._to_delete = self._to_delete, []
                group = self._take_group()
            outcomes = [Outcome.FAILED] * len(group)
            try:
                self._delete(damaged)
                outcomes = self._put(group)
            except Exception:  # the thread's boundary
                log.exception("%d chunks could not be put into the remote store", len(group))
            with self._wake:
                for chunk, outcome in zip(group, outcomes, strict=True):
                    self._counters.remote_puts_dropped += outcome is not Outcome.DONE
                    self._finish(chunk)

    def _take_group(self) -> list[HostChunk]:
        group: list[HostChunk] = []
        size = 0
        while self._queue and len(group) < GROUP_CHUNKS and size < GROUP_BYTES:
            chunk = self._queue.popleft()
            if chunk.state is ChunkState.READY:
                group.append(chunk)
                size += chunk.tiling.total_frame_bytes
            else:  # invalidated while it waited
                self._counters.remote_puts_dropped += 1
                self._finish(chunk)
        return group

    def _is_hopeless(self) -> bool:
        return self._breaker.is_open and time.monotonic() - self._breaker.opened_at >= OPEN_LIMIT_S

    def _drop_queued(self) -> None:
        while self._queue:
            self._counters.remote_puts_dropped += 1
            self._finish(self._queue.popleft())

    def _finish(self, chunk: HostChunk) -> None:
        self._queued_bytes -= chunk.tiling.total_frame_bytes
        self._table.unpin(chunk)

    def _delete(self, damaged: list[tuple[ChainKey, str]]) -> None:
        if not damaged:
            return
        outcomes = self._store.delete([name for _, name in damaged])
        self._note_failures(outcomes)
        with self._wake:
            for (key, _), outcome in zip(damaged, outcomes, strict=True):
                if outcome is Outcome.DONE:
                    self._forgotten.pop(key, None)

    def _put(self, group: list[HostChunk]) -> list[Outcome]:
        """Put what the store does not have yet; once more where there was no room."""
        if not group:
            return []
        outcomes = self._store.exists([key_of(chunk.namespace, chunk.key) for chunk in group])
        if Outcome.FAILED not in outcomes:
            self._put_where(Outcome.MISSING, group, outcomes)
            if Outcome.FULL in outcomes:
                time.sleep(FULL_WAIT_S)
                self._put_where(Outcome.FULL, group, outcomes)
        self._note_failures(outcomes)
        return outcomes

    def _put_where(self, state: Outcome, group: list[HostChunk], outcomes: list[Outcome]) -> None:
        numbers = [number for number, outcome in enumerate(outcomes) if outcome is state]
        found = self._store.put([value_of(group[number]) for number in numbers])
        moved = 0
        for number, outcome in zip(numbers, found, strict=True):
            outcomes[number] = outcome
            moved += group[number].tiling.total_frame_bytes * (outcome is Outcome.DONE)
        with self._wake:
            self._moved.put += moved

    def _note_failures(self, outcomes: list[Outcome]) -> None:
        """Open the breaker when nothing of a batch worked: a part of it fails when another node is gone."""
        if Outcome.FAILED in outcomes:
            with self._wake:
                self._counters.remote_failures += 1
            if set(outcomes) == {Outcome.FAILED}:
                self._breaker.fail()


def value_of(chunk: HostChunk) -> Value:
    """Return what is put for a READY chunk."""
    header = pack_header(pack_body(describe(chunk)), chunk.tiling.total_frame_bytes, 0)
    return Value(key_of(chunk.namespace, chunk.key), header, extents(chunk))
