"""The worker's load threads: they hand frames of the arena to the copy engine as these become ready.

A thread waits for frames that a promotion is filling by watching their state; it never talks to the server. There are
two, so that a load from memory need not wait behind one from disk. That no unverified byte is used is the engine's
business; what it could not bring becomes bad blocks, which vLLM computes.

A request's load may come in pieces, which end in any order; it has ended when the last of them was submitted and all
have ended.

Locking design: loads travel through a queue; results are collected under `_lock`. The blocks of a failed load are added
before its request counts as finished, as vLLM demands.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from cachetier.client import ArenaView
from cachetier.core.arena_format import STATE_FILLING, STATE_READY
from cachetier.core.errors import CachetierError
from cachetier.core.pool_messages import POOL_FILL, POOL_NONE
from cachetier_connector.arena_cache import ArenaCache
from cachetier_connector.copy_base import CopyEngine, LoadRun
from cachetier_connector.plan import ChunkSource, LoadOp

NUM_THREADS = 2
GROUP_CHUNKS = 16
POOL_GROUP_CHUNKS = 64  # what is in device memory takes the device less time than the hand-over
WATCH_INTERVAL_S = 0.0002

log = logging.getLogger(__name__)


def frames_of(chunk: ChunkSource) -> Sequence[int]:
    """Return the frames of the arena that a chunk needs to be ready: none if it is read from its segment."""
    return () if chunk.segment else chunk.frames


class Submitted(NamedTuple):
    """A load in the queue: what it must wait for, and since when it is there."""

    load: LoadOp
    fence: Any
    since_s: float


class Loader:
    """Carries out `LoadOp`s on threads of its own."""

    def __init__(
        self,
        engine: CopyEngine,
        arenas: ArenaCache,
        *,
        stall_s: float,
        report_corrupt: Callable[[bytes], None],
        report_filled: Callable[[int, list[int]], None] = lambda fill, frames: None,
    ) -> None:
        """Start the threads.

        Args:
            engine: of this rank's paged blocks.
            arenas: to read from.
            stall_s: a load without progress for so long is given up.
            report_corrupt: called with the key of a chunk whose bytes do not match its checksum.
            report_filled: called with a load's fill, if it has one, and the frames of the own pool that it has filled.
        """
        self._engine, self._arenas = engine, arenas
        self._stall_s, self._report_corrupt, self._report_filled = stall_s, report_corrupt, report_filled
        self._lock = threading.Lock()
        self._has_finished = threading.Event()
        self._under_way: dict[str, int] = {}
        self._more_to_come: set[str] = set()
        self._finished: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._seconds: dict[str, float] = {}
        self._parts: dict[str, dict[int, int]] = {}
        self._loads: queue.SimpleQueue[Submitted | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"cachetier-loader-{number}", daemon=True)
            for number in range(NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, load: LoadOp, fence: Any = None) -> None:
        """Queue a load that waits for `fence`, if there is one, before it writes. The worker's main thread.

        The engine bounds their number: each holds paged blocks.
        """
        with self._lock:
            self._under_way[load.request_id] = self._under_way.get(load.request_id, 0) + 1
            (self._more_to_come.discard if load.is_last else self._more_to_come.add)(load.request_id)
        self._loads.put(Submitted(load, fence, time.monotonic()))

    def take_finished(self, wait_s: float = 0.0) -> set[str]:
        """Return the requests whose last load ended since the last call; wait for a load to end, or for one to come.

        Requests that are blended are not among them: see `take_parts`. The worker's main thread.
        """
        if wait_s and (self._under_way or self._more_to_come):
            self._has_finished.wait(wait_s)
        with self._lock:
            self._has_finished.clear()
            finished, self._finished = self._finished, set()
        return finished

    def take_parts(self) -> dict[str, dict[int, int]]:
        """Return up to which token each part of blended requests was filled that ended since the last call."""
        with self._lock:
            parts, self._parts = self._parts, {}
        return parts

    def take_bad_blocks(self) -> set[int]:
        """Return the blocks that loads could not fill, since the last call."""
        with self._lock:
            bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_seconds(self) -> dict[str, float]:
        """Return how long the loads took that ended since the last call, by request."""
        with self._lock:
            seconds, self._seconds = self._seconds, {}
        return seconds

    def stop(self) -> bool:
        """End the threads after the loads under way; tell whether they have ended."""
        for _ in self._threads:
            self._loads.put(None)
        for thread in self._threads:
            thread.join(self._stall_s + 1)
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        torch.set_num_threads(1)  # this thread's copies must not take the cores that compute
        while (submitted := self._loads.get()) is not None:
            load, start_s = submitted.load, time.monotonic()
            try:
                end = self._load(submitted)
            except Exception:
                log.exception("cachetier: loading request %s failed; it is computed instead", load.request_id)
                end = load.start
            with self._lock:
                self._has_finished.set()
                self._seconds[load.request_id] = time.monotonic() - start_s
                self._under_way[load.request_id] -= 1
                is_complete = not self._under_way[load.request_id] and load.request_id not in self._more_to_come
                if not self._under_way[load.request_id]:
                    del self._under_way[load.request_id]
                if load.part is not None:  # what is missing will be computed with the rest
                    self._parts.setdefault(load.request_id, {})[load.part] = end
                    continue
                if end < load.end:
                    block_tokens = self._engine.block_tokens
                    self._bad_blocks.update(load.block_ids[end // block_tokens : -(-load.end // block_tokens)])
                if is_complete:
                    self._finished.add(load.request_id)

    def _load(self, submitted: Submitted) -> int:
        """Carry out a load and report what it filled; return up to which token that worked."""
        load, filled = submitted.load, list[int]()
        try:
            return self._carry_out(submitted, filled)
        finally:
            if load.fill:
                self._report_filled(load.fill, filled)

    def _carry_out(self, submitted: Submitted, filled: list[int]) -> int:
        load, start_s = submitted.load, time.monotonic()
        if not load.chunks.tiling_of:
            return load.start
        try:
            arena = self._arenas.get(load.arena_path, load.instance)
        except CachetierError as error:
            log.warning("cachetier: request %s is computed, not loaded: %s", load.request_id, error)
            return load.start
        run = self._engine.open_load(arena, load, submitted.fence)
        try:
            self._push_as_ready(arena, load, run)
        finally:
            pushed_s = time.monotonic()
            num_good = run.finish()
        self._log_times(num_good, load, submitted.since_s, start_s, pushed_s)
        filled += run.filled
        if run.corrupt_key is not None:
            log.error("cachetier: a chunk does not match its checksum; dropping it and computing from there")
            self._report_corrupt(run.corrupt_key)
        end = (load.first_chunk + num_good) * load.chunk_tokens + load.shift
        return max(load.start, min(load.end, end))

    def _log_times(self, num_good: int, load: LoadOp, since_s: float, start_s: float, pushed_s: float) -> None:
        end_s = time.monotonic()
        log.debug(
            "cachetier: load of %d chunks: queued %.2f ms, pushed %.2f ms, settled %.2f ms, %.1f GB/s",
            num_good,
            1000 * (start_s - since_s),
            1000 * (pushed_s - start_s),
            1000 * (end_s - pushed_s),
            num_good * self._engine.shard_bytes(load.chunk_tokens) / max(end_s - start_s, 1e-6) / 1e9,
        )

    def _push_as_ready(self, arena: ArenaView, load: LoadOp, run: LoadRun) -> None:
        """Push chunks in order, up to the first that does not arrive: what is ready together goes together."""
        chunks, first = load.chunks.unpack(load.tilings), 0
        patient_until_s = time.monotonic() + (math.inf if load.patience_s is None else load.patience_s)
        while first < len(chunks) and run.corrupt_key is None:
            if not self._wait_until_ready(arena, frames_of(chunks[first]), patient_until_s):
                log.warning("cachetier: a chunk did not arrive in time or could not be read; computing from there")
                return
            at_once = POOL_GROUP_CHUNKS if POOL_NONE < chunks[first].pool < POOL_FILL else GROUP_CHUNKS
            end, end_max = first + 1, min(first + at_once, len(chunks))
            while end < end_max and all(arena.state(frame) == STATE_READY for frame in frames_of(chunks[end])):
                end += 1
            run.push(chunks[first:end])
            first = end

    def _wait_until_ready(self, arena: ArenaView, frames: Sequence[int], patient_until_s: float) -> bool:
        deadline_s = min(time.monotonic() + self._stall_s, patient_until_s)
        for frame in frames:
            while (state := arena.state(frame)) == STATE_FILLING:
                if time.monotonic() > deadline_s:
                    return False
                time.sleep(WATCH_INTERVAL_S)
            if state != STATE_READY:
                return False
        return True
