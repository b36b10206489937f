"""The worker's store thread: from staging memory into frames of the arena, behind the engine's back.

Chunks are gathered by the worker's main thread, because only it knows when the blocks hold them; everything else
(asking for frames, digests, copying, committing) happens here. What would wait for longer than a second, or does not
fit into `staging_bytes`, is dropped and counted: a cache may forget.

Locking design: jobs travel through a queue; `_staged_bytes` and `_dropped` are guarded by `_lock`. The link and the
chains belong to this thread.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from cachetier.client import ArenaView
from cachetier.core.checksum import checksum_of, page_digests
from cachetier.core.keys import KEY_BYTES
from cachetier.core.layout import Shard, digests_offset, frame_bytes
from cachetier.core.messages import RESERVE_FILL, Commit, Invalidate, Report, Reserve, ReserveReply
from cachetier_connector.arena_cache import ArenaCache
from cachetier_connector.link import ServerLink
from cachetier_connector.plan import StoreOp

QUEUE_TIME_MAX_S = 1.0
CALL_TIMEOUT_S = 1.0
IDLE_S = 0.2
STOP_TIMEOUT_S = 3.0

log = logging.getLogger(__name__)


class _Staged(NamedTuple):
    store: StoreOp
    shards: torch.Tensor
    since_s: float


class Storer:
    """Carries out `StoreOp`s whose chunks have been gathered, on a thread of its own."""

    def __init__(
        self, link: ServerLink, tiling: list[Shard], shard: int, arenas: ArenaCache, *, staging_bytes: int
    ) -> None:
        """Start the thread.

        Args:
            link: used by the thread alone from now on.
            tiling: how this engine cuts chunks.
            shard: this rank's part of it.
            arenas: to write to.
            staging_bytes: how much may wait.
        """
        self._link, self._tiling, self._shard, self._arenas = link, tiling, shard, arenas
        self._staging_bytes = staging_bytes
        self._lock = threading.Lock()
        self._staged_bytes = self._dropped = 0
        self._chains: dict[str, tuple[int, bytes]] = {}
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="cachetier-storer", daemon=True)
        self._thread.start()

    def has_room(self, num_chunks: int, size_bytes: int) -> bool:
        """Tell whether `num_chunks` chunks of `size_bytes` in all may be staged now; if not, they count as dropped."""
        with self._lock:
            has_room = self._link.is_up and self._staged_bytes + size_bytes <= self._staging_bytes
            if not has_room:
                self._dropped += num_chunks
            return has_room

    def submit(self, store: StoreOp, shards: torch.Tensor) -> None:
        """Queue chunks. `shards` is uint8 `[num_chunks, shard_bytes]` in host memory and belongs to the storer now."""
        with self._lock:
            self._staged_bytes += shards.numel()
        staged = _Staged(store, shards, time.monotonic())
        self._jobs.put(lambda: self._store(staged))

    def finish(self, request_ids: list[str]) -> None:
        """Forget the chains of these requests, after what is queued."""

        def forget() -> None:
            for request_id in request_ids:
                self._chains.pop(request_id, None)

        self._jobs.put(forget)

    def report_corrupt(self, key: bytes) -> None:
        """Tell the server that a chunk does not match its checksum."""
        self._jobs.put(lambda: self._link.call(lambda session: Invalidate(session=session, keys=key), CALL_TIMEOUT_S))

    def stop(self) -> None:
        """Store what is queued, close the session and end the thread."""
        self._jobs.put(None)
        self._thread.join(STOP_TIMEOUT_S)

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
                self._link.probe()
                job()
            except Exception:
                log.exception("cachetier: a job of the storer failed")
        self._link.close()

    def _store(self, staged: _Staged) -> None:
        try:
            is_late = time.monotonic() - staged.since_s > QUEUE_TIME_MAX_S
            if is_late or not self._store_now(staged.store, staged.shards):
                with self._lock:
                    self._dropped += len(staged.shards)
        finally:
            with self._lock:
                self._staged_bytes -= staged.shards.numel()

    def _store_now(self, store: StoreOp, shards: torch.Tensor) -> bool:
        """Reserve, fill and commit; False: the chunks are dropped."""
        server = self._link.server
        if server is None or server.chunk_tokens != store.chunk_tokens:
            return False  # cut for a server that this one has replaced
        position, parent = self._chains.get(store.request_id, (-1, b""))
        if store.parent is not None:
            parent = store.parent
        elif position != store.position:
            return False  # an earlier part of the chain was dropped
        reply = self._link.call(lambda session: self._reserve(session, store, parent), CALL_TIMEOUT_S)
        if reply is None:
            return False
        self._chains[store.request_id] = (store.position + len(shards), reply.keys[-KEY_BYTES:])
        if not reply.lease:
            return True
        arena = self._arenas.get(server.arena_path, server.instance)
        checksums = self._fill(arena, reply, shards)
        commit = self._link.call(
            lambda session: Commit(session=session, lease=reply.lease, checksums=checksums), CALL_TIMEOUT_S
        )
        return commit is not None

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

    def _fill(self, arena: ArenaView, reply: ReserveReply, shards: torch.Tensor) -> list[int | None]:
        """Fill the frames of `reply`; return the checksums of their objects."""
        wanted = [number for number, outcome in enumerate(reply.outcomes) if outcome == RESERVE_FILL]
        checksums: list[int | None] = []
        for number, offset in zip(wanted, reply.frames, strict=True):
            payload = memoryview(shards[number].numpy())
            digests = page_digests(payload)
            frame = arena.frame(offset, frame_bytes(len(payload)))
            frame[: len(payload)] = payload
            start = digests_offset(len(payload))
            frame[start : start + len(digests)] = digests
            checksums.append(checksum_of(digests))
        return checksums

    def _report_dropped(self) -> None:
        with self._lock:
            dropped = self._dropped
        if dropped and self._link.call(lambda session: Report(session=session, stores_dropped=dropped), CALL_TIMEOUT_S):
            with self._lock:
                self._dropped -= dropped
