"""The worker's store thread: from the copy engine's snapshots into frames of the arena, behind the engine's back.

Snapshots are taken by the worker's main thread, because only it knows when the blocks hold the chunks; everything else
(asking for frames, filling, committing) happens here. What would wait for longer than a deadline, or does not fit into
`staging_bytes`, is dropped and counted: a cache may forget.

Where the copy engine keeps blocks, a queued store has yet to read them, and vLLM gives blocks to others in two cases.
When a request ends, vLLM waits until it is reported (`finish`, `take_released`), which it is once everything queued
before has been stored or dropped. When a request is preempted, vLLM does not wait: `cancel` drops what is queued for it
and makes the main thread wait until a fill under way has let go of the blocks.

Locking design: jobs travel through a queue; what both threads touch is guarded by `_lock`, and `_let_go` is notified
when a fill ends. The link and the chains belong to the store thread.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from cachetier.client import ArenaView
from cachetier.core.errors import CachetierError
from cachetier.core.keys import KEY_BYTES, TOKEN_BYTES
from cachetier.core.layout import Shard
from cachetier.core.messages import RESERVE_FILL, Commit, Invalidate, Report, Reserve, ReserveReply
from cachetier.core.pool_messages import CommitPool
from cachetier_connector.arena_cache import ArenaCache
from cachetier_connector.copy_base import CopyEngine
from cachetier_connector.direct_keeper import DirectKeeper
from cachetier_connector.link import ServerLink
from cachetier_connector.plan import StoreOp
from cachetier_connector.pool_keeper import PoolKeeper

IDLE_S = 0.2
STOP_TIMEOUT_S = 3.0

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Queued:
    """A store whose snapshot was taken. `is_wanted` turns False at most once, under the lock."""

    store: StoreOp
    snapshot: Any
    num_chunks: int
    staged_bytes: int
    since_s: float
    is_wanted: bool = True


class Storer:
    """Carries out `StoreOp`s on a thread of its own.

    Attributes:
        is_serving: the engine has begun to serve, so it may be measured how to read from disk; set from outside.
    """

    def __init__(
        self,
        engine: CopyEngine,
        link: ServerLink,
        tiling: list[Shard],
        shard: int,
        arenas: ArenaCache,
        *,
        staging_bytes: int,
        deadline_s: float,
        num_workers: int = 1,
    ) -> None:
        """Start the thread.

        Args:
            engine: of this rank's paged blocks.
            link: used by the thread alone from now on.
            tiling: how this engine cuts chunks.
            shard: this rank's part of it.
            arenas: to write to.
            staging_bytes: how much may wait in host memory.
            deadline_s: how long a store may wait here, and then for each answer of the server.
            num_workers: of the whole engine.
        """
        self._engine, self._link, self._tiling, self._shard, self._arenas = engine, link, tiling, shard, arenas
        self._staging_bytes, self._deadline_s = staging_bytes, deadline_s
        self._lock = threading.Lock()
        self._let_go = threading.Condition(self._lock)
        self._staged_bytes = self._dropped = 0
        self._queued: set[_Queued] = set()
        self.is_serving = False
        self._pools = PoolKeeper(engine, link, tiling, shard)
        self._direct = DirectKeeper(engine, link, num_workers)
        self._filling: _Queued | None = None
        self._released: set[str] = set()
        self._chains: dict[str, tuple[int, bytes]] = {}
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="cachetier-storer", daemon=True)
        self._thread.start()

    def submit(self, store: StoreOp) -> None:
        """Take the chunks of `store` as the work launched so far leaves them, and queue them. The main thread."""
        num_chunks = len(store.tokens) // (TOKEN_BYTES * store.chunk_tokens)
        size_bytes = 0 if self._engine.keeps_blocks else num_chunks * self._engine.shard_bytes(store.chunk_tokens)
        with self._lock:
            if not self._link.is_up or self._staged_bytes + size_bytes > self._staging_bytes:
                self._dropped += num_chunks
                return
            self._staged_bytes += size_bytes
        first_token = store.position * store.chunk_tokens % self._engine.block_tokens
        snapshot = self._engine.snapshot(store.block_ids, first_token, num_chunks, store.chunk_tokens)
        queued = _Queued(store, snapshot, num_chunks, size_bytes, time.monotonic())
        with self._lock:
            self._queued.add(queued)
        self._jobs.put(lambda: self._store(queued))

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Drop what is queued of these requests; their paged blocks are not read any more when this returns.

        The main thread. Waits for the batch that a fill of one of them is copying, if there is one.
        """
        unwanted = set(request_ids)
        with self._let_go:
            for queued in self._queued:
                if queued.store.request_id in unwanted:
                    queued.is_wanted = False
            self._let_go.wait_for(lambda: self._filling is None or self._filling.is_wanted)

    def finish(self, request_ids: list[str], held: Iterable[str]) -> None:
        """Forget the chains of these requests and report those that are `held` as released, after what is queued."""

        def forget() -> None:
            for request_id in request_ids:
                self._chains.pop(request_id, None)
            with self._lock:
                self._released.update(held)

        self._jobs.put(forget)

    def take_released(self) -> set[str]:
        """Return the held requests whose blocks are not read any more, since the last call."""
        with self._lock:
            released, self._released = self._released, set()
        return released

    def report_corrupt(self, key: bytes) -> None:
        """Tell the server that a chunk does not match its checksum."""
        self._jobs.put(lambda: self._link.call(lambda session: Invalidate(session=session, keys=key), self._deadline_s))

    def commit_pool(self, fill: int, frames: list[int]) -> None:
        """Tell the server which frames of the own pool a load has filled."""
        self._jobs.put(
            lambda: self._link.call(
                lambda session: CommitPool(session=session, fill=fill, frames=frames), self._deadline_s
            )
        )

    def stop(self) -> bool:
        """Store what is queued, close the session and end the thread; tell whether it has ended."""
        self._jobs.put(None)
        self._thread.join(STOP_TIMEOUT_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        torch.set_num_threads(1)
        while True:
            try:
                job = self._jobs.get(timeout=IDLE_S)
            except queue.Empty:
                job = self._report_dropped
            if job is None:
                break
            try:
                if self._link.probe():
                    self._map_arena()
                    self._pools.tend()
                    if self.is_serving:
                        self._direct.tend()
                job()
            except Exception:
                log.exception("cachetier: a job of the storer failed")
        self._link.close()

    def _map_arena(self) -> None:
        """Map the arena of a server as soon as it is there: engines may need a while to prepare it."""
        server = self._link.server
        assert server is not None
        try:
            self._arenas.get(server.arena_path, server.instance)
        except CachetierError as error:
            log.debug("cachetier: the server that was just there is gone: %s", error)

    def _store(self, queued: _Queued) -> None:
        is_done = False
        try:
            is_done = time.monotonic() - queued.since_s <= self._deadline_s and self._store_now(queued)
        finally:
            with self._lock:
                self._queued.discard(queued)
                self._dropped += 0 if is_done else queued.num_chunks
                self._staged_bytes -= queued.staged_bytes

    def _store_now(self, queued: _Queued) -> bool:
        """Reserve, fill and commit; False: the chunks are dropped. The server counts those that it dropped itself."""
        server, store = self._link.server, queued.store
        if not queued.is_wanted or server is None or server.chunk_tokens != store.chunk_tokens:
            return False  # its blocks are gone, or it was cut for a server that this one has replaced
        position, parent = self._chains.get(store.request_id, (-1, b""))
        if store.parent is not None:
            parent = store.parent
        elif position != store.position:
            return False  # an earlier part of the chain was dropped
        times_s = [time.monotonic()]
        reply = self._link.call(lambda session: self._reserve(session, store, parent), self._deadline_s)
        if reply is None:
            return False
        times_s.append(time.monotonic())
        self._chains[store.request_id] = (store.position + queued.num_chunks, reply.keys[-KEY_BYTES:])
        if not reply.lease:
            return True
        arena = self._arenas.get(server.arena_path, server.instance)
        checksums = self._fill(arena, reply, queued)
        times_s.append(time.monotonic())
        commit = self._link.call(
            lambda session: Commit(session=session, lease=reply.lease, checksums=checksums), self._deadline_s
        )
        self._log_times(queued, [queued.since_s, *times_s, time.monotonic()])
        return commit is not None

    def _log_times(self, queued: _Queued, times_s: Sequence[float]) -> None:
        phases_ms = (1000 * (end - start) for start, end in pairwise(times_s))
        size_gb = queued.num_chunks * self._engine.shard_bytes(queued.store.chunk_tokens) / 1e9
        log.debug(
            "cachetier: store of %d chunks: queued %.2f ms, reserved %.2f ms, filled %.2f ms, committed %.2f ms, "
            "%.1f GB/s",
            queued.num_chunks,
            *phases_ms,
            size_gb / max(times_s[-2] - times_s[-3], 1e-6),
        )

    def _reserve(self, session: int, store: StoreOp, parent: bytes) -> Reserve:
        return Reserve(
            session=session,
            namespace=store.namespace,
            tokens=store.tokens,
            tiling=self._tiling,
            shard=self._shard,
            position=store.position,
            parent=parent,
            salt=store.salt,
            extras=store.extras,
        )

    def _fill(self, arena: ArenaView, reply: ReserveReply, queued: _Queued) -> list[int | None]:
        """Fill the frames of `reply`; return the checksums of their objects."""
        numbers = [number for number, outcome in enumerate(reply.outcomes) if outcome == RESERVE_FILL]
        with self._lock:
            self._filling = queued
        try:
            return self._engine.fill(queued.snapshot, numbers, arena, reply.frames, lambda: queued.is_wanted)
        except Exception:
            log.exception("cachetier: storing chunks of request %s failed", queued.store.request_id)
            return [None] * len(numbers)
        finally:
            with self._let_go:
                self._filling = None
                self._let_go.notify_all()

    def _report_dropped(self) -> None:
        with self._lock:
            dropped = self._dropped
        if not dropped:
            return
        if self._link.call(lambda session: Report(session=session, stores_dropped=dropped), self._deadline_s):
            with self._lock:
                self._dropped -= dropped
