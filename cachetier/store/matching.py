"""Match and release: how many leading chunks of a prompt are held, and the lease that keeps them.

Runs on the caller's thread. A match walks the chain in the host table under the store's lock, pinning what it passes.
Where the host table ends and there is a disk tier, it looks the rest up without the lock, takes the lock again and
gives what was found frames and a place in the promoter's queue. Hashes find a chunk; its content and its parent are
compared, along the whole chain, before it counts.

Where this node's tiers end, the remote store may have more. Asking it takes milliseconds and not microseconds, so a
match that has to is handed back as a function, for a thread that can wait: what it pinned so far stays pinned.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate

import msgspec

from cachetier.core.errors import ProtocolError
from cachetier.core.messages import LATE_TIERS, TIER_DISK, TIER_GPU, TIER_HOST, TIER_REMOTE, Match, MatchReply
from cachetier.storage.disk import DiskChunk
from cachetier.store.books import Books
from cachetier.store.chunk import HITS_MAX, ChunkState, HostChunk
from cachetier.store.direct import DirectChunk
from cachetier.store.flush import Flusher
from cachetier.store.leases import Lease, Session
from cachetier.store.match_reply import describe
from cachetier.store.pending import begun_wait, count_pending, num_awaited
from cachetier.store.promotion import Promoter
from cachetier.store.prompt import Prompt, tier_of
from cachetier.store.remote_tier import RemoteTier
from cachetier.store.wait_table import ChunkWait

LOOK_UP_CHUNKS = 64  # looked up at a time: the first are being read while the next are looked up


class Matcher:
    """Answers `match` and ends leases to read."""

    def __init__(
        self, books: Books, flusher: Flusher | None, promoter: Promoter | None, remote: RemoteTier | None
    ) -> None:
        self._books = books
        self._flusher = flusher
        self._promoter = promoter
        self._remote = remote

    def begin(self, message: Match) -> MatchReply | Callable[[], MatchReply]:
        """See `Store.begin_match`."""
        session, prompt = self._prompt(message, is_counted=True)
        if not message.lease:
            return self._promised(message, prompt, self._asking(session.engine, prompt))
        try:
            self._walk_here(prompt)
            deadline = self._remote.deadline_for(prompt) if self._remote is not None else None
        except BaseException:
            self._clean_up(prompt, None)
            raise
        if deadline is None:
            return self._lease(message, prompt)
        return partial(self._lease, message, prompt, deadline)

    def match(self, message: Match, *, is_counted: bool = True) -> MatchReply:
        """Match on this node alone; what `is_counted` counts as tokens that were asked for."""
        session, prompt = self._prompt(message, is_counted=is_counted)
        if not message.lease:
            return self._promised(message, prompt, self._asking(session.engine, prompt))
        try:
            self._walk_here(prompt)
        except BaseException:
            self._clean_up(prompt, None)
            raise
        return self._lease(message, prompt)

    def _prompt(self, message: Match, *, is_counted: bool) -> tuple[Session, Prompt]:
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
        return session, prompt

    def _promised(self, message: Match, prompt: Prompt, reply: MatchReply) -> MatchReply:
        """Note that the asking engine is about to store what `reply` does not have, if it says so."""
        if not message.promise:
            return reply
        books, first = self._books, reply.num_chunks
        with books.lock:
            session = books.leases.session(message.session, books.clock())
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
            self._walk_here(prompt, lambda: waits.is_on(wait))
        finally:
            self._stop_keeping(prompt)
            wait.is_looked_at = False
        with books.lock:
            num_pending = num_awaited(books, wait)
            if not waits.is_on(wait) or (num_pending and len(prompt.held) == before):
                return None
            if not num_pending:
                waits.end(lease.id)
            self._count_tokens(lease, prompt)
            lease.waited_tokens = (len(prompt.held) - wait.num_held) * books.chunk_tokens
            return self._reply(lease, prompt, num_pending)

    def look_up(self, namespace: bytes, tokens: bytes, salt: str) -> MatchReply:
        """Say what is held of a prompt to somebody without a session; changes, leases and counts nothing.

        Copies in device memory count as TIER_GPU.

        Raises:
            ProtocolError: status 404 for an unknown namespace, 400 for what no prompt can be.
        """
        books = self._books
        contents = books.contents(tokens, [], salt)
        with books.lock:
            known = books.namespaces.get(namespace)
        root = books.hasher.root(known.id, salt)
        return self._asking("", Prompt(known, root, contents, books.hasher.chain(root, contents)), names_copies=True)

    def release_read(self, lease: Lease, *, may_fill: bool = True) -> None:
        """Give back what an ended lease to read pinned (lock held); offer what is not on disk to the flusher again.

        Unless it `may_fill` frames of a pool still, what it ordered there is given up.
        """
        self._books.waits.end(lease.id)
        if lease.pool_use is not None:
            self._books.gpu.end_use(lease.pool_use, self._books.clock(), may_fill=may_fill)
        self._unpin(lease.chunks)

    def _unpin(self, chunks: Sequence[HostChunk]) -> None:
        unpin, disk, flusher = self._books.table.unpin, self._books.disk, self._flusher
        ready, promoting = ChunkState.READY, ChunkState.PROMOTING
        for chunk in chunks:
            if not chunk.is_durable and flusher is not None and chunk.state is ready:
                flusher.offer(chunk)
            unpin(chunk)
            if isinstance(chunk, DirectChunk) and disk is not None:
                disk.let_go(chunk.record)
            elif chunk.state is promoting and chunk.pins == 1:
                self._cancel(chunk)

    def _cancel(self, chunk: HostChunk) -> None:
        if chunk.is_remote and self._remote is not None:
            self._remote.fetcher.cancel(chunk)
        elif self._promoter is not None:
            self._promoter.cancel(chunk)

    def trim(self, lease: Lease, num_chunks: int) -> None:
        """Give back all but the first chunks of a live lease to read (lock held), and count the rest as cut.

        Nothing more is waited for.
        """
        self._books.waits.end(lease.id)
        cut, lease.chunks = lease.chunks[num_chunks:], lease.chunks[:num_chunks]
        self._unpin(cut)
        self._books.counters.hits_cut += bool(cut)
        self._books.counters.tokens_cut += len(cut) * self._books.chunk_tokens

    def _walk_here(self, prompt: Prompt, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Pin what this node holds of a prompt from where it stands on, while `is_wanted` (lock held)."""
        lock = self._books.lock
        with lock:
            if is_wanted():
                self._walk(prompt, {}, self._take_from_disk)
        while rows := self._look_up(prompt):
            with lock:
                if not is_wanted():
                    return
                before = len(prompt.held)
                self._walk(prompt, rows, self._take_from_disk)
            if len(prompt.held) - before < LOOK_UP_CHUNKS:
                return

    def _lease(self, message: Match, prompt: Prompt, deadline: float | None = None) -> MatchReply:
        """Lease what was pinned, and until `deadline` what the remote store says that it has of the rest."""
        books = self._books
        lease: Lease | None = None
        try:
            while deadline is not None and self._remote is not None:
                rows = self._remote.look_up(prompt, deadline)
                with books.lock:
                    before = len(prompt.held)
                    self._walk(prompt, rows, self._remote.take)
                if not rows or len(prompt.held) - before < len(rows):
                    break
            with books.lock:
                session = books.leases.session(message.session, books.clock())
                wait = begun_wait(books, message.wait, session.engine, prompt) if message.wait else None
                num_pending = (
                    num_awaited(books, wait) if wait else count_pending(books, session.engine, prompt, len(prompt.held))
                )
                if (prompt.held or (wait and num_pending)) and not books.leases.is_full:
                    lease = self._grant(session, prompt, message.reads_pools)
                    if wait and num_pending:
                        books.waits.begin(wait, lease)
                reply = self._reply(lease, prompt, num_pending)
        finally:
            self._clean_up(prompt, lease)
        return self._promised(message, prompt, reply)

    def _clean_up(self, prompt: Prompt, lease: Lease | None) -> None:
        """Give back what a match kept on disk, and without a lease also what it pinned."""
        self._stop_keeping(prompt)
        if lease is None and prompt.held:
            with self._books.lock:
                self._unpin(prompt.held)

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
        lease.remote_tokens = tiers.count(TIER_REMOTE) * chunk_tokens

    def _walk(
        self, prompt: Prompt, rows: Mapping[int, DiskChunk], take: Callable[[Prompt, DiskChunk], HostChunk | None]
    ) -> None:
        """Pin held chunks from where the prompt stands on, having `take` those in `rows`, up to the first miss.

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
                chunk = take(prompt, row) if row is not None else None
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
                tiers.append(tier_of(chunk))
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
        if record is not None:
            self._books.disk_pins.touch(row.key)
            return DirectChunk(row, prompt.root, tiling, record)
        assert self._promoter is not None
        chunk = self._books.table.add_to_fill(row, prompt.root, tiling)
        if chunk is not None:
            is_kept = self._books.disk_pins.pin(row.key)
            assert is_kept, "the match kept it on disk, so it cannot be leaving"
            self._promoter.offer(chunk)
        return chunk

    def _reply(self, lease: Lease | None, prompt: Prompt, num_pending: int) -> MatchReply:
        """Describe what `lease` holds (lock held, so that no frame changes hands meanwhile)."""
        ready_in_s = self._ready_in_s(prompt) if lease and prompt.held else []
        return describe(lease, prompt, num_pending, ready_in_s)

    def _ready_in_s(self, prompt: Prompt) -> list[float]:
        """Say when each chunk of a late tier will be there; nothing if that is not known of one of these tiers."""
        late = [pair for pair in zip(prompt.held, prompt.tiers, strict=True) if pair[1] in LATE_TIERS]
        on_disk = [chunk for chunk, tier in late if tier == TIER_DISK]
        fetched = [chunk for chunk, tier in late if tier == TIER_REMOTE]
        from_disk = iter(self._disk_ready_in_s(prompt, on_disk))
        from_remote = iter(self._remote.fetcher.ready_in_s(fetched) if fetched and self._remote is not None else ())
        ready = [next(from_disk if tier == TIER_DISK else from_remote, None) for _, tier in late]
        return [each for each in ready if each is not None] if None not in ready else []

    def _disk_ready_in_s(self, prompt: Prompt, on_disk: Sequence[HostChunk]) -> list[float]:
        if not on_disk or self._promoter is None:
            return []
        if not isinstance(on_disk[-1], DirectChunk):
            return self._promoter.ready_in_s(on_disk)
        read_bytes = accumulate(chunk.tiling.total_frame_bytes for chunk in on_disk)
        return [each / prompt.direct_bytes_per_s for each in read_bytes]

    def _asking(self, engine: str, prompt: Prompt, *, names_copies: bool = False) -> MatchReply:
        """Say what this node holds without touching anything; no frames are named, for nothing keeps them."""
        books, tiers = self._books, bytearray()
        for number, key in enumerate(prompt.keys):
            chunk = books.table.chunks.get(key)
            if chunk is not None and chunk.state is not ChunkState.PENDING and prompt.has(number, chunk):
                copy = chunk.copy if names_copies else None
                tiers.append(TIER_GPU if copy is not None and copy.is_ready else tier_of(chunk))
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
            num_pending=count_pending(books, engine, prompt, len(tiers)),
        )
