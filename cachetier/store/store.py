"""The store: the facade through which the service asks for everything.

Owns the data directory, the arena, the disk tier, the books and the threads (one that flushes, `io_threads` that
promote). Messages are answered on the caller's thread.

Locking design: see `store.books`: one lock for the books, I/O outside it.
"""

import os
import time
from collections.abc import Callable

import cachetier
from cachetier.core.config import ServerConfig
from cachetier.core.errors import ProtocolError
from cachetier.core.keys import KEY_BYTES, ChainKey
from cachetier.core.messages import (
    MAX_CHUNKS,
    Commit,
    CommitReply,
    Empty,
    Invalidate,
    Match,
    MatchReply,
    NamespaceInfo,
    OpenSession,
    OpenSessionReply,
    ReadsDirectly,
    RegisterNamespace,
    RegisterNamespaceReply,
    Release,
    Renew,
    RenewReply,
    Report,
    Reserve,
    ReserveReply,
    Trim,
)
from cachetier.core.pool_messages import CheckPools, CheckPoolsReply, CommitPool, OfferPool
from cachetier.storage.data_dir import DataDir
from cachetier.storage.file_layer import FileLayer
from cachetier.store.chunk import ChunkState
from cachetier.store.direct import DirectChunk
from cachetier.store.documents import Documents
from cachetier.store.engines import Engines
from cachetier.store.events import Events
from cachetier.store.leases import Lease
from cachetier.store.matching import Matcher
from cachetier.store.opening import open_tiers
from cachetier.store.remote_tier import MakeStore
from cachetier.store.stats import Stats
from cachetier.store.storing import Storer
from cachetier.store.waiting import Waiting

INSTANCE_BYTES = 16


class Store:
    """The tier's decisions: what is held where, who may read it, what goes. Synchronous and thread-safe.

    Every method may be called from any thread. Those that answer messages are short (no I/O beyond look-ups in the
    index); `flush` and `close` block and belong on a thread of their own.

    A chunk that `match` leases neither changes nor vanishes until the lease ends. What a process writes after its
    lease to fill has expired (it was stopped for long) may hit a frame that belongs to another chunk by then; its
    reader's checksum finds it and `invalidate` drops the chunk.

    Raises:
        StorageError: from the constructor, when the data directory or the arena cannot be used.
        ProtocolError: from the methods that answer messages: status 404 for an unknown session or namespace, 400 for
            an impossible request, 409 where the request contradicts what is known.

    Attributes:
        chunk_tokens: tokens a chunk.
        data_dir: the data directory.
        documents, engines, events, waiting: answer the messages about them.
        look_up: says what is held of a prompt: `Matcher.look_up`.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        files: FileLayer | None = None,
        remote: MakeStore | None = None,
    ) -> None:
        """Open the store; `files` and `remote` stand in for the operating system's files and the remote store."""
        self._config = config
        self.chunk_tokens = config.chunk_tokens
        self._clock = clock
        self._opened_at = clock()
        self._instance = os.urandom(INSTANCE_BYTES)
        self._is_closed = False
        self.data_dir = DataDir.open(config)
        try:
            tiers = open_tiers(config, self.data_dir, self._instance, clock, files, remote)
        except BaseException:
            self.data_dir.close()
            raise
        self._arena, self._books, self._remote = tiers.arena, tiers.books, tiers.remote
        self._flusher, self._promoter = tiers.flusher, tiers.promoter
        self._matcher = Matcher(self._books, self._flusher, self._promoter, self._remote)
        self._storer = Storer(self._books, self._flusher, self._remote, config.lease_ttl_s)
        self.documents = Documents(self._books, self._matcher, self._flusher, tiers.document_file)
        self.engines, self.events = Engines(self._books), Events(self._books)
        self.waiting = Waiting(self._books, self._matcher)
        self.look_up = self._matcher.look_up

    @property
    def instance(self) -> str:
        """Random id of this run, as in `OpenSessionReply.instance`."""
        return self._instance.hex()

    def open_session(self, message: OpenSession) -> OpenSessionReply:
        """Begin a session; it ends with `close_session`, or when it gives no sign of life for many lease times."""
        with self._books.lock:
            session = self._books.leases.open_session(message.client, message.engine, message.pid, self._clock())
        return OpenSessionReply(
            session=session.id,
            instance=self.instance,
            version=cachetier.__version__,
            chunk_tokens=self.chunk_tokens,
            arena_path=self._arena.path,
            arena_bytes=self._config.host_bytes,
            lease_ttl_s=self._config.lease_ttl_s,
            segments_dir=self._books.disk.segments_dir if self._books.disk else "",
        )

    def close_session(self, session: int) -> None:
        """End a session: its leases are given back, chunks that it was storing are dropped. Unknown: ignored.

        A pool that it offered a part of is gone from the books when this returns.
        """
        with self._books.lock:
            self._books.gpu.end_session(session)
            self._books.direct.end_session(session)
            self._books.engines.end_session(session)
            self.events.end_session(session)
            self._books.promises.end_session(session)
            self._end_dead(self._books.leases.close_session(session))

    def register_namespace(self, message: RegisterNamespace) -> RegisterNamespaceReply:
        """Make a model known; 409 if it is known with other layouts."""
        books = self._books
        with books.lock:
            books.leases.session(message.session, self._clock())
            namespace, is_new = books.namespaces.register(message.identity, message.layouts)
            if is_new and self._flusher is not None:
                self._flusher.remember(namespace)
        return RegisterNamespaceReply(namespace=namespace.id)

    def namespaces(self) -> list[NamespaceInfo]:
        """Describe the known models, the one registered last at the end."""
        with self._books.lock:
            return self._books.namespaces.infos()

    def match(self, message: Match) -> MatchReply:
        """Say how many leading chunks of a prompt are held and lease them; start reading those that are on disk.

        The hit ends before the first chunk that is held nowhere, is still being stored, or finds no room in the arena
        because everything is leased; a match that waits is told of what follows by `waiting`. For an engine that reads
        segment files itself the reply names places in them, which stay as they are until the lease ends. Without
        `lease` the reply names no frames and nothing is touched or counted.
        """
        found = self._matcher.begin(message)
        return found() if callable(found) else found

    def begin_match(self, message: Match) -> MatchReply | Callable[[], MatchReply]:
        """Do as `match` without ever waiting: return a function where the remote store has to be asked.

        The function gives the reply and waits for `remote_deadline_ms` at most. It must be called.
        """
        return self._matcher.begin(message)

    def trim(self, message: Trim) -> Empty:
        """Shorten a lease to read, and count what was cut; 400 for a lease to fill."""
        books = self._books
        with books.lock:
            session = books.leases.session(message.session, self._clock())
            lease = books.leases.get(session, message.lease)
            if lease is not None:
                if lease.shard is not None or message.num_chunks < 0:
                    raise ProtocolError("only a lease to read can be cut, and to no less than 0 chunks")
                self._matcher.trim(lease, message.num_chunks)
        return Empty()

    def release(self, message: Release) -> Empty:
        """End leases and count what they were good for; a lease to fill that is released drops its chunks."""
        books = self._books
        with books.lock:
            session = books.leases.session(message.session, self._clock())
            for use in message.uses:
                lease = books.leases.get(session, use.lease)
                if lease is not None:
                    books.leases.end(lease)
                    books.tokens.hit.host += min(max(use.host_tokens, 0), lease.host_tokens)
                    books.tokens.hit.disk += min(max(use.disk_tokens, 0), lease.disk_tokens)
                    books.tokens.hit.gpu += min(max(use.gpu_tokens, 0), lease.gpu_tokens)
                    books.tokens.hit.remote += min(max(use.remote_tokens, 0), lease.remote_tokens)
                    books.tokens.waited += min(max(use.waited_tokens, 0), lease.waited_tokens)
                    used = use.host_tokens + use.disk_tokens + use.gpu_tokens + use.remote_tokens
                    self._give_back(lease, is_used=used > 0)
        return Empty()

    def renew(self, message: Renew) -> RenewReply:
        """Extend leases; name those that the session does not have (any more)."""
        with self._books.lock:
            now = self._clock()
            session = self._books.leases.session(message.session, now)
            return RenewReply(expired=self._books.leases.renew(session, message.leases, now))

    def reserve(self, message: Reserve) -> ReserveReply:
        """Hand out frames for new chunks of one shard, evicting what must go.

        After the first chunk of the message that is dropped the rest is dropped too: without it they could not be
        found. The same holds when the chunk before the message is held nowhere.
        """
        return self._storer.reserve(message)

    def commit(self, message: Commit) -> CommitReply:
        """Take over filled frames; a chunk becomes visible with the last object of its tiling.

        An expired or unknown lease accepts nothing. 409 for a lease to read.
        """
        return self._storer.commit(message)

    def invalidate(self, message: Invalidate) -> Empty:
        """Drop damaged chunks from every tier; who has leased them keeps the frames until the lease ends."""
        if len(message.keys) % KEY_BYTES or len(message.keys) > MAX_CHUNKS * KEY_BYTES:
            raise ProtocolError(f"keys has {len(message.keys)} bytes; at most {MAX_CHUNKS} keys of {KEY_BYTES} bytes")
        keys = {ChainKey(message.keys[at : at + KEY_BYTES]) for at in range(0, len(message.keys), KEY_BYTES)}
        books, disk, flusher = self._books, self._books.disk, self._flusher
        on_disk = {key for key in keys if disk is not None and disk.lookup(key) is not None}
        with books.lock:
            books.leases.session(message.session, self._clock())
            for key in keys:
                chunk = books.table.chunks.get(key)
                is_held = chunk is not None and chunk.state is not ChunkState.PENDING
                if chunk is not None and is_held:
                    books.table.remove(chunk)
                    if self._remote is not None:
                        self._remote.forget(chunk)
                if flusher is not None and (key in on_disk or is_held) and not flusher.is_forgotten(key):
                    flusher.forget(key)
                    is_held = True
                books.counters.checksum_failures += is_held
        return Empty()

    def report(self, message: Report) -> Empty:
        """Add counters that only the engine knows."""
        with self._books.lock:
            self._books.leases.session(message.session, self._clock())
            self._books.note_report(message)
        return Empty()

    def reads_directly(self, message: ReadsDirectly) -> Empty:
        """Note that a worker reads segment files itself, or does not any more."""
        with self._books.lock:
            session = self._books.leases.session(message.session, self._clock())
            self._books.direct.note(session.engine, message)
        return Empty()

    def offer_pool(self, message: OfferPool) -> Empty:
        """Take a rank's part of its engine's pool; it stays until the session ends or offers another."""
        with self._books.lock:
            session = self._books.leases.session(message.session, self._clock())
            self._books.gpu.offer(session.engine, message)
        return Empty()

    def commit_pool(self, message: CommitPool) -> Empty:
        """Note what a rank has copied into its part of its engine's pool."""
        with self._books.lock:
            self._books.leases.session(message.session, self._clock())
            self._books.gpu.commit(message.session, message.fill, message.frames)
        return Empty()

    def check_pools(self, message: CheckPools) -> CheckPoolsReply:
        """Name the pools that are gone."""
        with self._books.lock:
            self._books.leases.session(message.session, self._clock())
            return CheckPoolsReply(gone=self._books.gpu.gone(message.pools))

    def stats(self) -> Stats:
        """Return a snapshot of all counters and gauges."""
        backlog = self._flusher.backlog_bytes if self._flusher else 0
        with self._books.lock:
            return self._books.snapshot(
                self._arena,
                instance=self.instance,
                uptime_s=self._clock() - self._opened_at,
                flush_backlog_bytes=backlog,
                disk_bytes_per_s=self._promoter.bytes_per_s if self._promoter else 0.0,
                remote_bytes_per_s=self._remote.fetcher.bytes_per_s if self._remote else 0.0,
                is_remote_available=self._remote is not None and self._remote.is_available,
            )

    def expire(self) -> None:
        """End leases whose time is over and sessions that gave no sign of life; call it about once a second."""
        with self._books.lock:
            now = self._clock()
            self._end_dead(self._books.leases.expire(now))
            self._storer.expire(now)
            self._books.gpu.expire(now, self._books.leases.is_open)
            self._books.direct.expire(self._books.leases.is_open)
            self._books.engines.expire(self._books.leases.is_open)
            self._books.promises.expire(now, self._books.leases.is_open)
            self.events.expire(now, self._books.leases.is_open)
            if self._remote is not None:
                self._remote.expire()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Block until everything committed before the call is durable, or was refused by the disk tier.

        Returns False when `timeout_s` passed first.
        """
        return self._flusher is None or self._flusher.flush(timeout_s)

    def check_integrity(self) -> None:
        """Raise AssertionError if the books contradict each other, the arena or the disk tier."""
        with self._books.lock:
            self._books.leases.check_integrity()
            self._books.table.check_integrity()
            self._storer.check_integrity()
            self._books.documents.check_integrity()
            leases = self._books.leases.leases()
            self._books.promises.check_integrity()
            self._books.waits.check_integrity(lease.id for lease in leases)
            uses = [lease.pool_use for lease in leases if lease.pool_use is not None]
            self._books.gpu.check_integrity(self._books.table.with_frames(), uses)
            leased: dict[int, int] = {}
            for lease in leases:
                for chunk in lease.chunks:
                    leased[id(chunk)] = leased.get(id(chunk), 0) + 1
                    assert chunk.pins >= leased[id(chunk)], "a leased chunk is not pinned as often as it is leased"
            num_direct = sum(isinstance(chunk, DirectChunk) for lease in leases for chunk in lease.chunks)
        if self._books.disk is not None:
            assert self._books.disk.num_held == num_direct, "what is held on disk is not what is leased there"
            self._books.disk.check_integrity()

    def close(self, flush_timeout_s: float = 8.0) -> None:
        """Flush for at most `flush_timeout_s`, stop the threads, close the tiers. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self.flush(flush_timeout_s)
        if self._remote is not None:
            self._remote.stop()
        if self._promoter is not None:
            self._promoter.stop()
        if self._flusher is not None:
            self._flusher.stop()
        if self._books.disk is not None:
            self._books.disk.close()
        self._arena.close()
        self.data_dir.close()

    def _end_dead(self, leases: list[Lease]) -> None:
        self._books.counters.leases_expired += len(leases)
        for lease in leases:
            self._give_back(lease)

    def _give_back(self, lease: Lease, *, is_used: bool = True) -> None:
        if lease.shard is None:
            self._matcher.release_read(lease, may_fill=is_used)
        else:
            self._storer.release_fill(lease)
