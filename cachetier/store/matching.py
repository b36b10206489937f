"""Match and release: how many leading chunks of a prompt are held, and the lease that keeps them.

Runs on the caller's thread. A match walks the chain in the host table under the store's lock, pinning what it passes.
Where the host table ends and there is a disk tier, it looks the rest up without the lock, takes the lock again and
gives what was found frames and a place in the promoter's queue. Hashes find a chunk; its content and its parent are
compared, along the whole chain, before it counts.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import msgspec

from cachetier.core.errors import ProtocolError
from cachetier.core.messages import TIER_DISK, TIER_GPU, TIER_HOST, Match, MatchReply, Wait
from cachetier.core.pool_messages import POOL_NONE
from cachetier.storage.disk import DiskChunk
from cachetier.store.books import Books
from cachetier.store.chunk import HITS_MAX, ChunkState, HostChunk, Tiling
from cachetier.store.direct import DirectChunk, name_segments
from cachetier.store.flush import Flusher
from cachetier.store.leases import Lease, Session
from cachetier.store.promotion import Promoter
from cachetier.store.prompt import Prompt
from cachetier.store.wait_table import ChunkWait

LOOK_UP_CHUNKS = 64  # looked up at a time: the first are being read while the next are looked up
PROMISE_GRACE_S = 1.0  # a request may reach the engine that waits before the one that promises


class Matcher:
    """Answers `match` and ends leases to read."""

    def __init__(self, books: Books, flusher: Flusher | None, promoter: Promoter | None) -> None:
        self._books = books
        self._flusher = flusher
        self._promoter = promoter

    def match(self, message: Match, *, is_counted: bool = True) -> MatchReply:
        """See `Store.match`; what `is_counted` counts as tokens that were asked for."""
        books = self._books
        contents = books.contents(message.tokens, message.extras, message.salt)
        with books.lock:
            session = books.leases.session(message.session, books.clock())
            namespace = books.namespaces.get(message.namespace)
            direct_bytes_per_s = books.direct.bytes_per_s(session.engine)
            if message.lease and is_counted:
                books.tokens.queried += len(contents) * books.chunk_tokens
        root = books.hasher.root(namespace.id, message.salt)
        prompt = Prompt(namespace, root, contents, books.hasher.chain(root, contents))
        prompt.direct_bytes_per_s = direct_bytes_per_s
        reply = self._leasing(message, prompt) if message.lease else self._asking(session.engine, prompt)
        if not message.promise:
            return reply
        with books.lock:
            session, first = books.leases.session(message.session, books.clock()), reply.num_chunks
            promise = books.promises.make(session, prompt.keys[first:], first, books.clock())
        return msgspec.structs.replace(reply, promise=promise)

    def progress(self, wait: ChunkWait) -> MatchReply | None:
        """Lease what is held by now of what `wait` waits for; return the match's reply as it is then.

        Returns:
            None: there is no news, or nobody waits any more. A wait for which nothing more will come is over.
        """
        books, prompt, waits = self._books, wait.prompt, self._books.waits
        with books.lock:
            lease = waits.begin_to_look(wait)
            if lease is None:
                return None
            before = len(prompt.held)
        try:
            self._advance(prompt, lambda: waits.is_on(wait))
        finally:
            self._stop_keeping(prompt)
            wait.is_looked_at = False
        with books.lock:
            num_pending = self._num_awaited(wait)
            if not waits.is_on(wait) or (num_pending and len(prompt.held) == before):
                return None
            if not num_pending:
                waits.end(lease.id)
            self._count_tokens(lease, prompt)
            lease.waited_tokens = (len(prompt.held) - wait.num_held) * books.chunk_tokens
            return self._reply(lease, prompt, num_pending)

    def release_read(self, lease: Lease, *, may_fill: bool = True) -> None:
        """Give back what an ended lease to read pinned (lock held); offer what is not on disk to the flusher again.

        Unless it `may_fill` frames of a pool still, what it ordered there is given up.
        """
        self._books.waits.end(lease.id)
        if lease.pool_use is not None:
            self._books.gpu.end_use(lease.pool_use, self._books.clock(), may_fill=may_fill)
        self._unpin(lease.chunks)

    def _unpin(self, chunks: Sequence[HostChunk]) -> None:
        unpin, disk, flusher, promoter = self._books.table.unpin, self._books.disk, self._flusher, self._promoter
        ready, promoting = ChunkState.READY, ChunkState.PROMOTING
        for chunk in chunks:
            if not chunk.is_durable and flusher is not None and chunk.state is ready:
                flusher.offer(chunk)
            unpin(chunk)
            if isinstance(chunk, DirectChunk) and disk is not None:
                disk.let_go(chunk.record)
            elif chunk.state is promoting and chunk.pins == 1 and promoter is not None:
                promoter.cancel(chunk)

    def trim(self, lease: Lease, num_chunks: int) -> None:
        """Give back all but the first chunks of a live lease to read (lock held), and count the rest as cut.

        Nothing more is waited for.
        """
        self._books.waits.end(lease.id)
        cut, lease.chunks = lease.chunks[num_chunks:], lease.chunks[:num_chunks]
        self._unpin(cut)
        self._books.counters.hits_cut += bool(cut)
        self._books.counters.tokens_cut += len(cut) * self._books.chunk_tokens

    def _leasing(self, message: Match, prompt: Prompt) -> MatchReply:
        books = self._books
        lease: Lease | None = None
        try:
            self._advance(prompt, lambda: True)
            with books.lock:
                session = books.leases.session(message.session, books.clock())
                wait = self._wait_of(message.wait, session.engine, prompt) if message.wait else None
                num_pending = (
                    self._num_awaited(wait) if wait else self._count_pending(session.engine, prompt, len(prompt.held))
                )
                if (prompt.held or (wait and num_pending)) and not books.leases.is_full:
                    lease = self._grant(session, prompt, message.reads_pools)
                    if wait and num_pending:
                        books.waits.begin(wait, lease)
                return self._reply(lease, prompt, num_pending)
        finally:
            self._stop_keeping(prompt)
            if lease is None and prompt.held:
                with books.lock:
                    self._unpin(prompt.held)

    def _wait_of(self, asked: Wait, engine: str, prompt: Prompt) -> ChunkWait:
        """Return the wait that a match asks for (lock held); it has not begun."""
        is_coming = asked.for_promised and self._books.engines.is_producer(asked.prefill)
        promised_by_s = self._books.clock() + PROMISE_GRACE_S if is_coming else 0.0
        return ChunkWait(asked, engine, prompt, promised_by_s)

    def _advance(self, prompt: Prompt, is_wanted: Callable[[], bool]) -> None:
        """Pin what is held of a prompt from where it stands on, while `is_wanted` (asked with the lock held)."""
        lock = self._books.lock
        with lock:
            if is_wanted():
                self._walk(prompt, {})
        while rows := self._look_up(prompt):
            with lock:
                if not is_wanted():
                    return
                before = len(prompt.held)
                self._walk(prompt, rows)
            if len(prompt.held) - before < LOOK_UP_CHUNKS:
                return

    def _stop_keeping(self, prompt: Prompt) -> None:
        """Let go of what was kept on disk while a prompt was walked along."""
        for key in prompt.kept:
            self._books.disk_pins.unpin(key)
        for record in prompt.records.values():
            assert self._books.disk is not None
            self._books.disk.let_go(record)
        prompt.kept.clear()
        prompt.records.clear()

    def _grant(self, session: Session, prompt: Prompt, reads_pools: bool) -> Lease:
        lease = self._books.leases.grant(session, prompt.held, self._books.clock())
        if reads_pools:
            lease.pool_use = self._books.gpu.use(session.engine, prompt.held, prompt.tiers)
        self._count_tokens(lease, prompt)
        return lease

    def _count_tokens(self, lease: Lease, prompt: Prompt) -> None:
        chunk_tokens, tiers = self._books.chunk_tokens, prompt.tiers
        lease.host_tokens = tiers.count(TIER_HOST) * chunk_tokens
        lease.disk_tokens = tiers.count(TIER_DISK) * chunk_tokens
        lease.gpu_tokens = tiers.count(TIER_GPU) * chunk_tokens

    def _walk(self, prompt: Prompt, rows: Mapping[int, DiskChunk]) -> None:
        """Pin held chunks from where the prompt stands on, promoting those in `rows`, up to the first that is not held.

        Written out because 512 turns of this loop are most of a match.
        """
        get, keys, contents, held, tiers = (
            self._books.table.chunks.get, prompt.keys, prompt.contents, prompt.held, prompt.tiers,
        )  # fmt: skip
        now_s = self._books.clock()
        ready, promoting, direct = ChunkState.READY, ChunkState.PROMOTING, ChunkState.DIRECT
        for number in range(len(held), len(keys)):
            chunk = get(keys[number])
            if chunk is None:
                row = rows.get(number)
                chunk = self._take_from_disk(prompt, row) if row is not None else None
                if chunk is None:
                    return
            state = chunk.state
            if (
                chunk.content != contents[number]
                or chunk.parent != (keys[number - 1] if number else prompt.root)
                or (state is not ready and state is not promoting and state is not direct)
            ):
                return
            chunk.pins += 1
            if state is ready:
                tiers.append(TIER_HOST)
                chunk.used_at_s = now_s
                if chunk.hits < HITS_MAX:
                    chunk.hits += 1
            else:
                tiers.append(TIER_DISK)
            held.append(chunk)

    def _look_up(self, prompt: Prompt) -> dict[int, DiskChunk]:
        """Return what the disk tier has of the prompt's next chunks, kept there by pins, up to the first miss.

        Runs without the lock: what the host table has is skipped here, and looked at again under the lock.
        """
        disk, flusher, pins = self._books.disk, self._flusher, self._books.disk_pins
        rows: dict[int, DiskChunk] = {}
        if disk is None or flusher is None:
            return rows
        chunks = self._books.table.chunks
        first = len(prompt.held)
        for number in range(first, min(first + LOOK_UP_CHUNKS, len(prompt.keys))):
            key = prompt.keys[number]
            if key in chunks:
                if number == first:
                    break  # pending, or of another content: the walk ends here whatever follows
                continue
            if flusher.is_forgotten(key) or not pins.pin(key):
                break
            prompt.kept.append(key)
            row = disk.lookup(key)
            if row is None or not prompt.has(number, row):
                break
            rows[number] = row
            if prompt.direct_bytes_per_s and not pins.was_read(key) and (record := disk.hold(key)) is not None:
                prompt.records[key] = record
        return rows

    def _take_from_disk(self, prompt: Prompt, row: DiskChunk) -> HostChunk | None:
        """Have a chunk on disk read (lock held): by the engine, or by the promoter. None: it cannot be."""
        try:
            tiling = prompt.namespace.tiling(row.tiling)
        except ProtocolError:
            return None
        if tiling.object_bytes != row.object_bytes:
            return None
        record = prompt.records.pop(row.key, None)
        if record is None:
            return self._promote(prompt, row, tiling)
        self._books.disk_pins.touch(row.key)
        return DirectChunk(row, prompt.root, tiling, record)

    def _promote(self, prompt: Prompt, row: DiskChunk, tiling: Tiling) -> HostChunk | None:
        """Give a chunk on disk frames and queue its reading (lock held); None: there is no room."""
        books = self._books
        assert self._promoter is not None
        chunk = HostChunk(
            row.key,
            row.parent,
            tenant=prompt.root,
            namespace=row.namespace,
            position=row.position,
            content=row.content,
            tiling=tiling,
            state=ChunkState.PROMOTING,
        )
        chunk.checksums[:] = row.checksums
        books.table.add(chunk)
        for shard in range(len(tiling.shards)):
            if not books.table.allocate(chunk, shard):
                books.table.remove(chunk)
                return None
        is_kept = books.disk_pins.pin(row.key)
        assert is_kept, "the match kept it on disk, so it cannot be leaving"
        self._promoter.offer(chunk)
        return chunk

    def _reply(self, lease: Lease | None, prompt: Prompt, num_pending: int) -> MatchReply:
        """Describe what `lease` holds (lock held, so that no frame changes hands meanwhile)."""
        held = prompt.held if lease else []
        tilings: list[Tiling] = []
        tiling_of = bytearray()
        frames: list[Any] = []
        checksums: list[Any] = []
        last: Tiling | None = None
        index = 0
        for chunk in held:
            if chunk.tiling is not last:
                last = chunk.tiling
                if last not in tilings:
                    tilings.append(last)
                index = tilings.index(last)
            tiling_of.append(index)
            frames += chunk.frames
            checksums += chunk.checksums
        use = lease.pool_use if lease else None
        segments, segment_of = name_segments(held)
        return MatchReply(
            lease=lease.id if lease else 0,
            num_chunks=len(held),
            keys=b"".join(prompt.keys),
            tiers=bytes(prompt.tiers[: len(held)]),
            tilings=[list(tiling.shards) for tiling in tilings],
            tiling_of=bytes(tiling_of),
            frames=frames,
            checksums=checksums,
            num_pending=num_pending,
            ready_in_s=self._ready_in_s(prompt) if held else [],
            segments=segments,
            segment_of=segment_of,
            pools=[pool.message for pool in use.pools] if use else [],
            pool_of=bytes(use.pool_of).ljust(len(held), bytes([POOL_NONE])) if use else b"",
            pool_frames=use.frames + [0] * (len(held) - len(use.frames)) if use else [],
            fill=use.fill.id if use and use.fill else 0,
        )

    def _ready_in_s(self, prompt: Prompt) -> list[float]:
        if self._promoter is None or TIER_DISK not in prompt.tiers:
            return []
        on_disk = [chunk for chunk, tier in zip(prompt.held, prompt.tiers, strict=True) if tier == TIER_DISK]
        if not isinstance(on_disk[-1], DirectChunk):
            return self._promoter.ready_in_s(on_disk)
        read_bytes = accumulate(chunk.tiling.total_frame_bytes for chunk in on_disk)
        return [each / prompt.direct_bytes_per_s for each in read_bytes]

    def _asking(self, engine: str, prompt: Prompt) -> MatchReply:
        """Say what is held without touching anything; no frames are named, for nothing keeps them."""
        books, tiers = self._books, bytearray()
        for number, key in enumerate(prompt.keys):
            chunk = books.table.chunks.get(key)
            if chunk is not None and chunk.state is not ChunkState.PENDING and prompt.has(number, chunk):
                tiers.append(TIER_HOST if chunk.state is ChunkState.READY else TIER_DISK)
                continue
            row = books.disk.lookup(key) if chunk is None and books.disk is not None else None
            if row is None or not prompt.has(number, row) or (self._flusher and self._flusher.is_forgotten(key)):
                break
            tiers.append(TIER_DISK)
        return MatchReply(
            lease=0,
            num_chunks=len(tiers),
            keys=b"".join(prompt.keys),
            tiers=bytes(tiers),
            tilings=[],
            tiling_of=b"",
            frames=[],
            checksums=[],
            num_pending=self._count_pending(engine, prompt, len(tiers)),
        )

    def _num_awaited(self, wait: ChunkWait) -> int:
        """Return how many chunks after the held ones `wait` is waiting for (lock held)."""
        prompt = wait.prompt
        start = len(prompt.held)
        num_pending = self._count_pending(wait.engine, prompt, start, with_promised=wait.for_promised)
        if not num_pending and self._books.clock() < wait.promised_by_s:
            return len(prompt.keys) - start
        return num_pending

    def _count_pending(self, engine: str, prompt: Prompt, start: int, *, with_promised: bool = True) -> int:
        """Return how many chunks from `start` on are in memory, being stored, or promised by others than `engine`."""
        get, promises, count = self._books.table.chunks.get, self._books.promises, 0
        for number in range(start, len(prompt.keys)):
            chunk = get(prompt.keys[number])
            if chunk is not None:
                is_coming = prompt.has(number, chunk)
            else:
                is_coming = with_promised and promises.is_made(prompt.keys[number], not_by=engine)
            if not is_coming:
                break
            count += 1
        return count
