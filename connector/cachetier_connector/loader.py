"""The worker's load threads: from frames of the arena into paged blocks, every byte verified on the way.

Bytes are copied out of the arena first and verified in the copy: a frame whose lease has expired may change under the
reader's eyes, and must then be a miss and never wrong KV. A thread waits for frames that a promotion is filling by
watching their state; it never talks to the server. There are two, so that a load from memory need not wait behind one
from disk.

Locking design: loads travel through a queue; results are collected under `_lock`. The blocks of a failed load are added
before its request counts as finished, as vLLM demands.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch

from cachetier.client import ArenaView
from cachetier.core.arena_format import STATE_FILLING, STATE_READY
from cachetier.core.checksum import digests_match, pages_match
from cachetier.core.errors import CachetierError
from cachetier.core.layout import DIGEST_BYTES, PAGE_BYTES, KVLayout, Piece, Shard, digests_offset, num_pages
from cachetier_connector.arena_cache import ArenaCache
from cachetier_connector.copy_base import CopyEngine
from cachetier_connector.plan import ChunkSource, LoadOp

NUM_THREADS = 2
GROUP_CHUNKS = 16
WATCH_INTERVAL_S = 0.0002

log = logging.getLogger(__name__)


class Loader:
    """Carries out `LoadOp`s on threads of its own."""

    def __init__(
        self,
        engine: CopyEngine,
        layout: KVLayout,
        shard: Shard,
        arenas: ArenaCache,
        *,
        stall_s: float,
        report_corrupt: Callable[[bytes], None],
    ) -> None:
        """Start the threads.

        Args:
            engine: of this rank's paged blocks.
            layout: of the model's KV cache group.
            shard: what of it this rank holds.
            arenas: to read from.
            stall_s: a load without progress for so long is given up.
            report_corrupt: called with the key of a chunk whose bytes do not match its checksum.
        """
        self._engine, self._layout, self._shard, self._arenas = engine, layout, shard, arenas
        self._stall_s, self._report_corrupt = stall_s, report_corrupt
        self._lock = threading.Lock()
        self._finished: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._loads: queue.SimpleQueue[LoadOp | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"cachetier-loader-{number}", daemon=True)
            for number in range(NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, load: LoadOp) -> None:
        """Queue a load. The engine bounds their number: each holds paged blocks."""
        self._loads.put(load)

    def take_finished(self) -> set[str]:
        """Return the requests whose loads ended since the last call."""
        with self._lock:
            finished, self._finished = self._finished, set()
        return finished

    def take_bad_blocks(self) -> set[int]:
        """Return the blocks that loads could not fill, since the last call."""
        with self._lock:
            bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def stop(self) -> None:
        """End the threads after the loads under way."""
        for _ in self._threads:
            self._loads.put(None)
        for thread in self._threads:
            thread.join(self._stall_s + 1)

    def _run(self) -> None:
        torch.set_num_threads(1)  # this thread's copies must not take the cores that compute
        while (load := self._loads.get()) is not None:
            try:
                end = self._load(load)
            except Exception:
                log.exception("cachetier: loading request %s failed; it is computed instead", load.request_id)
                end = load.start
            with self._lock:
                if end < load.end:
                    block_tokens = self._engine.block_tokens
                    self._bad_blocks.update(load.block_ids[end // block_tokens : -(-load.end // block_tokens)])
                self._finished.add(load.request_id)

    def _load(self, load: LoadOp) -> int:
        """Carry out `load`; return up to which token that worked."""
        try:
            arena = self._arenas.get(load.arena_path, load.instance)
        except CachetierError as error:
            log.warning("cachetier: request %s is computed, not loaded: %s", load.request_id, error)
            return load.start
        reader = _ShardReader(arena, self._layout, self._shard, load.tilings, load.chunk_tokens)
        chunks, done = load.chunks.unpack(load.tilings), load.start
        for first in range(0, len(chunks), GROUP_CHUNKS):
            group = chunks[first : first + GROUP_CHUNKS]
            shards = torch.empty(len(group), self._engine.shard_bytes(load.chunk_tokens), dtype=torch.uint8)
            num_good = self._fill(reader, group, shards)
            group_start = (load.first_chunk + first) * load.chunk_tokens
            end = min(load.end, group_start + num_good * load.chunk_tokens)
            if end > done:
                self._engine.scatter(
                    shards, load.chunk_tokens, done - group_start, load.block_ids, done, num_tokens=end - done
                )
                done = end
            if num_good < len(group):
                break
        return done

    def _fill(self, reader: "_ShardReader", group: Sequence[ChunkSource], shards: torch.Tensor) -> int:
        """Copy and verify the chunks of `group`; return how many, from the first on, are good."""
        for number, chunk in enumerate(group):
            if not self._wait_until_ready(reader.arena, chunk.frames):
                log.warning("cachetier: a chunk did not arrive in time or could not be read; computing from there")
                return number
            if not reader.read(chunk, memoryview(shards[number].numpy())):
                log.error("cachetier: a chunk does not match its checksum; dropping it and computing from there")
                self._report_corrupt(chunk.key)
                return number
        return len(group)

    def _wait_until_ready(self, arena: ArenaView, frames: Sequence[int]) -> bool:
        deadline_s = time.monotonic() + self._stall_s
        for frame in frames:
            while (state := arena.state(frame)) == STATE_FILLING:
                if time.monotonic() > deadline_s:
                    return False
                time.sleep(WATCH_INTERVAL_S)
            if state != STATE_READY:
                return False
        return True


class _ShardReader:
    """Copies a rank's shard of a chunk out of the arena, however the chunk was cut when it was stored."""

    def __init__(
        self, arena: ArenaView, layout: KVLayout, wanted: Shard, tilings: Sequence[Sequence[Shard]], chunk_tokens: int
    ) -> None:
        self.arena = arena
        self._cuts: list[list[tuple[int, list[Piece]]]] = [
            [
                (layout.object_bytes(stored, chunk_tokens), layout.pieces(stored, wanted, chunk_tokens))
                for stored in tiling
            ]
            for tiling in tilings
        ]

    def read(self, chunk: ChunkSource, into: memoryview) -> bool:
        """Fill `into` with the wanted shard; tell whether all bytes used match the chunk's checksums."""
        cuts = self._cuts[chunk.tiling]
        return all(
            not pieces or self._read_object(frame, size, checksum, pieces, into)
            for frame, checksum, (size, pieces) in zip(chunk.frames, chunk.checksums, cuts, strict=True)
        )

    def _read_object(self, frame: int, size: int, checksum: int, pieces: list[Piece], into: memoryview) -> bool:
        digests = bytes(self.arena.frame(frame + digests_offset(size), num_pages(size) * DIGEST_BYTES))
        if not digests_match(digests, size, checksum):
            return False
        return all(self._read_piece(frame, size, digests, piece, into) for piece in pieces)

    def _read_piece(self, frame: int, size: int, digests: bytes, piece: Piece, into: memoryview) -> bool:
        first_page, end_page = piece.object_offset // PAGE_BYTES, num_pages(piece.object_offset + piece.length_bytes)
        start, end = first_page * PAGE_BYTES, min(end_page * PAGE_BYTES, size)
        target = into[piece.wanted_offset : piece.wanted_offset + piece.length_bytes]
        source = self.arena.frame(frame + start, end - start)
        if len(source) == len(target):
            copy = target
            copy[:] = source
        else:  # the piece starts or ends within a page, and only whole pages can be verified
            copy = memoryview(bytes(source))
            skip = piece.object_offset - start
            target[:] = copy[skip : skip + piece.length_bytes]
        return pages_match(copy, digests, first_page)
